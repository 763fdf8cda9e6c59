"""Views -> one HTML file that loads nothing.

Whatever comes from data (texts, tokens, keys, reasons) is escaped by the template, and the page's
content security policy forbids scripts and requests. The same data gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2

from casa_train.errors import UserError
from casa_train.inspect import charts
from casa_train.inspect.packs import PackView
from casa_train.inspect.statistics import PlanView
from casa_train.inspect.streams import StreamView
from casa_train.io.files import write_atomic
from casa_train.io.log import count

# HTML cannot hold control characters; they have pictures.
SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


@dataclass(frozen=True)
class Part:
    """A piece of a message: text, or an image as its file has it.

    :param text: of the text, or about the image.
    :param uri: of the image; None for text, or where the file cannot be read.
    """

    kind: str
    text: str = ""
    uri: str | None = None


@dataclass(frozen=True)
class MessageView:
    role: str
    parts: list[Part]


@dataclass(frozen=True)
class OneSample:
    """A sample on its own: as its source wrote it, and the pack that it makes alone.

    :param messages: None where the row cannot be read.
    :param about: names and values of what the index knows.
    """

    id: str
    about: list[tuple[str, str]]
    messages: list[MessageView] | None


@dataclass(frozen=True)
class Page:
    """What is shown.

    :param settings: names and values of the configuration that the data depends on.
    :param packs_per_step, world: place a pack in a step, a micro-step and on a rank.
    :param plan, sample, stream: one of them says what the page is about.
    """

    title: str
    settings: list[tuple[str, str]]
    packs: Sequence[PackView]
    packs_per_step: int
    world: int
    plan: PlanView | None = None
    sample: OneSample | None = None
    stream: StreamView | None = None


def write_page(page: Page, path: Path) -> None:
    """Writes the page, whole or not at all.

    :raises UserError: the file cannot be written.
    """
    # Texts may hold lone surrogates (JSON can), which UTF-8 cannot.
    html = render(page).encode("utf-8", "replace").decode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, html)
    except OSError as error:
        raise UserError(f"page {path} cannot be written: {error}; choose another --out") from error


def render(page: Page) -> str:
    """The page as HTML."""
    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, width=_width, count=count)
    packs = page.packs
    html = environment.from_string(source).render(
        page=page,
        plan=page.plan,
        learned=sum(pack.learned for pack in packs) / max(1, sum(p.text_tokens for p in packs)),
        failures=[(pack.index, sample) for pack in packs for sample in pack.failures],
        chart_width=charts.WIDTH,
        chart_height=charts.HEIGHT,
    )
    return html.translate(SIGNS)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _width(share: float) -> str:
    """A share as a CSS width."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"
