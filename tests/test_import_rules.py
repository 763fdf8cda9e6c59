"""Who may import whom: the rules that keep the folders apart."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from casa_train.export.model_card import CARD

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "casa_train"

# The arrows of the house: room -> the rooms that it may import from.
BASE = {"config", "distributed", "io", "errors"}
TABLE: dict[str, set[str]] = {}
TABLE["modeling"] = set()
TABLE["errors"] = set()
TABLE["io"] = {"errors"}
TABLE["distributed"] = {"errors", "io"}
TABLE["config"] = {"errors", "io"}
TABLE["metrics"] = BASE
TABLE["data"] = BASE | {"modeling"}
TABLE["pages"] = {"errors", "io", "modeling"}
TABLE["video"] = {"errors", "io", "config"}
TABLE["run"] = BASE | {"modeling", "metrics", "data"}
TABLE["setup"] = BASE | {"modeling", "data"}
TABLE["cost"] = TABLE["setup"] | {"setup"}
TABLE["checkpoint"] = BASE | {"run"}
TABLE["engine"] = BASE | {"checkpoint", "cost", "setup", "modeling"}
TABLE["training"] = BASE | {"metrics", "data", "setup", "cost"}
TABLE["export"] = TABLE["run"] | {"run", "setup", "checkpoint", "training"}
TABLE["convert"] = TABLE["setup"] | {"setup", "export"}
TABLE["caption"] = TABLE["export"] | {"export", "pages", "video"}
TABLE["evaluate"] = TABLE["export"] | {"export", "pages", "caption"}
TABLE["report"] = TABLE["cost"] | {"run", "metrics", "cost", "evaluate", "pages"}
TABLE["inspect"] = TABLE["data"] | {"data", "run", "report", "pages"}
TABLE["bench"] = (
    TABLE["training"] | TABLE["report"] | {"training", "checkpoint", "engine", "export", "train"}
)
BESIDE = {"report", "inspect", "bench", "convert", "video"}  # what training never needs
TABLE["train"] = set(TABLE) - BESIDE
TABLE["__main__"] = BASE | {"train", "training", "run", "cost", "engine"}
# The order of architecture: nothing imports from a row below its own.
ROWS = (
    {"__main__"},
    {"report", "inspect", "bench", "convert"},
    {"train"},
    {"training", "export", "caption", "evaluate"},
    {"setup", "engine", "checkpoint", "run", "cost"},
    {"data", "metrics", "pages", "video"},
    {"modeling", "distributed", "config", "io", "errors"},
)

# Each heavy library has one home.
HOMES = {
    "deepspeed": "engine/",
    "flash_attn": "modeling/attention.py",
    "wandb": "metrics/sinks/",
    "webdataset": "data/prepared/",
    "datasets": "data/stream/ evaluate/benchmarks/reading.py",
    "hydra": "__main__.py config/",
    "matplotlib": "report/",
    "av": "video/",
    "gguf": "convert/",
    "lmms_eval": "evaluate/lmms/",
    "starlette": "caption/web/",
    "uvicorn": "caption/web/",
    "peft": "setup/lora.py",
    "scipy": "report/significance.py",
}
TOPS = ("casa_train", "conf", "data_recipes", "launch", "tests")
# Files that a user writes, which explanations name as examples.
NO_FILES = {"mine/toy.py", "mechanisms/toy.py"}
MODELING_MAY = {"torch", "transformers", "tokenizers", "einops", "PIL", "numpy", "flash_attn"}


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


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_run_down(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "modeling"):
        return  # modeling has rules of its own, above
    for name in project_imports(path):
        _, _, inner = name.partition(".")
        other = inner.split(".")[0]
        allowed = not other or other == room or other in TABLE[room]
        assert allowed, f"{path.relative_to(ROOT)} imports {name}; {room}/ may: {TABLE[room]}"


def test_the_table_has_every_room_and_no_circle() -> None:
    rooms = {room_of(path) for path in sources(PACKAGE)} - {"__init__"}
    assert rooms == set(TABLE) == set().union(*ROWS)
    row = {room: number for number, rooms in enumerate(ROWS) for room in rooms}

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, f"circle: {' -> '.join([*trail, room])}"
        for other in TABLE[room]:
            assert row[room] <= row[other], f"{room} may not import {other}: an arrow up"
            visit(other, (*trail, room))

    for room in TABLE:
        visit(room, ())


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {}
    for path in sources(PACKAGE):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[dotted] = names
    modules = set(graph) - {"casa_train"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name] & modules:
                visit(other, (*trail, name))
            done.add(name)

    for module in modules:
        visit(module, ())


def test_the_top_of_the_package_holds_four_files() -> None:
    top = {path.name for path in PACKAGE.glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "train.py", "errors.py"}


def test_every_room_tells_its_story_in_its_init_and_nothing_else() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE:
            continue
        tree = ast.parse(path.read_text())
        story = ast.get_docstring(tree)
        assert story, f"{path.parent.name} tells nothing"
        sentences = len(re.findall(r"[.?!](?=\s|$)", story))
        assert 1 <= sentences <= 3, (
            f"{path.relative_to(ROOT)} has {sentences} sentences, not 1 to 3"
        )
        assert len(tree.body) == 1, f"{path.relative_to(ROOT)} holds more than its story"
    rooms = {path.parent for path in sources(PACKAGE)} - {PACKAGE}
    assert all((room / "__init__.py").is_file() for room in rooms)


def test_no_two_modules_have_one_name() -> None:
    # A benchmark may be named after what it measures.
    paths = [p for p in sources(PACKAGE) if room_of(p) != "bench" and "__" not in p.stem]
    names = [path.stem for path in paths]
    assert len(set(names)) == len(names), sorted(names)


def explanations(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every comment, docstring and text of several lines in a file."""
    source = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(source)):
        docstring = isinstance(node, ast.Expr)
        text = getattr(node.value if isinstance(node, ast.Expr) else node, "value", None)
        if isinstance(text, str) and (docstring or "\n" in text):
            found.append((node.lineno, text))
    return found


@pytest.mark.parametrize("folder", ["casa_train", "data_recipes", "launch", "tests"])
def test_explanations_name_files_that_exist(folder: str) -> None:
    # By its name, or by the end of its path.
    files = [file for top in TOPS for file in (ROOT / top).rglob("*.*")]
    ends = {"/".join(file.parts[-n:]) for file in files for n in range(1, len(file.parts))}
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(ROOT / folder)
        for line, text in explanations(path)
        for name in re.findall(r"\w[\w./-]*\.(?:py|md)\b", text)
        if name not in ends | NO_FILES
    ]
    assert not missing, missing


def test_heavy_libraries_have_one_home() -> None:
    for path in [*sources(PACKAGE), *sources(ROOT / "data_recipes")]:
        inside = path.is_relative_to(PACKAGE)
        relative = path.relative_to(PACKAGE if inside else ROOT).as_posix()
        for level, name in imports(path):
            library = name.split(".")[0]
            if level or library not in HOMES:
                continue
            recipes = relative.startswith("data_recipes/") and library == "datasets"
            allowed = recipes or (inside and relative.startswith(tuple(HOMES[library].split())))
            assert allowed, f"{relative} imports {name}; its home is {HOMES[library]}"


def test_data_uses_only_the_processor_side_of_modeling() -> None:
    allowed = {"processing_casa", "image_processing_casa", "tower_kinds", "windows", "packed"}
    for path in sources(PACKAGE / "data"):
        for name in project_imports(path):
            if name.startswith("casa_train.modeling"):
                assert name.split(".")[2] in allowed, f"{path.name} imports {name}"


def test_recipes_know_only_data_and_what_it_stands_on() -> None:
    for path in sources(ROOT / "data_recipes"):
        for name in project_imports(path):
            allowed = {"data", "video", "config", "io", "errors"}
            assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sources(ROOT / "tests"), ids=lambda p: p.name)
def test_what_tests_share_stands_in_helpers(path: Path) -> None:
    """A test file that others import could not be moved, marked or left out by itself."""
    for level, name in imports(path):
        module = name.split(".")
        assert not level and (module[0] != "tests" or module[1] == "helpers"), f"{path} of {name}"
