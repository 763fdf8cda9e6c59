"""Views -> one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from casa_train.inspect.packs import PackView
from casa_train.inspect.statistics import PlanView
from casa_train.inspect.streams import StreamView
from casa_train.pages import html


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
    packs = page.packs
    content = html.render(
        "page.html.j2",
        __package__,
        page=page,
        plan=page.plan,
        stream=page.stream,
        learned=sum(pack.learned for pack in packs) / max(1, sum(p.text_tokens for p in packs)),
        failures=[(pack.index, sample) for pack in packs for sample in pack.failures],
    )
    html.write(content, path, "; choose another --out")
