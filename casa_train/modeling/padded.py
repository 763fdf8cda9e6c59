"""Padded batches, as Hugging Face's interface has them, as the chunks that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .streaming import StreamingState
from .windows import Chunk

# Keywords of older clients and of `generate` that carry nothing this model needs.
TOLERATED = {
    "reinit_casa_handler",
    "__is_first_gen_call__",
    "cache_position",
    "token_type_ids",
    "next_sequence_length",
    "is_first_iteration",
}


def refuse_keywords(options: dict[str, Any]) -> None:
    """Refuses keywords of `forward` that would have no effect.

    :raises TypeError: naming them.
    """
    # What is None or False asks for nothing: peft names every argument it knows.
    asked = (k for k, v in options.items() if v is not None and v is not False)
    if unknown := sorted(set(asked) - TOLERATED):
        raise TypeError(f"CasaForConditionalGeneration.forward does not take {unknown}")


@dataclass
class PaddedInputs:
    """A checked batch of rows.

    :param ids: (B, T); :param mask: as it was given, longer by what was appended.
    :param points: for each sample the columns at which its images stand; None: no images.
    :param images: (3, H, W) each, over all samples.
    """

    ids: Tensor
    mask: Tensor | None
    points: list[list[int]] | None
    images: list[Tensor]


def padded_inputs(
    ids: Tensor | None,
    mask: Tensor | None,
    pixel_values: Any,
    points: Sequence[Any] | None,
    cache: Any,
    around: tuple[Sequence[int] | None, Sequence[int] | None],
) -> PaddedInputs:
    """What a call of `forward` gives, checked; images without points are appended to every row.

    :param around: ids that stand before and behind such an image.
    :raises ValueError: no ids, or images that nothing would read.
    """
    if ids is None:
        raise ValueError("forward needs input_ids (or packed)")
    check_ids(ids)
    # Points first: where samples were joined wrongly, their message says so.
    columns = None if points is None else [as_ints(p) for p in points]
    images = image_list(pixel_values)
    check_pixels(images)
    if images and columns is None:
        # Later tokens of a stream read it.
        if all(tokens is None for tokens in around) and not hasattr(cache, "casa"):
            raise ValueError(
                "pixel_values without image_embeds_insertion_points would stand behind the last "
                "token, where nothing reads them: pass the points, as the processor returns them, "
                "or pre_image_tokens and post_image_tokens, between which the image is "
                "then appended"
            )
        ids, mask, columns = append_images(ids, mask, len(images), *around)
    return PaddedInputs(ids, mask, columns, images)


def image_list(pixel_values: Any) -> list[Tensor]:
    """One tensor for each image, of tensors or arrays.

    :raises TypeError: images of another kind.
    """
    if pixel_values is None:
        return []
    if getattr(pixel_values, "ndim", None) == 3:
        pixel_values = [pixel_values]
    images = [torch.tensor(p) if isinstance(p, np.ndarray) else p for p in pixel_values]
    for number, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(
                f"pixel_values[{number}] is a {type(image).__name__}; expected a (3, H, W) tensor "
                "or array with values 0..255, as processor.image_processor makes them"
            )
    return images


def check_pixels(images: Sequence[Tensor]) -> None:
    """Refuses images on another scale than 0..255, as far as that shows.

    Whole numbers up to 1 are a dark image. Images of bytes cost nothing.

    :raises ValueError: negative values, or fractions that never exceed 1.
    """
    floats = {number: p for number, p in enumerate(images) if p.is_floating_point() and p.numel()}
    if not floats:
        return
    found = [
        torch.stack([p.min(), p.max(), (p != p.round()).any().to(p.dtype)])
        for p in (image.detach() for image in floats.values())
    ]
    bounds = torch.stack([bound.float().to(found[0].device) for bound in found]).tolist()
    for number, (low, high, fractions) in zip(floats, bounds, strict=True):
        if low < 0 or (high <= 1 and fractions):
            raise ValueError(
                f"pixel_values[{number}] holds values from {low:.3g} to {high:.3g}; expected "
                "0..255: the model scales and normalises images itself, so give them as "
                "processor.image_processor makes them"
            )


def check_ids(input_ids: Any) -> None:
    """Refuses `input_ids` that are no batch of rows.

    :raises ValueError: another number of axes; :raises TypeError: no tensor.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids is a {type(input_ids).__name__}; expected a (B, T) tensor: give the "
            'processor return_tensors="pt"'
        )
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (B, T), for one sample "
            "input_ids[None]"
        )


def as_ints(points: Any) -> list[int]:
    """The insertion points of one sample: a tensor, an array, or a list of numbers."""
    if hasattr(points, "tolist"):
        points = points.tolist()
    if not isinstance(points, (list, tuple, range)):
        raise ValueError(
            f"insertion points of a sample are {points!r}; expected one list of columns for each "
            "sample, such as [[25]] for a batch of one"
        )
    values = [p.tolist() if hasattr(p, "tolist") else p for p in points]
    if any(isinstance(p, (list, tuple)) for p in values):
        raise ValueError(
            f"insertion points {values} are nested too deeply; expected one list of columns for "
            "each sample. A pipeline with batch_size > 1 joins samples like this: leave it at 1, "
            "or give the whole batch to processor.apply_chat_template and model.generate"
        )
    return [int(p) for p in values]


def append_images(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    images: int,
    before: Sequence[int] | None,
    after: Sequence[int] | None,
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Appends one image to every row, with the ids that stand around it."""
    batch, width = input_ids.shape
    if images != batch:
        raise ValueError(
            f"{images} images for a batch of {batch} and no image_embeds_insertion_points: pass "
            "the points, or one image a row"
        )
    before, after = (
        ids.tolist() if isinstance(ids, Tensor) else list(ids or []) for ids in (before, after)
    )
    extra = torch.tensor([[*before, *after]] * batch, dtype=input_ids.dtype).to(input_ids.device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids = torch.cat([input_ids, extra], 1)
    mask = torch.cat([mask, mask.new_ones(batch, extra.shape[1])], 1)
    return ids, mask, [[width + len(before)] for _ in range(batch)]


def valid_columns(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    finished: Sequence[bool] | None = None,
) -> np.ndarray:
    """(B, T) bool on the host: which of the new columns hold text.

    :param finished: rows that hold none.
    """
    batch, width = input_ids.shape
    over = np.zeros(batch, bool) if finished is None else np.asarray(finished, bool)
    if width == 1 or attention_mask is None:
        return np.broadcast_to(~over[:, None], (batch, width))
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < width:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch}, {width}) "
            "or more columns, of which the last belong to these input_ids"
        )
    given: np.ndarray = attention_mask[:, -width:].bool().cpu().numpy()
    if not (given.any(1) | over).all():
        raise ValueError("attention_mask hides every token of a sample")
    valid: np.ndarray = given & ~over[:, None]
    return valid


def flat_index(valid: np.ndarray) -> Tensor:
    """(T,) indices of the valid entries of a flattened (B, T) batch."""
    return torch.from_numpy(np.flatnonzero(valid.ravel()))


def unflatten(packed: Tensor, flat: Tensor, batch: int, width: int) -> Tensor:
    """(T, C) of the entries `flat` -> (B, width, C), zero where there is padding."""
    if len(flat) != batch * width:
        padded = packed.new_zeros(batch * width, packed.shape[-1])
        packed = padded.index_copy(0, flat.to(packed.device), packed)
    padded_rows: Tensor = packed.unflatten(0, (batch, width))
    return padded_rows


def chunks_of(
    valid: np.ndarray,
    points: Sequence[Sequence[int]] | None,
    follows: Sequence[Sequence[bool]] | None,
    counts: Sequence[int],
    state: StreamingState | None,
) -> list[Chunk]:
    """The new tokens of each sample, with its images among them.

    :param valid: see `valid_columns`.
    :param points: for each sample the columns at which its images stand.
    :param follows: for each sample, whether each image follows the one before it.
    :param counts: tokens of each image, over all samples in order.
    :raises ValueError: other numbers of samples or images, points outside.
    """
    batch, width = valid.shape
    columns = points if points is not None else [()] * batch
    if len(columns) != batch:
        raise ValueError(
            f"image_embeds_insertion_points lists {len(columns)} samples, input_ids holds {batch}"
        )
    slots = sum(map(len, columns))
    if slots != len(counts):
        raise ValueError(
            f"{slots} insertion points but {len(counts)} images in pixel_values: every insertion "
            "point needs exactly one image"
        )
    left = iter(counts)
    chunks = []
    for row, sample_points in enumerate(columns):
        if any(not 0 <= p <= width for p in sample_points):
            raise ValueError(
                f"insertion points {list(sample_points)} of sample {row} lie outside 0..{width}, "
                "the columns of input_ids"
            )
        before = np.concatenate([[0], np.cumsum(valid[row])])  # text tokens before each column
        chunks.append(
            Chunk(
                text=int(before[-1]),
                points=tuple(int(before[p]) for p in sample_points),
                images=tuple(next(left) for _ in sample_points),
                past_text=0 if state is None else state.text[row],
                follows=() if follows is None else _following(follows[row], state, row),
                past_span=0 if state is None else state.span[row],
            )
        )
    return chunks


def _following(follows: Sequence[bool], state: StreamingState | None, row: int) -> tuple[bool, ...]:
    """What follows a frame: the first image of a stream has none before it."""
    first = state is not None and state.span[row] > 0
    return tuple(bool(f) and (i > 0 or first) for i, f in enumerate(follows))


def with_rows(chunks: Sequence[Chunk], rows: Sequence[int]) -> list[Chunk]:
    """The chunks with the rows of their images, which multimodal RoPE asks for."""
    left = iter(rows)
    return [replace(c, rows=tuple(next(left) for _ in c.images)) for c in chunks]
