"""Resume under every ZeRO stage is exact, by name, also when 2 ranks become 1, then 4, then 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from casa_train.checkpoint.slices import read_weights
from casa_train.io.files import sha256
from tests.helpers.commands import run
from tests.helpers.once import once
from tests.helpers.resume_steps import CASES, CROSSINGS, MOSTLY_FROZEN, OPTIM, frozen_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each number of ranks found, in the directories 2, 1, 4 and finish (2 again)."""

    def make(out: Path) -> None:
        out.mkdir()
        run([sys.executable, "-m", "tests.helpers.resume_steps", str(out)])

    return once(tmp_path_factory, "chain", make)


def found(directory: Path, case: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(directory / case / "found.pt", weights_only=False)
    return loaded


def differences(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[str]:
    assert one.keys() == other.keys()
    names = [(name, kind) for name, kinds in one.items() for kind in kinds if name != "updates"]
    return [f"{n} {k}" for n, k in names if not torch.equal(one[n][k], other[n][k])]


@pytest.mark.parametrize("case", CASES)
def test_every_value_arrives_at_every_number_of_ranks(chain: Path, case: str) -> None:
    saved = found(chain / "2", case)
    for ranks in ("1", "4", "finish"):
        loaded = found(chain / ranks, case)
        assert differences(saved["now"], loaded["now"]) == []
        assert set(loaded["now"]["updates"].values()) == {2.0}
        assert loaded["settings"] == saved["settings"]


@pytest.mark.parametrize("case", CASES)
def test_resumed_steps_are_those_of_an_uninterrupted_run(chain: Path, case: str) -> None:
    """After 2 -> 1 -> 4 -> 2, so what was carried on the way saved and loaded exactly too."""
    straight, resumed = found(chain / "2", case), found(chain / "finish", case)
    assert differences(straight["end"], resumed["end"]) == []
    moved = differences(straight["now"], straight["end"])
    _, _, frozen = CASES[case]
    kinds = 4  # weight, master and two moments of everything that trains
    trained = [name for name, values in straight["now"].items() if "master" in values]
    assert len(moved) > 0.9 * kinds * len(trained)
    still = [name for name, values in straight["now"].items() if set(values) == {"weight"}]
    assert any("self_attn" in name for name in still) == bool(frozen)
    assert any("visual" in name for name in still)  # the tower's first block never trains


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_read_without_processes_gives_the_masters(chain: Path, case: str) -> None:
    expected = found(chain / "2", case)["now"]
    for ranks in ("2", "4"):
        weights = read_weights(chain / ranks / case)
        assert weights.keys() == expected.keys() - {"updates"}
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name].get("master", expected[name]["weight"]))


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" in case])
def test_a_step_without_finite_numbers_is_left_out_in_bf16(chain: Path, case: str) -> None:
    after = found(chain / "finish", case)
    assert after["skipped"]
    assert differences(after["end"], after["after a skipped step"]) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_train_alike(chain: Path, precision: str) -> None:
    """Adam's first updates are the sign of the gradient, so rounding shows in bf16."""
    runs = {s: found(chain / "2", f"stage {s}, {precision}, trained") for s in (1, 2, 3)}
    names = [name for name, values in runs[2]["end"].items() if "master" in values]

    def masters(stage: int, when: str) -> torch.Tensor:
        return torch.cat([runs[stage][when][name]["master"].flatten() for name in names])

    moved = (masters(2, "end") - masters(2, "now")).norm()
    for stage in (1, 3):
        apart = (masters(stage, "end") - masters(2, "end")).norm() / moved
        assert apart < {"fp32": 1e-4, "bf16": 0.2}[precision]


@pytest.mark.parametrize("older", [False, True], ids=["", "as before"])
@pytest.mark.parametrize(("there", "here"), CROSSINGS)
def test_every_stage_loads_what_another_saved(
    chain: Path, there: int, here: int, older: bool
) -> None:
    """Also from a checkpoint whose ranks hold shares of the frozen weights."""
    saved = found(chain / "2", f"stage {there}, bf16, frozen")["now"]
    name = f"{there} to {here}{', as before' if older else ''}"
    loaded = torch.load(chain / "finish" / f"{name}.pt", weights_only=False)
    assert differences(saved, loaded) == []
    # Its next checkpoint has them in a file: the same one that others have.
    files = frozen_files(chain / "finish" / name)
    assert len(files) == 1 and files.keys() < frozen_files(chain / "2").keys()
    weights = read_weights(chain / "finish" / name / "step_1")
    for key, weight in weights.items():
        assert torch.equal(weight, saved[key].get("master", saved[key]["weight"]))


def test_equal_frozen_weights_have_one_file_whoever_writes_it(chain: Path) -> None:
    """Two precisions, backbone frozen, trained, or frozen beside adapters, where linears have other
    names: every stage and number of ranks writes these.
    """
    names = frozen_files(chain / "2").keys()
    assert len(names) == 5
    for ranks in ("1", "4"):
        assert frozen_files(chain / ranks).keys() == names
    rounded = chain / "finish" / "bf16 to fp32"
    assert not frozen_files(rounded).keys() & names
    for directory in (chain / "2", rounded):
        for path in (directory / "frozen").iterdir():
            assert sha256(path) == path.stem


@pytest.mark.parametrize("case", MOSTLY_FROZEN)
def test_frozen_weights_are_written_once(chain: Path, case: str) -> None:
    """By the first of two checkpoints; and again by one that does not find them."""
    first, second, third = found(chain / "2", case)["saves again"]
    assert len(first) == 1 and second == first and third.keys() == first.keys()
    (name,) = first
    weights = load_file(chain / "2" / "again" / case / "frozen" / name)
    now = found(chain / "2", case)["now"]
    assert weights.keys() == {n for n, kinds in now.items() if kinds.keys() == {"weight"}}
    for name, weight in weights.items():
        assert torch.equal(weight, now[name]["weight"])
    assert any(name.startswith("visual.") for name in weights)  # a part of the tower
    assert any(name.startswith("model.") for name in weights)
    assert not any("visual.blocks.1." in name or ".fusion." in name for name in weights)


def test_settings_differ_between_groups(chain: Path) -> None:
    settings = found(chain / "2", "stage 2, bf16, trained")["settings"]
    assert {(g["name"], g["weight_decay"]) for g in settings} == {
        pair for name, g in OPTIM.groups.items() for pair in ((name, g.weight_decay), (name, 0.0))
    }
    assert len({g["base_lr"] for g in settings}) == 3


def test_the_state_of_another_model_is_refused_with_names(chain: Path) -> None:
    for said in json.loads((chain / "finish" / "refusals.json").read_text()):
        assert "is not the state of this model" in said and "model.init_from" in said
    frozen, other = json.loads((chain / "finish" / "refusals.json").read_text())
    assert "was trained there and is frozen now" in frozen and "visual" in frozen
    assert "was not saved" in other or "is not in the model" in other
