"""A run is used from any folder: it keeps its tokenizer, and where its sources lie."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from casa_train.checkpoint.resume import check_resume
from casa_train.config.bounds import Place, leaves
from casa_train.config.compose import compose_config
from casa_train.config.data_schema import SourceConfig, StreamDatasetConfig
from casa_train.config.places import absolute, as_before, places, relocated, same_place, shown
from casa_train.config.schema import BenchmarkConfig, Config, fingerprint
from casa_train.errors import UserError
from casa_train.evaluate import __main__ as evaluate
from casa_train.export import __main__ as export
from casa_train.inspect import __main__ as inspect
from casa_train.report import __main__ as report
from casa_train.run.configuration import check_same_run, load_model_config, load_run_config
from casa_train.run.directory import prepare_run_directory
from tests.helpers.commands import TINY, environment

COMMAND = ["+experiment=demo", *TINY, "evaluation.max_samples=4", "evaluation.attention_samples=2"]


def start(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The training command, given in a folder, with the relative paths of the configuration."""
    command = [sys.executable, "-m", "casa_train", *COMMAND, *overrides]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def project(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run of two steps."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(data_dir, folder / "demo_data")
    done = start(folder, "trainer.steps=2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.mark.slow
def test_the_same_command_goes_on_from_another_folder(project: Path, elsewhere: Path) -> None:
    run = project / "runs" / "demo"
    more = ["trainer.steps=3", "checkpoint.resume_allow=[trainer.steps]"]
    done = start(elsewhere, *more, f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run}/checkpoints/step_2 at step 2" in done.stdout
    assert "saved checkpoint of step 3" in done.stdout
    # A run that is not there takes nothing from anywhere.
    done = start(elsewhere)
    assert done.returncode == 2 and "tokenizer 'demo_data/tokenizer'" in done.stderr


@pytest.mark.slow
def test_commands_on_a_run_work_in_any_folder(
    project: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / "demo"
    shutil.rmtree(tmp_path / "copy" / "demo_data" / "tokenizer")  # the run has its own
    assert export.main([str(run), "--out", "exported"]) == 0
    card = (elsewhere / "exported" / "README.md").read_text()
    assert "demo_data/train" in card and "runs/demo" in card
    assert str(tmp_path) not in card and str(project) not in card
    assert evaluate.main([str(run), "--export", "exported"]) == 0
    assert report.main([str(run)]) == 0
    assert inspect.main([str(run), "--packs", "1"]) == 0
    assert "packs planned" in capsys.readouterr().out


def copied(project: Path, folder: Path) -> Path:
    """The project as if it had always been in `folder`, whatever has become of the first one."""
    shutil.copytree(project, folder)
    stored = folder / "runs" / "demo" / "config.yaml"
    stored.write_text(stored.read_text().replace(str(project), str(folder)))
    return folder


def changed_tokenizer(source: Path, target: Path) -> None:
    """Another tokenizer with as many tokens: two of them have changed their ids."""
    shutil.copytree(source, target)
    text = (target / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    tree = json.loads(text)
    for old, new in ((one, other), (other, one)):
        tree["model"]["vocab"][old] = vocabulary[new]
    (target / "tokenizer.json").write_text(json.dumps(tree))


@pytest.mark.slow
def test_an_export_has_the_tokenizer_that_was_trained(
    project: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(project / "runs" / "demo", run)
    changed_tokenizer(project / "demo_data" / "tokenizer", tmp_path / "other")
    stored = OmegaConf.load(run / "config.yaml")
    stored.model.tokenizer = str(tmp_path / "other")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(stored))
    assert export.main([str(run), "--out", "kept"]) == 0  # by the run's own copy
    shutil.rmtree(run / "processor")
    capsys.readouterr()
    assert export.main([str(run), "--out", "none"]) == 2
    error = capsys.readouterr().err
    assert "trained with another tokenizer" in error and "model.tokenizer '" in error
    assert f"{run / 'processor'} is missing" in error and not Path("none").exists()


@pytest.mark.slow
def test_a_run_goes_on_without_its_tokenizer_s_source(project: Path, tmp_path: Path) -> None:
    folder = copied(project, tmp_path / "project")
    shutil.move(folder / "demo_data" / "tokenizer", folder / "moved")
    more = ["trainer.steps=4", "checkpoint.resume_allow=[trainer.steps]"]
    done = start(folder, *more)
    assert done.returncode == 0, done.stderr
    assert "tokenizer: this run's own copy in runs/demo/processor, since" in done.stdout
    assert "saved checkpoint of step 4" in done.stdout
    # One that starts over takes nothing from the run that was there.
    done = start(folder, *more, "checkpoint.resume=never")
    assert done.returncode == 2 and "is neither a directory nor a hub id" in done.stderr


@pytest.mark.slow
def test_records_without_a_checkpoint_are_kept(project: Path, tmp_path: Path) -> None:
    folder = copied(project, tmp_path / "project")
    run = folder / "runs" / "demo"
    before = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints")
    for times in (1, 2):
        done = start(folder, "trainer.steps=2", "checkpoint.resume_allow=[trainer.steps]")
        assert done.returncode == 0, done.stderr
        assert "note: metrics.jsonl knows of step" in done.stdout and "step 1/2" in done.stdout
        lost = (run / "metrics_lost.jsonl").read_text()
        assert lost.startswith(before)
        assert len(lost.splitlines()) == len(before.splitlines()) + 2 * (times - 1)
        shutil.rmtree(run / "checkpoints")


def test_a_run_inside_another_stays_where_it_is(tmp_path: Path) -> None:
    inner = ("a/sub/b/config.yaml", "a/sub/b/lock")
    wandb = "a/wandb/run-1/files/config.yaml"  # what it writes is no run of this program
    for name in ("a/metrics.jsonl", "a/config.yaml", "a/notes/x.txt", *inner, wandb):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    config = compose_config(["checkpoint.resume=never"])
    prepare_run_directory(tmp_path / "a", config)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"previous_1", "sub"}
    assert (tmp_path / "a" / "sub" / "b" / "config.yaml").exists()
    assert (tmp_path / "a" / "previous_1" / "notes" / "x.txt").exists()
    assert (tmp_path / "a" / "previous_1" / "wandb" / "run-1").exists()


@pytest.mark.parametrize("content", ["", "[1, 2]", "name: x\nrun_", "data: {sources: {}}\n", "\0"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"(?s)config\.yaml cannot be read .*[Rr]estore"):
        load_run_config(tmp_path)
    with pytest.raises(
        UserError, match=r"(?s)config\.yaml cannot be read .*checkpoint\.resume=never"
    ):
        check_same_run(tmp_path / "config.yaml", compose_config([]))


@pytest.mark.parametrize("content", ['{"a', "[]", "3", '{"text_config": 3}'])
def test_a_damaged_model_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_config.json").write_text(content)
    with pytest.raises(UserError, match=r"model_config\.json cannot be read .* start the run's"):
        load_model_config(tmp_path)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_found_beside_its_data(
    project: Path, elsewhere: Path, tmp_path: Path
) -> None:
    shutil.copytree(project, tmp_path / "old")
    run = tmp_path / "old" / "runs" / "demo"
    given = compose_config(COMMAND)
    assert given.model.tokenizer == "demo_data/tokenizer" and given.run_dir == "runs/demo"
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(given)))
    shutil.rmtree(run / "processor")
    assert export.main([str(run), "--out", "exported"]) == 0
    assert inspect.main([str(run), "--packs", "1"]) == 0
    assert inspect.main([str(run), "--packs", "1", "model.tokenizer=nowhere"]) == 2


def config_of(folder: Path, run_dir: str, prefix: str = "") -> Config:
    """Places in a folder that is there, a hub id, and nothing."""
    config = compose_config(["+experiment=demo"])
    config.run_dir = run_dir
    config.model.tokenizer = f"{prefix}data/tokenizer"
    config.model.init_from = "some/hub_id"
    config.data.sources = {"a": SourceConfig(f"{prefix}data/a")}
    config.data.validation = {"b": SourceConfig(f"{prefix}data/b")}
    config.data.stream.datasets = {"s": StreamDatasetConfig(f"{prefix}data/s")}
    config.evaluation.benchmarks = {"mme": BenchmarkConfig(f"{prefix}data/m")}
    for name in ("tokenizer", "a", "b", "s", "m"):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
    return config


def values(config: Config) -> dict[str, Any]:
    return {name: getattr(holder, field) for name, holder, field in places(config)}


def test_the_places_are_those_that_the_fields_declare(tmp_path: Path) -> None:
    declared = {leaf.name for leaf in leaves(Config) if isinstance(leaf.kind, Place)}
    found = {
        re.sub(r"\.([abs]|mme)\.", ".*.", name) for name in values(config_of(tmp_path, "runs/x"))
    }
    assert found == declared - {"run_dir"}


def test_places_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    given = config_of(here, "runs/x")
    monkeypatch.chdir(here)
    stored = absolute(given)
    found = {
        "model.tokenizer": f"{here}/data/tokenizer",
        "model.init_from": "some/hub_id",
        "model.backbone.pretrained": None,
        "model.vision.pretrained": None,
        "data.sources.a.path": f"{here}/data/a",
        "data.validation.b.path": f"{here}/data/b",
        "data.stream.datasets.s.source": f"{here}/data/s",
        "evaluation.benchmarks.mme.source": f"{here}/data/m",
    }
    assert values(stored) == found
    assert given.model.tokenizer == "data/tokenizer"  # a copy was changed
    stored.run_dir = f"{here}/runs/x"

    monkeypatch.chdir(there)
    assert values(absolute(given)) == values(given)
    assert values(relocated(given, here / "runs" / "x")) == found
    assert values(relocated(stored, here / "runs" / "x")) == found
    assert values(as_before(given, stored)) == found
    other = config_of(here, "runs/x", prefix="my_")
    assert values(as_before(other, stored)) == values(other)

    moved = tmp_path / "moved"
    here.rename(moved)
    expected = {k: v and v.replace(str(here), str(moved)) for k, v in found.items()}
    assert values(relocated(stored, moved / "runs" / "x")) == expected
    # Only the run was moved, the data is gone: said as it was.
    assert values(relocated(stored, there / "runs" / "x")) == found


def test_what_is_published_tells_no_directories(tmp_path: Path) -> None:
    config = config_of(tmp_path, "/home/somebody/secret/runs/x", prefix="/home/somebody/secret/")
    text = OmegaConf.to_yaml(OmegaConf.structured(shown(config)))
    assert "somebody" not in text and "secret" not in text
    assert "data/tokenizer" in text and "some/hub_id" in text and "runs/x" in text


def test_one_place_has_many_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert same_place(str(tmp_path / "data"), str(tmp_path / "link"))
    assert same_place("owner/name", "owner/name") and same_place(None, None)
    assert not same_place(str(tmp_path / "data"), None)
    assert not same_place(str(tmp_path / "data"), str(tmp_path))


def test_a_run_is_the_same_wherever_its_paths_are_written_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config_of(tmp_path, "runs/x")
    given.data.stream.datasets = {}  # a run has them or prepared sources
    monkeypatch.chdir(tmp_path)
    ours = absolute(given)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    stored = run / "config.yaml"
    stored.write_text(OmegaConf.to_yaml(OmegaConf.structured(given)))  # an earlier version's
    check_same_run(stored, ours)
    ours.data.sources["a"].path = str(tmp_path / "data" / "b")
    with pytest.raises(UserError, match=r"data\.sources\.a\.path: '.*data/a' there, .*data/b' now"):
        check_same_run(stored, ours)


def test_a_checkpoint_of_an_earlier_version_belongs_to_its_run(tmp_path: Path) -> None:
    given = config_of(tmp_path, "runs/x")
    without = fingerprint(given, list(values(given)))
    assert without != fingerprint(given)
    other = config_of(tmp_path, "runs/x", prefix=f"{tmp_path}/")
    assert fingerprint(other, list(values(other))) == without
    other.seed = 7
    now = {"config": without, "data": "{}", "plan": "{}"}

    def check(theirs: str) -> None:
        found: Any = SimpleNamespace(
            path="step_2", manifest={"fingerprints": {"config": theirs, "data": "{}"}}
        )
        check_resume(found, now, given, fingerprint(given))

    check(without)
    check(fingerprint(given))
    with pytest.raises(UserError, match=re.escape("belongs to another configuration")):
        check(fingerprint(other, list(values(other))))
