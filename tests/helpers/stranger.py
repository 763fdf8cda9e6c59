"""An export in the hands of someone who has transformers (4.51.3 or newer) and not this project.

    python tests/helpers/stranger.py EXPORT [SAVE_TO]

Needs torch, transformers, einops, pillow and numpy only. Calls what clients of the published CASA
models call, and the ordinary interface of a Hugging Face VLM; SAVE_TO is where `save_pretrained`
writes, to be tried again with another version of transformers. A parameter is given another value
than the export and the library have by themselves, and what it does is looked at: one that is
dropped in silence fails here.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
DTYPE = {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": "float32"}


def picture(colour, width=100, height=60):
    image = Image.new("RGB", (width, height), "ivory")
    ImageDraw.Draw(image).ellipse((4, 9, width // 2, height - 4), fill=colour)
    return image


def use_to_sample(model):
    """Makes sampling the model's habit, so that greedy decoding has to be asked for."""
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=0)


RED, BLUE, TALL = picture("red"), picture("blue"), picture("green", 40, 90)


def text(words):
    return {"type": "text", "text": words}


def ask(words, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, text(words)]}]


SHORT = ask("What colour is the circle?", RED)
LONG = [  # several images in a turn, text between them, several turns
    {"role": "system", "content": [text("Be brief.")]},
    *ask("How many shapes are there in these pictures?", RED, TALL),
    {"role": "assistant", "content": [text("one")]},
    {
        "role": "user",
        "content": [text("And "), {"type": "image", "image": BLUE}, text(" which colour?")],
    },
]


def load(path):
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, **DTYPE)
    return model.eval(), AutoProcessor.from_pretrained(path, trust_remote_code=True)


def chat(processor, messages, **options):
    options = {"add_generation_prompt": True, "return_tensors": "pt", **options}
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def columns(batch):
    """The insertion points as numbers; a batch holds an integer tensor for each sample."""
    points = batch["image_embeds_insertion_points"]
    assert isinstance(points, list) and all(p.dtype == torch.int64 and p.ndim == 1 for p in points)
    return [p.tolist() for p in points]


def same_batch(a, b):
    assert set(a) == set(b), (set(a), set(b))
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(a[name], b[name]), (name, a[name], b[name])
    assert columns(a) == columns(b)
    assert len(a["pixel_values"]) == len(b["pixel_values"])
    pairs = zip(a["pixel_values"], b["pixel_values"], strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def check_auto_classes(path):
    for cls in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        for implementation in ("eager", "sdpa"):
            model = cls.from_pretrained(
                path,
                trust_remote_code=True,
                torch_dtype=torch.float32,
                attn_implementation=implementation,
            )
            assert type(model).__name__ == "CasaForConditionalGeneration"
            assert next(model.parameters()).dtype == torch.float32
            assert model.config._attn_implementation == implementation
    multimodal = getattr(transformers, "AutoModelForMultimodalLM", None)
    if multimodal is not None:
        assert type(multimodal.from_pretrained(path, trust_remote_code=True)) is type(model)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        half = AutoModel.from_pretrained(path, trust_remote_code=True, torch_dtype=name)
        assert next(half.parameters()).dtype == dtype
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    batch = processor.tokenize_messages(SHORT).to(torch.float16)
    assert half.generate_from_image(**batch, max_new_tokens=2).shape[0] == 1


PHOTO, DOT = picture("red", 300, 200), picture("blue", 20, 20)
JINJA = "{% for m in messages %}{{ m['role'] }}!{% endfor %}"


def check_processor_options(path, folder):
    """What `AutoProcessor.from_pretrained` is given acts, or is refused by its name."""

    def read(**options):
        return AutoProcessor.from_pretrained(path, trust_remote_code=True, **options)

    def sizes(processor):
        """(H, W) of a photo and of a dot, by all ways to the pixels."""
        batch = chat(processor, ask("?", PHOTO, DOT))
        direct = [processor.image_processor.process_images(image) for image in (PHOTO, DOT)]
        assert all(map(torch.equal, batch["pixel_values"], direct))
        return [tuple(pixels.shape[1:]) for pixels in direct]

    own = read()
    photo, dot = sizes(own)
    capped = dot if dot[0] * dot[1] <= 3500 else (56, 56)  # the export's own min_pixels may be more
    for options, large, small in (
        ({"image_size": 112}, (84, 112), dot),
        ({"max_pixels": 3500}, (28, 56), capped),
        ({"min_pixels": 7000}, photo, (84, 84)),
        ({"max_pixels": 9500, "min_pixels": 7000}, (56, 112), (84, 84)),
        ({"image_size": 28}, (28, 28), (28, 28)),  # goes before the export's own min_pixels
    ):
        processor = read(**options)
        assert sizes(processor) == [large, small], (options, sizes(processor))
        assert [large, small] != [photo, dot]
        processor.save_pretrained(folder / "bounds")
        again = AutoProcessor.from_pretrained(folder / "bounds", trust_remote_code=True)
        assert sizes(again) == [large, small], options
    processor = read()
    processor.image_processor.max_pixels = 3500  # as users of Qwen's processors do
    assert sizes(processor)[0] == (28, 56) and processor.max_pixels == 3500
    processor.save_pretrained(folder / "bounds")
    assert (
        AutoProcessor.from_pretrained(folder / "bounds", trust_remote_code=True).max_pixels == 3500
    )

    other = "right" if own.tokenizer.padding_side == "left" else "left"
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, padding_side=other)
    for options in ({"padding_side": other}, {"tokenizer": tokenizer}):
        processor = read(**options)
        assert processor.tokenizer.padding_side == other
        short = processor.tokenize_messages([SHORT, LONG])["attention_mask"][0]
        assert short[-1] == (other == "left") and short[0] == (other == "right")
    assert processor.tokenizer is tokenizer
    pad = own.tokenizer.convert_ids_to_tokens(5)
    assert own.tokenizer.pad_token != pad
    processor = read(pad_token=pad, truncation_side="left", model_max_length=77)
    batch = processor.tokenize_messages([SHORT, LONG])
    assert (batch["input_ids"][0][batch["attention_mask"][0] == 0] == 5).all()
    assert own.tokenizer.truncation_side != processor.tokenizer.truncation_side == "left"
    assert own.tokenizer.model_max_length != processor.tokenizer.model_max_length == 77

    rendered = own.apply_chat_template(SHORT)
    processor = read(chat_template=JINJA)
    assert processor.apply_chat_template(SHORT) == "user!" != rendered
    assert processor.tokenizer.chat_template == JINJA
    template = {**own.template, "user_start": "Q:", "user_end": "!"}
    processor = read(template=template)
    changed = processor.apply_chat_template(SHORT)
    assert changed != rendered and "Q:<image>" in changed.replace(template["image_start"], "")
    same_batch(
        processor(text=changed, images=RED, return_tensors="pt"),
        chat(processor, SHORT, add_generation_prompt=False),
    )

    processor, unused = read(image_size=112, return_unused_kwargs=True)
    assert processor.max_pixels == 112 * 112 and unused == {}
    # Pipelines hand on what is their model's.
    read(torch_dtype=torch.float16, device_map="cpu").save_pretrained(folder / "bounds")
    for options, words in (
        ({"imagesize": 448}, "imagesize=448 (did you mean image_size?)"),
        ({"size": {"longest_edge": 448}}, "size={'longest_edge': 448}"),
        ({"do_resize": False, "image_mean": [0.5]}, "do_resize=False, image_mean=[0.5]"),
        ({"image_size": 112, "max_pixels": 3500}, "image_size=112 and max_pixels=3500 both"),
        ({"image_size": "112"}, "image_size is '112'"),
        ({"image_size": 27}, "image_size is 27"),
        ({"max_pixels": 7000, "min_pixels": 7001}, "min_pixels is 7001"),
        ({"use_fast": False}, "use_fast=False"),
    ):
        refused(words, read, **options)


def refused(words, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except ValueError as error:
        assert words in str(error), f"expected {words!r} in {error!r}"
    else:
        raise AssertionError(f"no error with the words {words!r}")


def check_generation(model, processor):
    """One conversation, then the same in a left-padded batch: the answers must not change."""
    assert isinstance(processor.asst_start_tokens, list)
    assert processor._image_processor is processor.image_processor
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    one = processor.tokenize_messages(SHORT).to("cpu")
    names = {"input_ids", "attention_mask", "image_embeds_insertion_points", "pixel_values"}
    assert set(one) == names
    assert one["pixel_values"][0].dtype == torch.uint8 and one["pixel_values"][0].shape[0] == 3
    width = one["input_ids"].shape[1]
    alone = model.generate_from_image(**one, **GREEDY)
    assert alone.shape == (1, width + 6) and torch.equal(alone[:, :width], one["input_ids"])
    assert torch.equal(model.generate(**one, **GREEDY), alone)
    # Each of the options of GREEDY acts: without it the answer is another one.
    assert model.generate(**one, **{**GREEDY, "max_new_tokens": 7}).shape[1] == width + 7
    end = {"eos_token_id": int(alone[0, width])}
    assert model.generate(**one, **{**GREEDY, "min_new_tokens": 0}, **end).shape[1] == width + 1
    assert model.generate(**one, **{**GREEDY, "min_new_tokens": 4}, **end).shape[1] >= width + 4
    torch.manual_seed(0)
    assert not torch.equal(model.generate(**one, **{**GREEDY, "do_sample": True}), alone)
    assert processor.tokenizer.padding_side == "left"
    both = processor.tokenize_messages([SHORT, LONG])
    assert (both["attention_mask"][0] == 0).any() and both["attention_mask"][0, -1] == 1
    assert torch.equal(model.generate_from_image(**both, **GREEDY)[0, -6:], alone[0, -6:])
    second = processor.tokenize_messages(LONG)
    second = model.generate(**second, **GREEDY)[0, -6:]
    assert torch.equal(model.generate(**both, **GREEDY)[1, -6:], second)
    sampling = {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "max_new_tokens": 5}
    sampling["min_new_tokens"] = 5
    draws = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        draws.append(model.generate(**both, **sampling).tolist())
    assert draws[0] == draws[1] and any(draw != draws[0] for draw in draws)
    nearly = model.generate(**one, **{**sampling, "temperature": 1e-4})  # the likeliest token
    assert torch.equal(nearly, alone[:, :-1])
    nearly = model.generate(**one, **{**sampling, "top_p": 1e-4})
    assert torch.equal(nearly, alone[:, :-1])
    return one, alone


def check_empty_slot(model, processor, one, alone):
    """A slot without an image: the caller passes the pixels itself."""
    empty = processor.tokenize_messages(ask("What colour is the circle?", None))
    assert empty["pixel_values"] == []
    pixels = processor.image_processor.process_images(RED)
    frames = processor.image_processor.process_images(pixels[None].repeat(2, 1, 1, 1), img_size=56)
    assert pixels.shape[-2:] == (56, 112) and frames.shape == (2, 3, 28, 56)
    assert torch.equal(pixels, one["pixel_values"][0])
    empty["pixel_values"] = pixels[None]
    assert torch.equal(model.generate_from_image(**empty, **GREEDY), alone)
    # Without insertion points, the image stands behind the text, between these tokens.
    before, after = [5, 6], [7]
    assert (before, after) != (processor.pre_image_tokens, processor.post_image_tokens)
    words = processor.tokenize_messages(ask("What now?"))
    given = {"input_ids": words["input_ids"], "pixel_values": [pixels]}
    given["image_embeds_insertion_points"] = None
    around = {"pre_image_tokens": before, "post_image_tokens": after}
    out = model.generate_from_image(**given, **around, **GREEDY)
    given["input_ids"] = torch.cat([words["input_ids"], torch.tensor([[*before, *after]])], 1)
    given["image_embeds_insertion_points"] = [[words["input_ids"].shape[1] + len(before)]]
    expected = model.generate(**given, **GREEDY)
    assert torch.equal(out[:, -6:], expected[:, -6:])


@torch.no_grad()
def check_streams(model, processor, one, alone):
    """A stream goes on: only text enters the cache (images, too, where they are inserted)."""
    cache = DynamicCache()
    model(**one, past_key_values=cache)
    held = cache.get_seq_length()
    added = held - one["input_ids"].shape[1]  # an image's tokens in the cache
    assert (added > 0) == model.mechanism.inserts
    pixels = one["pixel_values"]
    points = one["image_embeds_insertion_points"]
    more = processor.tokenize_messages(ask("And now?", BLUE), suppress_bos_token=True)
    fresh = more["input_ids"]  # BLUE is as large as RED

    cache = DynamicCache()
    assert torch.equal(model.generate_from_image(**one, past_key_values=cache, **GREEDY), alone)
    assert cache.get_seq_length() == held + 5  # the last new id has not entered yet
    out = model.generate_from_image(**more, past_key_values=cache, reset_streaming=False, **GREEDY)
    assert torch.equal(out[:, : fresh.shape[1]], fresh)
    assert cache.get_seq_length() == held + 6 + fresh.shape[1] + added + 5

    def whole(earlier):
        """The answer to `more` after these ids, without any cache."""
        start = earlier.shape[1] + more["image_embeds_insertion_points"][0][0]
        return model.generate(
            input_ids=torch.cat([earlier, fresh], 1),
            pixel_values=[*pixels, *more["pixel_values"]],
            image_embeds_insertion_points=[[*points[0], start]],
            use_cache=False,
            **GREEDY,
        )[:, earlier.shape[1] :]

    assert torch.equal(out, whole(alone))

    # Clients forward a token themselves before the next turn: the last generated one, which the
    # cache does not hold yet, or one more (an end token); the mask covers it alone or everything.
    end = torch.tensor([[processor.tokenizer.eos_token_id]])
    for own, said in ((alone[:, -1:], alone), (end, torch.cat([alone, end], 1))):
        for mask in (torch.ones(1, 1), torch.ones(1, said.shape[1])):
            cache = DynamicCache()
            model.generate_from_image(**one, past_key_values=cache, **GREEDY)
            given = model(input_ids=own, past_key_values=cache, attention_mask=mask).logits
            full = model(
                input_ids=said, pixel_values=pixels, image_embeds_insertion_points=points
            ).logits
            assert given.shape[1] == 1 and (given[:, -1] - full[:, -1]).abs().max() < 1e-4
            assert cache.get_seq_length() == held + said.shape[1] - one["input_ids"].shape[1]
            out = model.generate_from_image(
                **more, past_key_values=cache, reset_streaming=False, **GREEDY
            )
            assert torch.equal(out, whole(said))

    # The same with plain forward calls and the keywords of older clients.
    cache = DynamicCache()
    old = {"reinit_casa_handler": True, "__is_first_gen_call__": True}
    logits = model(**one, past_key_values=cache, **old).logits
    token = logits[:, -1:].argmax(-1)
    step = model(input_ids=token, past_key_values=cache, attention_mask=torch.ones(1, 1)).logits
    full = model(
        input_ids=torch.cat([one["input_ids"], token], 1),
        pixel_values=pixels,
        image_embeds_insertion_points=points,
    ).logits
    assert (step[:, -1] - full[:, -1]).abs().max() < 1e-4
    model.start_ca_streaming_states()
    model.reset_ca_streaming_states()
    model.reset_casa_streaming_states()


def check_chat(model, processor, folder):
    """`apply_chat_template`, the processor's call and the ways to name an image agree."""
    for messages in (SHORT, LONG, [SHORT, LONG]):
        expected = processor.tokenize_messages(messages)
        batch = chat(processor, messages)
        same_batch(batch, expected)
        rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [[RED], [RED, TALL, BLUE]]
        images = {id(SHORT): RED, id(LONG): images[1]}.get(id(messages), images)
        called = processor(text=rendered, images=images, return_tensors="pt")
        same_batch(called, expected)
        for arguments in ((images, rendered), (rendered, images)):  # clients of both orders exist
            same_batch(processor(*arguments, return_tensors="pt"), expected)
        wide = expected["input_ids"].shape[1] + 3
        rows = processor(text=rendered, images=images, padding="max_length", max_length=wide)
        assert {len(row) for row in rows["input_ids"]} == {wide}
        answer = model.generate(**batch, **GREEDY)
        words = processor.batch_decode(answer, skip_special_tokens=True)
        assert len(words) == len(answer) and "<image>" not in words[0]
        whole = [processor.decode(row, skip_special_tokens=False) for row in answer]
        assert all(len(a) < len(b) for a, b in zip(words, whole, strict=True))
    ids = processor.apply_chat_template(SHORT, tokenize=True, add_generation_prompt=True)
    assert ids == processor.tokenize_messages(SHORT)["input_ids"][0].tolist()
    RED.save(folder / "red.png")
    coded = base64.b64encode((folder / "red.png").read_bytes()).decode()
    expected = chat(processor, SHORT)
    for where in (
        {"image": np.asarray(RED)},
        {"image": np.asarray(RED).astype("float32") / 255},
        {"image": torch.from_numpy(np.array(RED)).permute(2, 0, 1)},
        {"image": {"bytes": (folder / "red.png").read_bytes(), "path": None}},
        {"bytes": (folder / "red.png").read_bytes()},
        {"image": coded},
        {"url": (folder / "red.png").as_uri()},
        {"image": str(folder / "red.png")},
        {"path": str(folder / "red.png")},
        {"url": (folder / "red.png").as_posix()},
        {"base64": coded},
        {"url": f"data:image/png;base64,{coded}"},
    ):
        same_batch(chat(processor, ask_with(where)), expected)
    linked = {"type": "image_url", "image_url": {"url": str(folder / "red.png")}}
    linked = [{"role": "user", "content": [linked, SHORT[0]["content"][1]]}]
    same_batch(chat(processor, linked), expected)
    # A video is a list of frames.
    film = [{"role": "user", "content": [{"type": "video", "video": [RED, BLUE, RED]}, text("?")]}]
    alone = chat(processor, film)
    assert alone["image_follows"] == [[False, True, True]]
    batch = chat(processor, [film, LONG])
    assert torch.equal(
        model.generate(**batch, **GREEDY)[0, -6:], model.generate(**alone, **GREEDY)[0, -6:]
    )
    # What a user writes is never taken for an image.
    tricky = ask(r"Is <image> or <\image> a tag?", RED)
    same_batch(chat(processor, tricky), processor.tokenize_messages(tricky))
    rendered = processor.apply_chat_template(tricky, add_generation_prompt=True)
    called = processor(text=rendered, images=[RED], return_tensors="pt")
    same_batch(called, processor.tokenize_messages(tricky))


def ask_with(where):
    return [{"role": "user", "content": [{"type": "image", **where}, SHORT[0]["content"][1]]}]


def check_pipeline(path, model, processor):
    pipe = pipeline(
        "image-text-to-text", model=path, trust_remote_code=True, torch_dtype=torch.float32
    )
    use_to_sample(pipe.model)
    for messages in (SHORT, LONG):
        (record,) = in_list(pipe(text=messages, generate_kwargs=dict(GREEDY)))
        answer = record["generated_text"][-1]
        assert answer["role"] == "assistant"
        expected = model.generate(**processor.tokenize_messages(messages), **GREEDY)[:, -6:]
        words = processor.batch_decode(expected, skip_special_tokens=True)[0]
        assert answer["content"] == words, (answer, words)
    (record,) = in_list(pipe(text=SHORT, generate_kwargs=dict(GREEDY), return_full_text=False))
    rendered = processor.apply_chat_template(SHORT, add_generation_prompt=True)
    (plain,) = in_list(
        pipe(images=RED, text=rendered, generate_kwargs=dict(GREEDY), return_full_text=False)
    )
    assert plain["generated_text"] == record["generated_text"]
    records = pipe(text=[SHORT, LONG], generate_kwargs=dict(GREEDY), return_full_text=False)
    assert in_list(records[0])[0]["generated_text"] == plain["generated_text"]
    try:
        pipe(text=[SHORT, LONG], generate_kwargs=dict(GREEDY), batch_size=2)
    except ValueError as error:
        assert "batch_size > 1" in str(error)
    else:
        raise AssertionError("a pipeline with batch_size=2 moved no insertion points")
    open_answer = [*SHORT, {"role": "assistant", "content": [text("The circle is")]}]
    (record,) = in_list(pipe(text=open_answer, generate_kwargs=dict(GREEDY)))
    assert record["generated_text"][-1]["content"][-1]["text"].startswith("The circle is")


def in_list(result):
    return result if isinstance(result, list) else [result]


def check_saving(path, model, processor, saved):
    """What `save_pretrained` writes loads again and computes the same."""
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    again, reader = load(saved)
    with torch.no_grad():
        batch = chat(reader, SHORT)
        same_batch(batch, chat(processor, SHORT))
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
    assert tokenizer.chat_template == processor.chat_template
    assert reader.chat_template == processor.chat_template
    code = {file.name for file in Path(path).glob("*.py")}
    assert code == {file.name for file in Path(saved).glob("*.py")}


def check_bad_input(model, processor):
    """One clear message each."""
    one = processor.tokenize_messages(SHORT)
    width = one["input_ids"].shape[1]
    red = one["pixel_values"][0]
    two = {**one, "pixel_values": [red, red]}

    def at(batch, *points):
        return {**batch, "image_embeds_insertion_points": [list(points)]}

    for words, call in (
        ("lie outside 0..", lambda: model(**at(one, width + 1))),
        ("lie outside 0..", lambda: model(**at(one, -1))),
        ("not sorted", lambda: model(**at(two, 3, 2))),
        ("1 insertion points but 0 images", lambda: model(**{**one, "pixel_values": []})),
        ("1 insertion points but 2 images", lambda: model(**two)),
        ("/nowhere.png cannot be read", lambda: chat(processor, ask("Why?", "/nowhere.png"))),
        ("holds 1 places for images", lambda: processor(text="<image> a", return_tensors="pt")),
        ("holds 0 places for images", lambda: processor(text="a", images=RED)),
        ("does not take {'truncation': True}", lambda: processor(text="a", truncation=True)),
    ):
        refused(words, call)


def main(path, saved=None):
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    model, processor = load(path)
    use_to_sample(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_auto_classes(path)
        check_processor_options(path, folder)
        one, alone = check_generation(model, processor)
        check_empty_slot(model, processor, one, alone)
        check_streams(model, processor, one, alone)
        check_chat(model, processor, folder)
        check_pipeline(path, model, processor)
        check_saving(path, model, processor, saved or str(folder / "saved"))
        check_bad_input(model, processor)
    print("STRANGER DONE")


if __name__ == "__main__":
    main(*sys.argv[1:3])
