"""The READMEs: every command runs, or is marked and checked as far as it can be; every link leads
somewhere; every file, field and target that they name is there.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.evaluate.lmms.model_options import read_options
from launch.submit import compose_jobs
from tests.helpers.commands import ROOT
from tests.helpers.docs_world import World, leading_variables, make_world, open_world
from tests.helpers.once import once
from tests.helpers.readmes import MARK, Block, anchors, blocks, inline_code, links, readmes

FILES = readmes()
BLOCKS = [block for path in FILES for block in blocks(path)]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]
ON_CLUSTERS = {"sbatch", "squeue", "scancel", "eval"}
"""Commands of a cluster, and the shell's own; what is ours among their words is checked."""


# --------------------------------------------------------------------------------------- running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    shared = once(tmp_path_factory, "world", make_world)
    return open_world(shared, tmp_path_factory.mktemp("docs") / "world")


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in COMMANDS if not b.marked], ids=str)
def test_an_unmarked_command_runs(block: Block, world: World) -> None:
    for words in block.commands():
        world.run(words)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({b.file for b in BLOCKS if b.language == "python"}))
def test_python_runs(file: str, world: World) -> None:
    """The blocks of a file continue each other."""
    world.python("\n".join(b.text for b in BLOCKS if (b.file, b.language) == (file, "python")))


@pytest.mark.slow
def test_the_model_card_runs(world: World) -> None:
    """The card of an export, on that export."""
    card = (world.folder / "runs" / "demo" / "export" / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert "AutoModelForImageTextToText.from_pretrained" in code
    world.python(code.replace("PATH/TO/THIS/DIRECTORY", "runs/demo/export"))


# ------------------------------------------------------------------------- checked without running


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("block", [b for b in COMMANDS if b.marked], ids=str)
def test_a_command_is_spelt_right(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that can be told without a hub, a GPU or a cluster."""
    for words in block.commands():
        _, words = leading_variables(words)
        check_files(words)
        if words[0] == "make":
            makefile = (ROOT / "Makefile").read_text()
            for target in words[1:]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), words
        elif words[0] == "python":
            assert words[1] == "-m", words
            check_module(words[2], words[3:], monkeypatch)
        elif words[0] == "launch/torchrun.sh":
            compose_config(words[1:])
        elif words[0] == "torchrun":
            started = torchrun_parser().parse_args(words[1:])
            assert started.module, words
            check_module(started.training_script, started.training_script_args, monkeypatch)
        else:
            assert words[0] in ON_CLUSTERS or words[0].startswith("launch/"), words
            assert block.marked, f"{block}: {words[0]} cannot run here; expected a mark"


def check_files(words: Sequence[str]) -> None:
    """Files of the project that a command names are there."""
    for before, word in zip(["", *words], words, strict=False):
        ours = re.match(r"(casa_train|conf|data_recipes|launch|tests)/", word)
        if ours and before != "--out":
            assert (ROOT / word).exists(), f"{' '.join(words)}: {word} is not there"


class Parsed(Exception):
    """What a command made of its arguments."""


def check_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is there, takes the arguments, and every override composes."""
    if module == "casa_train":
        check_overrides([word for word in arguments if word != "-m"], "-m" in arguments)
        return
    if module == "pytest":
        return
    if module == "lmms_eval":  # of an environment of its own; what is ours are the model's options
        assert arguments[arguments.index("--model") + 1] == "casa"
        given = arguments[arguments.index("--model_args") + 1].split(",")
        read_options(dict(pair.split("=", 1) for pair in given))
        return
    options = parsed(module, arguments, monkeypatch)
    if module == "launch.submit":
        check_overrides(options.overrides, options.array)
    elif module == "casa_train.bench" and options.name == "step":
        for experiment in options.experiments:
            compose_config([f"+experiment={experiment.replace(',', ' ')}".split()[0], *options.set])


def check_overrides(overrides: list[str], sweep: bool) -> None:
    if "data=mine" in overrides:  # a file that the README's own command writes
        overrides = ["data=synthetic" if word == "data=mine" else word for word in overrides]
    assert compose_jobs(overrides, array=sweep)


def parsed(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> argparse.Namespace:
    """What argparse makes of a command; its code goes no further than that."""

    def stop(parse: Any) -> Any:
        def parse_and_stop(*given: Any, **options: Any) -> None:
            raise Parsed(parse(*given, **options))

        return parse_and_stop

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(
                argparse.ArgumentParser, name, stop(getattr(argparse.ArgumentParser, name))
            )
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed) as found:
            runpy.run_module(module, run_name="__main__")
    namespace: argparse.Namespace = found.value.args[0]
    return namespace


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in FILES])
def test_blocks_are_of_known_kinds(path: Path) -> None:
    """So that no command hides from these tests."""
    for block in blocks(path):
        assert block.language in ("bash", "python", "text"), str(block)
        if "# needs" in block.text:
            assert MARK.match(block.text), f"{block}: the mark is the first line of a block"


# -------------------------------------------------------------------------------- links and names


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in FILES])
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{path}: {link}; {sorted(anchors(target))}"


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in FILES])
def test_what_is_named_is_there(path: Path) -> None:
    rooms = listed_rooms()
    for code in inline_code(path):
        word = code.split()[0]
        if re.fullmatch(r"(casa_train|conf|data_recipes|launch|tests)/[\w/.]*", word):
            is_room = word.removeprefix("casa_train/").rstrip("/") in rooms  # tested by themselves
            assert (ROOT / word).exists() or is_room, f"{path}: `{word}` is not there"
        if match := re.match(r"python -m ([\w.]+)", code):
            assert module_exists(match[1]), f"{path}: `{code}`"
        if match := re.match(r"make ([a-z-]+)$", code):
            assert f"\n{match[1]}:" in (ROOT / "Makefile").read_text(), f"{path}: `{code}`"
        name = re.split(r"[=\s]", word.lstrip("'+"))[0]
        if is_field(name) and "(" not in code:
            if name.startswith("model.") and "=" not in code and "export" in path.parts:
                continue  # a model object, not a field
            assert field_exists(name), f"{path}: `{code}` is no field"


def is_field(name: str) -> bool:
    """Whether a word looks like a field of the configuration: `trainer.steps`, not a file."""
    section, _, rest = name.partition(".")
    return section in SECTIONS and bool(rest) and not name.endswith((".jsonl", ".py"))


def module_exists(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


SECTIONS = {f.name for f in fields(Config) if is_dataclass(get_type_hints(Config)[f.name])}
SECTIONS |= {"fusion"}


def fusion_options() -> set[str]:
    files = (ROOT / "conf" / "fusion").glob("*.yaml")
    return {key for file in files for key in yaml.safe_load(file.read_text())}


def field_exists(name: str) -> bool:
    """Whether a dotted name leads to a field; a key of a dict may have any name."""
    section, *parts = name.split(".")
    if section == "fusion":
        return parts[0] in fusion_options()
    kind: Any = get_type_hints(Config)[section]
    for part in parts:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
            if kind is None:
                return False
        else:
            return False
    return True


def test_field_names_are_told_apart() -> None:
    assert field_exists("trainer.steps") and field_exists("data.sources.NAME.path")
    assert field_exists("fusion.every") and field_exists("data.ratings.relevance")
    assert not field_exists("trainer.stepz") and not field_exists("data.sources.NAME.pth")
    assert not field_exists("fusion.evry") and not field_exists("trainer.steps.x")


# ----------------------------------------------------------------------------------- the first page


def listed_rooms() -> list[str]:
    """Of the table of rooms; one row may hold several."""
    text = (ROOT / "README.md").read_text()
    cells = re.findall(r"^\| ((?:`\w+/`(?:, )?)+) \|", text, re.MULTILINE)
    return re.findall(r"`(\w+)/`", " ".join(cells))


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_first_page_names_every_room() -> None:
    rooms = {p.parent.name for p in (ROOT / "casa_train").glob("*/__init__.py")}
    assert sorted(listed_rooms()) == sorted(rooms)


def test_the_first_page_names_every_mechanism() -> None:
    """By a configuration that one can type; some mechanisms stand there in several forms."""
    text = (ROOT / "README.md").read_text()
    names = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    files = {file.stem: file for file in (ROOT / "conf" / "fusion").glob("*.yaml")}
    assert names <= set(files)
    options = {name: yaml.safe_load(file.read_text()) for name, file in files.items()}
    mechanisms = {some["mechanism"] for some in options.values() if "mechanism" in some}
    assert mechanisms <= names


def test_every_experiment_and_sweep_is_named() -> None:
    """An experiment in the table's first column, a sweep as one types it in the text."""
    page = ROOT / "conf" / "README.md"
    (table,) = re.findall(r"^\| `\+experiment=` .*\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    rows = [row.split("|")[1] for row in table.splitlines()]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == stems("experiment")
    sweeps = [re.fullmatch(r"\+sweep=(\w+)", code) for code in inline_code(page)]
    assert {found[1] for found in sweeps if found} == stems("sweep")


def stems(group: str) -> set[str]:
    """The names of a group's files in `conf/`."""
    return {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
