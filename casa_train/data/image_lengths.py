"""Image tokens of stored images from their sizes: of one, and of millions at once."""

from __future__ import annotations

import numpy as np

from casa_train.modeling.image_processing_casa import (
    MAX_ASPECT,
    MAX_SOURCE_PIXELS,
    ImageError,
    target_size,
)

IMAGES = 1 << 15  # images whose tokens are counted at once: what a cache holds


def image_tokens(width: int, height: int, max_pixels: int, min_pixels: int, side: int) -> int:
    """Image tokens of a stored image, none if the image code will refuse it.

    :param side: pixels of a token's side.
    """
    try:
        h, w = target_size(width, height, max_pixels, min_pixels, side)
    except ImageError:
        return 0
    return h * w // side**2


def token_counts(
    widths: np.ndarray,
    heights: np.ndarray,
    max_pixels: int | np.ndarray,
    min_pixels: int,
    side: int,
) -> np.ndarray:
    """`image_tokens` of many images at once, (images,) int64.

    :param max_pixels: one for all, or (images,) one for each.
    """
    counts = np.empty(len(widths), np.int64)
    limits = np.broadcast_to(np.asarray(max_pixels, np.int64), counts.shape)
    for start in range(0, len(counts), IMAGES):
        part = slice(start, start + IMAGES)
        counts[part] = _token_counts(widths[part], heights[part], limits[part], min_pixels, side)
    return counts


def _token_counts(
    widths: np.ndarray, heights: np.ndarray, max_pixels: np.ndarray, min_pixels: int, side: int
) -> np.ndarray:
    """The rules of `target_size`, operation by operation, so that no rounding differs."""
    width, height = widths.astype(np.int64), heights.astype(np.int64)
    area, shorter = width * height, np.minimum(width, height)
    refused = (shorter < 1) | (np.maximum(width, height) > MAX_ASPECT * shorter)
    refused |= area > MAX_SOURCE_PIXELS
    rows = np.rint(height / side).astype(np.int64)
    columns = np.rint(width / side).astype(np.int64)
    small = np.flatnonzero((rows * columns * side**2 < min_pixels) & ~refused)
    if len(small):
        enlarge = np.sqrt(min_pixels / area[small])
        rows[small] = np.ceil(height[small] * enlarge / side)
        columns[small] = np.ceil(width[small] * enlarge / side)
    counts = np.maximum(1, rows) * np.maximum(1, columns)
    budget = max_pixels // side**2
    big = np.flatnonzero((counts > budget) & ~refused)
    if len(big):
        budget = budget[big]
        shrink = np.sqrt(area[big] / max_pixels[big])
        rows, columns = (
            np.minimum(np.maximum(1, np.floor(length[big] / shrink / side)), budget)
            for length in (height, width)
        )
        counts[big] = (rows * columns).astype(np.int64)
    counts[refused] = 0
    return counts
