"""The project's READMEs, taken apart: fenced blocks, commands, links, headings and inline code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import ROOT

FOLDERS = ("casa_train", "conf", "data_recipes", "launch", "tests")
MARK = re.compile(r"# needs (a hub|a GPU|a cluster|a browser|lmms-eval|SmolLM2|hours)\b")
"""The first line of a block that not every machine can run."""
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    :param file: the README, relative to the checkout.
    :param line: of its fence, from 1.
    """

    file: str
    line: int
    language: str
    text: str

    @property
    def marked(self) -> bool:
        return MARK.match(self.text) is not None

    def commands(self) -> list[list[str]]:
        """The words of each command; comments are dropped, variables stay as they are written."""
        found: list[list[str]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
            lexer.whitespace_split = True
            found.append([])
            for word in lexer:
                if word in ("&&", ";"):
                    found.append([])
                else:
                    found[-1].append(word)
        return [words for words in found if words]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def readmes() -> list[Path]:
    """Every README of the project, each once (casa_train/conf is a link)."""
    found = [ROOT / "README.md"]
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("README.md"))
    return list(dict.fromkeys(path.resolve() for path in found))


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a file, in order."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, match.start()) + 1, match[2], match[3])
        for match in FENCE.finditer(text)
    ]


def prose(path: Path) -> str:
    """A file without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def inline_code(path: Path) -> list[str]:
    """What stands between single backticks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path))]


def links(path: Path) -> list[str]:
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives the headings of a file."""
    headings = re.findall(r"^#+ +(.+?)\s*$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
