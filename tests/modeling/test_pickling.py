"""Whole models through pickle: `torch.save(model)`, `mp.spawn` and `copy.deepcopy`."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from casa_train.modeling.backbones import BACKBONES
from casa_train.modeling.decoder import FUSED, FusedLayer
from casa_train.modeling.mechanisms import MECHANISMS
from tests.helpers import stranger, tiny
from tests.helpers.commands import ROOT, environment
from tests.helpers.stranger import GREEDY, SHORT
from tests.helpers.tiny import HARD_PACK, fill, packed_inputs, tiny_model, tiny_text_config
from tests.helpers.tiny_export import write_tiny_export


def saved_and_loaded(model: Any, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
@torch.no_grad()
def test_every_model_pickles_and_copies(mechanism: str, backbone: str, tmp_path: Path) -> None:
    model = tiny_model(mechanism, text_config=tiny_text_config(backbone, tie_word_embeddings=True))
    pack = packed_inputs(fill(HARD_PACK))
    expected = model(packed=pack).logits
    for again in (saved_and_loaded(model, tmp_path), copy.deepcopy(model)):
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert again.lm_head.weight is not model.lm_head.weight
        assert torch.equal(again(packed=pack).logits, expected)
        again.model.norm.weight.zero_()  # apart from the first one
    assert torch.equal(model(packed=pack).logits, expected)


def test_the_classes_pickle_too() -> None:
    assert len(FUSED) == len(BACKBONES)
    for base, fused in FUSED.items():
        assert pickle.loads(pickle.dumps(fused)) is fused
        assert issubclass(fused, base) and issubclass(fused, FusedLayer)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def export(home: Path) -> str:
    return str(write_tiny_export(home / "pickled", "casa"))


def answer_elsewhere(rank: int, models: list[Any], batch: dict[str, Any], answers: str) -> None:
    """What `mp.spawn` runs in its process."""
    torch.save([model.generate(**batch, **GREEDY) for model in models], answers)


@pytest.mark.fresh
@pytest.mark.slow
def test_models_travel_to_another_process(export: str, tmp_path: Path) -> None:
    """A loaded export, in the middle of a stream, and a model that the package has built."""
    theirs, reader = stranger.load(export)
    ours = tiny_model(text_config=theirs.config.text_config)
    assert type(ours) is not type(theirs)
    batch, answers = dict(reader.tokenize_messages(SHORT)), tmp_path / "answers.pt"
    expected = theirs.generate_from_image(**batch, **GREEDY)
    mp.spawn(answer_elsewhere, ([ours, theirs], batch, str(answers)), nprocs=1)
    assert all(torch.equal(answer, expected) for answer in torch.load(answers))


@pytest.mark.parametrize("act", [saved_and_loaded, lambda model, _: copy.deepcopy(model)])
def test_a_loaded_export_pickles_and_copies(
    export: str, act: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    model, reader = stranger.load(export)
    assert type(model).__module__.startswith("transformers_modules.")
    batch = reader.tokenize_messages(SHORT)
    again = act(model, tmp_path)
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


@pytest.mark.fresh
@pytest.mark.slow
def test_a_saved_export_loads_in_a_new_process_that_knows_its_code(
    export: str, tmp_path: Path
) -> None:
    model, reader = stranger.load(export)
    batch = reader.tokenize_messages(SHORT)
    torch.save((model, dict(batch), model.generate(**batch, **GREEDY)), tmp_path / "all.pt")
    script = [
        "import sys, torch",
        "from transformers import AutoConfig",
        "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)",
        "model, batch, expected = torch.load(sys.argv[2], weights_only=False)",
        f"assert torch.equal(model.generate(**batch, **{GREEDY}), expected)",
    ]
    command = [sys.executable, "-c", "\n".join(script), export, str(tmp_path / "all.pt")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
