"""Adapters (LoRA) that an export keeps apart, read to start a later stage from the merged weights.

Of peft's format only what `lora.write_adapters` writes is taken: B A alpha / rank beside a linear.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from casa_train.errors import UserError

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before the names of a model's parameters in peft's files."""
# What would make more of an adapter than a product, and what it is without.
PLAIN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


class KeptAdapters:
    """The adapters in a folder, in peft's format.

    :param setting: the configuration field, for messages.
    :raises UserError: files that are missing or not whole, or another kind of adapter.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self.folder, self.setting = folder, setting
        try:
            config = json.loads((folder / CONFIG).read_text())
            self.rank = int(config["r"])
            self.scale = float(config["lora_alpha"]) / self.rank
            self._tensors = load_file(folder / WEIGHTS)
        except (
            OSError,
            ValueError,
            ArithmeticError,
            LookupError,
            TypeError,
            SafetensorError,
        ) as error:
            raise UserError(
                f"{setting}: the adapters in {folder} cannot be read ({error}); expected {CONFIG} "
                f"and {WEIGHTS} as the export wrote them. Copy them again."
            ) from error
        other = {k: config[k] for k, v in PLAIN.items() if (config.get(k) or v) != v}
        if config.get("peft_type") != "LORA" or other:
            kind = other or config.get("peft_type")
            raise UserError(
                f"{setting}: the adapters in {folder} are of another kind ({kind}); expected plain "
                "LoRA, as exports of this project have it. Merge them with peft first."
            )

    def check(self, shapes: dict[str, list[int]]) -> None:
        """Whether every adapter stands beside a weight.

        :param shapes: of the export's tensors.
        :raises UserError: naming one that does not.
        """
        for name, tensor in self._tensors.items():
            base, side, _ = ("", "", *name.removeprefix(PREFIX).rsplit(".", 2))[-3:]
            rows, columns = (*shapes.get(f"{base}.weight", ()), 0, 0)[:2]
            down = side == "lora_A"
            expected = (self.rank, columns) if down else (rows, self.rank)
            partner = name.replace(*(("_A", "_B") if down else ("_B", "_A")))
            if not all(expected) or tensor.shape != expected or partner not in self._tensors:
                raise UserError(
                    f"{self.setting}: the adapter {name} in {self.folder} fits no weight of the "
                    "export beside it. Copy the export again."
                )

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A weight with its adapter, if it has one, added in fp32.

        :param name: of the weight in the export; :param weight: (outputs, inputs).
        """
        side = PREFIX + name.removesuffix(".weight")
        down = self._tensors.get(f"{side}.lora_A.weight")
        if down is None:
            return weight
        up = self._tensors[f"{side}.lora_B.weight"]
        return torch.addmm(weight.float(), up.float(), down.float(), alpha=self.scale)
