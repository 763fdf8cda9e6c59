"""What an export does with a run's adapters (LoRA): adds them to the weights, or keeps them apart.

A merge is exact in fp32 but for the rounding of a sum; in bf16 a weight keeps eight bits, and
what an adapter adds below its last one is gone. So the merge itself is compared in fp32, to the
gate's tolerance, and what rounding to bf16 does is measured beside what the adapters do: no bound
would fit both a faint adapter and a strong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casa_train.config.model_schema import LORA
from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.export.gate import TOLERANCE, packed_logits
from casa_train.setup.kept_adapters import FOLDER
from casa_train.setup.lora import merge_adapters, plain_layers, write_adapters

MERGE, KEEP = "merge", "keep"
# Above this share of what adapters change, rounding is worth a word.
NOTEWORTHY = 0.1


def chosen_way(config: Config, asked: str | None) -> str | None:
    """merge, keep, or None where the run has no adapters.

    :param asked: the command's `--lora`; None: as the run's configuration says.
    :raises UserError: it was asked for, and there are none.
    """
    trainable = config.model.backbone.trainable
    if trainable == LORA:
        return asked or config.export.lora
    if asked is not None:
        raise UserError(
            f"--lora {asked}: the run {config.name} has no adapters (model.backbone.trainable is "
            f"{str(trainable).lower()}); expected one with model.backbone.trainable={LORA}. Leave "
            "--lora out."
        )
    return None


class Merge:
    """Merges the adapters of a model, and compares logits before and behind it.

    :param model: with its adapters; in fp32 and without them afterwards.
    :param conversations: as the gate takes them.
    :raises UserError: logits that differ by more than `TOLERANCE`.
    """

    def __init__(self, model: Any, processor: Any, conversations: Sequence[Any]) -> None:
        self.inputs = processor, conversations
        model.float()
        self.before = packed_logits(model, *self.inputs)
        with plain_layers(model):
            self.effect = difference(self.before, packed_logits(model, *self.inputs))
        merge_adapters(model)
        self.error = difference(self.before, packed_logits(model, *self.inputs))
        if not self.error <= TOLERANCE:
            raise UserError(
                f"merged adapters: logits differ from those before by {self.error:.2e}, more than "
                f"{TOLERANCE:.0e} in fp32. Nothing was written. Export with --lora keep."
            )

    def line(self, saved: Any, dtype: torch.dtype) -> str:
        """What the merge did to logits.

        :param saved: the model with the values that were saved; :param dtype: theirs.
        """
        line = (
            f"adapters: merged, logits equal to {self.error:.1e} before rounding; the adapters "
            f"move them by up to {self.effect:.1e}"
        )
        if dtype == torch.float32:
            return line
        moved = difference(self.before, packed_logits(saved, *self.inputs))
        line += f", rounding all weights to bf16 by up to {moved:.1e}"
        if moved > NOTEWORTHY * self.effect:
            line += " (--dtype fp32 or --lora keep loses less of the adapters)"
        return line


def save_kept(model: Any, config: Config, directory: Path) -> None:
    """Writes the weights without the adapters, and these into a folder of their own."""
    model.config.kept_adapter = FOLDER
    with plain_layers(model):
        model.save_pretrained(directory)
    write_adapters(model, config.model.backbone.lora, directory / FOLDER)


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest between logits; NaN if there is any."""
    pairs = zip(one, other, strict=True)
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
