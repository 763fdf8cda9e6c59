"""Who may import whom: the rules that keep the folders apart."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from casa_train.model_card import CARD

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "casa_train"

# Each heavy library has one home.
HOMES = {
    "deepspeed": {"casa_train/engine.py"},
    "flash_attn": {"casa_train/modeling/attention.py"},
    "wandb": {"casa_train/metrics/sinks/wandb.py"},
    "webdataset": {"casa_train/data/shards.py"},
    "datasets": {"casa_train/data/stream.py"},
    "av": {"data_recipes/video.py"},
    "hydra": {"casa_train/__main__.py", "casa_train/compose.py", "casa_train/overrides.py"},
}
MODELING_MAY = {"torch", "transformers", "tokenizers", "einops", "PIL", "numpy", "flash_attn"}
# Folders and modules that receive modules, names and states instead of importing them.
BLIND = (
    "optim.py",
    "loss.py",
    "engine.py",
    "zero_state.py",
    "audit.py",
    "checkpoint",
    "metrics",
    "trainer.py",
)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(relative level, dotted module) of every import in a file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def project_imports(path: Path) -> set[str]:
    return {name for level, name in imports(path) if level == 0 and name.startswith("casa_train")}


@pytest.mark.parametrize("path", sources(PACKAGE / "modeling"), ids=lambda p: p.name)
def test_modeling_stands_alone(path: Path) -> None:
    for level, name in imports(path):
        if level:
            assert level == 1, f"{path.name} imports from outside its folder: {'.' * level}{name}"
            assert "." not in name, f"{path.name}: the folder is flat, found .{name}"
        else:
            top = name.split(".")[0]
            allowed = top in MODELING_MAY or top in sys.stdlib_module_names
            assert allowed, f"{path.name} imports {name}, which a user of an export may not have"


def test_the_model_card_tells_what_an_export_imports() -> None:
    found = {n.split(".")[0] for p in sources(PACKAGE / "modeling") for _, n in imports(p) if n}
    local = {path.stem for path in sources(PACKAGE / "modeling")}
    # Optional; comes with transformers.
    needed = found - local - set(sys.stdlib_module_names) - {"flash_attn", "tokenizers"}
    (command,) = re.findall("pip install (.*)", CARD)
    packages = {re.split("[<>=]", word.strip('"'))[0] for word in command.split()}
    assert "einops" in needed
    assert packages == {{"PIL": "pillow"}.get(name, name) for name in needed}


def test_modeling_imports_are_acyclic() -> None:
    graph = {
        path.stem: {name for level, name in imports(path) if level == 1}
        for path in sources(PACKAGE / "modeling")
    }

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        for following in graph.get(name, set()):
            visit(following, (*trail, name))

    for start in graph:
        visit(start, ())


def test_model_entry_file_names_every_file_it_reaches() -> None:
    # transformers 4.51 copies only what an entry file imports directly.
    graph = {
        path.stem: {name for level, name in imports(path) if level == 1}
        for path in sources(PACKAGE / "modeling")
    }
    for entry in ("modeling_casa", "processing_casa", "configuration_casa"):
        reached: set[str] = set()
        pending = [entry]
        while pending:
            for name in graph[pending.pop()] - reached:
                reached.add(name)
                pending.append(name)
        assert reached == graph[entry], f"{entry} must also import {sorted(reached - graph[entry])}"


def test_heavy_libraries_have_one_home() -> None:
    for path in [*sources(PACKAGE), *sources(ROOT / "data_recipes")]:
        relative = path.relative_to(ROOT).as_posix()
        for level, name in imports(path):
            library = name.split(".")[0]
            if level == 0 and library in HOMES:
                allowed = relative in HOMES[library]
                allowed = allowed or (
                    library == "datasets" and relative.startswith("data_recipes/")
                )
                assert allowed, f"{relative} imports {name}; its home is {HOMES[library]}"


def test_data_uses_only_the_processor_side_of_modeling() -> None:
    allowed = {
        "casa_train.modeling.processing_casa",
        "casa_train.modeling.image_processing_casa",
        "casa_train.modeling.windows",
        "casa_train.modeling.packed",
    }
    for path in sources(PACKAGE / "data"):
        for name in project_imports(path):
            if name.startswith("casa_train.modeling"):
                assert name in allowed, f"{path.name} imports {name}"


def test_some_folders_know_neither_model_nor_data() -> None:
    for entry in BLIND:
        target = PACKAGE / entry
        for path in sources(target) if target.is_dir() else [target]:
            for name in project_imports(path):
                blind = not name.startswith(("casa_train.modeling", "casa_train.data"))
                assert blind, f"{path.relative_to(PACKAGE)} imports {name}"


def test_recipes_know_only_the_data_folder() -> None:
    for path in sources(ROOT / "data_recipes"):
        for name in project_imports(path):
            allowed = name.startswith("casa_train.data")
            own = ("casa_train.errors", "casa_train.kinds", "casa_train.caches")
            allowed = allowed or name in own
            assert allowed, f"{path.name} imports {name}"
