"""What all pages share: their colours, their templates, and how they are written.

A page is one HTML file that loads nothing. Whatever comes from data (questions, answers, keys,
reasons) is escaped by the templates, and the content security policy of `base.html.j2` forbids
requests, and every script but the page's own one, which it knows by its hash. The same data gives
the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

import jinja2

from casa_train.errors import UserError
from casa_train.io import numbers as numbers_text
from casa_train.io.files import write_atomic

LONGEST_TEXT = 600  # characters of a question or an answer that are shown
# HTML cannot hold control characters; they have pictures.
SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}

# Variables of the style, each with its colour on a light and on a dark page. Drawings are made with
# the light ones and refer to the variables in the end.
COLOURS = {
    "page": ("#f5f6f8", "#131619"),
    "card": ("#ffffff", "#1c2024"),
    "ink": ("#1f2328", "#e5e8eb"),
    "muted": ("#626a75", "#98a1ab"),
    "line": ("#e2e5e9", "#2e343a"),
    "track": ("#e8ebef", "#2e343a"),
    "faint": ("#c3c8ce", "#4a525b"),
    "weak": ("#9aa3af", "#7b8590"),
    "accent": ("#2563eb", "#6ea0ff"),
    "right": ("#15803d", "#4ade80"),
    "wrong": ("#b91c1c", "#f98080"),
    # Series of a drawing, and sources wherever they are coloured.
    "s0": ("#2563eb", "#6ea0ff"),
    "s1": ("#d9730d", "#f59e4b"),
    "s2": ("#15803d", "#4ade80"),
    "s3": ("#9333ea", "#c084fc"),
    "s4": ("#be123c", "#fb7185"),
    "s5": ("#0e7490", "#22d3ee"),
    "s6": ("#a16207", "#facc15"),
    "s7": ("#475569", "#b6c2d1"),
    # More of them, for drawings with as many lines.
    "t0": ("#65a30d", "#a3e635"),
    "t1": ("#db2777", "#f9a8d4"),
    "t2": ("#7c4a2d", "#d6a77a"),
    "t3": ("#0d9488", "#5eead4"),
}
SERIES = [name for name in COLOURS if name[0] == "s" and name[1:].isdigit()]
MORE_SERIES = [name for name in COLOURS if name[0] == "t" and name[1:].isdigit()]


def render(template: str, package: str, /, **content: Any) -> str:
    """A page as HTML.

    :param template: its name.
    :param package: of the command that writes the page; its templates go before those here.
    :param content: what they show. `script`, where there is one, is the page's own script; it must
        hold nothing of the data.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader(package, "templates"),
                jinja2.PackageLoader(__package__, "templates"),
            ]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=numbers_text.percent,
        count=numbers_text.count,
        width=width,
        short=shortened,
        digest=digest,
        thousands="{:,}".format,
    )
    environment.globals.update(colours=COLOURS, series=SERIES, missing=numbers_text.MISSING)
    html = environment.get_template(template).render(content)
    # Texts may hold lone surrogates (JSON can), which UTF-8 cannot.
    return html.translate(SIGNS).encode("utf-8", "replace").decode("utf-8")


def write(html: str, path: Path, advice: str = "") -> None:
    """Writes a page, whole or not at all.

    :raises UserError: the file cannot be written; :param advice: what to do then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, html)
    except OSError as error:
        raise UserError(f"page {path} cannot be written: {error}{advice}") from error


def width(share: float | None) -> str:
    """A share as a CSS width."""
    if share is None or not math.isfinite(share):
        return "0%"
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


def digest(script: str) -> str:
    """What a content security policy calls a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def shortened(value: Any) -> str:
    text = str(value).strip()
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
