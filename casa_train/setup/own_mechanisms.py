"""Fusion mechanisms of the user's own: Python files that the environment names.

Nothing else brings their code in: a configuration says a mechanism's name and no more, so that what
lies in a run directory can choose among known mechanisms and run nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
from pathlib import Path

from casa_train import modeling
from casa_train.errors import UserError
from casa_train.modeling.fusion import FusionMechanism
from casa_train.modeling.mechanisms import MECHANISMS

VARIABLE = "CASA_MECHANISMS"
FOLDER = Path(str(modeling.__file__)).parent


def own_files() -> list[Path]:
    """The files that the environment variable names, joined by `:`."""
    named = os.environ.get(VARIABLE, "").split(os.pathsep)
    return [Path(name).expanduser().absolute() for name in named if name]


def register_own() -> None:
    """Registers the mechanisms of these files, each as a module of `casa_train.modeling`: there its
    imports mean what they mean in an export.

    What fails inside such a file is raised as it is, so that its author sees the line.

    :raises UserError: no file, a name that a module cannot have, an import that an export lacks, or
        a file that registers nothing.
    """
    for path in own_files():
        name = f"{modeling.__name__}.{path.stem}"
        loaded = sys.modules.get(name)
        if loaded is not None and loaded.__file__ == str(path):
            continue
        _check(path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        if not any(mechanism.__module__ == name for mechanism in MECHANISMS.values()):
            del sys.modules[name]
            raise UserError(
                f"{VARIABLE} names {path}, which registers no fusion mechanism; expected a "
                "subclass of FusionMechanism with a name and the decorator @register."
            )


def own_class(mechanism: FusionMechanism) -> type[FusionMechanism] | None:
    """The class whose file an export of this mechanism takes along; None for the project's own."""
    kind = type(mechanism)
    return None if Path(inspect.getfile(kind)).parent == FOLDER else kind


def _check(path: Path) -> None:
    """:raises UserError: what cannot be a mechanism's file, here or in an export."""
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"{VARIABLE} names {path}, which is no Python file; expected files such as mine/toy.py."
        )
    if not path.stem.isidentifier() or (FOLDER / path.name).exists():
        raise UserError(
            f"{VARIABLE} names {path}; expected a name that Python can import and that no file in "
            f"{FOLDER} has, since an export holds them side by side. Rename it."
        )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        near = isinstance(node, ast.ImportFrom) and node.level > 0
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}"]
        for name in names:
            if name.split(".")[0] == "casa_train":
                raise UserError(
                    f"{path}, line {node.lineno}: imports {name}, which an export's user does not "
                    "have; write the import relative, as in `from .fusion import register`."
                )
            if near and not (FOLDER / f"{name[1:]}.py").is_file():
                raise UserError(
                    f"{path}, line {node.lineno}: imports {name}; expected a file of {FOLDER}: "
                    "a mechanism is one file, and beside it an export holds these alone."
                )
