"""Overrides of the command line as they were typed: `name=12e4567` names a run, it is no number.

Hydra reads 12e4567, 1_000 and True as values wherever they stand. Where the configuration has text,
they are put in quotes before Hydra sees them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from antlr4 import ParserRuleContext, Token
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from casa_train.config.bounds import Place, leaves
from casa_train.config.schema import RENAMED, Config
from casa_train.errors import UserError

VALUES = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
SWEEPS = ("choice", "shuffle", "sort")  # functions whose arguments are values of the field
HOME = re.compile(r"(?<![^=,:\[{( ])~[^,:\[\]{}() '\"]*")
MERGED = "evaluation.benchmarks"
"""Empty by default, and Hydra adds nothing to an empty dict unless a plus says so: whoever writes
it out as {NAME: {...}} means it to be added."""
SWEEP_DIRECTORIES = ("hydra.sweep.dir", "hydra.run.dir")


def as_typed(overrides: Sequence[str]) -> list[str]:
    """Overrides with quotes around what stands in fields of text and would be read as a value.

    Whatever else stands between them, options or what Hydra will refuse, is left as it is; `~` in
    Hydra's own directories is expanded, and fields of earlier versions get their names of today.

    :raises UserError: a URL as one of those directories.
    """
    return [_typed(override) for override in overrides]


def quoted(text: str) -> str:
    """Any text as one value of an override."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (f"\\{m[2]}" if m[2] else ""), text)
    return f"'{escaped}'"


def _typed(override: str) -> str:
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    if name in RENAMED:
        key = key.replace(name, RENAMED[name])
        override, name = f"{key}{equals}{value}", RENAMED[name]
    if not equals or key.startswith("-"):
        return override
    if key == MERGED and value.lstrip().startswith("{"):
        key = f"++{key}"
        override = f"{key}={value}"
    if name in SWEEP_DIRECTORIES:
        try:
            return f"{key}={Place().resolve(name, value)}"
        except ValueError as error:
            raise UserError(f"{error}.") from error
    try:
        tree = _parse(override)
    except HydraException:
        # Its grammar knows no ~ outside of quotes, and no shell expands it behind a dotted name.
        quoted = HOME.sub(r"'\g<0>'", value)
        if quoted == value:
            return override  # Hydra says what is wrong with it
        return _typed(f"{key}={quoted}")
    found: Any = tree.value()
    tokens = [] if found is None else list(_values(found, tuple(name.split("."))))
    for token in reversed(tokens):
        override = f"{override[: token.start]}'{token.text}'{override[token.stop + 1 :]}"
    return override


def _parse(override: str) -> Any:
    """:raises HydraException: it does not follow Hydra's grammar."""
    listener = HydraErrorListener()
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(listener)
    return parser.override()


def _values(node: Any, path: tuple[str, ...]) -> Iterator[Token]:
    """The tokens below a node that fields of text would lose their writing by."""
    if isinstance(node, OverrideParser.PrimitiveContext):
        tokens = [child.symbol for child in node.getChildren()]
        tokens = [token for token in tokens if token.type != OverrideLexer.WS]
        if len(tokens) == 1 and tokens[0].type in VALUES and _is_text(path):
            yield tokens[0]
        return
    if isinstance(node, OverrideParser.FunctionContext) and node.ID().getText() not in SWEEPS:
        return
    if isinstance(node, OverrideParser.ListContainerContext):
        path = (*path, "*")
    elif isinstance(node, OverrideParser.DictKeyValuePairContext):
        path = (*path, node.dictKey().getText())
    for child in node.getChildren():
        if isinstance(child, ParserRuleContext):
            yield from _values(child, path)


def _is_text(path: tuple[str, ...]) -> bool:
    """Whether text stands there: in a field, or as a group's choice, such as experiment=2024."""
    fields = leaves(Config)
    if len(path) == 1 and path not in [leaf.path for leaf in fields]:
        return True
    return any(
        leaf.type is str
        and len(leaf.path) == len(path)
        and all(own in ("*", given) for own, given in zip(leaf.path, path, strict=True))
        for leaf in fields
    )
