"""A block of Qwen2.5-VL's vision tower over packed patches, with transformers' parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import varlen_attention
from .lean import one_kernel_pays, untouched
from .regions import (
    Compiler,
    add_normed,
    compiling,
    gated_product,
    normed,
    region,
)
from .segments import Segments

# Matrix kernels of a GPU want rows of 16 bytes, and like those of 128 best: columns in half
# precision.
NEEDED, ALIGNED = 8, 64
# Patches; below, padding costs as much as it saves.
PADDED_FROM = 512


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if one_kernel_pays(x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class VisionAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], segments: Segments, backend: str
    ) -> Tensor:
        q, k, v = _rotated_heads(self.qkv(x), table, self.heads)
        read = varlen_attention(q, k, v, segments, backend)
        out: Tensor = self.proj(read.flatten(1))
        return out


class VisionMLP(nn.Module):
    """A gated feed-forward network.

    :ivar aligned: its width is padded to a multiple of this while it runs; 1: it is not, but where
        nothing is differentiated and many patches pay for it on a GPU.
    """

    aligned = 1

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        out: Tensor
        aligned = self.aligned
        if aligned == 1 and not torch.is_grad_enabled() and self._padding_pays(x):
            aligned = ALIGNED
        if more := -gate.out_features % aligned:
            product = gated_product(F.silu, _widened(gate, x, more), _widened(up, x, more))
            out = F.linear(product, F.pad(down.weight, (0, more)), down.bias)
        else:
            out = down(gated_product(F.silu, gate(x), up(x)))
        return out

    def _padding_pays(self, x: Tensor) -> bool:
        """Whether kernels for rows that are not aligned would cost more than padding the weights,
        and the weights are all there is to the linears.
        """
        if not x.is_cuda or x.element_size() != 2 or len(x) < PADDED_FROM:
            return False
        linears = self.gate_proj, self.up_proj, self.down_proj
        for linear in linears:
            plain = type(linear) is nn.Linear and untouched(linear)
            # Weights of quantised linears are of a class of their own.
            if not plain or any(type(p) is not nn.Parameter for p in linear.parameters()):
                return False
        return self.gate_proj.out_features % NEEDED > 0


def _widened(linear: nn.Linear, x: Tensor, more: int) -> Tensor:
    """linear(x) with so many more columns, all exactly zero."""
    return F.linear(x, F.pad(linear.weight, (0, 0, 0, more)), F.pad(linear.bias, (0, more)))


class VisionBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        segments: Segments,
        backend: str,
        compiler: Compiler | None = None,
    ) -> Tensor:
        with compiling(compiler):
            read = self.attn(normed(self.norm1, x), table, segments, backend)
            x, y = add_normed(self.norm2, x, read)
            out: Tensor = x + self.mlp(y)
        return out


@region
def _rotated_heads(
    qkv: Tensor, table: tuple[Tensor, Tensor], heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(patches, 3 * C) -> rotated queries and keys, and values: (patches, heads, D) each."""
    both, v = qkv.unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], 1)
    if torch.compiler.is_compiling():  # a kernel writes each on its own
        q, k = (_rotate(x, table) for x in both.split(heads, 1))
    else:
        q, k = _rotate(both, table).split(heads, 1)
    return q, k, v


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Half-rotation RoPE in float32 over (patches, heads, D)."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
