"""Draws the page of benchmarks: scores beside the published ones, and questions with their pictures
and answers, which a script on the page filters.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from casa_train.evaluate.benchmarks.table import COUNTED, TITLES, counted, figure
from casa_train.io.numbers import MISSING
from casa_train.modeling.image_processing_casa import SIDE as TOKEN_SIDE
from casa_train.modeling.image_processing_casa import CasaImageProcessor
from casa_train.modeling.image_sources import ImageError
from casa_train.pages import html, pictures

SIDE = 448  # pixels of a picture's longer side
ROOM = 19_000_000  # bytes that all pictures may take; data URIs are a third longer
FOLDED = 400, 8  # characters, and lines, beyond which a text is folded
HEAD = 160  # characters that stand in its place then
LONGEST = 2000  # characters of a text on the page

VERDICTS = {
    "right": "right",
    "partly": "partly right",
    "wrong": "wrong",
    "unreadable": "unreadable",
}

Record = Mapping[str, Any]
Picture = Callable[[str, int, str], bytes]


def write_page(
    path: Path,
    result: Mapping[str, Any],
    answers: Mapping[str, Sequence[Record]],
    picture: Picture,
    shown: int = 200,
) -> None:
    """Writes the page, whole or not at all.

    :param result: what `benchmarks.json` holds.
    :param answers: by benchmark, the records of its JSON lines.
    :param picture: (benchmark, index, question) -> the encoded picture; where it raises ImageError
        or OSError, the page says so.
    :param shown: questions of a benchmark on the page at most, see `choose`.
    :raises UserError: the file cannot be written.
    """
    benchmarks = result["benchmarks"]
    side = result.get("token_side", TOKEN_SIDE)  # results from before that are of the first tower
    processor = CasaImageProcessor(result["max_pixels"], side=side)
    sections = {
        name: _section(name, benchmarks[name], answers.get(name, ()), shown) for name in benchmarks
    }
    for name, section in sections.items():
        section["cards"] = _cards(name, section.pop("records"), picture, processor)
    _embed([card for section in sections.values() for card in section["cards"]])
    page = html.render(
        "benchmarks.html.j2",
        __package__,
        script=html.render("filter.js.j2", __package__),
        result=result,
        titles={name: TITLES.get(name, name) for name in benchmarks},
        table=[
            {**row, "scores": [figure(name, row["scores"].get(name)) for name in benchmarks]}
            for row in result["table"]
        ],
        counted=[COUNTED, *(counted(benchmarks[name]) for name in benchmarks)],
        sections=sections,
        total=sum(section["total"] for section in sections.values()),
        unreadable=sum(section["unreadable"] for section in sections.values()),
        verdicts=VERDICTS,
        side=SIDE,
        setup=list(_setup(result)),
    )
    html.write(page, path)


def choose(records: Sequence[Record], shown: int) -> list[Record]:
    """Some records of a benchmark, in its order: half of them right and half not, if there are so
    many, each half spread evenly over the benchmark. The same for the same records.
    """
    right: list[Record] = []
    other: list[Record] = []
    for record in sorted(records, key=lambda record: int(record["index"])):
        (right if verdict(record) == "right" else other).append(record)
    of_right = min(len(right), max(shown // 2, shown - len(other)))
    chosen = [*_spread(right, of_right), *_spread(other, min(len(other), shown - of_right))]
    return sorted(chosen, key=lambda record: int(record["index"]))


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    return [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]


def verdict(record: Record) -> str:
    """One of `VERDICTS`."""
    if "error" in record:
        return "unreadable"
    score = float(record["score"])
    return "right" if score >= 1 else "partly" if score > 0 else "wrong"


def _section(
    name: str, scores: Mapping[str, Any], records: Sequence[Record], shown: int
) -> dict[str, Any]:
    """What the page says about a benchmark; `records` are those that it shows."""
    chosen = choose(records, shown)
    return {
        **scores,
        "score": figure(name, scores.get("score")),
        "sub_scores": {
            part: figure(name, score) for part, score in (scores.get("sub_scores") or {}).items()
        },
        "total": len(records),
        "unreadable": sum(verdict(record) == "unreadable" for record in records),
        "verdicts": Counter(verdict(record) for record in chosen),
        "prompt": _text(chosen[0].get("prompt") or "")["text"] if chosen else "",
        "records": chosen,
    }


def _cards(
    name: str, records: Sequence[Record], picture: Picture, processor: CasaImageProcessor
) -> list[dict[str, Any]]:
    """Pictures as the model gets them, each with all that was asked about it."""
    cards: dict[str, dict[str, Any]] = {}
    for record in records:
        try:
            data = picture(name, int(record["index"]), str(record["question"]))
            key = hashlib.sha256(data).hexdigest()
            if key not in cards:
                pixels = processor.load(data).permute(1, 2, 0).numpy()
                jpeg = pictures.jpeg(Image.fromarray(pixels), SIDE)
                cards[key] = {"jpeg": jpeg, "missing": None, "questions": []}
        except (ImageError, OSError) as error:
            key = f"{len(cards)}th card"
            cards[key] = {"jpeg": None, "missing": str(error), "questions": []}
        cards[key]["questions"].append(_question(record))
    return list(cards.values())


def _embed(cards: Sequence[dict[str, Any]]) -> None:
    """Puts a data URI into every card that has a picture, all of them within `ROOM`."""
    kept = [card for card in cards if card["jpeg"] is not None]
    small = pictures.fitted([card.pop("jpeg") for card in kept], ROOM)
    for card, data in zip(kept, small, strict=True):
        card["uri"] = pictures.uri(data)


def _question(record: Record) -> dict[str, Any]:
    options = [_text(option) for option in record.get("options") or ()]
    references = Counter(str(reference) for reference in record.get("reference") or ())
    return {
        "id": str(record["id"]),
        "category": str(record.get("category") or ""),
        "question": _text(record["question"]),
        "options": options,
        "references": [(_text(text), times) for text, times in references.items()],
        "answer": None if "error" in record else _text(record["answer"]),
        "error": str(record["error"]) if "error" in record else None,
        "verdict": verdict(record),
        "score": None if "error" in record else float(record["score"]),
    }


def _text(value: Any) -> dict[str, Any]:
    """A text as the page shows it: its line breaks kept, a long one folded and a huge one cut.

    `head` is what stands in the place of a folded text, `cut` the length of one that was cut.
    """
    whole = "\n".join(str(value).strip().splitlines())
    text = whole if len(whole) <= LONGEST else whole[:LONGEST] + "…"
    folded = len(text) > FOLDED[0] or text.count("\n") >= FOLDED[1]
    return {
        "text": text,
        "head": " ".join(text.split())[:HEAD] if folded else None,
        "cut": len(whole) if len(whole) > LONGEST else None,
    }


def _setup(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("export", "step", "protocol", "max_pixels", "dtype"):
        value = result[name]
        yield name, MISSING if value is None else str(value)
    for file, digest in result["weights_sha256"].items():
        yield f"weights_sha256.{file}", str(digest)
    for name, entry in result["benchmarks"].items():
        versions = [f"{package} {version}" for package, version in entry["versions"].items()]
        yield TITLES.get(name, name), ", ".join([*versions, f"batches of {entry['batch_size']}"])
