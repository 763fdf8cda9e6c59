"""Memory of a rank: the state that DeepSpeed keeps, to the byte, and an estimate of activations.

The state follows DeepSpeed 0.19's ZeRO optimisers. The estimate counts what autograd saves for the
backward pass of eager code with varlen attention, one pack at a time; a compiled block saves less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from casa_train.metrics.flops import SampleShape, TextSizes, VisionSizes, fused_layers

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000
PERSISTENT_BELOW = 100_000  # ZeRO-3 keeps smaller tensors whole
MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 holds gathered at once
ALIGNMENT = 2  # partitions of ZeRO 1 and 2 start at multiples of this

FP32 = 4


def state_bytes(
    groups: Sequence[Sequence[int]], frozen: Sequence[int], stage: int, world: int, bf16: bool
) -> dict[str, int]:
    """Bytes of parameters, gradients and optimiser on each of `world` ranks, by what they hold.

    :param groups: for each parameter group of the optimiser, the sizes of its tensors.
    :param frozen: sizes of the tensors that do not train.
    :param stage: ZeRO stage, 1 to 3.
    :param bf16: parameters in bf16 with fp32 masters and accumulation; otherwise all in fp32.
    """
    width = 2 if bf16 else FP32
    trainable = [size for group in groups for size in group]
    total = sum(trainable)
    if stage == 3:
        own = sum(ceil(size / world) for size in trainable)
        kept = [size for size in (*trainable, *frozen) if size < PERSISTENT_BELOW]
        return {
            "parameters that train": width * own,
            "frozen parameters": width * sum(ceil(size / world) for size in frozen),
            "gathered parameters": width * (min(MAX_LIVE, total + sum(frozen)) + sum(kept)),
            "gradients": FP32 * own,
            "fp32 masters": FP32 * own,
            "Adam's moments": 2 * FP32 * own,
            "reduction bucket": width * REDUCE_BUCKET,
        }
    own = sum(ALIGNMENT * ceil(sum(group) / (ALIGNMENT * world)) for group in groups)
    # Stage 1 accumulates whole gradients in fp32, beside bf16 ones of the last backward pass, and
    # its bf16 optimiser has no bucket.
    gradients = FP32 * own if stage == 2 else FP32 * total + (width * total if bf16 else 0)
    return {
        "parameters that train": width * total,
        "frozen parameters": width * sum(frozen),
        "gradients": gradients,
        "fp32 masters": FP32 * own,
        "Adam's moments": 2 * FP32 * own,
        "reduction bucket": 0 if stage == 1 and bf16 else width * REDUCE_BUCKET,
    }


def logits_bytes(answers: int, vocabulary: int, bf16: bool) -> int:
    """Logits, their fp32 log-softmax and the gradients of both, as the backward pass starts."""
    return answers * vocabulary * ((2 if bf16 else FP32) + 3 * FP32)


def activation_bytes(
    text: TextSizes,
    vision: VisionSizes,
    fusion: Mapping[str, Any],
    pack: Sequence[SampleShape],
    bf16: bool,
) -> dict[str, int]:
    """Bytes that autograd keeps of one pack's forward pass, by part; logits are left out."""
    saved = _Saved(2 if bf16 else FP32)
    images = sum(sample.image_tokens for sample in pack)
    texts = sum(sample.text for sample in pack)
    parts = {"vision tower": _tower(saved, vision, images)}
    # Whether image tokens carry a gradient when they reach the decoder.
    grad = vision.trained != 0 or vision.out != text.width
    stream = texts
    if fusion["mechanism"] == "insertion":
        stream += images
    if fusion["mechanism"] == "qformer_insertion":
        queries = int(fusion.get("queries", 128)) * sum(len(sample.grids) for sample in pack)
        stream += queries
        layer = _resampler_layer(saved, text.width, queries, images, grad)
        parts["fusion"] = int(fusion.get("layers", 2)) * layer
    fused = fused_layers(fusion, text.layers)
    # Blocks that a frozen decoder runs before any gradient is in its stream save nothing.
    silent = 0 if text.trainable or not fused else fused[0]
    attentions = text.layers - silent - (len(fused) if fusion.get("placement") == "replace" else 0)
    if not text.trainable and fused and fusion.get("placement") != "before":
        attentions -= 1  # beside or before the first fusion
    attention = saved.norm(text.width, text.trainable) + saved.attention(
        text.q_width, text.kv_width
    )
    ffn = saved.norm(text.width, text.trainable) + saved.mlp(text.ffn, text.trainable)
    parts["text decoder"] = stream * ((text.layers - silent) * ffn + attentions * attention)
    if fused:
        parts["fusion"] = len(fused) * _fused_layer(saved, text, fusion, texts, images, grad)
    return parts


def _tower(saved: _Saved, vision: VisionSizes, images: int) -> int:
    """The trained blocks and the merger; the frozen blocks run without autograd."""
    patches = images * vision.cell
    wide = vision.width * vision.cell
    block = 2 * saved.norm(vision.width, True) + saved.mlp(vision.ffn, True)
    block += saved.attention(vision.width, vision.width)
    if vision.trained == 0:
        return 0
    merger = images * (saved.norm(wide, True) + 2 * saved.width * wide)
    if vision.trained < 0:
        return vision.depth * patches * block + merger + patches * vision.patch * saved.width
    return vision.trained * patches * block + merger


def _resampler_layer(saved: _Saved, width: int, queries: int, images: int, grad: bool) -> int:
    own = 3 * saved.norm(width, True) + 2 * saved.attention(width, 0) + saved.attention(0, width)
    return queries * (own + saved.mlp(2 * width, True)) + images * (
        saved.norm(width, True, grad) + saved.attention(0, width)
    )


def _fused_layer(
    saved: _Saved,
    text: TextSizes,
    fusion: Mapping[str, Any],
    texts: int,
    images: int,
    grad: bool,
) -> int:
    """What the fusion of one layer adds."""
    base = text.trainable
    own = base or not fusion.get("share_parameters", False)
    text_keys = fusion["mechanism"] == "casa" and fusion.get("text_in_window", True)
    size = texts * saved.attention(text.q_width, text.kv_width if text_keys else 0)
    size += images * (saved.norm(text.width, own, grad) + saved.attention(0, text.kv_width))
    if fusion.get("placement") in ("before", "after", "replace"):
        size += texts * saved.norm(text.width, own)
    if fusion["mechanism"] == "gated_cross_attention":
        size += texts * (2 * saved.norm(text.width, True) + saved.mlp(text.ffn, True))
    update = fusion.get("update_image_tokens", "none")
    if update != "none" and (grad or base or update != "ffn"):
        size += images * (saved.norm(text.width, base, grad) + saved.mlp(text.ffn, base))
    if update == "ffn_and_attention":
        size += images * saved.attention(text.q_width, 0)
    return size


class _Saved:
    """Bytes that autograd saves for one token.

    :param width: bytes of a number in the model's precision.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def norm(self, size: int, trains: bool, grad: bool = True) -> int:
        """An RMS norm: its fp32 input; the normalised and the scaled one, if weights train.

        :param grad: whether its input carries a gradient.
        """
        return size * ((FP32 if grad else 0) + (2 * self.width if trains else 0))

    def attention(self, q: int, kv: int) -> int:
        """Queries and what they read, `q` wide; keys and values, `kv` wide."""
        return self.width * 2 * (q + kv)

    def mlp(self, ffn: int, trains: bool) -> int:
        """Gate, its SiLU and the up projection; their product, if the last linear trains."""
        return self.width * ffn * (4 if trains else 3)
