"""Where a path is named, `~` is the home directory and a URL is refused; text stays as typed."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from casa_train.__main__ import run
from casa_train.bench.__main__ import main as bench
from casa_train.config.bounds import Place, leaves, values
from casa_train.config.compose import compose_config, to_config
from casa_train.config.overrides import as_typed
from casa_train.config.ready_templates import read_template
from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.evaluate import __main__ as evaluate
from casa_train.export import __main__ as export
from casa_train.inspect import __main__ as inspect
from casa_train.report import __main__ as report
from data_recipes.__main__ import main as recipe
from launch.submit import compose_jobs
from launch.submit import main as submit
from tests.helpers.commands import ROOT, TINY, on_data

BASE = compose_config([])
STREAM = ["~data.sources.synthetic", "+data.stream.datasets.d.source=d"]
# Fields that hold a path or a hub id; "*" is any name.
PLACES = {
    "run_dir",
    "model.tokenizer",
    "model.init_from",
    "model.backbone.pretrained",
    "model.vision.pretrained",
    "data.sources.*.path",
    "data.validation.*.path",
    "data.stream.datasets.*.source",
    "evaluation.benchmarks.*.source",
}


def value_of(config: Config, name: str) -> Any:
    return next(values(config, tuple(name.split(".")))).value


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_places_of_the_configuration_are_known() -> None:
    """A new field that holds a path belongs here, and is annotated with a `Place`."""
    assert {leaf.name for leaf in leaves(Config) if isinstance(leaf.kind, Place)} == PLACES


@pytest.mark.parametrize("name", sorted(PLACES))
def test_home_is_expanded_in_fields(home: Path, name: str) -> None:
    quote = "" if "path" in name else "'"  # no shell expands behind a dotted name, or in quotes
    name = name.replace("benchmarks.*", "benchmarks.mme").replace("*", "d")
    more = STREAM if "stream" in name else ["evaluation.every=1"] if "benchmarks" in name else []
    config = compose_config([*more, f"++{name}={quote}~/a/b{quote}"])
    assert value_of(config, name) == str(home / "a/b")


def test_home_is_expanded_in_what_a_file_or_the_environment_says(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASA_DATA", "~/prepared")
    config = compose_config(["+experiment=helium_casa"])
    assert {Path(s.path).is_relative_to(home) for s in config.data.sources.values()} == {True}


def test_home_is_expanded_in_lists_and_mappings(home: Path) -> None:
    config = compose_config(["+data.sources={b: {path: ~/x, repeats: 2}}"])
    assert config.data.sources["b"].path == str(home / "x")
    jobs = compose_jobs(["data.sources.synthetic.path=~/x,~/y"], array=True)
    assert [job.config.data.sources["synthetic"].path for job in jobs] == [
        str(home / "x"),
        str(home / "y"),
    ]


def test_the_directories_of_a_sweep_are_expanded(home: Path) -> None:
    assert as_typed(["-m", "hydra.sweep.dir=~/sweeps"]) == ["-m", f"hydra.sweep.dir={home}/sweeps"]
    with pytest.raises(UserError, match="hydra.sweep.dir is 's3://b/x', a URL"):
        as_typed(["hydra.sweep.dir=s3://b/x"])


def test_a_template_s_file_is_found_at_home(home: Path) -> None:
    home.mkdir()
    (home / "mine.yaml").write_text("user_start: Q\n")
    assert read_template("~/mine.yaml", "--template") == {"user_start": "Q"}
    assert compose_config(["model.template=~/mine.yaml"]).model.template.user_start == "Q"


URLS = itertools.cycle(["s3://bucket/x", "gs://b", "file:///x", "hf://datasets/a/b"])


@pytest.mark.parametrize(("name", "url"), [(name, next(URLS)) for name in sorted(PLACES)])
def test_a_url_is_refused_in_fields(name: str, url: str) -> None:
    name = name.replace("benchmarks.*", "benchmarks.mme").replace("*", "d")
    more = STREAM if "stream" in name else ["evaluation.every=1"] if "benchmarks" in name else []
    with pytest.raises(UserError, match=f"{name} is '{url}', a URL; expected a (path|directory)"):
        compose_config([*more, f"++{name}={url}"])


def test_a_home_that_there_is_not_is_named() -> None:
    with pytest.raises(UserError, match="run_dir is '~no_such_user/x', but there is no such home"):
        compose_config(["run_dir=~no_such_user/x"])


@pytest.mark.parametrize("name", ["", "~/x", "s3://b/x"])
def test_a_name_is_no_place(name: str) -> None:
    with pytest.raises(UserError, match=f"name is '{name}'; expected a name.*run_dir"):
        compose_config([f"name='{name}'"])


# ---------------------------------------------------------------------------- command lines

COMMANDS: list[tuple[Callable[[list[str]], int], list[str]]] = [
    (report.main, ["PLACE"]),
    (report.main, ["--sweep", "PLACE"]),
    (export.main, ["PLACE", "--out", "x"]),
    (export.main, ["run", "--out", "PLACE"]),
    (evaluate.main, ["PLACE"]),
    (evaluate.main, ["--sweep", "PLACE"]),
    (evaluate.main, ["run", "--export", "PLACE"]),
    (inspect.main, ["PLACE"]),
    (inspect.main, ["demo", "--out", "PLACE"]),
    (bench, ["streaming", "--export", "PLACE", "other"]),
    (bench, ["images", "--files", "PLACE"]),
    (bench, ["faults", "--directory", "PLACE"]),
    (bench, ["packing", "--json", "PLACE"]),
    (submit, ["--submissions", "PLACE", "+experiment=demo"]),
    (recipe, ["synthetic", "--samples", "9", "--seed", "1", "--out", "PLACE"]),
    (recipe, ["synthetic", "--samples", "9", "--seed", "1", "--out", "x", "--tokenizer", "PLACE"]),
    (recipe, ["easyvqa", "--seed", "1", "--out", "PLACE"]),
    (recipe, ["finevision", "--out", "PLACE"]),
    (recipe, ["finevision", "--out", "x", "--source", "PLACE"]),
    (recipe, ["finevision", "--out", "x", "--tokenizer", "PLACE"]),
    (recipe, ["llava_onevision", "--out", "PLACE"]),
    (recipe, ["llava_video", "--out", "PLACE"]),
    (recipe, ["live_whisperx", "--out", "PLACE"]),
    (recipe, ["mixture", "--data", "PLACE", "--out", "x"]),
    (recipe, ["mixture", "--data", "x", "--out", "PLACE"]),
    (recipe, ["retokenize", "--data", "PLACE", "--out", "x", "--tokenizer", "t"]),
    (recipe, ["retokenize", "--data", "x", "--out", "PLACE", "--tokenizer", "t"]),
    (recipe, ["retokenize", "--data", "x", "--out", "y", "--tokenizer", "PLACE"]),
]


@pytest.mark.parametrize(
    ("command", "arguments"), COMMANDS, ids=[f"{c.__module__} {' '.join(a)}" for c, a in COMMANDS]
)
def test_a_url_is_refused_on_command_lines(
    command: Callable[[list[str]], int],
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command([x.replace("PLACE", "s3://bucket/x") for x in arguments])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "'s3://bucket/x', a URL" in error and "expected a" in error, error
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_on_command_lines(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["~/runs/demo"]) == 2
    assert f"{home}/runs/demo is not a run directory" in capsys.readouterr().err
    arguments = ["synthetic", "--samples", "4", "--seed", "1", "--workers", "1", "--out", "~/data"]
    assert recipe([*arguments, "--tasks", "colour", "--validation", "1"]) == 0
    assert (home / "data" / "train" / "meta.json").is_file()


def test_every_path_of_a_command_line_is_read_as_one() -> None:
    """`type=Path` would neither expand nor refuse."""
    for folder in ("casa_train", "data_recipes", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                    types = [k.value for k in node.keywords if k.arg == "type"]
                    plain = [t for t in types if isinstance(t, ast.Name) and t.id == "Path"]
                    assert not plain, f"{path}:{node.lineno}"


@pytest.mark.slow
def test_a_run_goes_home(
    data_dir: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, with the path as a shell leaves it behind a dotted name."""
    GlobalHydra.instance().clear()
    home.mkdir()
    (home / "train").symlink_to(data_dir / "train")
    monkeypatch.chdir(tmp_path)
    overrides = ["+experiment=demo", *TINY, *on_data(data_dir), "trainer.steps=1"]
    overrides += ["run_dir='~/runs/a'", "data.sources.synthetic.path=~/train"]
    overrides += ["optim.warmup_steps=0", "optim.decay_steps=0", "evaluation.every=0"]
    monkeypatch.setattr(sys, "argv", ["casa_train", *overrides])
    assert run() == 0
    assert (home / "runs" / "a" / "metrics.jsonl").is_file()
    assert not (tmp_path / "~").exists()
    stored = to_config(OmegaConf.load(home / "runs" / "a" / "config.yaml"))  # type: ignore[arg-type]
    assert stored.data.sources["synthetic"].path == str(home / "train")


# ---------------------------------------------------------------------------- text as it was typed

TYPED = ["12e4567", "007", "1_000", "1e3", "0x10", "1:30", "2024-01-01", "true", "False", "inf"]
TYPED += ["nan", "-5", "+7", ".5", "1.0", "on", "1234567"]


@pytest.mark.slow
@pytest.mark.parametrize("text", TYPED)
def test_text_stays_as_it_was_typed(text: str) -> None:
    overrides = [f"name={text}", f"model.template.bos='{text}'", f'model.template.system="{text}"']
    overrides += [f"metrics.wandb_tags=[a, {text} ]"]
    overrides += [f"+data.stream.datasets.d={{source: d, revision: {text}}}"]
    config = compose_config(["~data.sources.synthetic", *overrides])
    assert (config.name, config.run_dir) == (text, f"runs/{text}")
    assert (config.model.template.bos, config.model.template.system) == (text, text)
    assert config.metrics.wandb_tags == ["a", text]
    assert config.data.stream.datasets["d"].revision == text
    # A run's own file says the same.
    stored = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert to_config(stored) == config


def test_every_field_of_text_keeps_it() -> None:
    for leaf in leaves(Config):
        if leaf.type is str and leaf.path[-1] != "*":
            name = leaf.name.replace("*", "d")
            assert as_typed([f"{name}=1e3", f"+{name}=1e3", f"{name}=null"]) == [
                f"{name}='1e3'",
                f"+{name}='1e3'",
                f"{name}=null",
            ]


@pytest.mark.parametrize(
    "override",
    ["seed=3", "optim.eps=1e-6", "trainer.audit=false", "metrics.wandb_entity=null", "-m", "name"]
    + ["fusion.every=1,2", "optim.betas=[0.9,0.95]", "name=a,b", "name=${seed}", "name=[("]
    + ["model.backbone.config.hidden_size=64", "name=str(3)"],
)
def test_other_overrides_are_left_alone(override: str) -> None:
    assert as_typed([override]) == [override]


def test_a_sweep_over_text_keeps_it() -> None:
    assert as_typed(["name=1e3,b,choice(2e3,c)"]) == ["name='1e3',b,choice('2e3',c)"]
    jobs = compose_jobs(["name=12e4567,13e4567"], array=True)
    assert [job.config.name for job in jobs] == ["12e4567", "13e4567"]


def test_the_choice_of_a_group_is_text() -> None:
    with pytest.raises(UserError, match="experiment/2024"):
        compose_config(["+experiment=2024"])


@pytest.mark.parametrize(("text", "read"), [("0x10", 16), ("1:30", 90), ("1e3", 1000.0)])
def test_text_that_yaml_read_as_a_value_is_named(text: str, read: float) -> None:
    """In a file the writing is lost."""
    raw = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(BASE)))
    raw.name = OmegaConf.create(f"name: {text}").name
    assert raw.name == read
    with pytest.raises(UserError, match=f"name is {read!r} as YAML reads it.*in quotes"):
        to_config(raw)
    raw.name = OmegaConf.create(f"name: '{text}'").name
    assert to_config(raw).name == text
