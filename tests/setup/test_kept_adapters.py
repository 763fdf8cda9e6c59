"""Adapters that lie apart, read to be merged: plain LoRA alone, and what its scale is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from casa_train.errors import UserError
from casa_train.setup.kept_adapters import CONFIG, PREFIX, WEIGHTS, KeptAdapters


def written(folder: Path, more: str | None = None, **settings: Any) -> Path:
    """An adapter of rank 2 beside a weight of (3, 4).

    :param more: the name of one more tensor.
    """
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, **settings}
    (folder / CONFIG).write_text(json.dumps(content))
    tensors = {"lora_A": torch.full((2, 4), 0.5), "lora_B": torch.full((3, 2), 2.0)}
    named = {f"{PREFIX}model.q_proj.{side}.weight": value for side, value in tensors.items()}
    if more is not None:
        named[more] = torch.ones(2)
    save_file(named, folder / WEIGHTS)
    return folder


def test_a_weight_gets_its_adapter(tmp_path: Path) -> None:
    adapters = KeptAdapters(written(tmp_path, alpha_pattern={}, use_dora=False), "model.init_from")
    adapters.check({"model.q_proj.weight": [3, 4]})
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    merged = adapters.merged("model.q_proj.weight", weight)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, torch.full((3, 4), 1 + 2 * 2.0 * 0.5 * 5 / 2))
    assert adapters.merged("model.k_proj.weight", weight) is weight


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"q_proj": 16}},
        {"rank_pattern": {"q_proj": 4}},
        {"lora_bias": True},
        {"use_rslora": True},
        {"use_dora": True},
        {"peft_type": "LOHA"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_another_scale_or_kind_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="are of another kind .*expected plain LoRA"):
        KeptAdapters(written(tmp_path, **settings), "model.init_from")


@pytest.mark.parametrize(
    ("more", "rank"), [("scale", 2), (f"{PREFIX}q.lora_A.weight", 2), (None, 4)]
)
def test_what_stands_beside_no_weight_is_named(tmp_path: Path, more: str | None, rank: int) -> None:
    adapters = KeptAdapters(written(tmp_path, more, r=rank), "model.init_from")
    with pytest.raises(UserError, match="the adapter .* fits no weight of the export beside it"):
        adapters.check({"model.q_proj.weight": [3, 4]})
