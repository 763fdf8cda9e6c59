"""Floating-point work of a pack: the vision tower, then the decoder as its fusion mechanism says.

How products are counted stands in `modeling/block_work.py`. Everything comes from plain sizes and
lengths, so the numbers of a real batch are counted the same way as those of an imagined one. The
work of a mechanism is described by the mechanism: nothing here knows any by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from casa_train.modeling.block_work import BlockWork, Operations, Pairs, Paper, TextSizes
from casa_train.modeling.fusion import FusionMechanism
from casa_train.modeling.tower_kinds import TowerShape
from casa_train.modeling.windows import Chunk, Grid


@dataclass(frozen=True)
class VisionSizes:
    """The vision tower, and what leads to the text's width.

    :param trained: last blocks that train, the merger with them; 0 none, -1 everything.
    :param adapter: linear, where the widths differ, or mlp.
    """

    tower: TowerShape
    trained: int
    adapter: str


def count_operations(
    text: TextSizes,
    vision: VisionSizes,
    mechanism: FusionMechanism,
    pack: Sequence[Chunk],
    answers: int,
    pairs: Pairs | None = None,
) -> dict[str, Operations]:
    """Forward and backward operations of one pack, by part, in the order of the forward pass.

    :param pack: whole samples with the rows of their images.
    :param answers: tokens that need logits.
    :param pairs: what to count for attention in the decoder; None: the attended pairs.
    """
    paper = Paper()
    z = _image_tokens(paper, text, vision, mechanism, pack)
    h, _ = _decoder(paper, text, mechanism, pack, z, pairs)
    paper.linear("logits", answers, text.width, text.vocabulary, text.trainable, h)
    return dict(paper.parts)


def repeated_operations(
    text: TextSizes,
    vision: VisionSizes,
    mechanism: FusionMechanism,
    pack: Sequence[Chunk],
    blocks: str,
    pairs: Pairs | None = None,
) -> int:
    """Operations that activation checkpointing runs twice; they are no part of the model's work.

    :param blocks: whose activations are checkpointed: none, decoder, vision or all.
    :param pairs: as in `count_operations`.
    """
    paper = Paper()
    z = _image_tokens(paper, text, vision, mechanism, pack)
    repeated = 0
    if blocks in ("vision", "all"):
        tower = vision.tower
        patches = sum(sample.image_tokens for sample in pack) * tower.cell
        trained = tower.depth if vision.trained < 0 else vision.trained
        repeated += sum(
            part.forward for name, part in paper.parts.items() if "trained blocks" in name
        )
        repeated -= trained * 2 * patches * tower.ffn * tower.width  # as in `_decoder`
        if vision.trained < 0:
            embedding = Paper()  # stands before the blocks
            _embed(embedding, vision, [grid for sample in pack for grid in sample.grids])
            repeated -= embedding.forward
    if blocks in ("decoder", "all"):
        repeated += _decoder(Paper(), text, mechanism, pack, z, pairs)[1]
    return repeated


def _image_tokens(
    paper: Paper,
    text: TextSizes,
    vision: VisionSizes,
    mechanism: FusionMechanism,
    pack: Sequence[Chunk],
) -> bool:
    """uint8 images -> what the decoder takes; whether that carries a gradient."""
    z = _tower(paper, vision, [grid for sample in pack for grid in sample.grids])
    tokens, out = sum(sample.image_tokens for sample in pack), vision.tower.out
    if vision.adapter == "mlp":
        z = paper.linear("adapter", tokens, out, text.width, True, z)
        z = paper.linear("adapter", tokens, text.width, text.width, True, z)
    elif out != text.width:
        z = paper.linear("adapter", tokens, out, text.width, True, z)
    return mechanism.count_resampler(paper, text.width, pack, z)


def _embed(paper: Paper, vision: VisionSizes, grids: Sequence[Grid]) -> bool:
    """uint8 images -> patches, with their positions where these are learned."""
    everything, sizes = vision.trained < 0, vision.tower
    patches = sum(rows * columns for rows, columns in grids) * sizes.cell
    part = f"vision, {'trained' if everything else 'frozen'} blocks: linears"
    x = paper.linear(part, patches, sizes.patch, sizes.width, everything, False)
    side, merge = sizes.table, isqrt(sizes.cell)
    for rows, columns in set(grids) if side else ():  # the table is resized once for each size
        height, width = rows * merge, columns * merge
        paper.linear(part, height, side, side * sizes.width, everything, False)
        paper.linear(part, width, side, height * sizes.width, everything, False)
    return x


def _tower(paper: Paper, vision: VisionSizes, grids: Sequence[Grid]) -> bool:
    """uint8 images -> image tokens."""
    sizes = vision.tower
    tokens = sum(rows * columns for rows, columns in grids)
    patches = tokens * sizes.cell
    sizes_of_images = Counter(grids)  # packs hold hundreds of images of a few sizes
    full = sum(
        count * (rows * columns * sizes.cell) ** 2
        for (rows, columns), count in sizes_of_images.items()
    )
    windowed = sum(
        count * (height * width * sizes.cell) ** 2
        for (rows, columns), count in sizes_of_images.items()
        for height in _cut(rows, sizes.window or rows)
        for width in _cut(columns, sizes.window or columns)
    )
    first = 0 if vision.trained < 0 else sizes.depth - vision.trained
    x = _embed(paper, vision, grids)
    for block in range(sizes.depth):
        trains = block >= first
        name = "vision, trained blocks" if trains else "vision, frozen blocks"
        linears = f"{name}: linears"
        # A norm's weight gives every linear behind it an input with a gradient.
        qkv = paper.linear(linears, patches, sizes.width, 3 * sizes.width, trains, trains)
        pairs = full if block in sizes.full_blocks else windowed
        read = paper.attention(f"{name}: attention", pairs, sizes.width, qkv, qkv, qkv)
        x |= paper.linear(linears, patches, sizes.width, sizes.width, trains, read)
        for _ in range(2 if sizes.gated else 1):
            paper.linear(linears, patches, sizes.width, sizes.ffn, trains, trains)
        x |= paper.linear(linears, patches, sizes.ffn, sizes.width, trains, trains)
    wide = sizes.width * sizes.cell
    trains = vision.trained != 0
    if not sizes.merger:
        return trains
    hidden = paper.linear("vision, merger", tokens, wide, wide, trains, trains)
    return paper.linear("vision, merger", tokens, wide, sizes.out, trains, hidden)


def _cut(length: int, piece: int) -> list[int]:
    return [min(piece, length - start) for start in range(0, length, piece)]


def _decoder(
    paper: Paper,
    sizes: TextSizes,
    mechanism: FusionMechanism,
    pack: Sequence[Chunk],
    z: bool,
    pairs: Pairs | None,
) -> tuple[bool, int]:
    """The decoder with its fusion.

    :param z: whether the image tokens carry a gradient.
    :return: whether the hidden states do at the end; the operations of the forward pass that
        activation checkpointing runs again: all of a block but its last product, behind which
        nothing is saved.
    """
    chunks = mechanism.compress(pack)
    text = sum(chunk.text for chunk in chunks)
    images = sum(chunk.image_tokens for chunk in chunks)
    stream = sum(mechanism.stream_lengths(chunks))
    work = BlockWork(paper, sizes, pairs or mechanism.pairs(chunks), text, images, stream)
    h, repeated = sizes.trainable or (z and stream > text), 0
    for layer in range(sizes.layers):
        before, work.layer = paper.forward, layer
        h, z = mechanism.count_layer(work, layer, h, z)
        if h:  # otherwise the block keeps nothing, and nothing of it is needed again
            repeated += paper.forward - before - paper.last
    return h, repeated
