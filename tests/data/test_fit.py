"""What budgets and ratings leave of a sample; planned lengths are those that are trained."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from casa_train.data.budget import Budget
from casa_train.data.fit import LEAST_FRAME_TOKENS, NEVER, Fit, processor_for
from casa_train.data.image_lengths import image_tokens, token_counts
from casa_train.data.lengths import measure
from casa_train.data.materialize import encode_sample
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import Sample
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor
from tests.helpers.commands import TEMPLATE
from tests.helpers.counting import write_talks, writer_for

MAX_PIXELS = 140 * 140  # 25 image tokens
BRACKETS = {**TEMPLATE, "image_start": "<|user|>", "image_end": "<|end|>"}
# Without a single special token, and with a default system turn.
LITERAL = {
    "system": "Be kind.",
    "system_start": "### ",
    "system_end": "\n",
    "user_start": "Q: ",
    "user_end": "\n",
    "assistant_start": "A:",
    "answer_start": " ",
    "assistant_end": "\n\n",
    "image_start": "[",
    "image_end": "]",
}


@functools.cache
def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def processor(data_dir: Path) -> CasaProcessor:
    return CasaProcessor(load_tokenizer(str(data_dir / "tokenizer")), MAX_PIXELS, BRACKETS)


@pytest.fixture(scope="module")
def conversations(processor: CasaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Up to five rated turns with up to two images each; the last sample has one long turn."""
    out, draw = tmp_path_factory.mktemp("conversations"), random.Random(0)
    shards = writer_for(processor, out)
    for i in range(60):
        turns = draw.randint(1, 5)
        shown = [draw.choice([0, 0, 1, 2]) for _ in range(turns)]
        texts = [
            {
                "user": "<image>" * n + "what is this? " * draw.randint(1, 4),
                "assistant": "a red square " * draw.randint(1, 6),
            }
            for n in shown
        ]
        row = {
            "source": "talk",
            "texts": texts,
            "relevance_ratings": [draw.choice([1, 3, 5]) for _ in texts],
        }
        images = [picture(draw.randint(20, 200), draw.randint(20, 200)) for _ in range(sum(shown))]
        assert shards.write(f"s{i}", row, images)
    texts = [{"user": "how long? ", "assistant": "very " * 400}]
    assert shards.write("long", {"source": "talk", "texts": texts}, [])
    shards.close()
    return Split(out)


@pytest.fixture(scope="module")
def videos(processor: CasaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Videos of 1 to 40 frames, each of one size."""
    out, draw = tmp_path_factory.mktemp("videos"), random.Random(1)
    shards = writer_for(processor, out, "llava_video")
    for i, frames in enumerate((1, 2, 3, 5, 8, 12, 20, 40)):
        size = draw.randint(80, 220), draw.randint(80, 220)
        row = {
            "video": f"v{i}.mp4",
            "data_source": "film",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat happens?"},
                {"from": "gpt", "value": "a square moves"},
            ],
            "frame_times": [n / 2 for n in range(frames)],
        }
        assert shards.write(f"v{i}", row, [picture(*size)] * frames), shards.skipped
    shards.close()
    return Split(out)


def trained(fit: Fit, row: int, processor: CasaProcessor) -> tuple[int, int, int]:
    """Text tokens, image tokens and images of the sample as it is trained."""
    return tokens_of(*fit.apply(row, fit.split.read(row)), processor)


def tokens_of(sample: Sample, max_pixels: int, processor: CasaProcessor) -> tuple[int, int, int]:
    """Text tokens, image tokens and images of a sample, each image of at most `max_pixels`."""
    encoded = encode_sample(sample, processor, processor_for(processor, max_pixels))
    tokens = sum(i.shape[1] * i.shape[2] // 784 for i in encoded.images)
    return len(encoded.ids), tokens, len(encoded.images)


@pytest.mark.parametrize("ratings", [{}, {"relevance": 3}, {"relevance": 5}], ids=str)
@pytest.mark.parametrize("budgets", [(10_000, 10_000), (90, 60), (60, 20)], ids=str)
def test_lengths_are_those_of_what_is_trained(
    conversations: Split,
    processor: CasaProcessor,
    budgets: tuple[int, int],
    ratings: dict[str, int],
) -> None:
    fit = Fit(conversations, processor, Budget(*budgets), ratings)
    text, images, counts = fit.lengths()
    shortened = empty = 0
    for row in range(len(conversations)):
        whole = conversations.read(row)
        if text[row] == NEVER:
            empty += 1
            assert not fit.apply(row, whole)[0].turns
            continue
        if text[row] > budgets[0] or images[row] > budgets[1]:
            assert fit.cut(row) is None
            continue
        assert (text[row], images[row]) == trained(fit, row, processor)[:2]
        uncut = Fit(conversations, processor, Budget(10**6, 10**6), ratings).apply(row, whole)[0]
        sample = fit.apply(row, whole)[0]
        assert sample.turns == uncut.turns[: len(sample.turns)]
        shortened += len(sample.turns) < len(uncut.turns)
        if len(sample.turns) < len(uncut.turns):  # one turn more would not have fitted
            longer = replace(uncut, turns=uncut.turns[: len(sample.turns) + 1])
            assert not fit.budget.holds(*tokens_of(longer, MAX_PIXELS, processor)[:2])
    assert counts == {"shortened": shortened, "rated_out": empty, "without_captions": 0}
    assert (shortened > 0) == (budgets[0] < 1000)
    assert (empty > 0) == (ratings != {})


@pytest.mark.parametrize("template", [BRACKETS, LITERAL], ids=["special tokens", "literals"])
@pytest.mark.parametrize("budgets", [(10_000, 10_000), (110, 60), (60, 20)], ids=str)
def test_lengths_hold_for_messages_of_one_side_in_a_row(
    processor: CasaProcessor, tmp_path: Path, budgets: tuple[int, int], template: dict[str, str]
) -> None:
    processor = CasaProcessor(processor.tokenizer, MAX_PIXELS, template)
    split = Split(write_talks(tmp_path, processor, 40))
    fit = Fit(split, processor, Budget(*budgets))
    text, images, counts = fit.lengths()
    assert (counts["shortened"] > 0) == (budgets[0] < 1000)
    fitting = 0
    for row in range(len(split)):
        if text[row] > budgets[0] or images[row] > budgets[1]:
            assert fit.cut(row) is None
            continue
        fitting += 1
        assert (text[row], images[row]) == trained(fit, row, processor)[:2]
    assert fitting > 5


def test_a_single_turn_over_budget_is_left_out_by_the_plan(
    conversations: Split, processor: CasaProcessor
) -> None:
    fit = Fit(conversations, processor, Budget(100, 100))
    text, _, _ = fit.lengths()
    assert fit.cut(len(conversations) - 1) is None and text[-1] > 400


@pytest.mark.parametrize("budget", [70, 130, 500, 5000])
def test_frames_shrink_together_then_go_evenly(
    videos: Split, processor: CasaProcessor, budget: int
) -> None:
    """With room for 64 tokens a frame they shrink; with less, some go."""
    big = CasaProcessor(processor.tokenizer, 280 * 280, BRACKETS)  # 100 tokens a frame at most
    fit = Fit(videos, big, Budget(10_000, budget))
    text, images, _ = fit.lengths()
    for row in range(len(videos)):
        frames = len(videos.read(row).images)
        found = trained(fit, row, big)
        assert found[:2] == (text[row], images[row])
        assert images[row] <= budget
        cut = fit.cut(row)
        assert cut is not None
        if budget // frames >= LEAST_FRAME_TOKENS:
            assert cut.images == tuple(range(frames))
        elif len(cut.images) < frames:
            assert len(cut.images) == budget // LEAST_FRAME_TOKENS
            gaps = {b - a for a, b in zip(cut.images, cut.images[1:], strict=False)}
            assert cut.images[0] == 0 and max(gaps, default=1) - min(gaps, default=1) <= 1


@pytest.mark.parametrize("budgets", [(10_000, 10_000), (90, 60)], ids=str)
def test_lengths_are_those_of_enlarged_images(
    conversations: Split, videos: Split, processor: CasaProcessor, budgets: tuple[int, int]
) -> None:
    least = 131 * 131  # 22 tokens at least, more than a shrunk video's frames may have
    bounds = {"max_pixels": 280 * 280, "template": BRACKETS}
    large = CasaProcessor(processor.tokenizer, **bounds, min_pixels=least)
    plain = CasaProcessor(processor.tokenizer, **bounds)
    enlarged = 0
    for split in (conversations, videos):
        fit = Fit(split, large, Budget(*budgets))
        text, images, _ = fit.lengths()
        _, before, _ = Fit(split, plain, Budget(*budgets)).lengths()
        fitting = np.flatnonzero((text <= budgets[0]) & (images <= budgets[1])).tolist()
        assert fitting
        for row in fitting:
            assert (text[row], images[row]) == trained(fit, row, large)[:2]
            enlarged += images[row] > before[row]
            if max(budgets) > 1000:  # a stream counts from the images' headers
                assert measure(split.read(row), large) == (text[row], images[row])
    assert enlarged > 3


def test_frames_are_shrunk_below_the_bound_of_small_images(
    videos: Split, processor: CasaProcessor
) -> None:
    least = 280 * 280  # 100 tokens; forty frames get 65 each
    large = CasaProcessor(processor.tokenizer, 2 * least, BRACKETS, min_pixels=least)
    fit = Fit(videos, large, Budget(10_000, 65 * 40))
    row = len(videos) - 1
    text, images, frames = trained(fit, row, large)
    assert frames == 40 and images <= 65 * 40
    assert (text, images) == tuple(int(lengths[row]) for lengths in fit.lengths()[:2])


def test_frames_go_for_lack_of_text_tokens_too(videos: Split, processor: CasaProcessor) -> None:
    """Two tokens stand around every frame; with one turn nothing else can go."""
    fit = Fit(videos, processor, Budget(40, 100_000))
    text, images, counts = fit.lengths()
    assert (text <= 40).all() and counts["shortened"] >= 1
    for row in range(len(videos)):
        assert trained(fit, row, processor)[:2] == (text[row], images[row])


def test_conversations_never_shrink_images(conversations: Split, processor: CasaProcessor) -> None:
    fit = Fit(conversations, processor, Budget(10_000, 30))
    for row in range(len(conversations)):
        cut = fit.cut(row)
        assert cut is None or cut.max_pixels == MAX_PIXELS


def test_ratings_that_do_not_exist_are_refused(
    conversations: Split, processor: CasaProcessor
) -> None:
    with pytest.raises(UserError, match="data.ratings.beauty is no rating"):
        Fit(conversations, processor, Budget(100, 100), {"beauty": 3}).lengths()


# ------------------------------------------------------------------------------ all at once

sides = st.one_of(
    st.integers(0, 60),
    st.integers(1, 3000),
    st.sampled_from([14, 42, 70, 5000, 9459, 9460, 20_000, 89_478_485, 2**31 - 1]),
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(sides, sides, st.integers(1024, 10**6)), min_size=1, max_size=40),
    st.sampled_from([0, 3136, 50_000, 2_000_000]),
    st.sampled_from([28, 32]),
)
def test_tokens_of_many_images_are_those_of_each(
    images: list[tuple[int, int, int]], least: int, side: int
) -> None:
    widths, heights, limits = (np.array(values) for values in zip(*images, strict=True))
    expected = [image_tokens(*image, least, side) for image in images]
    sizes = widths.astype(np.int32), heights.astype(np.int32)
    assert token_counts(*sizes, limits, least, side).tolist() == expected
    expected = [image_tokens(width, height, 906_304, least, side) for width, height, _ in images]
    assert token_counts(*sizes, 906_304, least, side).tolist() == expected


def test_tokens_of_every_small_image_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves round to even; in parts that are not full."""
    monkeypatch.setattr("casa_train.data.image_lengths.IMAGES", 1000)
    widths, heights = (side.ravel() for side in np.meshgrid(np.arange(1, 130), np.arange(1, 130)))
    for limits in ((784, 0, 28), (20_000, 0, 28), (20_000, 3136, 28), (20_000, 4096, 32)):
        found = token_counts(widths, heights, *limits)
        pairs = zip(widths.tolist(), heights.tolist(), strict=True)
        assert found.tolist() == [image_tokens(w, h, *limits) for w, h in pairs]


class Columns:
    """Columns of an index, as a `Split` gives them.

    :param captions: for each row the text tokens behind its frames, which are not in `rows`; empty
        where the index does not know them.
    """

    def __init__(
        self,
        rows: list[list[tuple[int, int, int, list[tuple[int, int]]]]],
        schema: str,
        captions: list[list[int]],
    ) -> None:
        self.meta = {"schema": schema}
        self.modality = "image" if schema == "finevision" else "video"
        turns = [turn for row in rows for turn in row]
        images = [
            (number, width, height)
            for row in rows
            for number, (_, _, _, sizes) in enumerate(row)
            for width, height in sizes
        ]
        said = [sum(own) for row, own in zip(rows, captions, strict=True) for _ in row]
        self._turns = np.array([turn[:3] for turn in turns], np.int32).reshape(-1, 3)
        self._turns[:, 1] += np.array(said, np.int32)
        self._captions = (
            np.array([tokens for own in captions for tokens in own], np.int32),
            np.cumsum([0, *map(len, captions)]).astype(np.int32),
        )
        self._images = np.array(images, np.int32).reshape(-1, 3)
        shown = [sum(len(turn[3]) for turn in row) for row in rows]
        self._offsets = tuple(
            np.cumsum([0, *counts]).astype(np.int32) for counts in (map(len, rows), shown)
        )

    def __len__(self) -> int:
        return len(self._offsets[0]) - 1

    def list_column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name == "caption_tokens":
            return self._captions
        if name in ("image_turns", "widths", "heights"):
            at = ("image_turns", "widths", "heights").index(name)
            return self._images[:, at], self._offsets[1]
        at = ("user_tokens", "assistant_tokens", "relevance").index(name)
        return self._turns[:, at], self._offsets[0]

    turn_ratings = list_column


def slowly(fit: Fit) -> tuple[list[int], list[int], dict[str, int]]:
    """`Fit.lengths`, one sample after the other."""
    text, images = [], []
    counts = {"shortened": 0, "rated_out": 0, "without_captions": 0}
    for row in range(len(fit.split)):
        turns = fit._turns(row)
        sizes = [size for _, shown in turns for size in shown]
        whole = (
            fit.base + sum(words for words, _ in turns) + fit.per_image * len(sizes),
            sum(image_tokens(*size, fit.max_pixels, fit.min_pixels, fit.side) for size in sizes),
        )
        if not turns:
            counts["rated_out"] += 1
            whole = NEVER, whole[1]
        elif not fit.budget.holds(*whole):
            cut = fit.cut(row)
            if cut is not None:
                counts["shortened"] += 1
                whole = cut.text_tokens, cut.image_tokens
            elif fit.live:
                counts["without_captions"] += not fit._values("caption_tokens", row)
        text.append(whole[0])
        images.append(whole[1])
    return text, images, counts


@st.composite
def fits(draw: st.DrawFn, processor: Any) -> Fit:
    """Any conversations, budgets and ratings; videos of frames of one size or of several."""
    schema = draw(st.sampled_from(["finevision", "llava_video", "live_whisperx"]))
    size = st.tuples(st.integers(1, 400), st.integers(1, 400))
    longest = 3 if schema == "finevision" else 40
    turn = st.tuples(
        st.integers(0, 60), st.integers(0, 60), st.integers(0, 5), st.lists(size, max_size=longest)
    )
    conversation = st.lists(turn, max_size=5)
    if schema == "live_whisperx":
        conversation |= st.lists(turn, min_size=1, max_size=1)
    rows = draw(st.lists(conversation, min_size=1, max_size=12))
    known = [
        len(row[0][3]) if schema == "live_whisperx" and len(row) == 1 and draw(st.booleans()) else 0
        for row in rows
    ]
    captions = [draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) for n in known]
    budgets = draw(st.tuples(st.integers(1, 300), st.integers(0, 1500)))
    ratings = draw(st.sampled_from([{}, {"relevance": 3}, {"relevance": 5}]))
    fit = Fit(Columns(rows, schema, captions), processor, Budget(*budgets), ratings)  # type: ignore[arg-type]
    fit.max_pixels = draw(st.sampled_from([784, 19_600, 400 * 400]))
    fit.per_image = draw(st.integers(0, 3))
    return fit


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("casa_train.data.fit.ROWS", 3)
    yield


def test_lengths_of_all_samples_are_those_of_each(
    processor: CasaProcessor, few_at_once: None
) -> None:
    met = {"shortened": 0, "rated_out": 0, "without_captions": 0, "whole": 0, "unfit": 0}

    @settings(max_examples=150, deadline=None)
    @given(fits(processor))
    def compare(fit: Fit) -> None:
        text, images, counts = fit.lengths()
        expected = slowly(fit)
        assert (text.tolist(), images.tolist(), counts) == expected
        assert fit.lengths(2)[0].tolist() == text[:2].tolist()
        unfit = (~fit.budget.holds(text, images)).sum()
        for name, number in counts.items():
            met[name] += number
        met["unfit"] += int(unfit) - counts["rated_out"]
        met["whole"] += len(text) - int(unfit) - counts["shortened"]

    compare()
    assert min(met.values()) > 20, met


def test_lengths_of_live_samples_are_those_of_each(
    processor: CasaProcessor, few_at_once: None
) -> None:
    """One answer over many frames, with captions that the index knows."""
    draw, cut = random.Random(2), 0
    for _ in range(200):
        shown = [
            [(draw.randint(1, 400), draw.randint(1, 400)) for _ in range(draw.randint(0, 30))]
            for _ in range(5)
        ]
        rows = [[(draw.randint(0, 60), draw.randint(0, 60), 0, sizes)] for sizes in shown]
        captions = [[draw.randint(0, 9) for _ in sizes] for sizes in shown]
        budget = Budget(draw.randint(1, 300), draw.choice([0, 1, 63, 64, draw.randint(0, 1500)]))
        fit = Fit(Columns(rows, "live_whisperx", captions), processor, budget)  # type: ignore[arg-type]
        fit.per_image = draw.randint(0, 3)
        text, images, counts = fit.lengths()
        assert (text.tolist(), images.tolist(), counts) == slowly(fit)
        for sizes, found in zip(shown, map(fit.cut, range(5)), strict=True):
            cut += found is not None and 1 < len(found.images) < len(sizes)
    assert cut > 100
