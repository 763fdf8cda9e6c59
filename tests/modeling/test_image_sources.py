"""What an image may be given as, and what is said of what cannot be one."""

from __future__ import annotations

import base64
import re
import urllib.parse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from casa_train.modeling.image_processing_casa import CasaImageProcessor, ImageError, read_header
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers import stranger
from tests.helpers.bad_images import encoded, exif, halves
from tests.helpers.commands import TEMPLATE

# 84x56 and no square: an exchange of axes would show. No size is changed, so pixels are compared.
LEVELS = np.random.default_rng(3).integers(0, 256, (56, 84, 3), dtype=np.uint8)
PICTURE = Image.fromarray(LEVELS)
EXPECTED = torch.from_numpy(LEVELS.copy()).permute(2, 0, 1)
PNG = encoded(PICTURE)
CODED = base64.b64encode(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode()
assert "-" in URL_SAFE and "_" in URL_SAFE
IMAGES = CasaImageProcessor()
AVIF = "avif" in features.modules and features.check("avif")


@pytest.fixture(scope="module")
def processor() -> CasaProcessor:
    return CasaProcessor(build_tokenizer(), 140 * 140, TEMPLATE)


# ------------------------------------------------------------------------------- files and bytes


def files(folder: Path) -> dict[str, Any]:
    """The picture by every name of it."""
    path = folder / "a picture ä.png"
    path.write_bytes(PNG)
    return {
        "path": path,
        "string": str(path),
        "file URL": path.as_uri(),  # with %20 and its like
        "file URL of this host": path.as_uri().replace("file://", "file://localhost"),
        "capital scheme": "FILE" + path.as_uri()[4:],
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "memoryview": memoryview(PNG),
        "undecoded": {"bytes": PNG, "path": None},
        "undecoded, with the name it had": {"bytes": PNG, "path": "gone.png"},
        "undecoded, by its path": {"bytes": None, "path": str(path)},
        "base64": CODED,
        "base64 in lines": "\n".join(re.findall(".{1,76}", CODED)) + "\n",
        "data URL": f"data:image/png;base64,{CODED}",
        "base64, URL-safe": URL_SAFE,
        "base64, URL-safe without padding": URL_SAFE.rstrip("="),
        "data URL, URL-safe": f"data:image/png;base64,{URL_SAFE}",
        "data URL, quoted": "data:image/png;base64," + urllib.parse.quote(CODED),
        "bytes of base64": CODED.encode(),
        "bytes of base64, URL-safe": URL_SAFE.encode(),
    }


def test_every_name_of_a_file_gives_its_pixels(tmp_path: Path, processor: CasaProcessor) -> None:
    expected = processor(text="<image> a", images=PICTURE)["pixel_values"][0]
    for name, source in files(tmp_path).items():
        assert torch.equal(IMAGES.load(source), EXPECTED), name
        messages = [{"role": "user", "content": [{"type": "image", "image": source}]}]
        for batch in (
            processor.tokenize_messages(messages),
            processor(text="<image> a", images=source),
            processor(text="<image> a", images=[[source]]),
        ):
            assert torch.equal(batch["pixel_values"][0], expected), name


def test_a_part_of_a_message_may_be_a_row_of_a_dataset(processor: CasaProcessor) -> None:
    part = {"type": "image", "bytes": PNG, "path": "gone.png"}
    batch = processor.tokenize_messages([{"role": "user", "content": [part]}])
    assert torch.equal(batch["pixel_values"][0], IMAGES.load(PNG))


def test_a_file_whose_name_could_be_base64_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("abcd").write_bytes(PNG)
    assert torch.equal(IMAGES.load("abcd"), EXPECTED)


@pytest.mark.skipif(not AVIF, reason="this Pillow has no AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_is_read_upright(orientation: int) -> None:
    data = encoded(halves(), "AVIF", quality=100, exif=exif(orientation))
    pixels = IMAGES.load(data)
    assert pixels.shape == ((3, 28, 56) if orientation == 1 else (3, 56, 28))
    assert read_header(data) == ("AVIF", pixels.shape[2], pixels.shape[1])
    ends = pixels[:, 5, 5].tolist(), pixels[:, -5, -5].tolist()
    for found, colour in zip(ends, ((250, 20, 30), (10, 40, 240)), strict=True):
        assert np.abs(np.subtract(found, colour)).max() < 12


# ---------------------------------------------------------------------------------------- arrays


def alpha_of(levels: np.ndarray) -> np.ndarray:
    return np.concatenate([levels, np.full((*levels.shape[:2], 1), 255, np.uint8)], 2)


ARRAYS: dict[str, Callable[[], Any]] = {
    "(H, W, 3)": lambda: LEVELS,
    "(3, H, W)": lambda: LEVELS.transpose(2, 0, 1),
    "of another stride": lambda: LEVELS[::-1, ::-1][::-1, ::-1],
    "opaque (H, W, 4)": lambda: alpha_of(LEVELS),
    "opaque (4, H, W)": lambda: alpha_of(LEVELS).transpose(2, 0, 1),
    "int64": lambda: LEVELS.astype(np.int64),
    "uint16": lambda: LEVELS.astype(np.uint16),
    "big-endian": lambda: LEVELS.astype(">i4"),
    "float levels": lambda: LEVELS.astype(np.float64),
    "unit floats": lambda: LEVELS.astype(np.float32) / 255,
    "float16": lambda: (LEVELS.astype(np.float32) / 255).astype(np.float16),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_tensors_give_their_pixels(name: str, processor: CasaProcessor) -> None:
    array = ARRAYS[name]()
    tensor = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    for source in (array, tensor):
        pixels = IMAGES.load(source)
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, EXPECTED)
        assert torch.equal(IMAGES.process_images(source), EXPECTED)
    frozen = array.copy()
    frozen.setflags(write=False)  # as np.asarray(picture) is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = IMAGES.load(frozen)
    pixels.zero_()  # does not reach the caller's array
    assert torch.equal(IMAGES.load(frozen), EXPECTED)
    batch = processor(text="<image> <image>", images=[array, PICTURE])
    assert torch.equal(*batch["pixel_values"])


@pytest.mark.parametrize("shape", [(56, 84), (56, 84, 1), (1, 56, 84)])
def test_grey_arrays_are_grey(shape: tuple[int, ...]) -> None:
    grey = LEVELS[..., 0].reshape(shape)
    expected = IMAGES.load(Image.fromarray(LEVELS[..., 0]))
    assert expected.shape == (3, 56, 84)
    assert torch.equal(IMAGES.load(grey), expected)
    assert torch.equal(IMAGES.load(torch.from_numpy(grey.copy())), expected)


def test_alpha_of_an_array_stands_on_white() -> None:
    clear = alpha_of(LEVELS)
    clear[:28, :, 3] = 0
    pixels = IMAGES.load(clear)
    assert (pixels[:, :28] == 255).all()
    assert torch.equal(pixels[:, 28:], EXPECTED[:, 28:])
    assert torch.equal(pixels, IMAGES.load(Image.fromarray(clear)))


@pytest.mark.parametrize("last", [False, True])
def test_frames_may_be_one_array(processor: CasaProcessor, last: bool) -> None:
    frames = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]])
    given = frames if last else frames.transpose(0, 3, 1, 2)
    film = {"role": "user", "content": [{"type": "video", "video": given}]}
    expected = torch.stack([IMAGES.load(frame) for frame in frames])
    assert torch.equal(IMAGES.process_images(given), expected)
    for batch in (
        processor.tokenize_messages([film]),
        processor(text="<video> a", videos=given),
        processor(text="<image><image><image> a", images=given),
    ):
        assert torch.equal(torch.stack(batch["pixel_values"]), expected)


def test_what_is_resized_is_the_same_from_everywhere() -> None:
    small = CasaImageProcessor(56 * 56)
    expected = small.load(PICTURE)
    assert expected.shape == (3, 28, 56)
    for source in (PNG, CODED, {"bytes": PNG}, *(make() for make in ARRAYS.values())):
        assert torch.equal(small.load(source), expected)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (42, r"image: found is of type int; expected a path, a URL \(http, https, file, data\)"),
        (None, "found is of type NoneType"),
        ({"image": PNG}, r"a mapping of \['image'\], neither 'bytes' nor 'path'; expected"),
        ({"bytes": None, "path": None}, "neither 'bytes' nor 'path'"),
        ({"bytes": 3}, "found is of type int"),
        ({"bytes": None, "path": "/gone.png"}, "image /gone.png cannot be read: .*No such file"),
        ("/gone/cat.png", "image /gone/cat.png cannot be read: .*No such file"),
        ("/gone/cat", "image /gone/cat: there is no such file, nor is it base64 of an image"),
        ("", "^image: found is an empty string; expected a path, a URL"),
        ("?" * 9000, r"^image \?{40}\.\.\.: found is a string of 9,000 characters, .* no file"),
        ("/a." * 2000, r"^image (/a\.){66}/a\.\.\. cannot be read: .*File name too long"),
        ("A" * 9000, r"^image A{40}\.\.\.: there is no such file, nor is it base64 of an image"),
        (b"A" * 9000, "^image cannot be read as any of JPEG, PNG"),
        ("file:///gone%20cat.png", r"image file:///gone%20cat.png cannot be read: .*/gone cat.png"),
        ("file://elsewhere/cat.png", "file://elsewhere/cat.png cannot be read"),
        (CODED[: len(CODED) // 2], r"image iVBOR\S{35}\.\.\.[: ]"),
        ("data:image/png;base64,AAAA", "image data:image/png;base64,AAAA cannot be read as any of"),
        (np.zeros(9, np.uint8), r"ndarray \(9,\) of uint8; pixels have the axes"),
        (np.zeros((9, 9, 2), np.uint8), r"ndarray \(9, 9, 2\) of uint8; its channels, 1, 3 or 4"),
        (np.zeros((5, 9, 9, 3), np.uint8), "found are 5 frames; expected one image"),
        (np.zeros((5, 9, 9, 4), np.uint8), "frames have 1 or 3 channels"),
        (np.zeros((9, 9, 3), bool), "ndarray .* of bool, which holds no levels"),
        (torch.zeros(9, 9, 3, dtype=torch.bool), "Tensor .* of torch.bool, which holds no levels"),
        (np.array([["a"]]), "of <U1, which holds no levels"),
        (
            np.full((9, 9, 3), 40000, np.uint16),
            "with values from 40000 to 40000; levels are 0..255",
        ),
        (LEVELS / 127.5 - 1, "from -1 to 1; levels are .* normalised must be turned back"),
        (np.full((9, 9, 3), np.nan), "with values from nan to nan"),
        (torch.full((3, 9, 9), 256.0), "with values from 256 to 256"),
        (np.zeros((0, 9, 3), np.uint8), "image of 9x0 pixels is empty"),
        (np.zeros((2, 500, 3), np.uint8), "aspect ratio over 200"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_bad_images_are_named(bad: object, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        IMAGES.load(bad)
    assert len(str(caught.value)) < 420


# -------------------------------------------------------------------------------- order of a call


@pytest.mark.parametrize(
    "images",
    [
        lambda path: PICTURE,
        lambda path: LEVELS,
        lambda path: EXPECTED,
        lambda path: {"bytes": PNG},
        lambda path: PNG,
        lambda path: path,
        lambda path: [path],
        lambda path: [[PICTURE]],
    ],
)
def test_images_and_text_come_in_either_order(
    images: Callable[[str], Any], processor: CasaProcessor, tmp_path: Path
) -> None:
    path = str(files(tmp_path)["path"])
    source = images(path)
    for text in ("<image> a", ["<image> a"]):
        expected = processor(text=text, images=source, return_tensors="pt")
        assert len(expected["pixel_values"]) == 1
        for first, second in ((text, source), (source, text)):
            stranger.same_batch(processor(first, second, return_tensors="pt"), expected)


def test_text_alone_and_videos_may_stand_in_front(processor: CasaProcessor) -> None:
    film = [PICTURE, PICTURE]
    expected = processor(text="<video> a", videos=film)["input_ids"]
    assert processor("<video> a", None, film)["input_ids"] == expected
    assert processor("<video> a", videos=[film])["input_ids"] == expected
    assert processor("a", [])["input_ids"] == processor(text="a")["input_ids"]
    quoted = processor(r"<\image> a", [])["input_ids"]  # a word, not a place
    assert quoted == processor(text=r"<\image> a")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("photo.png",), "needs text: given is 'photo.png' as images alone: pass text="),
        ((PICTURE, 7), "text is int; expected a string or a list of strings"),
        ((PICTURE, PICTURE), "text is Image; expected a string"),
        (("<image> a", "<image> b"), "there is no such file|cannot be read"),
    ],
)
def test_calls_without_text_are_named(
    processor: CasaProcessor, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        processor(*arguments)


def test_a_row_of_a_dataset_with_undecoded_images(processor: CasaProcessor) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": PNG, "path": None}]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    batch = processor(text="<image> a", images=rows[0]["image"])
    assert torch.equal(batch["pixel_values"][0], IMAGES.load(PNG))


def test_base64_of_a_message_may_be_url_safe(processor: CasaProcessor) -> None:
    part = {"type": "image", "base64": URL_SAFE}
    batch = processor.tokenize_messages([{"role": "user", "content": [part]}])
    assert torch.equal(batch["pixel_values"][0], IMAGES.load(PNG))


def test_a_text_without_images_may_have_none(processor: CasaProcessor) -> None:
    texts = ["<image> a", "b"]
    expected = processor(text=texts, images=[[PICTURE], []], return_tensors="pt")
    given = processor(text=texts, images=[[PICTURE], None], return_tensors="pt")
    stranger.same_batch(given, expected)
    plain = processor(text=["a", "b"], return_tensors="pt")
    stranger.same_batch(processor(text=["a", "b"], images=[None, None], return_tensors="pt"), plain)
    assert processor(text=texts, images=[None])["pixel_values"] == []  # an empty place
    films = ["<video> a", "b"]
    expected = processor(text=films, videos=[[PICTURE, PICTURE]], return_tensors="pt")
    given = processor(text=films, videos=[[PICTURE, PICTURE], None], return_tensors="pt")
    stranger.same_batch(given, expected)
    with pytest.raises(ValueError, match=r"\[1, 0\] places .* given are \[0, 1\]"):
        processor(text=texts, images=[None, [PICTURE]])


@pytest.mark.parametrize(
    "pgm",
    [
        b"P5\n28 28\n65535\n" + bytes([156, 64]) * 784,
        b"P2\n28 28\n65535\n" + b"40000 " * 784,
        b"P5\n28 28\n1023\n" + bytes([2, 112]) * 784,
    ],
)
def test_deep_grey_of_a_pgm_is_scaled(pgm: bytes) -> None:
    deep = Image.fromarray(np.full((28, 28), 40000, np.uint16))
    for source in (pgm, encoded(deep), encoded(deep, "TIFF")):
        assert (IMAGES.load(source) == 40000 >> 8).all()
    assert read_header(pgm) == ("PPM", 28, 28)


@pytest.mark.parametrize(
    "given", ["hi", ["hi"], [["hi"]], {"role": "user", "content": "hi"}, None, 3, [None]]
)
def test_what_is_no_conversation_is_named(processor: CasaProcessor, given: Any) -> None:
    words = r"found is .*; expected messages: a list of {'role': ..., 'content': ...}"
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(given, tokenize=True)
    with pytest.raises(ValueError, match=words):
        processor.tokenize_messages(given)
    if isinstance(given, str):
        with pytest.raises(ValueError, match=words):
            processor.apply_chat_template(given)


def test_a_part_that_is_unknown_is_not_printed_whole(processor: CasaProcessor) -> None:
    part = {"type": "audio", "audio": CODED}
    for role in ("user", "system"):
        with pytest.raises(ValueError, match="holds the part") as caught:
            processor.encode([{"role": role, "content": [part]}])
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [("do_resize", None), ("size", None), ("max_pixel", "max_pixels"), ("tp_siz", None)],
)
def test_hints_are_the_processors_own_keywords(keyword: str, hint: str | None) -> None:
    with pytest.raises(ValueError, match=f"would not obey {keyword}=4") as caught:
        CasaProcessor.from_pretrained("gone", **{keyword: 4})
    assert (f"(did you mean {hint}?)" in str(caught.value)) == (hint is not None)
    assert ("did you mean" in str(caught.value)) == (hint is not None)
