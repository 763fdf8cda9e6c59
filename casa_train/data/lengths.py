"""How long samples will be: those of a split from its index alone, one sample from its bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from casa_train.data.sample import Sample
from casa_train.data.shards import Split
from casa_train.modeling.image_processing_casa import CasaImageProcessor, ImageError
from casa_train.modeling.processing_casa import CasaProcessor


def sample_lengths(split: Split, processor: CasaProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Text and image tokens of every sample of a split, two (samples,) int32 arrays.

    An image that the image code will refuse counts no tokens: materialising skips its sample.
    """
    user, user_offsets = split.list_column("user_tokens")
    answers, answer_offsets = split.list_column("assistant_tokens")
    widths, image_offsets = split.list_column("widths")
    heights, _ = split.list_column("heights")
    counts = np.diff(image_offsets)
    turns = np.diff(user_offsets)
    text = _segment_sums(user, user_offsets) + _segment_sums(answers, answer_offsets)
    # The template's share is linear in turns and images; three probes give its coefficients.
    base = processor.text_tokens([], [], 0)
    per_turn = processor.text_tokens([0], [0], 0) - base
    per_image = processor.text_tokens([], [], 1) - base
    text = text + base + per_turn * turns + per_image * counts
    tokens = np.zeros(len(widths), np.int64)
    if len(widths):
        sizes, inverse = np.unique(np.stack([widths, heights], 1), axis=0, return_inverse=True)
        each = np.array([_image_tokens(processor.image_processor, *map(int, s)) for s in sizes])
        tokens = each[inverse.ravel()]
    return text.astype(np.int32), _segment_sums(tokens, image_offsets).astype(np.int32)


def measure(sample: Sample, processor: CasaProcessor) -> tuple[int, int]:
    """Text and image tokens of one sample; reads the headers of its images, decodes no pixel.

    :raises ImageError: an image whose header cannot be read, or that the image code refuses.
    """
    encoded = processor.encode(sample.messages(list(sample.images)))
    tokens = 0
    for i, data in enumerate(encoded.images):
        try:
            with Image.open(io.BytesIO(data)) as image:
                size = image.size
        except Exception as error:  # Pillow raises many types on damaged headers
            raise ImageError(
                "unreadable_image", f"image {i} of sample {sample.key}: {error}"
            ) from error
        tokens += processor.image_processor.token_count(*size)
    return len(encoded.ids), tokens


def _image_tokens(images: CasaImageProcessor, width: int, height: int) -> int:
    try:
        return images.token_count(width, height)
    except ImageError:
        return 0


def _segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    sums: np.ndarray = total[offsets[1:]] - total[offsets[:-1]]
    return sums
