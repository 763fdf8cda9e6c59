"""The configuration: composition, and what each mistake prints."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict

from casa_train.__main__ import run, split_options
from casa_train.bench._arm import Arm
from casa_train.config import data_schema
from casa_train.config.compose import compose_config, compose_onto, to_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.model_schema import TemplateConfig
from casa_train.config.schema import Config, fingerprint, flatten, run_fields
from casa_train.data.processor import build_processor
from casa_train.engine.engine import leave_processes
from casa_train.errors import UserError
from casa_train.inspect.__main__ import main as inspect
from casa_train.inspect.pages import find_target
from casa_train.modeling import image_processing_casa
from casa_train.modeling.processing_casa import ChatTemplate
from casa_train.run.configuration import load_run_config
from casa_train.train import train
from casa_train.training.signals import StopRequest
from launch.submit import compose_jobs
from launch.submit import main as submit
from tests.helpers.commands import ROOT, TEMPLATE, TINY, on_data
from tests.helpers.config_reads import fields_read


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_config(compose("train", overrides=list(overrides)), overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "experiment").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_experiment_composes(path: Path) -> None:
    assert composed(f"+experiment={path.stem}").name == path.stem


@pytest.mark.parametrize("path", sorted((CONF_DIR / "fusion").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_mechanism_composes(path: Path) -> None:
    assert path.stem.startswith(composed(f"fusion={path.stem}").fusion["mechanism"])


def test_the_sizes_of_images_are_those_of_the_model() -> None:
    assert data_schema.TOKEN_SIDE == image_processing_casa.SIDE
    assert data_schema.MAX_PIXELS == image_processing_casa.MAX_PIXELS
    with pytest.raises(UserError, match=r"at least 784 \(28x28\)"):
        compose_config(["+experiment=demo", f"data.max_pixels={28 * 28 - 1}"])


ROOM = CONF_DIR.parent / "config"
SCHEMAS = [ROOM / name for name in ("schema.py", "model_schema.py", "data_schema.py")]


def sections(kind: Any = Config) -> Iterator[Any]:
    """The dataclasses that make up the configuration."""
    yield kind
    for hint in get_type_hints(kind).values():
        for part in (hint, *get_args(hint)):
            if is_dataclass(part):
                yield from sections(part)


def test_every_field_is_documented() -> None:
    source = "\n".join(path.read_text() for path in SCHEMAS)
    for cls in sections():
        tree = next(
            node
            for node in ast.parse(source.replace("from __future__ import annotations", "")).body
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__
        )
        for node, following in itertools.pairwise([*tree.body, None]):
            if isinstance(node, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(
                    following.value, ast.Constant
                )
                assert documented, f"{cls.__name__}.{ast.unparse(node.target)} has no docstring"


def test_every_field_is_read() -> None:
    """By type, so that `options.name` is no read of a run's name. The template's fields go to the
    processor together (`test_a_template_has_the_same_fields_everywhere`).
    """
    own = {*SCHEMAS, ROOM / "compose.py", ROOM / "checks.py"}
    package = sorted((ROOT / "casa_train").rglob("*.py"))
    read = fields_read(package, unread=own)
    whole = {(cls.__name__, f.name) for cls in sections() for f in fields(cls)}
    template = {("TemplateConfig", f.name) for f in fields(TemplateConfig)}
    assert len(whole) > 90 and whole - read - template == set()


def test_a_field_that_nobody_reads_is_found(tmp_path: Path) -> None:
    """A common name counts as read only where the value is of the configuration."""
    (tmp_path / "a.py").write_text(
        "class Inner:\n    every: int\n    name: str\n    split: str\n"
        "class Outer:\n    inner: Inner\n    others: dict[str, Inner]\n    name: str\n"
    )
    (tmp_path / "b.py").write_text(
        "def f(outer: Outer, path: Path, words: str):\n"
        "    path.name, words.split()\n"
        "    for key, other in outer.others.items():\n"
        "        print(other.every)\n"
    )
    paths = sorted(tmp_path.glob("*.py"))
    assert fields_read(paths) == {("Outer", "others"), ("Inner", "every")}


def test_fingerprint_ignores_only_what_does_not_change_the_run() -> None:
    base = composed("+experiment=demo")
    assert fingerprint(composed("+experiment=demo", "data.workers=0", "name=x")) == fingerprint(
        base
    )
    assert fingerprint(composed("+experiment=demo", "seed=7")) != fingerprint(base)
    assert "seed" in run_fields(base) and "data.workers" in flatten(base)


def message_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> str:
    """Runs the command in this process; returns its only message."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["casa_train", *overrides])
    assert run() == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert "Traceback" not in error and len(lines) <= 6, error
    assert lines[0].startswith("error: "), error
    return error


def small_demo(data_dir: Path, run_dir: Path, overrides: list[str]) -> list[str]:
    """Overrides of two steps, and others behind them."""
    experiment = [] if "experiment=" in overrides[0] else ["+experiment=demo"]
    steps = ["trainer.steps=2", "optim.warmup_steps=0", "optim.decay_steps=0"]
    return [*experiment, *TINY, *on_data(data_dir), f"run_dir={run_dir}", *steps, *overrides]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.stepz=5"], ["stepz"]),
        (["+trainer.stepz=5"], ["trainer.stepz", "Fields of trainer", "steps"]),
        (["data.balance_group=0"], ["data.balance_group is 0", "at least 1"]),
        (["data.min_pixels=-1"], ["data.min_pixels is -1", "0 or more"]),
        (["data.min_pixels=7057"], ["data.min_pixels is 7057", "at most data.max_pixels (7056)"]),
        (["data.video_share=2"], ["data.video_share", "2", "a share 0..1"]),
        (["trainer.steps=many"], ["trainer.steps", "'many'"]),
        (["+experiment=a=b"], ["+experiment=a=b: ", "in quotes"]),
        (["fusion=casaa"], ["casaa", "cross_attention"]),
        (["fusion.mechanism=casaa"], ["'casaa' is unknown", "insertion"]),
        (["+fusion.colour=red"], ["does not read ['colour']", "image_positions"]),
        (["fusion.share_parameter=true"], ["share_parameter'", "mean fusion.share_parameters?"]),
        (["fusion.queries=3"], ["fusion.queries is an option of qformer_insertion"]),
        (["fusion.colour=red"], ["Options of the mechanisms", "image_positions", "conf/fusion"]),
        (["fusion.init=zeros"], ["fusion.init", "'zeros'", "zero_output"]),
        (["model.backbone.config.model_type=gpt2"], ["'gpt2' is not supported", "llama"]),
        (["model.backbone.config.model_type=llamaa"], ["llamaa"]),
        (["+model.backbone.config.vocab_size=10"], ["vocab_size is 10", "has 512 tokens"]),
        (
            ["model.backbone.config.model_type=helium"],
            ["2 heads of head_dim 128 and hidden_size 32", "set head_dim to 16"],
        ),
        (
            ["model.backbone.config.model_type=qwen2_5_vl_text"],
            ["mrope_section None", "add up to 8", "rope_scaling"],
        ),
        (["model.vision.train_last_blocks=99"], ["train_last_blocks is 99", "2 blocks"]),
        (['model.template.bos="<|nothing|>"'], ["model.template", "special token '<|nothing|>'"]),
        (['model.template.bos="<eos>"'], ["special token '<eos>'"]),
        (['model.template.user_start="<｜User｜>"'], ["special token '<｜User｜>'"]),
        (["model.template.bos=<|bos|>"], ["model.template.bos=<|bos|>", "quotes"]),
        (
            ['model.template.user_start="<|user|>\\n"'],
            ["another chat template", "retokenize", r'"user_start": "<|user|>\n"'],
        ),
        (["model.tokenizer=/nowhere"], ["/nowhere", "neither a directory nor a hub id"]),
        (["data.sources.synthetic.path=/nowhere"], ["/nowhere", "does not exist", "data_recipes"]),
        (["data.text_tokens=4"], ["data.text_tokens is 4", "smallest samples need"]),
        (
            ["+data.sources.synthetic.weight=-1"],
            ["data.sources.synthetic.weight is -1.0", "a positive number"],
        ),
        (["~data.sources.synthetic"], ["data.sources", "at least one source"]),
        (["parallel.zero_stage=5"], ["parallel.zero_stage is 5", "1, 2 or 3"]),
        (["optim.warmup_steps=-1"], ["optim.warmup_steps is -1", "0 or more"]),
        (["optim.betas=[1.5,0.9]"], ["optim.betas.0 is 1.5", "0 or more, below 1"]),
        (["optim.groups.fusion.lr=-1"], ["optim.groups.fusion.lr is -1.0", "0 or more"]),
        (["optim.groups.fusion.patterns=['(']"], ["'('", "regular expression"]),
        (["checkpoint.resume_allow=[nope]"], ["checkpoint.resume_allow names 'nope'"]),
        (["+model.backbone.config.num_hiden_layers=1"], ["num_hiden_layers", "num_hidden_layers"]),
        (["+model.vision.config.dpth=1"], ["model.vision.config.dpth", "depth"]),
        (["model.backbone.config.hidden_size=abc"], ["transformers refuses", "hidden_size"]),
        (["+model.template.foo=bar"], ["model.template.foo", "user_start"]),
        (["optim.groups.vision.patterns=[nothing]"], ["visual", "matches no group"]),
        (
            ["+optim.groups.extra.patterns=[nothing]"],
            ["optim.groups.extra", "match no trainable"],
        ),
        (["+experiment=nothing"], ["experiment/nothing"]),
        (["experiment=demo"], ["+experiment=NAME"]),
        (["checkpoint.resume_allow=trainer.steps"], ["in brackets: checkpoint.resume_allow=["]),
        (
            ["optim.groups.vison.lr=1"],
            ["'vison'", "in conf/optim: backbone, fusion, lora, vision."],
        ),
        (["model.tokenizer=absent/tokenizer"], ["no such directory in", "Prepare the data first"]),
        (["name=../x"], ["name is '../x'", "run_dir"]),
        (["name=/x"], ["name is '/x'", "run_dir"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_named(
    data_dir: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    command = small_demo(data_dir, tmp_path / "run", overrides)
    try:
        with pytest.raises(UserError) as caught, StopRequest(max_hours=0) as stop:
            train(compose_config(command), stop)
    finally:
        leave_processes()
    error = str(caught.value)
    assert all(word in error for word in words) and len(error.splitlines()) <= 6, error
    assert not (tmp_path / "run").exists(), "the run directory was touched before the check"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+trainer.stepz=5"], ["trainer.stepz", "Fields of trainer", "steps"]),  # Hydra's
        (["fusion=casaa"], ["casaa", "cross_attention"]),
        (["data.min_pixels=-1"], ["data.min_pixels is -1", "0 or more"]),  # the schema's
        (["data.text_tokens=4"], ["data.text_tokens is 4", "smallest samples need"]),  # a run's
        (["-m", "seed=1,2"], ["run_dir=", "beside -m", "hydra.sweep.dir=DIR"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_prints_a_mistake_alone(
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    words: list[str],
) -> None:
    command = small_demo(data_dir, tmp_path / "run", overrides)
    error = message_of(capsys, monkeypatch, *command)
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists(), "the run directory was touched before the check"


@pytest.mark.parametrize(
    ("given", "sorted_"),
    [
        (["a=1", "--config-dir", "x", "b=2", "-m"], ["--config-dir", "x", "-m", "a=1", "b=2"]),
        (["--info", "defaults", "a=1"], ["--info", "defaults", "a=1"]),
        (["a=1", "--info", "b=2", "-cd=x"], ["--info", "-cd=x", "a=1", "b=2"]),
    ],
)
def test_options_may_stand_anywhere(given: list[str], sorted_: list[str]) -> None:
    options, overrides = split_options(given)
    assert [*options, *overrides] == sorted_


def test_the_folder_of_ones_own_may_stand_between_overrides(
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    own = "# @package _global_\ntrainer:\n  steps: 0\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(own)
    command = ["+experiment=mine", "--config-dir", str(tmp_path / "conf"), "seed=3"]
    assert "trainer.steps is 0" in message_of(capsys, monkeypatch, *command)


def test_fields_left_open_are_named() -> None:
    paths = [f"data.{part}.synthetic.path" for part in ("sources", "validation")]
    with pytest.raises(UserError, match=f"{paths[0]}, {paths[1]} must be given"):
        composed(*(f"{path}=???" for path in paths))


# ------------------------------------------------------------------------------- chat templates

READY = sorted((CONF_DIR / "model" / "template").glob("*.yaml"))


def test_a_template_has_the_same_fields_everywhere() -> None:
    assert {f.name for f in fields(TemplateConfig)} == {f.name for f in fields(ChatTemplate)}


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_template_leaves_nothing_to_the_tokenizer(path: Path) -> None:
    """But for `auto`, which leaves it everything. Both ways of choosing one say the same."""
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert set(values) == ({f.name for f in fields(ChatTemplate)} if path.stem != "auto" else set())
    ChatTemplate(**values)
    for override in (f"model/template={path.stem}", f"model.template={path.stem}"):
        assert composed(override).model.template == TemplateConfig(**values)


def test_a_ready_template_can_be_changed_in_one_field() -> None:
    chosen = composed("model/template=llama3", 'model.template.system="Be brief."').model.template
    assert chosen == replace(composed("model/template=llama3").model.template, system="Be brief.")


@pytest.mark.parametrize(
    ("written", "means"),
    [
        (r'"<|user|>\n"', "<|user|>\n"),
        (r'"\tuser\n\n"', "\tuser\n\n"),
        (r'"a\\nb"', r"a\nb"),  # a backslash and an n
        (r'"a\\\nb"', "a\\\nb"),
        (r'"a\\"', "a\\"),
        (r'"\d \r"', r"\d \r"),  # nothing else has a meaning
        (r"a\nb", "a\nb"),  # without quotes
    ],
)
def test_line_breaks_tabs_and_backslashes_can_be_written_out(written: str, means: str) -> None:
    names = ("model.template.user_start", "model.template.answer_start", "++model.template.bos")
    template = composed(*(f"{name}={written}" for name in names)).model.template
    meant = {"user_start": means, "answer_start": means, "bos": means}
    assert template == replace(composed().model.template, **meant)


def test_what_a_file_says_is_not_read_twice(tmp_path: Path) -> None:
    """Where YAML has a backslash and an n, it means them."""
    path = tmp_path / "mine.yaml"
    path.write_text("user_start: 'a\\nb'\nuser_end: \"c\\nd\"\nassistant_start: 'e\\tf\\\\'\n")
    meant = {"user_start": r"a\nb", "user_end": "c\nd", "assistant_start": "e\\tf\\\\"}
    assert composed(f"model.template={path}").model.template == TemplateConfig(**meant)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        overrides = ["model.template.bos=x"]
        raw = compose("train", overrides=overrides)
    raw.model.template.update(meant)  # as an experiment would
    template = to_config(raw, overrides).model.template
    assert template == replace(composed(*overrides).model.template, **meant)


def test_a_run_of_an_earlier_version_keeps_its_template() -> None:
    """Where it named no field, that was empty, whatever the tokenizer brings."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        raw = compose("train")
    named = {"bos": "", "user_start": "<|user|>", "assistant_end": "<|end|>"}
    with open_dict(raw):
        raw.model.template = named
    empty = ChatTemplate()
    expected = {f.name: getattr(empty, f.name) for f in fields(empty)}
    assert to_config(raw).model.template == TemplateConfig(**{**expected, **named, "trim": []})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.template=chatnl",
            ["model.template is 'chatnl'", "one of chatml, demo, demo_live, helium"],
        ),
        ("model/template=chatnl", ["model/template/chatnl", "Available options", "chatml demo"]),
        ("model.template=/nowhere.yaml", ["'/nowhere.yaml'", "cannot be read", "a YAML file"]),
        (f"model.template={ROOT}/Makefile", ["Makefile", "cannot be read"]),
        (f"model.template={CONF_DIR}/fusion/casa.yaml", ["fields out of bos, system"]),
        ("model.template=3", ["model.template is", "3", "one of chatml"]),
        ("model.template.trim=[narrator]", ["'trim' is ('narrator',)", "'system', 'user'"]),
        ("model.template.system_always=often", ["model.template.system_always", "'often'"]),
    ],
)
def test_a_template_that_is_none_is_named(data_dir: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_processor(compose_config([*on_data(data_dir), override]))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_escapes_in_a_mapping_mean_what_they_say(data_dir: Path) -> None:
    override = 'model.template={user_end: "<|end|>\\n"}'
    assert compose_config([*on_data(data_dir), override]).model.template.user_end == "<|end|>\n"


def test_null_is_the_tokenizer_s_own_template(data_dir: Path) -> None:
    config = compose_config([*on_data(data_dir), "model.template=null"])
    assert config.model.template == TemplateConfig()
    assert build_processor(config).template == asdict(ChatTemplate(**TEMPLATE))


def test_a_run_directory_of_another_configuration_is_refused(tmp_path: Path) -> None:
    from casa_train.run.directory import prepare_run_directory, record_run

    def start() -> None:
        prepare_run_directory(tmp_path / "run", config)
        record_run(tmp_path / "run", config, "{}")

    config = composed("+experiment=demo", f"run_dir={tmp_path / 'run'}")
    start()
    start()
    config.seed = 5
    with pytest.raises(UserError, match="seed: 0 there, 5 now"):
        start()
    config.checkpoint.resume_allow = ["seed"]
    start()
    config.seed = 6
    config.checkpoint.resume_allow = []
    config.checkpoint.resume = "never"
    start()
    assert (tmp_path / "run" / "previous_1" / "config.yaml").is_file()
    # Without its configuration an earlier attempt is moved aside all the same.
    (tmp_path / "run" / "config.yaml").unlink()
    (tmp_path / "run" / "checkpoints").mkdir()
    start()
    assert (tmp_path / "run" / "previous_2" / "checkpoints").is_dir()


def test_the_name_of_an_earlier_version_is_understood(tmp_path: Path) -> None:
    """Of `planned_ranks`: in what a run stored, in a user's own experiment, on the command line."""
    stored = OmegaConf.to_container(OmegaConf.structured(composed("planned_ranks=8")))
    assert isinstance(stored, dict)
    stored["world_size"] = stored.pop("planned_ranks")
    stored["checkpoint"]["resume_allow"] = ["trainer.steps"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    assert load_run_config(tmp_path).planned_ranks == 8
    (tmp_path / "experiment").mkdir()
    own = "# @package _global_\ndefaults: [demo]\nworld_size: 4\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(own)
    assert compose_config(["+experiment=mine"], tmp_path).planned_ranks == 4
    assert compose_config(["+experiment=mine", "planned_ranks=2"], tmp_path).planned_ranks == 2
    for override in ("world_size=2", "+world_size=2", "planned_ranks=2"):
        assert compose_config(["+experiment=demo", override]).planned_ranks == 2
    with pytest.raises(UserError, match="planned_ranks is 0; expected at least 1"):
        compose_config(["world_size=0"])


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A user's folder, with characters in its name that Hydra's grammar knows."""
    folder = tmp_path / "my co'nf, x=[1]"
    for name, text in (
        ("experiment/mine.yaml", "# @package _global_\ndefaults: [demo]\nname: mine\nseed: 5\n"),
        ("experiment/half.yaml", "# @package _global_\ntrainer: {steps: 33}\n"),
        ("fusion/wide.yaml", "mechanism: casa\nevery: 2\n"),
        ("sweep/ours.yaml", "# @package _global_\nhydra: {sweeper: {params: {seed: '1,2'}}}\n"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_folder_of_one_s_own_is_read_by_every_command(own_folder: Path) -> None:
    config = compose_config(["+experiment=mine", "fusion=wide"], own_folder)
    assert (config.name, config.seed, config.trainer.steps) == ("mine", 5, 1500)
    assert config.fusion["every"] == 2
    target = find_target("mine", None, [], own_folder)
    assert target.config.seed == 5
    jobs = compose_jobs(["+experiment=mine", "+sweep=ours"], array=True, config_dir=own_folder)
    assert [job.config.seed for job in jobs] == [1, 2]
    (job,) = compose_jobs(["+experiment=mine"], array=False, config_dir=own_folder)
    assert job.config.seed == 5
    assert Arm("mine,fusion=wide", [], 1, own_folder).config.fusion["every"] == 2
    # On top of what a run stored, too.
    half = compose_onto(config, ["+experiment=half", "data.text_tokens=99"], own_folder)
    assert (half.trainer.steps, half.data.text_tokens, half.seed) == (33, 99, 5)


def test_a_folder_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--config-dir", str(tmp_path / "nowhere")]
    for main, arguments in ((inspect, ["demo"]), (submit, ["--dry-run", "+experiment=demo"])):
        assert main([*arguments, *missing]) == 2
        assert f"--config-dir {missing[1]} is not a directory" in capsys.readouterr().err


def test_jobs_of_a_sweep_are_named_by_their_overrides() -> None:
    from casa_train.config.compose import job_directory

    assert job_directory("demo", ["+experiment=demo", "fusion=casa", "trainer.steps=5"]) == (
        "demo,fusion=casa,trainer.steps=5"
    )
    assert job_directory("demo", ["data.sources.a.path=/x/y", "name=z"]) == (
        "demo,data.sources.a.path=_x_y"
    )
    long = [[f"model.backbone.config.field_{i}={j}" for i in range(20)] for j in range(2)]
    first, second = (job_directory("demo", overrides) for overrides in long)
    assert first != second and len(first) <= 200
    common = ["data.sources.a.path=/x/y/train", f"model.tokenizer=/{'far/' * 40}tokenizer"]
    last = job_directory("demo", [*common, "model.backbone.config.num_hidden_layers=4"])
    assert last.startswith("demo,path=train,tokenizer=tokenizer,num_hidden_layers=4,")


NULLS = """# @package _global_
defaults:
  - demo
  - _self_
data:
  sources: {synthetic: null, own: {path: mine/train}}
  validation: {synthetic: null}
optim:
  groups: {fusion: null}
"""


def test_null_deletes_a_default_entry(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(NULLS)
    where = f"hydra.searchpath=['file://{tmp_path}']"
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = to_config(compose("train", overrides=[where, "+experiment=mine"]))
    assert {name: source.path for name, source in config.data.sources.items()} == {
        "own": "mine/train"
    }
    assert config.data.validation == {}
    names = set(composed("+experiment=demo").optim.groups)
    assert "fusion" in names and set(config.optim.groups) == names - {"fusion"}


@pytest.mark.parametrize("spelling", ["data.validation.synthetic=null", "data.validation=null"])
def test_null_deletes_on_the_command_line(spelling: str) -> None:
    assert composed("+experiment=demo", spelling).data.validation == {}
    streamed = ["+experiment=demo", "data=finevision_stream"]
    config = composed(*streamed, "data.stream.datasets.llava_onevision=null")
    assert list(config.data.stream.datasets) == ["finevision"]


def test_what_null_leaves_is_checked() -> None:
    with pytest.raises(UserError, match="data.sources is {}; expected at least one source"):
        composed("+experiment=demo", "data.sources.synthetic=null")
    with pytest.raises(UserError, match="Could not override 'data.sources.synthtic'"):
        compose_config(["+experiment=demo", "data.sources.synthtic=null"])
    with pytest.raises(UserError, match="data.text_tokens: Incompatible value"):
        composed("+experiment=demo", "data.text_tokens=null")
