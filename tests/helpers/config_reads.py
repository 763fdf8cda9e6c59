"""Which fields of the configuration the package reads, by following types through its code."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

Type = Any  # the name of a class, ("of", what a dict or a list holds), or None: unknown
HOLDERS = ("dict", "list", "tuple", "Mapping", "Sequence", "Iterable", "Collection")


def fields_read(paths: Iterable[Path], unread: Collection[Path] = ()) -> set[tuple[str, str]]:
    """(class, attribute) of every attribute that is read of a value whose class is known.

    :param unread: files whose own reads do not count.
    """
    trees = {path: ast.parse(path.read_text()) for path in paths}
    known = Known()
    for tree in trees.values():
        known.learn(tree)
    found: set[tuple[str, str]] = set()
    for path, tree in trees.items():
        if path not in unread:
            Scope(known, found, {}).run(tree.body)
    return found


def annotated(node: ast.expr | None) -> Type:
    """What an annotation says."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return annotated(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.BinOp):  # X | None
        return annotated(node.left)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Annotated":
            return annotated(inner[0])
        if node.value.id in HOLDERS:
            return ("of", annotated(inner[0] if node.value.id == "tuple" else inner[-1]))
    return None


class Known:
    """Of every class the types of its attributes, of every function what it returns."""

    def __init__(self) -> None:
        self.attributes: dict[str, dict[str, Type]] = {}
        self.returns: dict[str, Type] = {}

    def learn(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.returns[node.name] = annotated(node.returns)
            elif isinstance(node, ast.ClassDef):
                own = self.attributes.setdefault(node.name, {})
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        own[part.target.id] = annotated(part.annotation)
                    elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                        scope = Scope(self, set(), arguments(part))
                        for target, value in assignments(part):
                            if isinstance(target, ast.Attribute):
                                own.setdefault(target.attr, scope.type_of(value))
                            elif isinstance(target, ast.Name):
                                scope.names[target.id] = scope.type_of(value)


def arguments(function: ast.FunctionDef) -> dict[str, Type]:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {a.arg: annotated(a.annotation) for a in every}


def assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    for part in ast.walk(node):
        if isinstance(part, ast.Assign):
            for target in part.targets:
                if isinstance(target, ast.Tuple) and isinstance(part.value, ast.Tuple):
                    yield from zip(target.elts, part.value.elts, strict=False)
                else:
                    yield target, part.value


class Scope:
    """Names of a function and their types; nested functions see those around them."""

    def __init__(self, known: Known, found: set[tuple[str, str]], names: dict[str, Type]) -> None:
        self.known, self.found, self.names = known, found, dict(names)

    def run(self, body: Iterable[ast.AST], owner: str | None = None) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                inner = Scope(self.known, self.found, {**self.names, **arguments(node)})
                if owner is not None:
                    inner.names["self"] = owner
                inner.run(node.body)
            elif isinstance(node, ast.ClassDef):
                self.run(node.body, node.name)
            else:
                self.statement(node)

    def statement(self, node: ast.AST) -> None:
        for target, value in assignments(node):
            if isinstance(target, ast.Name):
                self.names[target.id] = self.type_of(value)
        for part in ast.walk(node):
            if isinstance(part, ast.For | ast.comprehension):
                self.bind(part.target, part.iter)
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers")]
        for block in blocks:
            if isinstance(block, list):
                self.run(block)
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load):
                self.type_of(part)

    def bind(self, target: ast.expr, values: ast.expr) -> None:
        """The names of a loop over a dict or a list."""
        if isinstance(values, ast.Call) and isinstance(values.func, ast.Name) and values.args:
            values = values.args[0]  # sorted(...), list(...)
        method = (
            values.func.attr
            if isinstance(values, ast.Call) and isinstance(values.func, ast.Attribute)
            else ""
        )
        whole = self.type_of(values.func.value if method in ("items", "values") else values)  # type: ignore[attr-defined]
        inner = whole[1] if isinstance(whole, tuple) else None
        if method == "items" and isinstance(target, ast.Tuple):
            target = target.elts[-1]
        if isinstance(target, ast.Name):
            self.names[target.id] = inner

    def type_of(self, node: ast.expr) -> Type:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if not isinstance(owner, str) or node.attr not in self.known.attributes.get(owner, {}):
                return None
            self.found.add((owner, node.attr))
            return self.known.attributes[owner][node.attr]
        if isinstance(node, ast.Subscript):
            whole = self.type_of(node.value)
            return whole[1] if isinstance(whole, tuple) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in self.known.attributes:
                return node.func.id
            return self.known.returns.get(node.func.id)
        return None
