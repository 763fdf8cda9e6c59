"""Shards, mixture, packing, plan and materialising, on the rendered dataset."""

from __future__ import annotations

import io
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.loader import PackLoader
from casa_train.data.materialize import Materializer, encode_sample
from casa_train.data.mixture import SourceSize
from casa_train.data.prepared.plan import Pack, Planner, PlanSource
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import ImageSlot, Sample
from casa_train.data.schemas.rows import BadRow, finevision
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor
from tests.helpers.commands import TEMPLATE
from tests.helpers.counting import FINGERPRINTS, ShardWriter, sample_lengths, texts_by

MAX_PIXELS = 7056
WORDS = texts_by(lambda text: len(text.split()))


@pytest.fixture(scope="module")
def processor(data_dir: Path) -> CasaProcessor:
    return CasaProcessor(load_tokenizer(str(data_dir / "tokenizer")), MAX_PIXELS, TEMPLATE)


@pytest.fixture(scope="module")
def split(data_dir: Path) -> Split:
    return Split(data_dir / "train")


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def row(*turns: tuple[str, str]) -> dict[str, object]:
    return {"texts": [{"user": u, "assistant": a} for u, a in turns], "source": "unit"}


def planner(
    split: Split, processor: CasaProcessor, text: int = 160, images: int = 64, workers: int = 0
) -> Planner:
    size = SourceSize(len(split))
    source = PlanSource(*sample_lengths(split, processor), size)
    plan = DataConfig(
        text_tokens=text,
        image_tokens=images,
        packs_per_step=4,
        balance_block=4,
        balance_group=2,
        workers=workers,
    )
    return Planner({"s": source}, plan, seed=1)


# ------------------------------------------------------------------------------------- schema


def test_images_stand_before_the_first_question() -> None:
    sample = finevision("k", row(("one?", "1"), ("two?", "2")), [b"a", b"b"])
    assert sample.turns[0].user == (ImageSlot(0), ImageSlot(1), "one?")
    assert sample.turns[1].user == ("two?",)


def test_one_placeholder_an_image_places_them() -> None:
    sample = finevision("k", row(("see <image> here", "1"), ("<image>two?", "2")), [b"a", b"b"])
    assert sample.turns[0].user == ("see", ImageSlot(0), "here")
    assert sample.turns[1].user == (ImageSlot(1), "two?")


def test_other_placeholders_are_noise() -> None:
    sample = finevision("k", row(("see <image> and <image>", "1")), [b"a"])
    assert sample.turns[0].user == (ImageSlot(0), "see  and")


def test_dropping_an_empty_turn_keeps_its_images() -> None:
    sample = finevision("k", row(("<image>", "1"), ("<image>two?", "2")), [b"a", b"b"])
    assert sample.turns[0].user == (ImageSlot(0), ImageSlot(1), "two?")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"texts": [{"user": "a", "assistant": "b"}]}, "no_source"),
        ({"texts": None, "source": "s"}, "no_texts"),
        ({"texts": [None, {"user": None, "assistant": "b"}], "source": "s"}, "no_turns"),
    ],
)
def test_unusable_rows_are_named(broken: dict[str, object], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        finevision("k", broken, [])
    assert caught.value.reason == reason


# ------------------------------------------------------------------------------------- shards


def write(directory: Path, samples: int, per_shard: int = 3) -> None:
    writer = ShardWriter(directory, "finevision", WORDS, FINGERPRINTS, per_shard)
    for i in range(samples):
        assert writer.write(
            f"k-{i}", row((f"question {i}", f"answer {i}")), [png(30 + i)] * (i % 3)
        )
    assert writer.close() == samples


def test_written_samples_are_read_back(tmp_path: Path) -> None:
    write(tmp_path, 8)
    assert len(list(tmp_path.glob("shard-*.tar"))) == 3
    for i, sample in enumerate(Split(tmp_path)):
        assert sample.key == f"k-{i}"
        assert sample.turns[0].assistant == f"answer {i}"
        assert list(sample.images) == [png(30 + i)] * (i % 3)


def test_more_than_ten_images_keep_their_order(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "finevision", WORDS, FINGERPRINTS)
    images = [png(20 + i) for i in range(12)]
    writer.write("k", row(("q", "a")), images)
    writer.close()
    assert list(Split(tmp_path).read(0).images) == images


def test_unreadable_rows_are_counted(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "finevision", WORDS, FINGERPRINTS)
    assert not writer.write("a", row(("q", "a")), [b"no image"])
    assert not writer.write("b", row(("q", "")), [])
    assert not writer.write("../c", row(("q", "a")), [])
    assert writer.skipped == {"unreadable_image": 1, "no_turns": 1, "bad_key": 1}


def test_a_shard_of_another_dataset_of_the_same_size_is_refused(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 50)):
        writer = ShardWriter(tmp_path / name, "finevision", WORDS, FINGERPRINTS)
        for i in range(4):
            writer.write(f"k-{start + i:03d}", row((f"question {i}", "answer")), [])
        writer.close()
    shard = "shard-000000.tar"
    sizes = {(tmp_path / name / shard).stat().st_size for name in "ab"}
    assert len(sizes) == 1  # tars are padded
    shutil.copy(tmp_path / "b" / shard, tmp_path / "a" / shard)
    with pytest.raises(UserError, match="expects k-000.json in shard-000000.tar, found is 'k-050"):
        Split(tmp_path / "a")


def test_a_damaged_index_is_named_also_where_no_digest_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "d", 8)
    index = tmp_path / "d" / "index.arrow"
    index.write_bytes(index.read_bytes()[:500])
    with pytest.raises(UserError, match="index.arrow cannot be read: .*Copy it again"):
        Split(tmp_path / "d", check=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: shutil.rmtree(d), "does not exist"),
        (lambda d: [p.unlink() for p in d.iterdir()], "is empty or unfinished"),
        (lambda d: (d / "shard-000001.tar").unlink(), "shard-000001.tar is missing"),
        (lambda d: (d / "shard-000001.tar").write_bytes(b"cut"), "has 3 bytes"),
        (lambda d: (d / "index.arrow").unlink(), "index.arrow is missing"),
        (lambda d: (d / "index.arrow").write_bytes(b"x"), "does not belong to"),
        (lambda d: (d / "meta.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "meta.json").write_text('{"format": 99}'), "format 99"),
    ],
)
def test_damaged_directories_are_refused(tmp_path: Path, damage: object, words: str) -> None:
    write(tmp_path / "d", 8)
    damage(tmp_path / "d")  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        Split(tmp_path / "d")


def test_an_index_without_samples_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0)
    with pytest.raises(UserError, match="lists no sample"):
        Split(tmp_path)


# ------------------------------------------------------------------------------------- plan


def test_planned_lengths_are_the_processor_s(split: Split, processor: CasaProcessor) -> None:
    text, images = sample_lengths(split, processor)
    for i, sample in enumerate(split):
        encoded = encode_sample(sample, processor)
        assert (text[i], images[i]) == (len(encoded.ids), encoded.chunk().image_tokens)


def test_a_budget_below_every_sample_is_refused(split: Split, processor: CasaProcessor) -> None:
    with pytest.raises(UserError, match=r"data.text_tokens is 5.*smallest samples need"):
        planner(split, processor, text=5)


def test_a_budget_below_every_image_is_refused(split: Split, processor: CasaProcessor) -> None:
    with pytest.raises(UserError, match=r"no sample with an image.*data.image_tokens is 3"):
        planner(split, processor, images=3)


# ------------------------------------------------------------------------------------- batches


def test_batch_matches_its_samples(split: Split, processor: CasaProcessor) -> None:
    materializer = Materializer({"s": split}, processor, Budget(160, 64))
    pack = next(planner(split, processor))
    batch = materializer[pack]
    assert batch.text_tokens <= 160 - 1 and batch.image_tokens <= 64 - 1
    start = 0
    expected_rows, expected_targets = [], []
    for name, r, _, _ in pack.items:
        encoded = encode_sample(split.read(r), processor)
        ids = batch.inputs.input_ids[start : start + len(encoded.ids)].tolist()
        assert ids == encoded.ids, name
        answers = [i for i, answer in enumerate(encoded.answer) if answer]
        expected_rows += [start + i - 1 for i in answers]
        expected_targets += [encoded.ids[i] for i in answers]
        start += len(encoded.ids)
    assert batch.inputs.logits_index is not None
    assert batch.inputs.logits_index.tolist() == expected_rows
    assert batch.targets.tolist() == expected_targets


def test_training_and_inference_give_the_same_bits(split: Split, processor: CasaProcessor) -> None:
    for sample in itertools.islice(split, 40):
        trained = encode_sample(sample, processor)
        asked = processor.tokenize_messages(sample.messages(list(sample.images)))
        assert asked["input_ids"][0].tolist() == trained.ids
        assert asked["image_embeds_insertion_points"][0].tolist() == trained.points
        assert all(map(torch.equal, asked["pixel_values"], trained.images))


def test_a_pack_without_images_gets_the_dummy(split: Split, processor: CasaProcessor) -> None:
    rows = [i for i in range(len(split)) if split.source(i) == "synthetic_text"][:2]
    text, images = sample_lengths(split, processor)
    pack = Pack(0, tuple(("s", r, int(text[r]), int(images[r])) for r in rows), 100, 0)
    batch = Materializer({"s": split}, processor, Budget(160, 64))[pack]
    assert batch.inputs.chunks[-1].images == (1,)
    assert batch.inputs.chunks[-1].text == 1
    assert len(batch.inputs.images) == 1
    assert batch.image_tokens == 1
    assert batch.inputs.logits_index is not None
    assert int(batch.inputs.logits_index.max()) < len(batch.inputs.input_ids) - 1


def corrupt_copy(data_dir: Path, out: Path, rows: list[int]) -> Split:
    """The dataset with the image bytes of some samples overwritten in their shard."""
    shutil.copytree(data_dir / "train", out)
    good = Split(out)
    index = good.index.to_pylist()
    for r in rows:
        shard = out / good.meta["shards"][index[r]["shard"]]["name"]
        with shard.open("r+b") as file:
            file.seek(index[r]["image_offsets"][0] + 20)
            file.write(b"\0" * (index[r]["image_sizes"][0] - 20))
    return Split(out)


def test_a_corrupt_image_leaves_a_hole(
    data_dir: Path, processor: CasaProcessor, tmp_path: Path
) -> None:
    good = Split(data_dir / "train")
    pack = next(planner(good, processor))
    with_image = [r for _, r, _, _ in pack.items if good.index["image_offsets"][r].as_py()]
    broken = corrupt_copy(data_dir, tmp_path / "broken", with_image[:1])
    whole = Materializer({"s": good}, processor, Budget(160, 64))[pack]
    holed = Materializer({"s": broken}, processor, Budget(160, 64))[pack]
    lost = f"{good.source(with_image[0])}/{good.key(with_image[0])}"
    assert [i for i in whole.sample_ids if i != lost] == holed.sample_ids
    assert [(f.reason, f.key) for f in holed.failures] == [
        ("unreadable_image", good.key(with_image[0]))
    ]


def test_a_sample_unlike_its_index_leaves_a_hole(split: Split, processor: CasaProcessor) -> None:
    pack = next(planner(split, processor))
    (name, row, text, images), *others = pack.items
    lied = Pack(0, ((name, row, text + 1, images), *others), pack.text_tokens, pack.image_tokens)
    batch = Materializer({"s": split}, processor, Budget(160, 64))[lied]
    assert [(f.reason, f.key) for f in batch.failures] == [("index_mismatch", split.key(row))]
    assert len(batch.sample_ids) == len(others)


def test_workers_and_ranks_keep_one_order(split: Split, processor: CasaProcessor) -> None:
    def steps(world: int, workers: int) -> list[list[str]]:
        loaders = [
            PackLoader(
                planner(split, processor, workers=workers),
                Materializer({"s": split}, processor, Budget(160, 64)),
                rank,
                world,
            )
            for rank in range(world)
        ]
        order = []
        for _ in range(3):
            per_rank = [loader.next_step() for loader in loaders]
            order += [per_rank[r][m].sample_ids for m in range(4 // world) for r in range(world)]
        return order

    reference = steps(1, 0)
    assert steps(2, 0) == reference
    assert steps(4, 0) == reference
    assert steps(1, 2) == reference


def test_messages_keep_the_order_of_parts() -> None:
    sample: Sample = finevision("k", row(("<image>what?", "that")), [b"a"])
    (user, assistant) = sample.messages(["IMAGE"])
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][0]["image"] == "IMAGE"
    assert assistant["content"] == [{"type": "text", "text": "that"}]
