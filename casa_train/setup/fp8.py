"""The linears of frozen vision blocks in fp8, which a GPU of data centres multiplies at twice the
rate of bf16 by its data sheet. No GPU has measured it here.

Both sides of a product are e4m3, scaled by row: weights once, by output channel, and activations on
every call, by patch. Sums are fp32, results bf16. There is no backward pass, and what is stored,
saved and exported stays the bf16 weights: the copies here are no parameters, and come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.modeling.regions import compiles, gated_product, region
from casa_train.modeling.vision import VisionTower
from casa_train.modeling.vision_block import VisionMLP

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# Rows of fp8 that matrix kernels take have a multiple of 16 bytes; of 64, their tiles fit as well.
ALIGNED = 64
# Below, a row's factor would not be finite.
SMALLEST = 1e-30
# Of the first GPUs with products in fp8 (Ada).
CAPABILITY = (8, 9)


class Fp8Linear(nn.Linear):
    """A frozen linear whose product runs in fp8: (rows, inputs) bf16 -> (rows, outputs) bf16.

    Made by `use_fp8` out of a linear, whose parameters it keeps.
    """

    rows8: Tensor
    scale: Tensor
    padded_bias: Tensor | None

    @torch.no_grad()
    def store(self) -> None:
        """Takes the weights as they stand into fp8: (outputs, inputs), padded with zeros."""
        more = -self.out_features % ALIGNED
        weight = nn.functional.pad(self.weight, (0, 0, 0, more))
        self.rows8, self.scale = fp8_rows(weight)
        self.padded_bias = None if self.bias is None else nn.functional.pad(self.bias, (0, more))

    def product(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Of `fp8_rows`; the outputs are padded with zeros."""
        return scaled_product(rows, self.rows8, scale, self.scale, self.padded_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(*fp8_rows(x))[:, : self.out_features]


class Fp8MLP(VisionMLP):
    """A feed-forward network of such linears: its input is rounded once, and its inner width stays
    padded, where silu(0) * 0 = 0.
    """

    gate_proj: Fp8Linear
    up_proj: Fp8Linear

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = fp8_rows(x)
        gate, up = (linear.product(rows, scale) for linear in (self.gate_proj, self.up_proj))
        out: Tensor = self.down_proj(gated_product(nn.functional.silu, gate, up))
        return out


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, width) -> e4m3, whose width is padded with zeros, and fp32 scales (rows, 1).

    A row's largest value becomes the largest of e4m3; a row of zeros stays one. In compiled
    blocks it is a region; eagerly, e4m3 is written from fp32 with no copy in between.
    """
    if compiles():
        return _fp8_rows(x)
    largest = _largest(x)
    width = x.shape[1] + -x.shape[1] % ALIGNED
    rows = torch.empty(len(x), width, dtype=FP8, device=x.device)
    torch.mul(x, LARGEST / largest, out=rows[:, : x.shape[1]])
    if width > x.shape[1]:
        rows[:, x.shape[1] :].zero_()
    return rows, largest / LARGEST


@region
def _fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = _largest(x)
    padded = nn.functional.pad(x, (0, -x.shape[1] % ALIGNED))
    return (padded * (LARGEST / largest)).to(FP8), largest / LARGEST


def _largest(x: Tensor) -> Tensor:
    """Of every row, by size: (rows, 1) fp32."""
    size: Tensor = torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True)
    return size.float().clamp(min=SMALLEST)


def scaled_product(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """(x * x_scale) (weight * weight_scale)^T + bias in bf16.

    :param x: (rows, inputs) e4m3; :param weight: (outputs, inputs) e4m3.
    :param x_scale: (rows, 1) fp32; :param weight_scale: (outputs, 1) fp32.
    """
    if x.device.type != "cuda":  # the same rounding of both sides, in the products of fp32
        out = (x.float() @ weight.float().T) * x_scale * weight_scale.T
        return (out if bias is None else out + bias.float()).to(torch.bfloat16)
    # Not nn.functional.scaled_mm, which torch has since 2.10 alone.
    return torch._scaled_mm(
        x,
        weight.T,
        scale_a=x_scale,
        scale_b=weight_scale.T,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def use_fp8(tower: VisionTower) -> None:
    """Runs the linears of a tower's frozen blocks in fp8 from here on, weights as they stand.

    On the device where they stand, too: the copies follow neither `load_state_dict` nor `.to()`.
    Whoever changes or moves the weights calls this again.
    """
    for linear in frozen_linears(tower):
        linear.__class__ = Fp8Linear
        assert isinstance(linear, Fp8Linear)
        linear.store()
    for block in tower.blocks[: tower.frozen_blocks]:
        if isinstance(mlp := block.get_submodule("mlp"), VisionMLP):
            mlp.__class__ = Fp8MLP


def frozen_linears(tower: VisionTower) -> list[nn.Linear]:
    """The linears of a tower's frozen blocks: all that a block has."""
    blocks = tower.blocks[: tower.frozen_blocks]
    return [module for module in blocks.modules() if isinstance(module, nn.Linear)]


def fp8_bytes(tower: VisionTower) -> int:
    """What the copies of a tower's frozen linears take on every rank."""

    def padded(size: int) -> int:
        return size + -size % ALIGNED

    shapes = [linear.weight.shape for linear in frozen_linears(tower)]
    return sum(
        padded(rows) * (padded(columns) + torch.float32.itemsize) for rows, columns in shapes
    )


def check_fp8(config: Config, tower: VisionTower) -> list[str]:
    """What to say at the start of a run that asks for fp8; nothing for others.

    :raises UserError: this machine's GPU or torch has no such products, or nothing is frozen.
    """
    if config.parallel.frozen_precision != "fp8":
        return []
    if not tower.frozen_blocks:
        raise UserError(
            "parallel.frozen_precision is 'fp8', but the vision tower has no frozen blocks "
            f"(model.vision.train_last_blocks={config.model.vision.train_last_blocks}). Freeze "
            "some, or set parallel.frozen_precision=bf16."
        )
    if not torch.cuda.is_available():
        return [
            "note: this machine has no GPU, so fp8 of the frozen vision blocks is emulated: its "
            "rounding, in more time than bf16 takes"
        ]
    if missing := what_is_missing(torch):
        raise UserError(
            f"parallel.frozen_precision is 'fp8', but {missing}. Set "
            "parallel.frozen_precision=bf16."
        )
    return []


def small_product(device: str = "cuda") -> Tensor:
    """One of rows of fp8 on this process's GPU, as the blocks ask for it; waits for its end."""
    ones = torch.ones(ALIGNED, ALIGNED, dtype=torch.bfloat16, device=device)
    rows, scale = fp8_rows(ones)
    return scaled_product(rows, rows, scale, scale, ones[0]).cpu()


def what_is_missing(library: Any, multiply: Callable[[], object] = small_product) -> str | None:
    """Why a GPU cannot multiply in fp8, in words; None: it can, and has done so.

    :param library: torch; :param multiply: tries it.
    """
    found, name = library.cuda.get_device_capability(), library.cuda.get_device_name()
    if tuple(found) < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return (
            f"{name} has compute capability {'.'.join(map(str, found))}; expected {least} or more"
        )
    if library.version.cuda is None or not hasattr(library, "_scaled_mm"):
        return f"torch {library.__version__} has no scaled products of fp8 for CUDA"
    try:  # builds for a card, and cards of a build, differ in scales by row
        multiply()
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"torch {library.__version__} cannot multiply rows of fp8 on {name}: {first}"
    return None
