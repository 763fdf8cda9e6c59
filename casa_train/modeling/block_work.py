"""The floating-point work of decoder blocks, counted by running their products on paper.

Every matrix product costs two operations for each multiply-add; nothing else is counted. What its
backward pass costs follows the rule of autograd: the gradient of a weight if the weight trains, the
gradient of an input if anything before it trains. Attention counts attended pairs only, and no
product twice: what a kernel recomputes or pads is not work of the model.

`BlockWork` mirrors the pieces of `block.py`: a fusion mechanism composes the work of its blocks
from it as it composes their forward (`FusionMechanism.count_layer`). Plain integers, no tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextSizes:
    """The text decoder.

    :param ffn: inner width of the feed-forward network.
    :param trainable: whether its own weights train; fusion weights always do.
    :param adapters: ranks of the low-rank adapters that train beside its linears, by layer and
        linear, such as `0.q_proj`.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    trainable: bool
    adapters: Mapping[str, int] = field(default_factory=dict)

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


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
    text: int = 0
    image: int = 0


class Paper:
    """Collects operations by part; each method returns whether its result carries a gradient.

    :ivar parts: in the order in which they first came.
    :ivar last: forward operations of the newest linear.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Operations] = defaultdict(Operations)
        self.last = 0

    @property
    def forward(self) -> int:
        """Operations of the forward pass so far."""
        return sum(part.forward for part in self.parts.values())

    def linear(
        self, part: str, tokens: int, inputs: int, outputs: int, trains: bool, x: bool
    ) -> bool:
        """(tokens, inputs) -> (tokens, outputs).

        :param trains: whether the weight does; :param x: whether the input carries a gradient.
        """
        self.last = 2 * tokens * inputs * outputs
        self.parts[part].forward += self.last
        self.parts[part].backward += self.last * (trains + x)
        return trains or x

    def attention(self, part: str, pairs: int, width: int, q: bool, k: bool, v: bool) -> bool:
        """Scores and weighted sums of `pairs` over all heads together, `width` wide.

        :param q: whether the queries carry a gradient; keys and values alike.
        """
        work = 2 * pairs * width
        self.parts[part].forward += 2 * work
        self.parts[part].backward += work * (q + k + v + (q or k))
        return q or k or v


# What of keys and values carries a gradient, where it is not all or nothing; `|` adds.
KEYS, VALUES = 2, 4


class BlockWork:
    """The work of decoder blocks over one pack; the methods are those of `block.py` on paper.

    Of every tensor it keeps whether it carries a gradient: `h` the hidden states of the stream, `z`
    the image tokens, `x` and `y` what norms make of them, q and k heads; k speaks for keys and
    values, of which an adapter may give one alone a gradient (`KEYS`, `VALUES`).

    :param paper: takes the operations.
    :param sizes: the decoder's.
    :param pairs: what attends to what.
    :param text: text tokens; :param images: image tokens; :param stream: tokens of the stream.
    :ivar layer: index of the layer that is counted.
    """

    layer = 0

    def __init__(
        self, paper: Paper, sizes: TextSizes, pairs: Pairs, text: int, images: int, stream: int
    ) -> None:
        self.paper, self.sizes, self.pairs = paper, sizes, pairs
        self.text, self.images, self.stream = text, images, stream

    def norm(self, h: bool) -> bool:
        """A norm of the backbone."""
        return h or self.sizes.trainable

    def linear(
        self,
        part: str,
        tokens: int,
        inputs: int,
        outputs: int,
        own: bool,
        x: bool,
        name: str | None = None,
    ) -> bool:
        """A linear of the backbone, or one of the fusion's own, which always trains.

        :param name: of the backbone's own, such as `q_proj`: it may have an adapter.
        """
        y = self.paper.linear(part, tokens, inputs, outputs, own or self.sizes.trainable, x)
        rank = 0 if own else self.sizes.adapters.get(f"{self.layer}.{name}", 0)
        if rank:
            inner = self.paper.linear(part, tokens, inputs, rank, True, x)
            y = self.paper.linear(part, tokens, rank, outputs, True, inner)
        return y

    def project(self, x: bool) -> tuple[bool, int]:
        """Self-attention's projections: queries, and keys and values."""
        part, width = "LLM, linears", self.sizes.width
        q = self.linear(part, self.stream, width, self.sizes.q_width, False, x, "q_proj")
        return q, self.keys(part, self.stream, False, x)

    def keys(self, part: str, tokens: int, own: bool, x: bool) -> int:
        """Projections of keys and values."""
        width, kv_width = self.sizes.width, self.sizes.kv_width
        k = self.linear(part, tokens, width, kv_width, own, x, "k_proj")
        v = self.linear(part, tokens, width, kv_width, own, x, "v_proj")
        return KEYS * k | VALUES * v

    def attention(self, part: str, pairs: int, q: bool, k: int) -> bool:
        """Scores and weighted sums, over all heads; k as `keys` gives it, or True for both."""
        of_keys, of_values = k is True or bool(k & KEYS), k is True or bool(k & VALUES)
        return self.paper.attention(part, pairs, self.sizes.q_width, q, of_keys, of_values)

    def self_attention(self, q: bool, k: int) -> bool:
        """What the stream reads in itself, before the output projection."""
        return self.attention("LLM, self-attention", self.pairs.stream, q, k)

    def project_out(self, read: bool) -> bool:
        """Self-attention's output projection."""
        width = self.sizes.width
        q_width = self.sizes.q_width
        return self.linear("LLM, linears", self.stream, q_width, width, False, read, "o_proj")

    def attend(self, h: bool) -> bool:
        """h + SA(norm(h))."""
        return h | self.project_out(self.self_attention(*self.project(self.norm(h))))

    def mlp(self, part: str, tokens: int, own: bool, x: bool, ffn: int | None = None) -> bool:
        """A gated feed-forward network of the backbone's shape, or `ffn` wide."""
        width, ffn = self.sizes.width, self.sizes.ffn if ffn is None else ffn
        gate, up = (
            self.linear(part, tokens, width, ffn, own, x, name) for name in ("gate_proj", "up_proj")
        )
        return self.linear(part, tokens, ffn, width, own, gate or up, "down_proj")

    def feed_forward(self, h: bool) -> bool:
        """h + FFN(norm(h))."""
        return h | self.mlp("LLM, linears", self.stream, False, self.norm(h))

    def plain_block(self, h: bool) -> bool:
        """The backbone's own block."""
        return self.feed_forward(self.attend(h))

    # The fusion's.

    def text_linear(
        self, inputs: int, outputs: int, own: bool, x: bool, name: str | None = None
    ) -> bool:
        """A projection of text tokens that serves fusion; `name` as in `linear`."""
        return self.linear("fusion, text projections", self.text, inputs, outputs, own, x, name)

    def text_keys(self, own: bool, x: bool) -> int:
        """Keys and values of the text tokens for fusion."""
        return self.keys("fusion, text projections", self.text, own, x)

    def image_keys(self, own: bool, y: bool) -> int:
        """Keys and values of the image tokens."""
        return self.keys("fusion, image projections", self.images, own, y)

    def cross_attention(self, q: bool, k: int) -> bool:
        """What text reads in a fusion layer, before any output projection."""
        return self.attention("fusion, attention", self.pairs.text, q, k)
