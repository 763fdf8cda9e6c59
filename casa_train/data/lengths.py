"""How long a sample will be, from its bytes."""

from __future__ import annotations

from casa_train.data.sample import Sample
from casa_train.modeling.image_processing_casa import read_header
from casa_train.modeling.processing_casa import CasaProcessor


def measure(sample: Sample, processor: CasaProcessor) -> tuple[int, int]:
    """Text and image tokens of one sample; reads the headers of its images, decodes no pixel.

    :raises ImageError: an image whose header cannot be read, or that the image code refuses.
    """
    encoded = processor.encode(sample.messages(list(sample.images)))
    tokens = 0
    for i, data in enumerate(encoded.images):
        _, width, height = read_header(data, f"image {i} of sample {sample.key}")
        tokens += processor.image_processor.token_count(width, height)
    return len(encoded.ids), tokens
