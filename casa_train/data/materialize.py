"""Pack descriptor -> PackedBatch: read, decode, resize, tokenize. Runs in loader workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from casa_train.data.budget import Budget
from casa_train.data.fit import Fit, processor_for
from casa_train.data.prepared.plan import Pack
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import Sample
from casa_train.data.schemas.rows import BadRow
from casa_train.data.transfer import pinned
from casa_train.errors import UserError
from casa_train.modeling.image_processing_casa import CasaImageProcessor, ImageError
from casa_train.modeling.packed import PackedInputs
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.modeling.windows import Chunk, has_pair

CountWork = Callable[[Sequence[Chunk], int], int]
"""Samples of a pack and its rows with logits -> floating-point operations."""


@dataclass(frozen=True)
class Failure:
    """A sample that left a hole in its pack."""

    source: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Entry:
    """A sample that stands in a pack: how long it was planned to be, and how to get it.

    :param name: its source in the mixture; :param source: what its rows call their source.
    """

    name: str
    source: str
    key: str
    text_tokens: int
    image_tokens: int
    read: Callable[[], Sample]
    shorten: Callable[[Sample], tuple[Sample, int]] | None = None


@dataclass
class PackedBatch:
    """One micro-step's data.

    :param inputs: what the model reads; `inputs.logits_index` are the rows that predict answers.
    :param targets: (A,) the token each of those rows must predict.
    :param answer_sources: for each sample, its source in the mixture and how many of the targets
        are its own.
    :param sample_ids: "source/key" of every sample, in order.
    :param fills: used share of the text and of the image budget.
    :param pairs: samples with images and answers; where there are none, no gradient reaches vision.
    :param left_out: samples that exceed the budgets; a stream meets them on its way, a plan knows
        them at the start.
    :param operations: floating-point operations of its forward and backward pass; 0: not counted.
    :param places: for each sample, which of the pack's it is: failures leave holes.
    """

    index: int
    inputs: PackedInputs
    targets: Tensor
    answer_sources: list[tuple[str, int]]
    sample_ids: list[str]
    sources: list[str]
    text_tokens: int
    image_tokens: int
    fills: tuple[float, float]
    pairs: int
    failures: list[Failure] = field(default_factory=list)
    left_out: int = 0
    operations: int = 0
    places: list[int] = field(default_factory=list)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory; torch's DataLoader calls this where it pins."""
        inputs, targets = pinned(self.inputs, self.targets)
        return replace(self, inputs=inputs, targets=targets)


@dataclass
class EncodedSample:
    """One sample as it stands in a pack, images loaded.

    :param side: pixels of an image token's side.
    """

    ids: list[int]
    answer: list[bool]
    points: list[int]
    images: list[Tensor]
    side: int
    follows: tuple[bool, ...] = ()

    def chunk(self) -> Chunk:
        """Its lengths, as the model and the count of its work want to know them."""
        side = self.side
        grids = [(image.shape[1] // side, image.shape[2] // side) for image in self.images]
        return Chunk.of_grids(len(self.ids), self.points, grids, self.follows)


def encode_sample(
    sample: Sample, processor: CasaProcessor, images: CasaImageProcessor | None = None
) -> EncodedSample:
    """A training sample through the processor that inference uses.

    :param images: image code with another bound on pixels.
    :raises ImageError: an image that cannot be used.
    """
    messages = sample.messages(list(sample.images))
    encoded = processor.encode(messages, continue_final=sample.open)
    load = (images or processor.image_processor).load
    loaded = [
        load(image, f"image {i} of sample {sample.key}") for i, image in enumerate(encoded.images)
    ]
    return EncodedSample(
        encoded.ids,
        encoded.answer,
        encoded.points,
        loaded,
        processor.token_side,
        tuple(encoded.follows),
    )


def dummy_sample(token: int, side: int) -> EncodedSample:
    """One black image token and one text token that nothing is learned from.

    Where a pack holds no pair of image and text, this keeps every rank's graph the same.

    :param side: pixels of an image token's side.
    """
    black = torch.zeros(3, side, side, dtype=torch.uint8)
    return EncodedSample(ids=[token], answer=[False], points=[0], images=[black], side=side)


def in_one_storage(images: Sequence[Tensor]) -> list[Tensor]:
    """The same images as views of one buffer.

    On the way from a worker every storage holds a file descriptor open, in both processes; a few
    packs of hundreds of small images would reach the usual limit of 1,024. In a worker the buffer
    is shared memory from the start, as in torch's own collate: that saves a copy.
    """
    if not images:
        return []
    buffer = torch.empty(0, dtype=torch.uint8)
    if torch.utils.data.get_worker_info() is not None:
        buffer.set_(torch.UntypedStorage._new_shared(sum(image.nbytes for image in images)))
    torch.cat([image.flatten() for image in images], out=buffer)
    parts = buffer.split([image.numel() for image in images])
    return [part.view(image.shape) for part, image in zip(parts, images, strict=True)]


def build_batch(
    index: int,
    entries: Iterable[Entry],
    processor: CasaProcessor,
    budget: Budget,
    count_work: CountWork | None = None,
) -> PackedBatch:
    """Reads and encodes the samples of one pack; a bad sample leaves a hole.

    :param budget: of a whole pack.
    :param count_work: counts the pack's work here, where it delays nobody.
    :raises UserError: the data is gone.
    :raises RuntimeError: a sample that fails in a way that is no known kind of bad data.
    """
    with warnings.catch_warnings():
        # Of odd files, which `python -W error` would turn into failures.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return _build(index, entries, processor, budget, count_work)


def _build(
    index: int,
    entries: Iterable[Entry],
    processor: CasaProcessor,
    budget: Budget,
    count_work: CountWork | None,
) -> PackedBatch:
    samples: list[EncodedSample] = []
    chunks: list[Chunk] = []
    names: list[tuple[str, str]] = []
    answers: list[tuple[str, int]] = []
    failures: list[Failure] = []
    places: list[int] = []
    for place, entry in enumerate(entries):
        source, key = entry.source, entry.key
        try:
            sample, images = entry.read(), processor.image_processor
            if entry.shorten is not None:
                sample, max_pixels = entry.shorten(sample)
                images = processor_for(processor, max_pixels)
            encoded = encode_sample(sample, processor, images)
        except (BadRow, ImageError) as error:
            failures.append(Failure(source, key, error.reason, str(error)))
            continue
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"sample {source}/{key} of pack {index}: {type(error).__name__}: {error}"
            ) from error
        chunk = encoded.chunk()
        found = chunk.text, chunk.image_tokens
        planned = entry.text_tokens, entry.image_tokens
        if found != planned:
            detail = f"{found} text and image tokens, the index promised {planned}"
            failures.append(Failure(source, key, "index_mismatch", detail))
            continue
        samples.append(encoded)
        chunks.append(chunk)
        names.append((sample.source, sample.key))
        answers.append((entry.name, sum(encoded.answer[1:])))
        places.append(place)
    pairs = sum(bool(s.images) and any(s.answer) for s in samples)
    if not has_pair(chunks):
        dummy = dummy_sample(processor.tokenizer.eos_token_id or 0, processor.token_side)
        samples.append(dummy)
        chunks.append(dummy.chunk())
    rows: list[int] = []
    targets: list[int] = []
    start = 0
    for encoded in samples:
        for position in range(1, len(encoded.ids)):
            if encoded.answer[position]:
                rows.append(start + position - 1)
                targets.append(encoded.ids[position])
        start += len(encoded.ids)
    inputs = PackedInputs(
        input_ids=torch.tensor([i for s in samples for i in s.ids], dtype=torch.long),
        chunks=chunks,
        images=in_one_storage([image for s in samples for image in s.images]),
        logits_index=torch.tensor(rows, dtype=torch.long),
    )
    text_tokens = sum(c.text for c in chunks)
    image_tokens = sum(c.image_tokens for c in chunks)
    return PackedBatch(
        index=index,
        inputs=inputs,
        targets=torch.tensor(targets, dtype=torch.long),
        answer_sources=answers,
        sample_ids=[f"{source}/{key}" for source, key in names],
        sources=[source for source, _ in names],
        text_tokens=text_tokens,
        image_tokens=image_tokens,
        fills=budget.fills(text_tokens, image_tokens),
        pairs=pairs,
        failures=failures,
        operations=0 if count_work is None else count_work(chunks, len(rows)),
        places=places,
    )


class Materializer(torch.utils.data.Dataset[PackedBatch]):
    """Turns packs into tensors; `loader[pack]` may run in any process.

    :param budget: of a whole pack.
    :param fits: by source, what of its samples is trained; the same as for the plan.
    :param count_work: counts the floating-point work of a pack.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        processor: CasaProcessor,
        budget: Budget,
        fits: Mapping[str, Fit] | None = None,
        count_work: CountWork | None = None,
    ) -> None:
        self.splits = splits
        self.processor = processor
        self.budget = budget
        self.fits = dict(fits or {})
        self.count_work = count_work

    def __getitem__(self, pack: Pack) -> PackedBatch:
        entries = (self._entry(*item) for item in pack.items)
        return build_batch(pack.index, entries, self.processor, self.budget, self.count_work)

    def _entry(self, name: str, row: int, text: int, images: int) -> Entry:
        split, fit = self.splits[name], self.fits.get(name)
        source, key = split.source(row), split.key(row)
        shorten = None if fit is None else partial(fit.apply, row)
        return Entry(name, source, key, text, images, partial(split.read, row), shorten)
