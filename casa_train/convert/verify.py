"""Whether an export computes what the published checkpoint does, by the checkpoint's own code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from casa_train.convert.original import (
    OURS,
    Places,
    listening,
    load_original,
    run_original,
    tokenized,
)
from casa_train.errors import UserError
from casa_train.export.from_run import gate_conversations
from casa_train.export.loading import load_model, load_processor
from casa_train.io.precision import DTYPES
from casa_train.io.tables import aligned
from casa_train.modeling.image_processing_casa import SIDE

# The largest relative error that rounding explains, by precision.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
IDS, POINTS, SIZES, LOGITS = "token ids", "insertion points", "large image", "logits"
SAME, DIFFERS = "", "<- differs"


@dataclass(frozen=True)
class Setting:
    """Where and how both models run.

    :param precision: fp32 or bf16; :param attention: the original's `attn_implementation`.
    """

    device: str = "cpu"
    precision: str = "fp32"
    attention: str | None = None


@dataclass
class Verdict:
    """What a comparison found.

    :ivar rows: (what is compared, values, relative error or None, remark).
    :ivar worst: the relative error of the logits.
    """

    rows: list[tuple[str, str, float | None, str]] = field(default_factory=list)
    passed: bool = False
    worst: float = float("inf")

    @property
    def first_difference(self) -> str | None:
        """The first row that differs; None where all are equal."""
        return next((name for name, _, _, remark in self.rows if remark), None)

    def table(self) -> str:
        """The rows as text. Where the logits are equal, layers are left out."""
        shown = [row for row in self.rows if not (self.passed and row[0].startswith("layer "))]
        cells = [("", "values", "relative error", "")]
        for name, values, error, remark in shown:
            cells.append((name, values, "" if error is None else f"{error:.1e}", remark))
        return aligned(cells)


@torch.no_grad()
def verify(source: Path, export: Path, places: Places, setting: Setting) -> Verdict:
    """Compares an export with its original on a fixed conversation of two images, and what both
    make of the size of a third one that is too large.

    The original gets the inputs of its own processor, the export the pixels of its own and the
    ids of the original, so that a template that differs is told apart from a model that does.

    :param source: the published checkpoint, whose code runs.
    :param places: the original's modules.
    :raises UserError: code of the original that fails.
    """
    dtype = DTYPES[setting.precision]
    theirs, their_processor = load_original(source, dtype, setting.device, setting.attention)
    ours = load_model(export, dtype).to(setting.device).eval()
    our_processor = load_processor(export)
    conversation = fixed_conversation(our_processor.max_pixels)
    given = tokenized(their_processor, conversation)
    own = tokenized(our_processor, conversation)
    verdict = Verdict()
    for name, key in ((IDS, "input_ids"), (POINTS, "image_embeds_insertion_points")):
        equal = _numbers(given.get(key)) == _numbers(own.get(key))
        length = len(_numbers(given.get(key)))
        verdict.rows.append((name, f"{length:,}", None, SAME if equal else DIFFERS))
    verdict.rows.append(_sizes(their_processor, our_processor))
    given = _moved(given, setting.device, dtype)
    own = _moved(own, setting.device, None)
    for key in ("input_ids", "attention_mask", "image_embeds_insertion_points"):
        if key in given:
            own[key] = given[key]
    with listening(theirs, places) as expected:
        logits = run_original(theirs, given)
    with listening(ours, OURS) as found:
        own_logits = ours(**own).logits
    expected[LOGITS] = logits.float().cpu().flatten(0, -2)
    found[LOGITS] = own_logits.float().cpu().flatten(0, -2)
    tolerance = TOLERANCES[setting.precision]
    for name, values in found.items():
        verdict.rows.append(_compared(name, expected.get(name), values, tolerance))
    verdict.rows.sort(key=lambda row: row[0] == LOGITS)  # last
    inputs_equal = all(not remark for _, _, _, remark in verdict.rows[:3])
    error = verdict.rows[-1][2]
    verdict.worst = float("inf") if error is None else error
    verdict.passed = inputs_equal and verdict.worst <= tolerance
    return verdict


def fixed_conversation(max_pixels: int) -> Any:
    """Two images with text between, neither of them square: rows and columns are told apart.

    They are as large as the export takes them, or 224 pixels, and so that nothing is resized.
    """
    conversation = gate_conversations(max_pixels)[1]
    for number, message in enumerate(conversation[::2]):
        part = message["content"][0]
        long = part["image"].width
        short = max(SIDE, long // 2 // SIDE * SIDE)
        size = (long, short) if number == 0 else (short, long)
        part["image"] = part["image"].resize(size)
    return conversation


def _sizes(theirs: Any, ours: Any) -> tuple[str, str, float | None, str]:
    """What both processors make of an image that is far too large: its sides."""
    side = isqrt(ours.max_pixels)
    picture = Image.new("RGB", (4 * side + 13, 3 * side + 5), "olive")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    found = []
    for processor in (theirs, ours):
        batch = tokenized(processor, [{"role": "user", "content": parts}])
        found.append(_sides(batch.get("pixel_values")))
    expected, own = found
    assert own is not None  # the export's are images
    shown = f"{own[0]}x{own[1]}"
    if expected is None:
        return f"{SIZES} (in patches there, not compared)", shown, None, SAME
    if expected[0] > picture.height - SIDE and expected[1] > picture.width - SIDE:
        return f"{SIZES} (no limit there)", shown, None, SAME
    there = f"{DIFFERS}: {expected[0]}x{expected[1]} there"
    return SIZES, shown, None, SAME if expected == own else there


def _sides(pixels: Any) -> tuple[int, int] | None:
    """Height and width of the one image in pixel values (..., 3, H, W), or lists of such."""
    while isinstance(pixels, list | tuple) and pixels:
        pixels = pixels[0]
    if not isinstance(pixels, Tensor) or pixels.ndim < 3 or pixels.shape[-3] != 3:
        return None
    return int(pixels.shape[-2]), int(pixels.shape[-1])


def check_device(device: str) -> None:
    """:raises UserError: a device that torch does not know, or has none of."""
    try:
        torch.empty(1, device=device)
    except Exception as error:  # of torch: RuntimeError, AssertionError, or a driver's
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--device is {device!r}, which cannot be used here ({first:.120}); expected cpu, or "
            "cuda on a machine with a GPU."
        ) from error


def facts(verdict: Verdict, digest: str, setting: Setting) -> dict[str, Any]:
    """What the record of an export keeps of a comparison that it passed."""
    return {
        "worst": verdict.worst,
        "precision": setting.precision,
        "device": setting.device,
        "source_digest": digest,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _compared(
    name: str, expected: Tensor | None, found: Tensor, tolerance: float
) -> tuple[str, str, float | None, str]:
    if expected is None:
        # No difference, but nothing either to say that there is none: the logits decide.
        return f"{name} (no such module there)", f"{found.numel():,}", None, SAME
    if expected.numel() != found.numel():
        return name, f"{found.numel():,}", None, f"{DIFFERS}: {expected.numel():,} there"
    difference = (found.flatten() - expected.flatten()).norm()
    error = float(difference / expected.norm().clamp_min(1e-12))
    return name, f"{found.numel():,}", error, SAME if error <= tolerance else DIFFERS


def _numbers(value: Any) -> list[int]:
    """Ids or points as a flat list, whichever containers they come in."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        numbers: list[int] = value.flatten().tolist()
        return numbers
    return [n for one in value for n in (_numbers(one) if not isinstance(one, int) else [one])]


def _moved(inputs: Mapping[str, Any], device: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Inputs on a device, floating ones in the model's precision."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            cast = dtype is not None and value.is_floating_point()
            return value.to(device, dtype) if cast else value.to(device)
        if isinstance(value, list | tuple):
            return type(value)(map(moved, value))
        return value

    return {key: moved(value) for key, value in inputs.items()}
