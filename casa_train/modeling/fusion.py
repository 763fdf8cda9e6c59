"""The interface of a fusion mechanism: one way to bring image tokens into a text decoder.

A mechanism does up to four things. `plan` turns the chunks of the batch into index layouts, once
per forward pass and without waiting for the device. `make_layer` gives a decoder layer a child
module `fusion` with new parameters. `run_layer` is the forward of a decoder layer, composed from
the pieces in `block.py`. `make_resampler` may put a module between vision tower and decoder.

Adding a mechanism takes one file with a subclass, its name in `mechanisms.py` and in the imports of
`modeling_casa.py` (an export copies what that file names), and one YAML in `conf/fusion/`. The
shortest example is `insertion.py`, one with parameters `gated.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .attention import Segments, on_device
from .block import DecoderContext, FusionPlan, plain_block
from .rope import mrope_section
from .streaming import FlatCache, StreamingState
from .windows import Chunk, text_positions


class FusionMechanism:
    """Base class; on its own it is the plain backbone, blind to images.

    :param fusion: the `fusion` section of the model configuration.
    :param text_config: the backbone's configuration.
    :raises ValueError: options that the mechanism does not have.
    """

    name: ClassVar[str]
    # Keys of `fusion` that the mechanism reads, with their defaults; any other key is refused.
    options: ClassVar[dict[str, Any]] = {}
    # For options with a fixed set of values: those values.
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    # Whether image tokens enter the decoder's own stream and so its KV cache.
    inserts: ClassVar[bool] = False
    # Whether new layers begin as the block's self-attention a second time, so that what they read
    # in images changes the text's stream from the first step.
    repeats_attention: bool = False

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        unknown = sorted(set(fusion) - {"mechanism"} - set(self.options))
        if unknown:
            raise ValueError(
                f"fusion mechanism {self.name!r} does not read {unknown}; its options are "
                f"{sorted(self.options)}"
            )
        self.fusion = {**self.options, **{k: v for k, v in fusion.items() if k != "mechanism"}}
        for key, allowed in self.choices.items():
            if key in self.fusion and self.fusion[key] not in allowed:
                raise ValueError(
                    f"fusion.{key} is {self.fusion[key]!r}; expected one of {list(allowed)}"
                )
        for key, default in self.options.items():
            if isinstance(default, bool) and not isinstance(self.fusion[key], bool):
                raise ValueError(f"fusion.{key} is {self.fusion[key]!r}; expected true or false")
        self.text_config = text_config
        # Whether positions have the three axes of Qwen2.5-VL's multimodal RoPE.
        self.multimodal = mrope_section(text_config) is not None

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module | None:
        """The `fusion` child of a decoder layer, or None where the layer stays as it is.

        Modules with parameters of their own define `reset_parameters()` for their first values.
        """
        return None

    def make_resampler(self) -> nn.Module | None:
        """A module (image tokens (N, C), tokens of each image, backend) -> new image tokens."""
        return None

    def initialise(self, layer: Any) -> None:
        """Gives new parameters of a decoder layer their first values, once weights are loaded."""

    def copied(self, name: str) -> bool:
        """Whether `initialise` fills a parameter with a copy of its decoder layer's own."""
        return False

    def adopt(self, name: str) -> str | None:
        """Where a tensor of the plain backbone goes; None: this model has no place for it."""
        return name

    def zero_at_start(self, name: str) -> bool:
        """Whether a parameter's gradient may be exactly zero on the first step, by design."""
        return False

    def compress(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """The chunks as the decoder sees them: `images` counts the resampler's tokens."""
        return chunks

    def plan(
        self,
        chunks: Sequence[Chunk],
        state: StreamingState | None,
        cache: FlatCache | None,
        device: torch.device,
    ) -> FusionPlan:
        """Index layouts for these chunks; `state` and `cache` continue a stream.

        Here: a stream of text tokens alone, at their text positions.
        """
        lengths = self.stream_lengths(chunks)
        return FusionPlan(
            stream_positions=on_device(text_positions(chunks), device),
            stream_lengths=lengths,
            self_attention=self._self_attention(lengths, cache, device),
        )

    def run_layer(
        self, layer: Any, h: Tensor, images: Tensor, context: DecoderContext
    ) -> tuple[Tensor, Tensor]:
        """One decoder block.

        :param h: (S, C) stream tokens.
        :param images: (N, C) image tokens.
        :return: both, after the block.
        """
        return plain_block(layer, h, context), images

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
