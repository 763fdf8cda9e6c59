"""Names of a checkpoint's tensors in few lines: numbers collapsed, with shapes and counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def name_tree(shapes: Mapping[str, Sequence[int]], marks: Mapping[str, str] | None = None) -> str:
    """One line for all tensors that differ in the numbers of layers alone.

    :param shapes: by name.
    :param marks: a sign in front of a name; lines with different signs stay apart.
    :return: lines such as `? model.layers.{0..27}.mlp.up_proj.weight  [8192, 2048]  x28`.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name in sorted(shapes, key=_in_order):
        mark = (marks or {}).get(name, " ")
        key = (mark, NUMBER.sub("*", name), tuple(shapes[name]))
        groups.setdefault(key, []).append(name)
    lines = []
    for (mark, pattern, shape), names in groups.items():
        times = f"  x{len(names)}" if len(names) > 1 else ""
        lines.append(f"{mark} {_with_ranges(pattern, names)}  {list(shape)}{times}")
    return "\n".join(lines)


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Layer 10 stands behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _with_ranges(pattern: str, names: Sequence[str]) -> str:
    columns = list(zip(*(NUMBER.findall(name) for name in names), strict=True))
    pieces = pattern.split("*")
    out = pieces[0]
    for column, piece in zip(columns, pieces[1:], strict=True):
        numbers = sorted({int(n) for n in column})
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        text = f"{numbers[0]}..{numbers[-1]}" if whole else ",".join(map(str, numbers))
        out += (f"{{{text}}}" if len(numbers) > 1 else str(numbers[0])) + piece
    return out
