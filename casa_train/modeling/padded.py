"""Padded batches, as Hugging Face's interface has them, as the chunks that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .streaming import StreamingState
from .windows import Chunk


def image_list(pixel_values: Sequence[Tensor] | Tensor | None) -> list[Tensor]:
    if pixel_values is None:
        return []
    if isinstance(pixel_values, Tensor) and pixel_values.ndim == 3:
        return [pixel_values]
    return list(pixel_values)


def as_ints(points: Any) -> list[int]:
    """The insertion points of one sample: a tensor, an array, or a list of numbers."""
    if hasattr(points, "tolist"):
        points = points.tolist()
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
    valid: np.ndarray = attention_mask[:, -width:].bool().cpu().numpy()
    if not (valid.any(1) | over).all():
        raise ValueError("attention_mask hides every token of a sample")
    return valid & ~over[:, None]


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
