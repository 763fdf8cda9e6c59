"""Live samples over the budgets end behind a frame; what is learned of them stays true."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from casa_train.config.data_schema import DataConfig, SourceConfig
from casa_train.config.schema import Config
from casa_train.data.budget import Budget
from casa_train.data.build import open_data
from casa_train.data.fit import LEAST_FRAME_TOKENS, Fit, processor_for
from casa_train.data.materialize import EncodedSample, Materializer, encode_sample
from casa_train.data.prepared.plan import Pack
from casa_train.data.prepared.shard_index import (
    INDEX_FILE,
    merge_parts,
    open_index,
    part_path,
    write_index,
)
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import ImageSlot, cut_answer
from casa_train.data.schemas.video_rows import FRAME_END, live_whisperx
from casa_train.data.tokens import save_tokenizer
from casa_train.evaluate.held_out import answer_spans
from casa_train.io.files import sha256
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.__main__ import main
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import TEMPLATE
from tests.helpers.counting import writer_for
from tests.helpers.published import live_line, picture

MAX_PIXELS = 280 * 280  # 100 image tokens
BARE = {**TEMPLATE, "assistant_end": "<|end|>\n", "trim": ("user", "assistant")}
TEMPLATES = {
    "nothing around images": BARE,
    "special tokens around images": {**BARE, "image_start": "<|user|>", "image_end": "<|end|>"},
    "no special token at all": {
        "system": "Be kind.",
        "user_start": "Q: ",
        "user_end": "\n",
        "assistant_start": "A:",
        "answer_start": " ",
        "assistant_end": "\n\n",
        "image_start": "[",
        "image_end": "]",
    },
}
WORDS = ("It", "starts", "now,", "a", "square", "of", "extraordinary", "...", "東京", "<|end|>")


@pytest.fixture(scope="module", params=list(TEMPLATES.values()), ids=list(TEMPLATES))
def processor(request: pytest.FixtureRequest) -> CasaProcessor:
    return CasaProcessor(build_tokenizer(), MAX_PIXELS, request.param)


@pytest.fixture(scope="module")
def split(processor: CasaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return Split(write_live(processor, tmp_path_factory.mktemp("live")))


def write_live(processor: CasaProcessor, out: Path) -> Path:
    """Clips of 1 to 24 frames, several words at some of them and none at others."""
    draw = random.Random(5)
    writer = writer_for(processor, out, "live_whisperx", per_shard=6)
    for i, frames in enumerate((1, 2, 3, 5, 8, 12, 16, 20, 24, 24)):
        times = [n / 2 for n in range(frames)]
        words = [
            [time - 0.3, time, draw.choice(WORDS)]
            for time in times
            for _ in range(draw.choice([0, 0, 1, 2, 4]))
        ]
        words.append([times[-1], times[-1], "end"])
        line = live_line("v.mp4", 0, times[-1], words, f"Comment on number {i}.")
        side = 280 if frames > 20 else draw.randint(200, 300)
        images = [picture(side, side, "JPEG")] * frames
        assert writer.write(f"k-{i}", {"messages": line, "frame_times": times}, images)
    writer.close()
    return out


def encoded_of(fit: Fit, row: int, processor: CasaProcessor) -> EncodedSample:
    """The sample as it is trained."""
    sample, max_pixels = fit.apply(row, fit.split.read(row))
    return encode_sample(sample, processor, processor_for(processor, max_pixels))


def learned(encoded: EncodedSample) -> list[int]:
    return [i for i, answer in zip(encoded.ids, encoded.answer, strict=True) if answer]


@pytest.mark.parametrize("budgets", [(10_000, 800), (60, 10_000), (45, 300), (90, 70)], ids=str)
def test_a_cut_sample_is_the_beginning_of_the_whole_one(
    split: Split, processor: CasaProcessor, budgets: tuple[int, int]
) -> None:
    """Token for token, as long as its index says, and with one frame more it would not fit."""
    fit = Fit(split, processor, Budget(*budgets))
    text, images, counts = fit.lengths()
    cut = 0
    for row in range(len(split)):
        sample = split.read(row)
        whole = encode_sample(sample, processor)
        if not fit.budget.holds(text[row], images[row]):
            assert fit.cut(row) is None
            # Not even its first frame fits beside the question.
            assert len(encode_sample(cut_answer(sample, 1), processor).ids) > budgets[0]
            continue
        found = encoded_of(fit, row, processor)
        frames = len(found.images)
        assert (text[row], images[row]) == (len(found.ids), found.chunk().image_tokens)
        assert found.ids == whole.ids[: len(found.ids)]
        assert found.answer == whole.answer[: len(found.ids)]
        assert found.points == whole.points[:frames] and found.follows == whole.follows[:frames]
        if frames == len(sample.images):
            assert found.ids == whole.ids
            continue
        cut += 1
        trained = fit.apply(row, sample)[0]
        assert trained.open and trained.turns[0].live == sample.turns[0].live[: 2 * frames]
        assert "".join(p for p in trained.turns[0].live if isinstance(p, str)) == (
            trained.turns[0].assistant
        )
        longer = len(encode_sample(cut_answer(sample, frames + 1), processor).ids)
        room = budgets[1] // (frames + 1)
        assert longer > budgets[0] or room < LEAST_FRAME_TOKENS
    assert cut > 1 and counts["shortened"] >= cut and counts["without_captions"] == 0


def test_no_end_of_an_answer_is_learned_that_was_none(
    split: Split, processor: CasaProcessor
) -> None:
    """The last frame that stays waits for the next one, which its " ..." says; a clip that is not
    cut ends as before.
    """
    fit = Fit(split, processor, Budget(60, 10_000))
    wait = processor.tokenizer.encode(FRAME_END, add_special_tokens=False)
    end = processor.answer_end_token
    text, images, _ = fit.lengths()
    cut = kept = 0
    for row in range(len(split)):
        tokens = learned(encoded_of(fit, row, processor))
        if len(fit.apply(row, split.read(row))[0].images) < len(split.read(row).images):
            cut += 1
            assert tokens[-len(wait) :] == wait and end not in tokens
        elif fit.budget.holds(text[row], images[row]):
            kept += 1
            assert tokens[-1] == end
    assert cut > 1 and kept > 1


def test_frames_shrink_before_any_goes(split: Split, processor: CasaProcessor) -> None:
    row, frames = len(split) - 1, 24
    for budget, left in ((24 * 64, 24), (24 * 64 - 1, 23), (10 * 64 + 5, 10), (64, 1), (40, 1)):
        fit = Fit(split, processor, Budget(10_000, budget))
        found = fit.cut(row)
        assert found is not None and found.images == tuple(range(left))
        assert found.image_tokens <= budget
        assert found.max_pixels == min(100, budget // left) * 784
        assert encoded_of(fit, row, processor).chunk().image_tokens == found.image_tokens
    assert len(split.read(row).images) == frames


def test_captions_of_the_index_are_those_behind_each_frame(
    split: Split, processor: CasaProcessor
) -> None:
    tokens, offsets = split.list_column("caption_tokens")
    for row, sample in enumerate(split):
        assert sample.is_live
        lengths = [
            len(processor.encode(cut.messages(), continue_final=cut.open).ids)
            for cut in (cut_answer(sample, n + 1) for n in range(len(sample.images)))
        ]
        around = len(processor.pre_image_tokens) + len(processor.post_image_tokens)
        own = tokens[offsets[row] : offsets[row + 1]].tolist()
        gaps = [b - a for a, b in itertools.pairwise(lengths)]
        assert [n + around for n in own[1:-1]] == gaps[:-1] if len(own) > 1 else len(own) == 1
        if len(own) > 1:
            assert own[-1] + around == gaps[-1]  # with the end of the turn


def test_validations_count_the_last_caption_of_a_cut_answer(
    split: Split, processor: CasaProcessor
) -> None:
    """In a pack, as training reads it; a caption is an answer where tokens stand around frames."""
    fit = Fit(split, processor, Budget(60, 10_000))
    text, images, _ = fit.lengths()
    row = len(split) - 1
    lengths = int(text[row]), int(images[row])
    materializer = Materializer({"a": split}, processor, Budget(90, 10_001), {"a": fit})
    batch = materializer[Pack(0, (("a", row, *lengths),), *lengths)]
    assert not batch.failures and (batch.text_tokens, batch.image_tokens) == lengths
    found = encoded_of(fit, row, processor)
    assert batch.inputs.logits_index is not None
    assert batch.targets.tolist() == learned(found)
    spans = answer_spans(
        batch.inputs.logits_index.tolist(), batch.targets.tolist(), processor.answer_end_token
    )
    # What opens an answer before its first frame is learned, too.
    opened = bool(processor.template["answer_start"])
    assert len(spans) == (len(found.images) + opened if processor.pre_image_tokens else 1)


# ------------------------------------------------------------------------------ older indexes


def forget_captions(directory: Path) -> None:
    """Makes an index such as the version before this column wrote."""
    table = open_index(directory / INDEX_FILE).combine_chunks().drop_columns(["caption_tokens"])
    write_index(directory, table)
    meta = json.loads((directory / "meta.json").read_text())
    meta["index_sha256"] = sha256(directory / INDEX_FILE)
    (directory / "meta.json").write_text(json.dumps(meta))


def config_of(split: Path, **budgets: int) -> Config:
    sources = {"live": SourceConfig(str(split))}
    return Config(data=DataConfig(sources=sources, packs_per_step=2, balance_group=2, **budgets))


def test_an_index_without_captions_reads_as_before_and_says_so(tmp_path: Path) -> None:
    processor = CasaProcessor(build_tokenizer(), MAX_PIXELS, BARE)
    save_tokenizer(processor.tokenizer, tmp_path / "tokenizer")
    now = write_live(processor, tmp_path / "now")
    old = write_live(processor, tmp_path / "old")
    forget_captions(old)
    for budgets in ((10_000, 800), (45, 300)):
        new, before = (Fit(Split(path), processor, Budget(*budgets)) for path in (now, old))
        lengths, lengths_before = new.lengths(), before.lengths()
        shorter = np.flatnonzero(lengths[0] != lengths_before[0])
        assert lengths_before[2]["without_captions"] >= len(shorter) > 1
        assert not before.budget.holds(*lengths_before[:2])[shorter].any()
        for row in shorter.tolist():
            assert before.cut(row) is None
    notes = {
        path: open_data(
            config_of(path, text_tokens=61, image_tokens=10_001), processor, {}, 1, lambda x: [x]
        ).notes
        for path in (now, old)
    }
    assert not any("retokenize" in note for note in notes[now])
    (said,) = [note for note in notes[old] if "retokenize" in note]
    assert said.startswith("source live: ") and "data.sources.live.path=NEW" in said
    # What it says to do helps, given word by word.
    (words,) = re.findall("python -m data_recipes (retokenize .* --out NEW)", said)
    given = {"NAME": str(tmp_path / "tokenizer"), "NEW": str(tmp_path / "counted")}
    assert main([given.get(word, word) for word in shlex.split(words)]) == 0
    assert Split(tmp_path / "counted").index.equals(Split(now).index)


def test_a_recipe_that_an_earlier_version_began_is_finished_by_this_one(tmp_path: Path) -> None:
    """Parts without the column stand beside those with it; only the latter's samples are cut."""
    processor = CasaProcessor(build_tokenizer(), MAX_PIXELS, BARE)
    whole = Split(write_live(processor, tmp_path / "whole"))
    rows = open_index(tmp_path / "whole" / INDEX_FILE)
    shard = rows.column("shard").to_numpy()
    for number in (0, 1):
        table = rows.filter(pa.array(shard == number)).combine_chunks()
        table = table.drop_columns(["caption_tokens"]) if number == 0 else table
        with pa.OSFile(str(part_path(tmp_path, number)), "wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    assert merge_parts(tmp_path, [0, 1]) == len(whole)
    table = open_index(tmp_path / INDEX_FILE)
    found = table.column("caption_tokens").to_pylist()
    expected = rows.column("caption_tokens").to_pylist()
    assert found == [[] if s == 0 else own for s, own in zip(shard, expected, strict=True)]
    assert table.schema.equals(rows.schema)


def test_a_live_turn_is_cut_between_slots() -> None:
    line = live_line("v.mp4", 0, 1, [[0, 0.4, "one"], [0.5, 0.9, "two"]])
    row = {"messages": line, "frame_times": [0.0, 0.5, 1.0]}
    sample = live_whisperx("k", row, [b"a", b"b", b"c"])
    assert cut_answer(sample, 3) == sample == cut_answer(sample, 9)
    (turn,) = cut_answer(sample, 2).turns
    assert turn.live == (ImageSlot(0), FRAME_END, ImageSlot(1), " one" + FRAME_END)
    assert turn.assistant == f"{FRAME_END} one{FRAME_END}" and turn.open
    assert cut_answer(sample, 2).images == (b"a", b"b") and cut_answer(sample, 2).times == (0, 0.5)
    assert dataclasses.replace(turn, open=False, live=(), assistant="") == dataclasses.replace(
        sample.turns[0], live=(), assistant=""
    )
