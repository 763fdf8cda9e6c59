"""Unusual and damaged images: the exact outcome of each, and what a run makes of it."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.loader import PackLoader
from casa_train.data.materialize import Materializer, PackedBatch
from casa_train.data.mixture import SourceSize
from casa_train.data.prepared.plan import Planner, PlanSource
from casa_train.data.prepared.shards import Split
from casa_train.data.tokens import load_tokenizer
from casa_train.modeling.image_processing_casa import (
    CasaImageProcessor,
    ImageError,
    read_header,
)
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.run.quarantine import Quarantine
from tests.helpers.bad_images import (
    REFUSED,
    USABLE,
    encoded,
    exif,
    half,
    halves,
    noise,
    png,
    zeros,
)
from tests.helpers.commands import TEMPLATE
from tests.helpers.counting import sample_lengths, writer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")
MEMORY = Path("/proc/self/status")


@pytest.mark.parametrize("name", USABLE)
def test_unusual_files_give_the_right_pixels(name: str) -> None:
    make, colour = USABLE[name]
    pixels = CasaImageProcessor().load(make())
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 28, 28)
    assert (pixels == torch.tensor(colour).view(3, 1, 1)).all()
    assert read_header(make())[1:] == (28, 28)


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_files_have_a_reason_and_name_the_image(name: str) -> None:
    make, reason, word = REFUSED[name]
    with pytest.raises(ImageError, match=word) as caught:
        CasaImageProcessor().load(make(), "image 3 of sample k-7")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("image 3 of sample k-7")


def test_a_path_names_the_image(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"text")
    with pytest.raises(ImageError, match="photo.jpg cannot be read"):
        CasaImageProcessor().load(path)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_the_header_agrees(file_format: str, orientation: int) -> None:
    options = {"quality": 95} if file_format in ("JPEG", "WEBP") else {}
    data = encoded(halves(), file_format, exif=exif(orientation), **options)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = CasaImageProcessor().load(data)
    assert torch.equal(pixels, torch.from_numpy(upright.copy()).permute(2, 0, 1))
    assert read_header(data)[1:] == (pixels.shape[2], pixels.shape[1])
    with Image.open(io.BytesIO(data)) as image:  # as a picture, the same bits
        assert torch.equal(CasaImageProcessor().load(image), pixels)
        image.load()
        assert torch.equal(CasaImageProcessor().load(image), pixels)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([784, 7056, 952 * 952]))
def test_interleaved_and_planar_pixels_give_the_same_bits(w: int, h: int, budget: int) -> None:
    image, processor = noise(w, h), CasaImageProcessor(budget)
    planar = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    pixels = processor.load(image)
    assert pixels.is_contiguous()
    assert torch.equal(pixels, processor.load(planar))
    assert torch.equal(pixels, processor.process_images(planar.repeat(3, 1, 1, 1))[2])


def peak_memory(reset: bool = False) -> int:
    """Bytes that this process held at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in MEMORY.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not MEMORY.exists(), reason="reads the kernel's account of a process")
@pytest.mark.parametrize("name", [name for name in REFUSED if "bomb" in name or "claims" in name])
def test_bombs_take_little_memory(name: str) -> None:
    data = REFUSED[name][0]()
    before = peak_memory(reset=True)
    with pytest.raises(ImageError):
        CasaImageProcessor().load(data)
    assert peak_memory() - before < 32e6  # the text bombs hold 200 MB, the pictures 300 MB and more


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
def test_damage_anywhere_gives_pixels_or_an_image_error(
    file_format: str, data: st.DataObject
) -> None:
    whole = encoded(noise(), file_format)
    start = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:start] + data.draw(st.binary(min_size=1, max_size=40)) + whole[start + 40 :]
    try:
        assert CasaImageProcessor().load(damaged).ndim == 3
    except ImageError as error:
        assert error.reason


# ------------------------------------------------------------------------------- through a run

TEXT, IMAGES, G = 160, 64, 2
SAMPLES = 60


def bad_bytes(size: int) -> dict[str, tuple[bytes, str]]:
    """What can stand in an image's place in a shard, by kind, and the reason it is counted by."""
    small = {
        "text": (b"404: no such picture", "unreadable_image"),
        "random": (np.random.default_rng(5).bytes(size), "unreadable_image"),
        "zeros": (b"", "unreadable_image"),
        "half": (half(encoded(noise(40, 30))), "unreadable_image"),
        "bomb": (png(60_000, 60_000), "too_many_pixels"),
        "large": (png(10_000, 10_000), "too_many_pixels"),
        "text bomb": (png(28, 28, (b"zTXt", b"a\0\0" + zeros(2))), "unreadable_image"),
        "long": (encoded(Image.new("RGB", (1, 3000))), "extreme_aspect"),
        "other size": (encoded(Image.new("RGB", (200, 200))), "index_mismatch"),
        "float": (
            encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
            "unsupported_mode",
        ),
    }
    assert all(len(data) <= size for data, _ in small.values())
    return {name: (data.ljust(size, b"\0"), reason) for name, (data, reason) in small.items()}


@pytest.fixture(scope="module")
def processor(data_dir: Path) -> CasaProcessor:
    return CasaProcessor(load_tokenizer(str(data_dir / "tokenizer")), 7056, TEMPLATE)


def write_dataset(directory: Path, processor: CasaProcessor) -> Split:
    """Samples of one image each, every third of an unusual kind that must not be lost."""
    usable = [make() for make, _ in USABLE.values()]
    writer = writer_for(processor, directory, per_shard=25)
    for i in range(SAMPLES):
        turned = {"exif": exif(6)} if i % 2 else {}
        data = usable[i // 3 % len(usable)] if i % 3 == 0 else encoded(noise(50, 40), **turned)
        row = {"texts": [{"user": f"what is {i}", "assistant": f"{i}"}], "source": f"s{i % 2}"}
        assert writer.write(f"k-{i:03d}", row, [data])
    writer.close()
    return Split(directory)


def overwrite(split: Split, row: int, member: str, data: bytes) -> None:
    """Writes over a member in place."""
    record = split.index.slice(row, 1).to_pylist()[0]
    shard = split.directory / split.meta["shards"][record["shard"]]["name"]
    offset = record["json_offset"] if member == "json" else record["image_offsets"][0]
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def make_loader(split: Split, processor: CasaProcessor, workers: int) -> PackLoader:
    source = PlanSource(*sample_lengths(split, processor), SourceSize(len(split)))
    plan = DataConfig(
        text_tokens=TEXT,
        image_tokens=IMAGES,
        packs_per_step=G,
        balance_block=2,
        balance_group=2,
        workers=workers,
    )
    materializer = Materializer({"s": split}, processor, Budget.of(plan))
    return PackLoader(Planner({"s": source}, plan, 3), materializer)


def read(split: Split, processor: CasaProcessor, workers: int, steps: int) -> list[PackedBatch]:
    loader = make_loader(split, processor, workers)
    return [batch for _ in range(steps) for batch in loader.next_step()]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_leave_holes_and_nothing_else_changes(
    tmp_path: Path, processor: CasaProcessor, workers: int
) -> None:
    split = write_dataset(tmp_path / "data", processor)
    steps = 12
    clean = read(split, processor, 0, steps)
    assert not any(batch.failures for batch in clean)
    assert len({i for batch in clean for i in batch.sample_ids}) == SAMPLES  # more than an epoch

    reasons: dict[str, str] = {}
    rows = iter(range(1, SAMPLES, 3))  # those with large files
    for kind in bad_bytes(10**6):
        row = next(rows)
        size = split.index["image_sizes"][row].as_py()[0]
        data, reason = bad_bytes(size)[kind]
        overwrite(split, row, "image", data)
        reasons[split.key(row)] = reason
    for data in (b"{not json", b"[1, 2]"):
        row = next(rows)
        size = split.index["json_size"][row].as_py()
        overwrite(split, row, "json", data.ljust(size))
        reasons[split.key(row)] = "unreadable_json"

    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="PIL")  # as under `python -W error`
        found = read(Split(split.directory), processor, workers, steps)
    path = tmp_path / "quarantine_3.jsonl"
    quarantine = Quarantine(tmp_path, 3)
    for before, after in zip(clean, found, strict=True):
        kept = [i for i in before.sample_ids if i.split("/")[1] not in reasons]
        assert after.sample_ids == kept
        quarantine.add(after.failures)
    lost = Counter(
        (source, key, reasons[key])
        for batch in clean
        for source, key in (i.split("/") for i in batch.sample_ids)
        if key in reasons
    )
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter((e["source"], e["key"], e["reason"]) for e in entries) == lost
    assert all(e["key"] in e["detail"] or "index promised" in e["detail"] for e in entries)
