"""The interface of a fusion mechanism: one way to bring image tokens into a text decoder.

A mechanism does two things. Once per forward pass `plan` turns the chunks of the batch into index
layouts (`FusionPlan`), without touching the device's results. And it may give a decoder layer a
child module `fusion` (`make_layer`) that reads the image tokens in that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .attention import Segments
from .streaming import FlatCache, StreamingState
from .windows import Chunk, Range, text_positions


@dataclass
class FusionPlan:
    """Index layouts of one forward pass; every tensor lies on the model's device.

    :param stream_positions: (S,) RoPE positions of the stream tokens, the decoder's hidden states.
    :param stream_lengths: stream tokens of each sample.
    :param self_attention: self-attention of the stream, block-diagonal over samples.
    :param stream_index: (S,) the stream as rows of [text tokens; image tokens]; None: text only.
    :param text_index: (T,) the text tokens as rows of the stream; None: all of it.
    :param cross: attention of the `fusion` children over [kept keys; text keys; image keys].
    :param query_positions: (T,) positions of text queries and keys in `cross`; None: no RoPE.
    :param image_positions: (N,) positions of image keys in `cross`; None: no RoPE.
    :param keep: rows of the key space of `cross` that the next chunk needs, per sample.
    """

    stream_positions: Tensor
    stream_lengths: list[int]
    self_attention: Segments
    stream_index: Tensor | None = None
    text_index: Tensor | None = None
    cross: Segments | None = None
    query_positions: Tensor | None = None
    image_positions: Tensor | None = None
    keep: list[list[Range]] = field(default_factory=list)


class FusionMechanism:
    """Base class; see `casa.py` and `insertion.py`.

    :param fusion: the `fusion` section of the model configuration.
    :param text_config: the backbone's configuration.
    """

    name: ClassVar[str]
    # Keys of `fusion` that the mechanism reads, with their defaults; any other key is refused.
    options: ClassVar[dict[str, Any]] = {}
    # Whether image tokens enter the decoder's own stream and so its KV cache.
    inserts: ClassVar[bool] = False

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        unknown = sorted(set(fusion) - {"mechanism"} - set(self.options))
        if unknown:
            raise ValueError(
                f"fusion mechanism {self.name!r} does not read {unknown}; its options are "
                f"{sorted(self.options)}"
            )
        self.fusion = {**self.options, **{k: v for k, v in fusion.items() if k != "mechanism"}}
        self.text_config = text_config

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module | None:
        """The `fusion` child of a decoder layer, or None where the layer stays as it is."""
        return None

    def initialise(self, layer: Any) -> None:
        """Gives new parameters of a decoder layer their first values, once weights are loaded."""

    def zero_at_start(self, name: str) -> bool:
        """Whether a parameter's gradient may be exactly zero on the first step, by design."""
        return False

    def plan(
        self,
        chunks: Sequence[Chunk],
        state: StreamingState | None,
        cache: FlatCache | None,
        device: torch.device,
    ) -> FusionPlan:
        """Index layouts for these chunks; `state` and `cache` continue a stream."""
        raise NotImplementedError(f"{type(self).__name__} must define plan()")

    def stream_lengths(self, chunks: Sequence[Chunk]) -> list[int]:
        """New stream tokens of each sample: what enters self-attention and the KV cache."""
        return [chunk.text + (sum(chunk.images) if self.inserts else 0) for chunk in chunks]

    def _self_attention(
        self, lengths: list[int], cache: FlatCache | None, device: torch.device
    ) -> Segments:
        """Causal attention within each sample, over its cached tokens too."""
        starts = np.cumsum([0, *lengths]).tolist()
        queries = [[(a, b)] for a, b in zip(starts, starts[1:], strict=False)]
        keys = queries if cache is None else cache.key_ranges()
        return Segments(queries, keys, causal=True, device=device)

    def _text_only(
        self, chunks: Sequence[Chunk], cache: FlatCache | None, device: torch.device
    ) -> FusionPlan:
        """The plan of a stream that holds text tokens alone, at their text positions."""
        lengths = self.stream_lengths(chunks)
        return FusionPlan(
            stream_positions=torch.from_numpy(text_positions(chunks)).to(device),
            stream_lengths=lengths,
            self_attention=self._self_attention(lengths, cache, device),
        )
