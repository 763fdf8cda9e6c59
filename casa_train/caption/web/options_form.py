"""The captioner's options as a form, and what a visitor filled in as options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from casa_train.caption.options import CaptionOptions
from casa_train.config.bounds import MOST_COUNT
from casa_train.errors import UserError

LONGEST_TEXT = 2000  # characters of a prompt
MOST_NEW_TOKENS = 256  # of a frame: a visitor shares the model with others


def form_fields(options: CaptionOptions) -> list[dict[str, Any]]:
    """(name, kind, default) of each option; kinds are int, float and str.

    :param options: what stands in the form at first.
    """
    hints = get_type_hints(CaptionOptions)
    return [
        {"name": f.name, "kind": hints[f.name].__name__, "default": getattr(options, f.name)}
        for f in fields(CaptionOptions)
    ]


def read_form(filled: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, each of its type. Whether a value makes sense, `CaptionOptions` says.

    :raises UserError: no such option, or another type.
    """
    hints = get_type_hints(CaptionOptions)
    unknown = sorted(set(filled) - set(hints))
    if unknown:
        raise UserError(f"option {unknown[0][:80]!r} is unknown; known: {', '.join(hints)}.")
    return {name: _read(name, hints[name], value) for name, value in filled.items()}


def _read(name: str, kind: type, value: Any) -> Any:
    if kind is str:
        if not isinstance(value, str) or len(value) > LONGEST_TEXT:
            raise UserError(f"{name}: expected a text of at most {LONGEST_TEXT} characters.")
        # JSON can hold halves of a character, which no tokenizer reads.
        return value.encode("utf-8", "replace").decode()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    most = MOST_NEW_TOKENS if name == "max_new_tokens" else MOST_COUNT
    if not number or (kind is int and not whole) or not -most <= value <= most:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} is {str(value)[:40]}; expected {expected}, at most {most:,}.")
    return kind(value)
