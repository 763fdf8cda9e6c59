"""Floating-point work of a pack, counted by running the model's matrix products on paper.

Every product costs two operations for each multiply-add; nothing else is counted. What its backward
pass costs follows the rule of autograd: the gradient of a weight if the weight trains, the gradient
of an input if anything before it trains. Attention counts attended pairs only, and no product
twice: what a kernel recomputes or pads is not work of the model.

Everything comes from plain sizes and lengths, so the numbers of a real batch are counted the same
way as those of an imagined one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from casa_train.modeling.windows import Grid, SampleShape


@dataclass(frozen=True)
class TextSizes:
    """The text decoder.

    :param ffn: inner width of the feed-forward network.
    :param trainable: whether its own weights train; fusion weights always do.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    trainable: bool

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class VisionSizes:
    """The vision tower.

    :param patch: numbers in a patch after the temporal slices are summed: channels * side * side.
    :param cell: patches that become one image token.
    :param window: side of an attention window in image tokens.
    :param full_blocks: indices of the blocks whose attention sees the whole image.
    :param trained: last blocks that train, the merger with them; 0 none, -1 everything.
    """

    depth: int
    width: int
    ffn: int
    patch: int
    cell: int
    window: int
    out: int
    full_blocks: tuple[int, ...]
    trained: int


@dataclass
class Operations:
    """Floating-point operations of one part of the model."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Pairs:
    """Attended (query, key) pairs of a pack, for one layer and one head.

    :param stream: self-attention of the decoder's stream.
    :param text: text queries in a fusion layer.
    :param image: image queries in a fusion layer, where image tokens attend.
    """

    stream: int
    text: int
    image: int


def fused_layers(fusion: Mapping[str, Any], layers: int) -> list[int]:
    """Indices of the decoder layers that have fusion."""
    mechanism = fusion["mechanism"]
    if mechanism in ("insertion", "qformer_insertion"):
        return []
    if mechanism == "hyper_attention":
        named = fusion.get("layers")
        spread = {0, layers // 3, 2 * layers // 3, layers - 1}
        return sorted(i for i in (spread if named is None else named) if i < layers)
    every = int(fusion.get("every", 1))
    return [i for i in range(layers) if i % every == every - 1]


def attended_pairs(fusion: Mapping[str, Any], pack: Sequence[SampleShape]) -> Pairs:
    """Counts what attends to what, sample by sample and scope by scope.

    A scope holds the keys that a fusion layer's query may see at or before its own place: a window,
    several of them, or the sample, as the fusion options say.
    """
    mechanism = fusion["mechanism"]
    text_keys = mechanism == "casa" and bool(fusion.get("text_in_window", True))
    whole = mechanism == "hyper_attention" or fusion.get("history", "window") == "all"
    frames_together = fusion.get("window_scope", "frame") == "all_frames"
    alone_too = whole and text_keys and fusion.get("placement") == "replace"
    stream = text = image = 0
    for sample in pack:
        inserted = _inserted(fusion, sample)
        stream += _causal(sample.text + inserted)
        texts = images = 0  # keys of the scope so far
        seen_image = False
        for is_image, length, follows in _interleaved(sample):
            if is_image:
                if not whole and not (frames_together and follows):
                    texts = images = 0
                image += length * (images + (texts if text_keys else 0)) + _causal(length)
                images += length
                seen_image = True
                continue
            if seen_image or alone_too:
                text += length * images
                text += length * texts + _causal(length) if text_keys else 0
            texts += length if seen_image or whole else 0
    return Pairs(stream, text, image)


def _interleaved(sample: SampleShape) -> list[tuple[bool, int, bool]]:
    """(is image, length, follows) of the pieces of a sample; images at one point are one piece."""
    pieces: list[tuple[bool, int, bool]] = []
    follows = sample.follows or (False,) * len(sample.points)
    done = 0
    for point, (rows, columns), frame in zip(sample.points, sample.grids, follows, strict=True):
        if point > done:
            pieces.append((False, point - done, False))
            done = point
        if pieces and pieces[-1][0]:
            _, before, first = pieces[-1]
            pieces[-1] = (True, before + rows * columns, first)
        else:
            pieces.append((True, rows * columns, frame))
    if sample.text > done:
        pieces.append((False, sample.text - done, False))
    return pieces


def _inserted(fusion: Mapping[str, Any], sample: SampleShape) -> int:
    """Tokens that join the decoder's stream beside the text."""
    if fusion["mechanism"] == "insertion":
        return sample.image_tokens
    if fusion["mechanism"] == "qformer_insertion":
        return int(fusion.get("queries", 128)) * len(sample.grids)
    return 0


def _causal(length: int) -> int:
    return length * (length + 1) // 2


@dataclass
class _Paper:
    """Collects operations; each method returns whether its result carries a gradient."""

    parts: dict[str, Operations] = field(default_factory=lambda: defaultdict(Operations))

    def forward(self) -> int:
        """Operations of the forward pass so far."""
        return sum(part.forward for part in self.parts.values())

    def linear(
        self, part: str, tokens: int, inputs: int, outputs: int, trains: bool, x: bool
    ) -> bool:
        """(tokens, inputs) -> (tokens, outputs).

        :param trains: whether the weight does; :param x: whether the input carries a gradient.
        """
        work = 2 * tokens * inputs * outputs
        self.parts[part].forward += work
        self.parts[part].backward += work * (trains + x)
        return trains or x

    def attention(self, part: str, pairs: int, width: int, q: bool, k: bool, v: bool) -> bool:
        """Scores and weighted sums of `pairs` over all heads together, `width` wide.

        :param q: whether the queries carry a gradient; keys and values alike.
        """
        work = 2 * pairs * width
        self.parts[part].forward += 2 * work
        self.parts[part].backward += work * (q + k + v + (q or k))
        return q or k or v


def count_operations(
    text: TextSizes,
    vision: VisionSizes,
    fusion: Mapping[str, Any],
    pack: Sequence[SampleShape],
    answers: int,
    pairs: Pairs | None = None,
) -> dict[str, Operations]:
    """Forward and backward operations of one pack, by part, in the order of the forward pass.

    :param fusion: mechanism and options; what is left out has its default.
    :param answers: tokens that need logits.
    :param pairs: what to count for attention in the decoder; None: the attended pairs.
    """
    paper = _Paper()
    grids = [grid for sample in pack for grid in sample.grids]
    z = _tower(paper, vision, grids)
    tokens = sum(rows * columns for rows, columns in grids)
    if vision.out != text.width:
        z = paper.linear("adapter", tokens, vision.out, text.width, True, z)
    if fusion["mechanism"] == "qformer_insertion":
        z = _resampler(paper, text.width, fusion, tokens, len(grids), z)
    h = _Decoder(paper, text, fusion, pack, pairs or attended_pairs(fusion, pack)).run(z)
    paper.linear("logits", answers, text.width, text.vocabulary, text.trainable, h)
    return dict(paper.parts)


def repeated_operations(
    text: TextSizes,
    vision: VisionSizes,
    fusion: Mapping[str, Any],
    pack: Sequence[SampleShape],
    blocks: str,
    pairs: Pairs | None = None,
) -> int:
    """Operations that activation checkpointing runs twice; they are no part of the model's work.

    :param blocks: whose activations are checkpointed: none, decoder, vision or all.
    :param pairs: as in `count_operations`.
    """
    paper = _Paper()
    z = _tower(paper, vision, [grid for sample in pack for grid in sample.grids])
    z |= vision.out != text.width or fusion["mechanism"] == "qformer_insertion"
    repeated = 0
    if blocks in ("vision", "all"):
        patches = sum(sample.image_tokens for sample in pack) * vision.cell
        trained = vision.depth if vision.trained < 0 else vision.trained
        repeated += sum(
            part.forward for name, part in paper.parts.items() if "trained blocks" in name
        )
        repeated -= trained * 2 * patches * vision.ffn * vision.width  # as in `_Decoder`
        if vision.trained < 0:
            repeated -= 2 * patches * vision.patch * vision.width  # the patch embedding
    if blocks in ("decoder", "all"):
        pairs = pairs or attended_pairs(fusion, pack)
        decoder = _Decoder(_Paper(), text, fusion, pack, pairs)
        decoder.run(z)
        repeated += decoder.repeated
    return repeated


def _tower(paper: _Paper, sizes: VisionSizes, grids: Sequence[Grid]) -> bool:
    """uint8 images -> image tokens."""
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
        for height in _cut(rows, sizes.window)
        for width in _cut(columns, sizes.window)
    )
    everything = sizes.trained < 0
    first = 0 if everything else sizes.depth - sizes.trained
    name = "vision, trained blocks" if everything else "vision, frozen blocks"
    x = paper.linear(f"{name}: linears", patches, sizes.patch, sizes.width, everything, False)
    for block in range(sizes.depth):
        trains = block >= first
        name = "vision, trained blocks" if trains else "vision, frozen blocks"
        linears = f"{name}: linears"
        # A norm's weight gives every linear behind it an input with a gradient.
        qkv = paper.linear(linears, patches, sizes.width, 3 * sizes.width, trains, trains)
        pairs = full if block in sizes.full_blocks else windowed
        read = paper.attention(f"{name}: attention", pairs, sizes.width, qkv, qkv, qkv)
        x |= paper.linear(linears, patches, sizes.width, sizes.width, trains, read)
        for _ in range(2):
            paper.linear(linears, patches, sizes.width, sizes.ffn, trains, trains)
        x |= paper.linear(linears, patches, sizes.ffn, sizes.width, trains, trains)
    wide = sizes.width * sizes.cell
    trains = sizes.trained != 0
    hidden = paper.linear("vision, merger", tokens, wide, wide, trains, trains)
    return paper.linear("vision, merger", tokens, wide, sizes.out, trains, hidden)


def _cut(length: int, piece: int) -> list[int]:
    return [min(piece, length - start) for start in range(0, length, piece)]


def _resampler(
    paper: _Paper, width: int, fusion: Mapping[str, Any], tokens: int, images: int, z: bool
) -> bool:
    """Compresses each image's tokens to a fixed number; all of it is new, so all of it trains."""
    queries = int(fusion.get("queries", 128))
    count = images * queries
    for _ in range(int(fusion.get("layers", 2))):
        for _ in range(3):
            paper.linear("resampler", count, width, width, True, True)
        paper.attention("resampler", images * queries**2, width, True, True, True)
        paper.linear("resampler", count, width, width, True, True)
        paper.linear("resampler", count, width, width, True, True)
        for _ in range(2):
            paper.linear("resampler", tokens, width, width, True, True)
        paper.attention("resampler", tokens * queries, width, True, True, True)
        paper.linear("resampler", count, width, width, True, True)
        paper.linear("resampler", count, width, 4 * width, True, True)
        paper.linear("resampler", count, 4 * width, width, True, True)
    return z or images > 0


class _Decoder:
    """The decoder with its fusion; follows modeling/decoder.py and the mechanism's own file."""

    def __init__(
        self,
        paper: _Paper,
        sizes: TextSizes,
        fusion: Mapping[str, Any],
        pack: Sequence[SampleShape],
        pairs: Pairs,
    ) -> None:
        self.paper, self.sizes, self.fusion, self.pairs = paper, sizes, fusion, pairs
        self.text = sum(sample.text for sample in pack)
        self.images = sum(sample.image_tokens for sample in pack)
        self.stream = self.text + sum(_inserted(fusion, sample) for sample in pack)
        self.shared = bool(fusion.get("share_parameters", False))
        self.text_keys = fusion["mechanism"] == "casa" and fusion.get("text_in_window", True)
        self.q_width, self.kv_width = sizes.q_width, sizes.kv_width
        # Of the forward pass, what activation checkpointing runs again: all of a block but its last
        # product, behind which nothing is saved.
        self.repeated = 0

    def run(self, z: bool) -> bool:
        """Whether the hidden states carry a gradient at the end.

        :param z: whether the image tokens do.
        """
        mechanism = self.fusion["mechanism"]
        fused = set(fused_layers(self.fusion, self.sizes.layers))
        h = self.sizes.trainable or (z and self.stream > self.text)
        for layer in range(self.sizes.layers):
            before = self.paper.forward()
            if layer not in fused:
                h = self._ffn(self._self_attention(h))
            elif mechanism == "gated_cross_attention":
                h = self._ffn(self._self_attention(self._gated(h)))
            elif mechanism == "hyper_attention":
                h = self._ffn(self._hyper(h, z))
            else:
                h, z = self._casa(h, z, updates=layer < max(fused))
            if h:  # otherwise the block keeps nothing, and nothing of it is needed again
                self.repeated += self.paper.forward() - before
                self.repeated -= 2 * self.stream * self.sizes.ffn * self.sizes.width
        return h

    def _linear(
        self, part: str, tokens: int, inputs: int, outputs: int, own: bool, x: bool
    ) -> bool:
        """A linear of the backbone, or one of the fusion's own."""
        trains = own or self.sizes.trainable
        return self.paper.linear(part, tokens, inputs, outputs, trains, x)

    def _qkv(self, x: bool) -> tuple[bool, bool]:
        """Self-attention's projections: whether queries, and keys, carry gradients."""
        width = self.sizes.width
        q = self._linear("LLM, linears", self.stream, width, self.q_width, False, x)
        k = self._linear("LLM, linears", self.stream, width, self.kv_width, False, x)
        self._linear("LLM, linears", self.stream, width, self.kv_width, False, x)
        return q, k

    def _self_read(self, q: bool, k: bool) -> bool:
        return self.paper.attention("LLM, self-attention", self.pairs.stream, self.q_width, q, k, k)

    def _self_output(self, read: bool) -> bool:
        width = self.sizes.width
        return self._linear("LLM, linears", self.stream, self.q_width, width, False, read)

    def _self_attention(self, h: bool) -> bool:
        x = h or self.sizes.trainable
        return h | self._self_output(self._self_read(*self._qkv(x)))

    def _mlp(self, part: str, tokens: int, own: bool, x: bool) -> bool:
        width, ffn = self.sizes.width, self.sizes.ffn
        for _ in range(2):
            inner = self._linear(part, tokens, width, ffn, own, x)
        return self._linear(part, tokens, ffn, width, own, inner)

    def _ffn(self, h: bool) -> bool:
        x = h or self.sizes.trainable
        return h | self._mlp("LLM, linears", self.stream, False, x)

    def _image_keys(self, own: bool, y: bool) -> bool:
        width = self.sizes.width
        for _ in range(2):
            k = self._linear("fusion, image projections", self.images, width, self.kv_width, own, y)
        return k

    def _text_reads(self, q: bool, k: bool) -> bool:
        return self.paper.attention("fusion, attention", self.pairs.text, self.q_width, q, k, k)

    def _fusion_text(self, tokens: int, inputs: int, outputs: int, own: bool, x: bool) -> bool:
        return self._linear("fusion, text projections", tokens, inputs, outputs, own, x)

    def _casa(self, h: bool, z: bool, updates: bool) -> tuple[bool, bool]:
        """A block with cross-attention, of one of four placements.

        :param updates: whether a later fused block reads the image tokens, so that they change.
        """
        placement = self.fusion.get("placement", "parallel")
        base = self.sizes.trainable
        own = not self.shared
        y = z or own or base  # behind the norm of the image tokens
        reuse = self.shared and placement == "parallel"
        if placement == "after":
            h = self._self_attention(h)
        # In `before` and `after` the text has a norm of the fusion's own.
        x = h or base or (own and placement in ("before", "after"))
        q = k = False
        if placement == "parallel":
            q, k = self._qkv(x)
            read = self._self_read(q, k)
        if not reuse:
            q, k = self._fusion_qkv(x, own)
        k_image = self._image_keys(own, y)
        k = k_image or (k and bool(self.text_keys))
        read_fusion = self._text_reads(q, k)
        if reuse:
            h |= self._self_output(read or read_fusion)
        else:
            if placement == "parallel":
                h |= self._self_output(read)
            h |= self._fusion_text(self.text, self.q_width, self.sizes.width, own, read_fusion)
        if placement == "before":
            h = self._self_attention(h)
        if updates:
            z = self._update_images(z, y, k, own)
        return self._ffn(h), z

    def _fusion_qkv(self, x: bool, own: bool) -> tuple[bool, bool]:
        """Queries, and keys and values where the text is among the keys."""
        width = self.sizes.width
        q = self._fusion_text(self.text, width, self.q_width, own, x)
        k = False
        if self.text_keys:
            for _ in range(2):
                k = self._fusion_text(self.text, width, self.kv_width, own, x)
        return q, k

    def _update_images(self, z: bool, y: bool, k: bool, own: bool) -> bool:
        """D4: image tokens through the block's feed-forward network, and through attention."""
        update = self.fusion.get("update_image_tokens", "none")
        width = self.sizes.width
        if update == "ffn_and_attention":
            part = "image updates, linears"
            q = self._linear(part, self.images, width, self.q_width, own, y)
            read = self.paper.attention(
                "image updates, attention", self.pairs.image, self.q_width, q, k, k
            )
            z |= self._linear(part, self.images, self.q_width, width, own, read)
        if update != "none":
            x = z or self.sizes.trainable
            z |= self._mlp("image updates, linears", self.images, False, x)
        return z

    def _gated(self, h: bool) -> bool:
        """Flamingo's layer before a block: everything in it is new."""
        width = self.sizes.width
        q = self._fusion_text(self.text, width, self.q_width, True, True)
        k = self._image_keys(True, True)
        read = self._text_reads(q, k)
        self._fusion_text(self.text, self.q_width, width, True, read)
        self._mlp("fusion, text projections", self.text, True, True)
        return True

    def _hyper(self, h: bool, z: bool) -> bool:
        """mPLUG-Owl3's block: shared queries and norm, own image keys, a gate on each token."""
        x = h or self.sizes.trainable
        q, k = self._qkv(x)
        read = self._self_read(q, k)
        image = self._image_keys(True, z or self.sizes.trainable)
        read_fusion = self._text_reads(q, image)
        gate = self._fusion_text(self.text, self.sizes.width, 1, True, x)
        return h | self._self_output(read or read_fusion or gate)
