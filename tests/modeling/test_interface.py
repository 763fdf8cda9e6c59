"""An export behind the interfaces of transformers, accelerate and peft."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache

from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers import stranger
from tests.helpers.commands import TEMPLATE
from tests.helpers.stranger import BLUE, GREEDY, LONG, RED, SHORT, TALL, ask, text
from tests.helpers.tiny import PROPERTY, VOCABULARY, tiny_model
from tests.helpers.tiny_export import FULL_TEMPLATE, MAX_PIXELS, write_tiny_export

QWEN = {
    "system": "You are a helpful assistant.",
    "system_start": "<|im_start|>system\n",
    "system_end": "<|im_end|>\n",
    "user_start": "<|im_start|>user\n",
    "user_end": "<|im_end|>\n",
    "assistant_start": "<|im_start|>assistant\n",
    "assistant_end": "<|im_end|>\n",
    "image_start": "<|vision_start|>",
    "image_end": "<|vision_end|>",
}
TEMPLATES = {"bare": TEMPLATE, "full": FULL_TEMPLATE, "qwen": QWEN}


@functools.cache
def processor(template: str) -> CasaProcessor:
    tokenizer = build_tokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return CasaProcessor(tokenizer, MAX_PIXELS, TEMPLATES[template])


@pytest.fixture(scope="module")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export of a tiny model with a mechanism; written once each."""

    @functools.cache
    def write(mechanism: str) -> Path:
        return write_tiny_export(tmp_path_factory.mktemp("tiny") / mechanism, mechanism)

    return write


@pytest.fixture(scope="module")
def export(export_of: Callable[[str], Path]) -> str:
    return str(export_of("casa"))


@pytest.fixture(scope="module")
def loaded(export: str) -> tuple[Any, Any]:
    model, reader = stranger.load(export)
    return model, reader


# ------------------------------------------------------------------------------- what strangers do


@pytest.mark.parametrize(
    "mechanism",
    ["casa", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cross_attention", "insertion"))],
)
def test_the_contract_holds(
    export_of: Callable[[str], Path], mechanism: str, tmp_path: Path
) -> None:
    stranger.main(str(export_of(mechanism)), str(tmp_path / "saved"))


# --------------------------------------------------------------------------------- chat and text

# Pieces of text that could be taken for places, quotes of places, or jinja.
TRICKY = [
    "<image>",
    r"<\image>",
    r"<\\video>",
    "<video>",
    "image>",
    "<",
    "\\",
    "{{",
    "%}",
    "'",
    '"',
]
WORDS = st.lists(st.sampled_from([*TRICKY, "a", " red", "\n", "Öl 東", "😀"]), max_size=6)
TEXTS = WORDS.map(lambda words: text("".join(words)))
IMAGES = st.sampled_from([RED, BLUE, TALL]).map(lambda i: {"type": "image", "image": i})
VIDEOS = st.lists(st.sampled_from([RED, BLUE]), min_size=1, max_size=3).map(
    lambda frames: {"type": "video", "video": frames}
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns of a user and an assistant, perhaps with a system message; contents of both forms."""
    parts = st.lists(st.one_of(TEXTS, TEXTS, IMAGES, VIDEOS), max_size=4)
    words = st.one_of(WORDS.map("".join), st.lists(TEXTS, max_size=2))
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(st.one_of(parts, WORDS.map("".join)))})
        messages.append({"role": "assistant", "content": draw(words)})
    return messages[: len(messages) - draw(st.integers(0, 1))]


def media(messages: list[dict[str, Any]], kind: str) -> list[Any]:
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    return [part[kind] for part in parts if part["type"] == kind]


@pytest.mark.parametrize("template", TEMPLATES)
@PROPERTY
@given(messages=conversations(), prompt=st.booleans())
def test_rendered_text_reads_as_the_messages(
    template: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    reader = processor(template)
    expected = reader.encode(messages, generation_prompt=prompt)
    options: dict[str, Any] = {"add_generation_prompt": prompt}
    direct = reader.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    rendered = reader.apply_chat_template(messages, **options)
    assert rendered == reader.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    called = reader(
        text=rendered,
        images=media(messages, "image"),
        videos=media(messages, "video"),
        return_tensors="pt",
    )
    stranger.same_batch(direct, called)
    assert direct["input_ids"][0].tolist() == expected.ids
    assert stranger.columns(direct) == [expected.points]
    if any(expected.follows):
        assert direct["image_follows"] == called["image_follows"] == [expected.follows]
    else:
        assert "image_follows" not in direct


def test_a_place_is_a_point_and_a_quoted_word_is_text() -> None:
    reader = processor("bare")
    batch = reader(text=r"a<image>b <\image> c", images=RED)
    expected = [reader.tokenizer.encode(w, add_special_tokens=False) for w in ("a", "b <image> c")]
    assert batch["input_ids"] == [expected[0] + expected[1]]
    assert stranger.columns(batch) == [[len(expected[0])]]


def test_frames_of_a_video_follow_the_first() -> None:
    reader = processor("qwen")
    film = {"type": "video", "video": [RED, BLUE, TALL]}
    messages = [{"role": "user", "content": [*ask("x", RED)[0]["content"][:1], film, film]}]
    encoded = reader.encode(messages)
    assert encoded.follows == [False, False, True, True, False, True, True]
    for point in encoded.points:
        assert encoded.ids[point - 1 : point + 1] == [
            *reader.pre_image_tokens,
            *reader.post_image_tokens,
        ]
    batch = reader.tokenize_messages([messages, ask("no video", RED)])
    assert batch["image_follows"] == [encoded.follows, [False]]
    assert len(batch["pixel_values"]) == 8


def test_a_model_that_reads_all_frames_learns_which_belong_together() -> None:
    reader = processor("full")
    film = {"type": "video", "video": [RED, BLUE]}
    batch = reader.tokenize_messages([{"role": "user", "content": [film, text("Why?")]}])
    batch["input_ids"] %= VOCABULARY
    model = tiny_model("casa", window_scope="all_frames")
    together = model(**batch).logits
    assert batch.pop("image_follows") == [[False, True]]
    assert (model(**batch).logits - together).abs().max() > 1e-3


def test_a_system_message_replaces_the_default_one() -> None:
    reader = processor("qwen")
    render = functools.partial(reader.apply_chat_template, add_generation_prompt=True)
    question = {"role": "user", "content": "Hi"}
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert render([question]) == default + asked
    given_one = [{"role": "system", "content": "Rhyme."}, question]
    assert render(given_one) == "<|im_start|>system\nRhyme.<|im_end|>\n" + asked


def test_a_template_of_the_callers_own_is_rendered() -> None:
    reader = processor("bare")
    jinja = "{% for m in messages %}<|user|>{% for p in m.content %}{% if p.type == 'image' %}"
    jinja += "<image>{% else %}{{ p.text }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    messages = ask("Why?", RED)
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = reader.apply_chat_template(messages, chat_template=jinja, **options)
    stranger.same_batch(
        batch, reader(text="<|user|><image>Why?<|end|>", images=RED, return_tensors="pt")
    )


def test_the_assistants_last_message_can_go_on() -> None:
    reader = processor("full")
    messages = [*ask("Why?", RED), {"role": "assistant", "content": [text("Because")]}]
    options: dict[str, Any] = {"continue_final_message": True}
    batch = reader.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    ends = reader.tokenizer.encode("Because", add_special_tokens=False)
    assert batch["input_ids"][0, -len(ends) :].tolist() == ends
    rendered = reader.apply_chat_template(messages, **options)
    stranger.same_batch(batch, reader(text=rendered, images=RED, return_tensors="pt"))
    with pytest.raises(ValueError, match="needs a last message of the assistant"):
        reader.encode(SHORT, continue_final=True)


def test_padding_and_masks() -> None:
    reader = processor("full")
    answered = [*SHORT, {"role": "assistant", "content": "red"}]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True}
    ragged = reader.apply_chat_template([answered, LONG], **options)
    assert len(ragged["input_ids"][0]) != len(ragged["input_ids"][1])
    marked = reader.apply_chat_template(answered, return_assistant_tokens_mask=True, **options)
    assert marked["assistant_masks"] == [[int(a) for a in reader.encode(answered).answer]]
    wide = reader(text="a", padding="max_length", max_length=9, return_tensors="pt")
    assert wide["attention_mask"].tolist() == [[1] + [0] * 8]
    with pytest.raises(ValueError, match="tensors need padding=True"):
        reader(text=["a", "a red"], padding=False, return_tensors="pt")
    with pytest.raises(ValueError, match="padding='sideways'"):
        reader(text="a", padding="sideways")


# ---------------------------------------------------------------------------------------- images


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server of the test's folder, on this machine."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_images_from_the_web(server: str, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), "navy").save(tmp_path / "x.png")
    load = processor("bare").image_processor.load
    assert torch.equal(load(f"{server}/x.png"), load(tmp_path / "x.png"))
    with pytest.raises(ValueError, match=r"image http://.*/none.png cannot be read: .*404"):
        load(f"{server}/none.png")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p(text="a <image>", images=[RED, RED]), r"1 places for images .* given are 2"),
        (
            lambda p: p(text=["<image>", "a"], images=[[], [RED]]),
            r"\[1, 0\] places for images .* given are \[0, 1\]",
        ),
        (lambda p: p(text="<video>"), "1 places for videos"),
        (lambda p: p(images=RED), "the processor needs text"),
        (lambda p: p(text="a", return_tensors="np"), r"does not take .*'np'"),
        (lambda p: p.tokenize_messages([]), "no conversation was given"),
        (
            lambda p: p.encode(
                [{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}]
            ),
            "a video is str; expected a list of frames",
        ),
    ],
)
def test_bad_calls_are_named(call: Callable[[CasaProcessor], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(processor("bare"))


# ------------------------------------------------------------------------- accelerate and peft


@pytest.mark.parametrize("memory", [None, 450_000, 600_000])
def test_device_map_auto_answers_the_same(
    loaded: tuple[Any, Any], export: str, memory: int | None, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    plain, reader = loaded
    batch = reader.tokenize_messages([SHORT, LONG])
    if memory == 450_000 and Version(transformers.__version__) < Version("5.17"):
        pytest.skip(
            "so little puts the whole model on the disk, and this release gives it no hooks"
        )
    # With little memory a part is offloaded to the disk: accelerate's hooks bring it back in time.
    little: dict[str, Any] = {"max_memory": {"cpu": memory}, "offload_folder": str(tmp_path)}
    model = AutoModelForImageTextToText.from_pretrained(
        export, trust_remote_code=True, device_map="auto", **(little if memory else {})
    )
    if memory:
        places = model.hf_device_map
        assert "disk" in places.values()
        # No layer is cut through, and neither is the tower.
        depth = {name: name.count(".") for name in places}
        assert all(
            n <= 2 if name.startswith("model.layers") else n < 2 for name, n in depth.items()
        )
    assert torch.equal(model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("casa", {"update_image_tokens": "ffn_and_attention", "history": "all"}),
        ("casa", {"share_parameters": True, "init": "from_self_attention"}),
        ("insertion", {}),
        ("gated_cross_attention", {}),
        ("hyper_attention", {}),
    ],
)
@torch.no_grad()
def test_layers_may_live_on_several_devices(mechanism: str, options: dict[str, Any]) -> None:
    """The meta device stands for a second GPU: an operation that mixes devices fails on it, too."""
    model = tiny_model(mechanism, **options)
    model.model.layers[1:].to("meta")
    model.model.norm.to("meta")
    model.lm_head.to("meta")
    for module in (*model.model.layers[1:], model.model.norm, model.lm_head):  # as accelerate does
        module.register_forward_pre_hook(
            lambda _, inputs: tuple(x.to("meta") if isinstance(x, Tensor) else x for x in inputs)
        )
    cache = DynamicCache()
    reader = processor("bare")
    batch = reader.tokenize_messages([SHORT, LONG])
    ids = batch.pop("input_ids") % VOCABULARY
    out = model(input_ids=ids, past_key_values=cache, **batch).logits
    assert out.is_meta and out.shape == (*ids.shape, VOCABULARY)
    step = model(input_ids=ids[:, :1], past_key_values=cache).logits
    assert step.is_meta and step.shape == (2, 1, VOCABULARY)


@pytest.mark.gpu
def test_flash_attention_2_answers_as_sdpa(export: str) -> None:
    pytest.importorskip("flash_attn")
    answers = []
    for name in ("flash_attention_2", "sdpa"):
        model = AutoModelForImageTextToText.from_pretrained(
            export, trust_remote_code=True, dtype=torch.bfloat16, attn_implementation=name
        ).cuda()
        _, reader = stranger.load(export)
        batch = reader.tokenize_messages(SHORT).to("cuda")
        answers.append(model(**batch).logits.float())
    assert (answers[0] - answers[1]).abs().max() < 0.1


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed"
)
def test_flash_attention_2_without_the_package_says_so(export: str) -> None:
    with pytest.raises(ImportError, match="(?i)flash.?att"):
        AutoModelForImageTextToText.from_pretrained(
            export, trust_remote_code=True, attn_implementation="flash_attention_2"
        )


def test_lora_trains_saves_loads_and_merges(
    export: str, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    _, reader = loaded
    base, _ = stranger.load(export)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("self_attn.q_proj", "self_attn.v_proj", "fusion.q_proj", "fusion.v_proj"):
        assert any(part in name for name in adapted), part
    batch = reader.tokenize_messages([SHORT, LONG])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    start = model(**batch).logits.detach()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        # The first step moves the B matrices, which start at zero; from then on A moves, too.
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    model.eval()
    with torch.no_grad():
        trained = model(**batch).logits
        assert (trained - start).abs().max() > 1e-3
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(stranger.load(export)[0], tmp_path / "adapter")
        assert torch.equal(again(**batch).logits, trained)
        answers = again.generate(**batch, **GREEDY)
        merged = again.merge_and_unload()
        assert (merged(**batch).logits - trained).abs().max() < 1e-4
        merged.save_pretrained(tmp_path / "merged")
        reader.save_pretrained(tmp_path / "merged")
        whole, _ = stranger.load(str(tmp_path / "merged"))
        assert (whole(**batch).logits - trained).abs().max() < 1e-4
    assert torch.equal(whole.generate(**batch, **GREEDY), answers)
