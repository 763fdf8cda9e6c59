"""Backbones out of exports of token insertion: their decoder is a plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaForCausalLM

from casa_train.config.compose import to_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.schema import Config
from casa_train.cost.sizes import size_model
from casa_train.data.processor import build_processor
from casa_train.errors import UserError
from casa_train.export.loading import load_model
from casa_train.setup.first_values import HOST
from casa_train.setup.model import build_model, build_model_config
from casa_train.setup.weights import find_weights, open_sources, start_weights
from tests.helpers.commands import TINY, on_data
from tests.helpers.tiny_export import write_tiny_export


def configured(data: Path, export: Path, *overrides: str) -> Config:
    """A tiny run whose backbone is an export's; its tower starts from random weights."""
    tiny = [o for o in TINY if ".backbone.config." not in o]
    named = ["~model.backbone.config", f"model.backbone.pretrained={export}", *overrides]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_config(compose("train", ["+experiment=demo", *tiny, *on_data(data), *named]))


@pytest.mark.parametrize("mechanism", ["casa", "gated_cross_attention", "insertion"])
def test_the_backbone_comes_out_of_an_insertion_s_export(
    data_dir: Path, tmp_path: Path, mechanism: str
) -> None:
    """Text logits before the first step are those of transformers' own Llama with the export's
    weights; casa's too, which adds nothing where there is no image.
    """
    export = write_tiny_export(tmp_path / "export", "insertion")
    own = ["fusion.init=zero_output"] if mechanism == "casa" else []
    config = configured(data_dir, export, f"fusion={mechanism}", *own)
    processor, sources = build_processor(config), open_sources(config)
    model = build_model(config, processor, build_model_config(config, processor, sources))
    start = find_weights(model, sources)
    start_weights(model, start, config.seed, HOST, torch.float32, lambda block: None)
    theirs = load_model(export, "auto")
    plain = LlamaForCausalLM(theirs.config.text_config).eval()
    found = plain.load_state_dict(
        {n: v for n, v in theirs.state_dict().items() if not n.startswith("visual.")}, strict=False
    )
    assert not found.missing_keys
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits)
    assert any("visual." in name for account in start.accounts for name in account.unused)
    assert size_model(config, []).text_config.hidden_size == theirs.config.text_config.hidden_size


def test_other_exports_are_refused_by_name(data_dir: Path, tmp_path: Path) -> None:
    export = write_tiny_export(tmp_path / "export", "casa")
    config = configured(data_dir, export)
    with pytest.raises(UserError, match="mechanism 'casa'; expected token insertion's"):
        build_model_config(config, build_processor(config), open_sources(config))
    export = write_tiny_export(tmp_path / "kept", "insertion")
    settings = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**settings, "kept_adapter": "adapters"}))
    config = configured(data_dir, export)
    with pytest.raises(UserError, match=r"adapters that are not merged; expected .*init_from"):
        build_model_config(config, build_processor(config), open_sources(config))
