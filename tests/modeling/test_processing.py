"""The processor and the image code: sizes, modes, refusals, templates, batches."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from casa_train.data.tokens import load_tokenizer, save_tokenizer
from casa_train.modeling.image_processing_casa import CasaImageProcessor, ImageError, target_size
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import TEMPLATE
from tests.helpers.stranger import columns

try:  # where there is this module, the other one needs torchvision
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
except ModuleNotFoundError:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(build_tokenizer(), path)
    return str(path)


def processor(path: str, **template: str) -> CasaProcessor:
    return CasaProcessor(load_tokenizer(path), 7056, {**TEMPLATE, **template})


def ask(*parts: object) -> dict[str, object]:
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
        for p in parts
    ]
    return {"role": "user", "content": content}


def part(**keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": [keys]}


# ------------------------------------------------------------------------------------- images


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([784, 7056, 952 * 952]))
def test_sizes_are_on_the_grid_and_within_the_budget(width: int, height: int, budget: int) -> None:
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ImageError, match="aspect ratio over 200"):
            target_size(width, height, budget)
        return
    h, w = target_size(width, height, budget)
    assert h % 28 == w % 28 == 0 and h >= 28 and w >= 28
    assert h * w <= budget
    # The aspect is kept as far as whole image tokens allow.
    if min(h, w) > 28 * 4:
        assert abs(w / h * height / width - 1) < 0.3


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([1, 784, 3136, 5000, 50176, 200704]),
    st.sampled_from([784, 7056, 12_000, 200_704, 952 * 952]),
)
def test_sizes_are_those_of_qwens_own_processor(w: int, h: int, least: int, most: int) -> None:
    """transformers' function is the oracle, wherever it keeps to its own bounds."""
    old = transformers.__version__.startswith("4.")
    assume(max(w, h) <= 200 * min(w, h) and least <= most)
    assume(not old or min(w, h) >= 28)  # 4.51 refuses the others
    size = target_size(w, h, most, least)
    theirs = smart_resize(h, w, 28, least, most)
    if 0 < theirs[0] * theirs[1] <= most:
        assert size == theirs
    else:  # theirs forgets the upper bound where it enlarges, and for very long images
        assert 784 <= size[0] * size[1] <= most
        assert size == target_size(w, h, most, 0) or size[0] * size[1] > most / 4


def test_small_images_are_enlarged_to_the_bound_and_no_further() -> None:
    for least, size in ((0, (28, 28)), (784, (28, 28)), (785, (56, 56)), (3136, (56, 56))):
        assert target_size(20, 20, 952**2, least) == size
    assert target_size(64, 64, 952**2, 3136) == (56, 56)
    assert target_size(64, 64, 952**2, 3137) == (84, 84)
    assert target_size(30, 50, 952**2, 3136) == (84, 56)
    assert target_size(20, 20, 784, 3136) == (28, 28)  # the upper bound goes first
    images = CasaImageProcessor(140 * 140, 84 * 84)
    assert images.token_count(30, 30) == 9
    assert images.load(Image.new("RGB", (30, 30))).shape == (3, 84, 84)
    assert images.process_images(Image.new("RGB", (30, 30)), img_size=56).shape == (3, 56, 56)
    frames = torch.zeros(2, 3, 10, 20, dtype=torch.uint8)
    assert images.process_images(frames).shape == (2, 3, 84, 140)


def test_known_sizes() -> None:
    assert target_size(952, 952) == (952, 952)
    assert target_size(896, 896) == (896, 896)
    assert target_size(4000, 4000) == (952, 952)
    assert target_size(100, 60) == (56, 112)
    assert target_size(5, 5) == (28, 28)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_transparency_stands_on_white_and_grey_keeps_its_range() -> None:
    load = CasaImageProcessor().load
    clear = Image.new("RGBA", (28, 28), (255, 0, 0, 0))
    assert (load(encoded(clear)) == 255).all()
    palette = Image.new("P", (28, 28), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert load(encoded(palette))[:, 0, 0].tolist() == [10, 20, 30]
    deep = Image.fromarray(np.full((28, 28), 40000, np.uint16))
    assert load(encoded(deep))[:, 0, 0].tolist() == [40000 >> 8] * 3
    cmyk = Image.new("CMYK", (28, 28), (0, 255, 255, 0))
    red = load(encoded(cmyk, "JPEG", quality=95))[:, 0, 0].tolist()
    assert red[0] > 180 and max(red[1:]) < 80
    frames = [Image.new("RGB", (28, 28), c) for c in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load(gif)[:, 0, 0].tolist() == [255, 0, 0]


def test_every_source_of_an_image_gives_the_same_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    (tmp_path / "x.png").write_bytes(encoded(image))
    images = CasaImageProcessor()
    expected = images.load(image)
    assert expected.dtype == torch.uint8 and expected.shape == (3, 56, 84)
    as_tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), encoded(image), as_tensor):
        assert torch.equal(images.load(source), expected)
    frames = images.process_images(as_tensor[None].repeat(3, 1, 1, 1))
    assert frames.shape == (3, 3, 56, 84) and torch.equal(frames[1], expected)
    assert images.process_images(image, img_size=28).shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "unreadable_image"),
        (b"not an image", "unreadable_image"),
        (encoded(Image.new("RGB", (90, 90), "red"))[:80], "unreadable_image"),
        (encoded(Image.new("RGB", (1, 1000))), "extreme_aspect"),
        ("/nowhere.png", "unreadable_image"),
        (42, "unreadable_image"),
    ],
)
def test_unusable_images_have_a_reason(bad: object, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        CasaImageProcessor().load(bad)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"max_pixels": 100}, "max_pixels is 100; one image token needs 784"),
        ({"max_pixels": "7056"}, "max_pixels is '7056'; expected a whole number of pixels"),
        ({"max_pixels": 7056.5}, "max_pixels is 7056.5; expected a whole number"),
        (
            {"min_pixels": -1},
            "min_pixels is -1; expected 0 .enlarge nothing. to max_pixels, 906304",
        ),
        ({"min_pixels": 7057, "max_pixels": 7056}, "min_pixels is 7057; .* to max_pixels, 7056"),
    ],
)
def test_bounds_that_no_image_can_meet_are_refused(bounds: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CasaImageProcessor(**bounds)


# ------------------------------------------------------------------------------------- template


def test_images_leave_points_and_answers_are_marked(tokenizer_path: str) -> None:
    p = processor(tokenizer_path, image_start="<|user|>", image_end="<|end|>")
    answer = {"role": "assistant", "content": "red"}
    e = p.encode([ask("a", b"IMAGE", "b"), answer])
    assert [e.ids[i] for i in range(len(e.ids)) if e.answer[i]] == [
        *p.tokenizer.encode("red", add_special_tokens=False),
        *p.asst_end_tokens,
    ]
    # The insertion point lies between the tokens around the image.
    (point,) = e.points
    assert e.ids[point - 1] == p.pre_image_tokens[0] and e.ids[point] == p.post_image_tokens[0]
    assert e.images == [b"IMAGE"]


def test_consecutive_images_share_a_point_without_delimiters(tokenizer_path: str) -> None:
    e = processor(tokenizer_path).encode([ask(b"1", b"2", "what?")])
    assert e.points == [2, 2]  # after bos and the user's start


def test_turns_and_opening_add_up_to_the_encoded_length(tokenizer_path: str) -> None:
    p = processor(tokenizer_path, image_start="<|user|>", system="hello <|end|>")
    turns = [("What is it?", "a red cat"), ("And now?", "blue")]
    messages = []
    for user, assistant in turns:
        messages += [ask(b"x", user), {"role": "assistant", "content": assistant}]
    counts = p.turn_tokens(messages)
    encoded = p.encode(messages)
    around = 2 * (len(p.pre_image_tokens) + len(p.post_image_tokens))
    assert around == 2
    assert p.opening_tokens() + around + sum(map(sum, counts)) == len(encoded.ids)
    assert [learned for _, learned in counts] == [
        len(p.tokenizer.encode(answer, add_special_tokens=False)) + 1 for _, answer in turns
    ]
    assert p.opening_tokens() == len(p.bos_tokens) + len(p.tokenizer.encode("hello ")) + 1


def test_padding_side_moves_the_points(tokenizer_path: str) -> None:
    p = processor(tokenizer_path)
    picture = Image.new("RGB", (28, 28))
    batch = [[ask(picture, "a")], [ask("some more words than a", picture)]]
    p.tokenizer.padding_side = "left"
    left = p.tokenize_messages(batch)
    p.tokenizer.padding_side = "right"
    right = p.tokenize_messages(batch)
    shift = int((left["attention_mask"][0] == 0).sum())
    assert shift > 0
    (first,), second = columns(right)
    assert columns(left) == [[first + shift], second]
    assert (right["attention_mask"].sum(1) == left["attention_mask"].sum(1)).all()


def test_a_dtype_moves_pixels_only(tokenizer_path: str) -> None:
    batch = processor(tokenizer_path).tokenize_messages([ask(Image.new("RGB", (28, 28)), "a")])
    moved = batch.to("cpu", torch.bfloat16)
    assert moved["pixel_values"][0].dtype == torch.bfloat16
    assert moved["input_ids"].dtype == torch.long


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "holds the part"),
        ([{"role": "user", "content": [{"type": "video"}]}], "expected a list of frames"),
        ([{"role": "assistant", "content": [{"type": "audio"}]}], "holds the part"),
        (
            [part(type="image", image=b"x", resized_height=28, resized_width=56)],
            "message 0 .*'image' with resized_height=28, resized_width=56, which would have no "
            "effect; expected .*; max_pixels and min_pixels bound",
        ),
        ([part(type="video", video=[b"x"], fps=2.0)], "'video' with fps=2.0, which would have no"),
        ([part(type="text", text="a", image="x.png")], "'text' with image='x.png', .*; expected"),
        ([part(type="image", image="x", text="y" * 10_000)], "with text='y{39}, which"),
    ],
)
def test_bad_messages_are_named(tokenizer_path: str, messages: list[object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor(tokenizer_path).encode(messages)  # type: ignore[arg-type]


# --------------------------------------------------------------------- an image's own bounds


def test_an_image_of_a_message_may_have_bounds_of_its_own(tokenizer_path: str) -> None:
    p = processor(tokenizer_path)  # at most 84x84
    large, small = Image.new("RGB", (84, 84)), Image.new("RGB", (28, 28))
    content: list[dict[str, Any]] = [
        {"type": "image", "image": large, "max_pixels": 784},
        {"type": "image", "image": large},
        {"type": "image", "url": "data:image/png;base64,x", "image": small, "min_pixels": 3136},
        {"type": "image", "image": Image.new("RGB", (140, 140)), "max_pixels": 140 * 140},
        {"type": "image_url", "image_url": {"url": png_url(large)}, "max_pixels": 3136},
        {"type": "video", "video": [large, large], "max_pixels": 784},
        {"type": "video", "video": [large], "min_pixels": None},
        {"type": "text", "text": "a"},
    ]
    messages = [{"role": "user", "content": content}]
    sides = [28, 84, 56, 140, 56, 28, 28, 84]
    plain = [
        {k: v for k, v in one.items() if k not in ("max_pixels", "min_pixels")} for one in content
    ]
    expected = p.tokenize_messages([{"role": "user", "content": plain}])
    # Jinja of the caller's own is rendered and read back.
    own = p.chat_template + "{# mine #}"
    for batch in (
        p.tokenize_messages(messages),
        *(
            p.apply_chat_template(
                messages,
                chat_template=jinja,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            for jinja in (None, own)
        ),
    ):
        assert [tuple(x.shape) for x in batch["pixel_values"]] == [(3, s, s) for s in sides]
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert columns(batch) == columns(expected)


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_messages_stay_as_they_were(tokenizer_path: str, tokenize: bool, batched: bool) -> None:
    p = processor(tokenizer_path)
    url = png_url(Image.new("RGB", (84, 84)))
    part = {"type": "image_url", "image_url": {"url": url}, "max_pixels": 3136}
    messages: Any = [
        {"role": "user", "content": [part, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
    ]
    given = copy.deepcopy([messages, messages] if batched else messages)
    same = copy.deepcopy(given)
    for jinja in (None, p.chat_template + "{# mine #}"):
        p.apply_chat_template(given, chat_template=jinja, tokenize=tokenize)
        assert given == same


def png_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(image)).decode()


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"max_pixels": 100}, "image 0: max_pixels is 100; one image token needs 784"),
        ({"max_pixels": "784"}, "image 0: max_pixels is '784'; expected a whole number"),
        ({"min_pixels": 7057}, "image 0: min_pixels is 7057; expected 0 .* to max_pixels, 7056"),
        ({"max_pixels": 0}, "image 0: max_pixels is 0; one image token"),
    ],
)
def test_an_images_own_bounds_are_refused_as_the_processors_are(
    tokenizer_path: str, bounds: dict[str, Any], words: str
) -> None:
    message = part(type="image", image=Image.new("RGB", (30, 30)), **bounds)
    with pytest.raises(ValueError, match=words):
        processor(tokenizer_path).tokenize_messages([message])


def test_empty_columns_of_a_table_of_parts_are_no_keys(tokenizer_path: str) -> None:
    p = processor(tokenizer_path)
    empty = {"fps": None, "resized_height": None, "max_pixels": None, "video": None, "url": None}
    content = [
        {"type": "image", "image": Image.new("RGB", (30, 30)), "text": None, "index": 0, **empty},
        {"type": "image", "text": "", "index": 1, **empty, "image": None},
        {"type": "text", "text": "a", "image": None, "index": None, **empty},
    ]
    batch = p.tokenize_messages([{"role": "user", "content": content}])
    assert len(batch["pixel_values"]) == 1
    assert p.encode([{"role": "user", "content": content}]).images[1] is None
