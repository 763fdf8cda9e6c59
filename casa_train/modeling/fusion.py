"""The interface of a fusion mechanism: one way to bring image tokens into a text decoder.

A mechanism does up to five things. `plan` turns the chunks of the batch into index layouts, once
per forward pass and without waiting for the device. `make_layer` gives a decoder layer a child
module `fusion` with new parameters. `run_layer` is the forward of a decoder layer, composed from
the pieces in `block.py`. `make_resampler` may put a module between vision tower and decoder.
`count_layer` and `count_resampler` say on paper what products these two do, composed from the same
pieces in `block_work.py`. One that makes keys of its own from unchanged image tokens may say in
`image_keys` where from: those of all layers are then made at once (`joint_keys.py`). A class with
a `run_layer` or a `make_layer` of its own says so anew: an `image_keys` from further up does not
count.

A new mechanism is one Python file and one YAML, and nothing of the project is edited:

1. `mine/toy.py` holds a subclass of `FusionMechanism`, or of any other mechanism, with a `name` and
   the decorator `@register`. It imports the files of this folder as they import each other,
   `from .fusion import FusionMechanism, register`, and beside them only what an export needs:
   torch, transformers, numpy, einops, pillow. The shortest example is `insertion.py`, one with
   parameters is `gated.py`.
2. `mine/conf/fusion/toy.yaml` says `mechanism: toy` and gives its options their values.
3. `export CASA_MECHANISMS=mine/toy.py`, several files joined by `:`, and then every command knows
   it: `python -m casa_train --config-dir mine/conf +experiment=demo fusion=toy`, with or without
   `dry_run=true`, under torchrun and SLURM, `casa_train.export`, `.evaluate`, `.report`, `.bench`.
   An export takes the file along: whoever loads it needs neither this project nor the variable.

Streams of a mechanism with a `run_layer` of its own take a whole forward pass a token until its
class says `decode_steps = True`: that it reads text and windows through `self_attention` and
`read_windows` alone, and nothing else in it counts tokens or looks at the plan (`decoding.py`).

What a mechanism costs comes from itself. Attended pairs are read out of its `plan`. Saved memory
is counted while the model itself runs on the meta device, so there is nothing to describe. Products
are what `count_layer` and `count_resampler` say; a class with a forward of its own and without them
is refused when it registers. Compare them with torch's own counter as `tests/cost/test_flops.py`
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .block import DecoderContext, FusionPlan, plain_block
from .block_work import BlockWork, Pairs, Paper
from .joint_keys import KeySource
from .rope import mrope_section
from .segments import Segments, on_device
from .streaming import FlatCache, StreamingState
from .windows import Chunk, text_positions

# Widths multiply into sizes that count in 64 bits.
WIDEST = 2**31 - 1


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
    # Said by a class beside its `run_layer`: that it reads text and windows by the pieces of
    # `block.py` and `windowed.py` alone, which know decode steps (`decoding.py`).
    decode_steps: ClassVar[bool] = True

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

    def check_whole(self, key: str, least: int, most: int) -> None:
        """Refuses an option that is no whole number of this range."""
        value = self.fusion[key]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"fusion.{key} is {value!r}; expected a whole number from {least} to {most}"
            )

    @classmethod
    def takes_steps(cls) -> bool:
        """Whether streams go on token by token without a whole forward pass each."""
        return cls.decode_steps and cls.depth_of("decode_steps") <= cls.depth_of("run_layer")

    @classmethod
    def joins_image_keys(cls) -> bool:
        """Whether `image_keys` was written for the `run_layer` and `make_layer` of this class."""
        own = cls.depth_of("image_keys")
        return own <= cls.depth_of("run_layer") and own <= cls.depth_of("make_layer")

    @classmethod
    def depth_of(cls, name: str) -> int:
        """How many classes up from this one a name was given last."""
        return next(i for i, owner in enumerate(cls.__mro__) if name in vars(owner))

    def start_advice(self) -> tuple[str, str] | None:
        """Of options with which new layers begin as the block's self-attention a second time, so
        that what they read in images changes the text's stream from the first step: the options
        that were chosen, and those with which the layers begin at the text's own loss.

        None: no layer begins that way.
        """
        return None

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

    def image_keys(self, layer: Any) -> KeySource | None:
        """What makes a layer's keys and values of the image tokens, where these are what entered
        the decoder; `run_layer` then takes `context.image_heads` where it holds the layer's index.

        None: the layer makes its own. Here: no layer has any.
        """
        return None

    def count_layer(self, work: BlockWork, layer_idx: int, h: bool, z: bool) -> tuple[bool, bool]:
        """The work of `run_layer`: the same products, on paper.

        :param h: whether the stream tokens carry a gradient; :param z: whether image tokens do.
        :return: both, after the block.
        """
        return work.plain_block(h), z

    def count_resampler(self, paper: Paper, width: int, pack: Sequence[Chunk], z: bool) -> bool:
        """The work of the module of `make_resampler`.

        :param width: C; :param pack: the samples with the tower's image tokens.
        :param z: whether these carry a gradient.
        :return: whether what the decoder gets does.
        """
        return z

    def pairs(self, chunks: Sequence[Chunk]) -> Pairs:
        """What attends to what in whole samples, as `compress` leaves them: counted in `plan`."""
        plan = self.plan(chunks, None, None, torch.device("cpu"))
        segments = (plan.self_attention, plan.cross, plan.image_cross)
        return Pairs(*(0 if s is None else s.pairs for s in segments))

    def stream_lengths(self, chunks: Sequence[Chunk]) -> list[int]:
        """New stream tokens of each sample: what enters self-attention and the KV cache."""
        return [chunk.text + (chunk.image_tokens if self.inserts else 0) for chunk in chunks]

    def _self_attention(
        self, lengths: list[int], cache: FlatCache | None, device: torch.device
    ) -> Segments:
        """Causal attention within each sample, over its cached tokens too."""
        starts = np.cumsum([0, *lengths]).tolist()
        queries = [[(a, b)] for a, b in zip(starts, starts[1:], strict=False)]
        keys = queries if cache is None else cache.key_ranges()
        return Segments(queries, keys, causal=True, device=device)


MECHANISMS: dict[str, type[FusionMechanism]] = {}
"""The registry: name in the configuration -> class."""

# A forward and what describes its work.
COUNTED = (("run_layer", "count_layer"), ("make_resampler", "count_resampler"))

M = TypeVar("M", bound=type[FusionMechanism])


def register(mechanism: M) -> M:
    """Enters a mechanism into the registry under its `name`; the decorator of each class.

    :raises TypeError: a class without a name, a name that another file has given, or a forward of
        its own whose work is described by no class as near as that.
    """
    name = mechanism.__dict__.get("name")
    if not isinstance(name, str):
        raise TypeError(f"fusion mechanism {mechanism.__name__}: expected a class variable `name`")
    other = MECHANISMS.get(name)
    if other is not None and other.__module__ != mechanism.__module__:
        raise TypeError(
            f"fusion mechanism {name!r} of {mechanism.__module__}: {other.__module__} has "
            "registered one of that name; choose another"
        )
    for forward, count in COUNTED:
        counted = mechanism.depth_of(count)
        if mechanism.depth_of(forward) < counted:
            owner = mechanism.__mro__[counted].__name__
            raise TypeError(
                f"fusion mechanism {name!r} has a {forward} of its own but no {count}: its "
                f"floating-point work would be counted as that of {owner}. Add {count}, "
                "composed from the pieces of block_work.py"
            )
    MECHANISMS[name] = mechanism
    return mechanism


def build_mechanism(fusion: dict[str, Any], text_config: Any) -> FusionMechanism:
    """The mechanism that `fusion["mechanism"]` names, with its options.

    :raises ValueError: unknown mechanism or option.
    """
    name = fusion.get("mechanism")
    if name not in MECHANISMS:
        raise ValueError(
            f"fusion mechanism {name!r} is unknown; choose one of {sorted(MECHANISMS)}, or name "
            "the Python file of your own in the environment variable CASA_MECHANISMS"
        )
    return MECHANISMS[name](fusion, text_config)
