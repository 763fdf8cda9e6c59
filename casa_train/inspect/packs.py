"""Batches as training gets them -> what a page shows of them: windows, tokens, pictures.

Which tokens are learned is read from `logits_index` and `targets` of the batch, which windows there
are from `split_windows`: a mistake in the data shows here as it would train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from casa_train.data.budget import Budget
from casa_train.data.materialize import Failure, Materializer, PackedBatch
from casa_train.data.prepared.plan import Pack
from casa_train.modeling.windows import Window, split_windows
from casa_train.pages import pictures

TRAINED, FAILED, DUMMY = "trained", "failed", "dummy"
FULL_SIZE = 160  # with more pictures on a page each gets smaller, so that the page does not grow
HUES = 8  # windows take these colours in turn

SIGNS = {9: "⇥\t", 10: "↵\n"}  # a token that ends a line says so
BROKEN = "\ufffd"  # what decoding part of a character gives
CONTINUED = ""  # the page puts a sign of its own there
LONGEST_CHARACTER = 4  # bytes, so at most as many tokens


@dataclass(frozen=True)
class Token:
    """A text token.

    :param text: empty for the further tokens of a character that several tokens make up.
    :param special: one of the tokenizer's added tokens, shown by its name.
    :param learned: whether the loss reads a prediction of it.
    :param target: what the batch asks for in its place, where that is another token: a defect.
    """

    id: int
    text: str
    special: bool
    learned: bool
    target: str | None


@dataclass(frozen=True)
class Picture:
    """An image as the model reads it.

    :param number: of the image, in its pack.
    """

    number: int
    uri: str
    width: int
    height: int
    tokens: int


@dataclass(frozen=True)
class WindowView:
    """A window with its images and its text.

    :param hue: its colour; None: text before the first image, which belongs to no window.
    """

    number: int
    hue: int | None
    pictures: list[Picture]
    tokens: list[Token]


@dataclass(frozen=True)
class SampleView:
    """A sample of a pack.

    :param mixture: the source's name in the mixture; empty for the dummy.
    :param state: trained, failed or dummy.
    """

    id: str
    mixture: str
    state: str
    text_tokens: int
    image_tokens: int
    windows: list[WindowView] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def learned(self) -> int:
        return sum(token.learned for window in self.windows for token in window.tokens)

    @property
    def pictures(self) -> int:
        return sum(len(window.pictures) for window in self.windows)


@dataclass(frozen=True)
class Stretch:
    """A piece of a budget, in tokens from its start."""

    start: int
    length: int
    hue: int | None
    label: str


@dataclass(frozen=True)
class PackView:
    """A pack: how full it is, and its samples in order.

    :param text, images: what stands where in each budget.
    :param answers: runs of learned tokens in the text budget.
    :param cuts: where samples end, in the text and in the image budget.
    :param planned: text and image tokens that the plan promised.
    """

    index: int
    text_tokens: int
    image_tokens: int
    budget: Budget
    planned: tuple[int, int]
    samples: list[SampleView]
    text: list[Stretch]
    images: list[Stretch]
    answers: list[Stretch]
    cuts: tuple[list[int], list[int]]

    @property
    def learned(self) -> int:
        return sum(sample.learned for sample in self.samples)

    @property
    def failures(self) -> list[SampleView]:
        return [sample for sample in self.samples if sample.failure is not None]


class TokenTexts:
    """Token ids as a reader sees them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """A token alone; part of a character by the tokenizer's name for it."""
        text = self._read(token)
        return text if text and BROKEN not in text else self._name(token)

    def read(self, tokens: Sequence[int]) -> list[str]:
        """Tokens that follow each other: the first of a character's several tokens shows it."""
        texts: list[str] = []
        while len(texts) < len(tokens):
            place = len(texts)
            if BROKEN in self._read(tokens[place]):
                for count in range(2, LONGEST_CHARACTER + 1):
                    text = self._decode(tokens[place : place + count])
                    if BROKEN not in text and place + count <= len(tokens):
                        texts += [text, *[CONTINUED] * (count - 1)]
                        break
            if len(texts) == place:
                texts.append(self[tokens[place]])
        return texts

    def _read(self, token: int) -> str:
        if token not in self._texts:
            if token in self.special:
                text = self._name(token)
            else:
                text = self._decode([token])
                if self._name(token).startswith("▁") and not text.startswith(" "):
                    text = " " + text  # SentencePiece drops the space at the start of a text
            self._texts[token] = text.translate(SIGNS)
        return self._texts[token]

    def _name(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Planned:
    """A batch, and the samples that its pack was made of, in order.

    :param samples: of each its source in the mixture, "source/key" and planned lengths.
    """

    batch: PackedBatch
    samples: list[tuple[str, str, tuple[int, int]]]

    @property
    def lengths(self) -> tuple[int, int]:
        """Text and image tokens that the plan promised."""
        lengths = [own for _, _, own in self.samples]
        return sum(text for text, _ in lengths), sum(images for _, images in lengths)


def view_packs(packs: Sequence[Pack], materializer: Materializer) -> list[PackView]:
    """Materialises packs and looks at what came out."""
    planned = [Planned(materializer[pack], _named(pack, materializer)) for pack in packs]
    return view_batches(planned, materializer.processor.tokenizer, materializer.budget)


def view_batches(planned: Sequence[Planned], tokenizer: Any, budget: Budget) -> list[PackView]:
    """Looks at batches.

    :param budget: of a whole pack.
    """
    side = side_for(sum(len(one.batch.inputs.images) for one in planned))
    texts = TokenTexts(tokenizer)
    return [_view(one, budget, texts, side) for one in planned]


def side_for(images: int) -> int:
    """CSS pixels of the longer side of a picture where a page holds so many."""
    if images <= FULL_SIZE:
        return pictures.SIDE
    return max(24, round(pictures.SIDE * math.sqrt(FULL_SIZE / images)))


def _view(planned: Planned, budget: Budget, texts: TokenTexts, side: int) -> PackView:
    batch = planned.batch
    chunks = batch.inputs.chunks
    tokens = _tokens(batch, texts)
    shown = _pictures(batch, side)
    windows = split_windows(chunks)
    by_chunk: list[list[WindowView]] = [[] for _ in chunks]
    text: list[Stretch] = []
    image = coloured = 0
    for number, window in enumerate(windows):
        hue = None if window.continues else coloured % HUES
        coloured += not window.continues
        count = _images_in(window, shown[image:])
        by_chunk[window.sample].append(
            WindowView(
                number,
                hue,
                shown[image : image + count],
                tokens[slice(*window.text)],
            )
        )
        image += count
        text.append(_stretch(*window.text, hue, f"window {number}" if hue is not None else "text"))

    def trained(chunk: int, id: str, mixture: str, state: str) -> SampleView:
        lengths = chunks[chunk].text, sum(chunks[chunk].images)
        return SampleView(id, mixture, state, *lengths, by_chunk[chunk])

    samples: list[SampleView] = []
    failures, ids = list(batch.failures), batch.sample_ids
    chunk = 0
    for mixture, id, item in planned.samples:
        if failures and f"{failures[0].source}/{failures[0].key}" == id:
            samples.append(SampleView(id, mixture, FAILED, *item, failure=failures.pop(0)))
        else:  # a row of a stream may call its source by another name
            samples.append(trained(chunk, ids[chunk], mixture, TRAINED))
            chunk += 1
    samples += [trained(c, "dummy", "", DUMMY) for c in range(len(ids), len(chunks))]

    stretches: list[Stretch] = []
    start = 0
    for drawn in (view for sample in by_chunk for view in sample):
        for picture in drawn.pictures:
            label = f"image {picture.number}, {picture.width}×{picture.height}"
            stretches.append(Stretch(start, picture.tokens, drawn.hue, label))
            start += picture.tokens
    return PackView(
        index=batch.index,
        text_tokens=batch.text_tokens,
        image_tokens=batch.image_tokens,
        budget=budget,
        planned=planned.lengths,
        samples=samples,
        text=text,
        images=stretches,
        answers=_runs(tokens),
        cuts=(
            _ends([chunk.text for chunk in chunks]),
            _ends([sum(chunk.images) for chunk in chunks]),
        ),
    )


def _named(pack: Pack, materializer: Materializer) -> list[tuple[str, str, tuple[int, int]]]:
    """Mixture source, "source/key" and planned lengths of every sample that the plan put here."""
    named = []
    for name, row, text, images in pack.items:
        split = materializer.splits[name]
        named.append((name, f"{split.source(row)}/{split.key(row)}", (text, images)))
    return named


def _tokens(batch: PackedBatch, texts: TokenTexts) -> list[Token]:
    ids = batch.inputs.input_ids.tolist()
    rows = batch.inputs.logits_index
    assert rows is not None
    # The prediction of a token is read off the row before it.
    wanted: Mapping[int, int] = {
        row + 1: target for row, target in zip(rows.tolist(), batch.targets.tolist(), strict=True)
    }
    return [
        Token(
            id=token,
            text=text,
            special=token in texts.special,
            learned=position in wanted,
            target=None if wanted.get(position, token) == token else texts[wanted[position]],
        )
        for position, (token, text) in enumerate(zip(ids, texts.read(ids), strict=True))
    ]


def _pictures(batch: PackedBatch, side: int) -> list[Picture]:
    counts = [tokens for chunk in batch.inputs.chunks for tokens in chunk.images]
    return [
        Picture(number, _thumbnail(image, side), image.shape[2], image.shape[1], tokens)
        for number, (image, tokens) in enumerate(zip(batch.inputs.images, counts, strict=True))
    ]


def _thumbnail(pixels: Tensor, side: int) -> str:
    """:param pixels: (3, H, W) uint8, as the model reads them."""
    return pictures.thumbnail(Image.fromarray(pixels.permute(1, 2, 0).numpy()), side)


def _images_in(window: Window, following: Sequence[Picture]) -> int:
    """How many of the following images make up the window's image tokens."""
    left = window.image[1] - window.image[0]
    count = 0
    while left > 0:
        left -= following[count].tokens
        count += 1
    return count


def _stretch(start: int, stop: int, hue: int | None, label: str) -> Stretch:
    return Stretch(start, stop - start, hue, label)


def _runs(tokens: Sequence[Token]) -> list[Stretch]:
    """Learned tokens that stand side by side."""
    runs: list[Stretch] = []
    for position, token in enumerate(tokens):
        if token.learned:
            start = position
            if runs and runs[-1].start + runs[-1].length == position:
                start = runs.pop().start
            runs.append(_stretch(start, position + 1, None, "learned"))
    return runs


def _ends(lengths: Sequence[int]) -> list[int]:
    ends, end = [], 0
    for length in lengths:
        end += length
        ends.append(end)
    return ends
