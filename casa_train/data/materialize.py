"""Pack descriptor -> PackedBatch: read, decode, resize, tokenize. Runs in loader workers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from casa_train.data.plan import Pack
from casa_train.data.sample import Sample
from casa_train.data.schemas import BadRow
from casa_train.data.shards import Split
from casa_train.errors import UserError
from casa_train.modeling.image_processing_casa import ImageError
from casa_train.modeling.packed import PackedInputs
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.modeling.windows import Chunk, has_pair


@dataclass(frozen=True)
class Failure:
    """A sample that left a hole in its pack."""

    source: str
    key: str
    reason: str
    detail: str


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


@dataclass
class EncodedSample:
    """One sample as it stands in a pack, images loaded."""

    ids: list[int]
    answer: list[bool]
    points: list[int]
    images: list[Tensor]

    @property
    def image_tokens(self) -> list[int]:
        return [image.shape[1] * image.shape[2] // 784 for image in self.images]


def encode_sample(sample: Sample, processor: CasaProcessor) -> EncodedSample:
    """A training sample through the processor that inference uses.

    :raises ImageError: an image that cannot be used.
    """
    encoded = processor.encode(sample.messages(list(sample.images)))
    images = [
        processor.image_processor.load(image, f"image {i} of sample {sample.key}")
        for i, image in enumerate(encoded.images)
    ]
    return EncodedSample(encoded.ids, encoded.answer, encoded.points, images)


def dummy_sample(token: int) -> EncodedSample:
    """One black image token and one text token that nothing is learned from.

    Where a pack holds no pair of image and text, this keeps every rank's graph the same.
    """
    black = torch.zeros(3, 28, 28, dtype=torch.uint8)
    return EncodedSample(ids=[token], answer=[False], points=[0], images=[black])


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


class Materializer(torch.utils.data.Dataset[PackedBatch]):
    """Turns packs into tensors; `loader[pack]` may run in any process.

    :param text_budget: text tokens of a full pack; :param image_budget: its image tokens.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        processor: CasaProcessor,
        text_budget: int,
        image_budget: int,
    ) -> None:
        self.splits = splits
        self.processor = processor
        self.text_budget = text_budget
        self.image_budget = image_budget

    def __getitem__(self, pack: Pack) -> PackedBatch:
        """Reads and encodes a pack; a bad sample leaves a hole.

        :raises UserError: the data is gone.
        :raises RuntimeError: a sample that fails in a way that is no known kind of bad data.
        """
        with warnings.catch_warnings():
            # Of odd files, which `python -W error` would turn into failures.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return self._materialize(pack)

    def _materialize(self, pack: Pack) -> PackedBatch:
        samples: list[EncodedSample] = []
        names: list[tuple[str, str]] = []
        answers: list[tuple[str, int]] = []
        failures: list[Failure] = []
        for name, row, text, tokens in pack.items:
            split = self.splits[name]
            key, source = split.key(row), split.source(row)
            try:
                encoded = encode_sample(split.read(row), self.processor)
            except (BadRow, ImageError) as error:
                failures.append(Failure(source, key, error.reason, str(error)))
                continue
            except UserError:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"sample {source}/{key} of pack {pack.index}: {type(error).__name__}: {error}"
                ) from error
            found = len(encoded.ids), sum(encoded.image_tokens)
            if found != (text, tokens):
                detail = f"{found} text and image tokens, the index promised {(text, tokens)}"
                failures.append(Failure(source, key, "index_mismatch", detail))
                continue
            samples.append(encoded)
            names.append((source, key))
            answers.append((name, sum(encoded.answer[1:])))
        pairs = sum(bool(s.images) and any(s.answer) for s in samples)
        chunks = [Chunk(len(s.ids), tuple(s.points), tuple(s.image_tokens)) for s in samples]
        if not has_pair(chunks):
            dummy = dummy_sample(self.processor.tokenizer.eos_token_id or 0)
            samples.append(dummy)
            chunks.append(Chunk(1, (0,), (1,)))
        rows: list[int] = []
        targets: list[int] = []
        start = 0
        for sample in samples:
            for position in range(1, len(sample.ids)):
                if sample.answer[position]:
                    rows.append(start + position - 1)
                    targets.append(sample.ids[position])
            start += len(sample.ids)
        inputs = PackedInputs(
            input_ids=torch.tensor([i for s in samples for i in s.ids], dtype=torch.long),
            chunks=chunks,
            images=in_one_storage([image for s in samples for image in s.images]),
            logits_index=torch.tensor(rows, dtype=torch.long),
        )
        text_tokens = sum(c.text for c in chunks)
        image_tokens = sum(sum(c.images) for c in chunks)
        return PackedBatch(
            index=pack.index,
            inputs=inputs,
            targets=torch.tensor(targets, dtype=torch.long),
            answer_sources=answers,
            sample_ids=[f"{source}/{key}" for source, key in names],
            sources=[source for source, _ in names],
            text_tokens=text_tokens,
            image_tokens=image_tokens,
            fills=(text_tokens / self.text_budget, image_tokens / self.image_budget),
            pairs=pairs,
            failures=failures,
        )
