"""Films with captions word by word and questions, rendered here as published datasets have them.

What films show and say is in `synthetic_motion`. Here they become mp4 files, and beside them stand
annotations in the formats of Live-WhisperX-526K and LLaVA-Video-178K: the recipes `live_whisperx`
and `llava_video` prepare them as they prepare the published ones (`--source OUT/train`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from casa_train.config.bounds import local_path
from casa_train.errors import UserError
from casa_train.io.files import write_atomic
from casa_train.video.filming import write_film
from data_recipes.pipeline import Progress, check_least, save_summary, writing
from data_recipes.synthetic import IMAGE_END, build_tokenizer
from data_recipes.synthetic_motion import FPS, PROMPT, Film, film, pictures, texts
from data_recipes.synthetic_scenes import SPLITS, SplitName

VERSION = 1  # raise when the same arguments would render something else
SIDES = (56, 1024)  # from 2 x 2 image tokens on
BATCH = 25  # films that a process renders at a time

SUBSET = "shapes"  # of what has the format of LLaVA-Video
CAPTIONS = "live_shapes_with_seeks.jsonl"
CARD = f"""---
configs:
- config_name: {SUBSET}
  data_files:
  - split: open_ended
    path: {SUBSET}/*.json
---
Rendered films of one shape: captions in {CAPTIONS}, questions in {SUBSET}/.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="where train/, validation/, tokenizer/ and summary.json go; each split is a --source "
        "of live_whisperx and llava_video",
    )
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="training films")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="0 or more")
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="held-out films (default: a tenth of --clips, at most 200)",
    )
    parser.add_argument(
        "--side",
        type=int,
        default=56,
        metavar="P",
        help=f"width and height in pixels, an even number of {SIDES[0]} to {SIDES[1]} "
        "(default: 56)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=os.cpu_count() or 1,
        help="rendering processes; the result does not depend on them (default: one a core)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Renders and writes both splits, or says that they are there already.

    :raises UserError: bad numbers, or a directory that holds something else.
    """
    validation = arguments.validation
    if validation is None:
        validation = min(max(arguments.clips // 10, 1), 200)
    check_least(
        ("--clips", arguments.clips, 1),
        ("--seed", arguments.seed, 0),
        ("--validation", validation, 0),
        ("--workers", arguments.workers, 1),
    )
    side = arguments.side
    if side % 2 or not SIDES[0] <= side <= SIDES[1]:
        raise UserError(
            f"--side is {side}; expected an even number of {SIDES[0]} to {SIDES[1]} pixels: H.264 "
            "stores colours for blocks of 2 x 2."
        )
    wanted = {
        "version": VERSION,
        "clips": arguments.clips,
        "validation": validation,
        "seed": arguments.seed,
        "side": side,
    }
    out: Path = arguments.out
    with writing(out, wanted) as done:
        if done:
            print(f"{out} already holds this dataset: nothing to do.")
            return
        header = {"recipe": "synthetic_clips", "arguments": wanted}
        save_summary(out, {**header, "finished": False})
        from casa_train.data.tokens import save_tokenizer

        save_tokenizer(film_tokenizer(), out / "tokenizer")
        sizes = dict(zip(SPLITS, (validation, arguments.clips), strict=True))
        summary = {
            split: write_films(out / split, arguments.seed, split, size, side, arguments.workers)
            for split, size in sizes.items()
            if size
        }
        save_summary(out, {**header, "finished": True, **summary})
    print(f"finished: {out}")
    for split, found in summary.items():
        print(f"  {split}: " + ", ".join(f"{number} {name}" for name, number in found.items()))


def film_tokenizer() -> Any:
    """The tokenizer of `synthetic` with the words of films, a token that stands behind pictures,
    and the end of a frame's captions as one token.
    """
    from casa_train.data.schemas.video_rows import FRAME_END

    return build_tokenizer([*texts(), *[FRAME_END] * 20], [IMAGE_END])


# ---------------------------------------------------------------------------------------- writing


def write_films(
    directory: Path, seed: int, split: SplitName, count: int, side: int, workers: int
) -> dict[str, int]:
    """Renders the films of a split that are not there yet, then their annotations.

    Returns how much it is.

    :param side: pixels; :param workers: processes.
    """
    (directory / "video").mkdir(parents=True, exist_ok=True)
    (directory / SUBSET).mkdir(exist_ok=True)
    task = partial(_render_batch, directory, seed, split, count, side)
    progress = Progress(split, count, "films")
    starts = range(0, count, BATCH)
    if workers == 1 or len(starts) == 1:
        for start in starts:
            rendered = task(start)
            progress.update(rendered, {"samples": rendered})
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(workers, len(starts)), mp_context=context, initializer=_ignore_interrupts
        ) as pool:
            for rendered in pool.map(task, starts):
                progress.update(rendered, {"samples": rendered})
    progress.close()
    films = [film(seed, split, i) for i in range(count)]
    lines = [json.dumps(live_line(i, films[i])) for i in range(count)]
    offsets = itertools.accumulate((len(line) + 1 for line in lines[:-1]), initial=0)
    write_atomic(directory / CAPTIONS, "\n".join([*lines, json.dumps(list(offsets))]) + "\n")
    rows = [question_row(i, films[i]) for i in range(count)]
    write_atomic(
        directory / SUBSET / f"{SUBSET}_oe_qa_processed.json", json.dumps(rows, indent=1) + "\n"
    )
    write_atomic(directory / "README.md", CARD)
    return {
        "films": count,
        "seconds": round(sum(one.seconds for one in films)),
        "words": sum(len(one.words()) for one in films),
        "questions": sum(len(one.questions()) for one in films),
    }


def _ignore_interrupts() -> None:
    # Ctrl-C reaches every process of the terminal; only the first has something to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _render_batch(
    directory: Path, seed: int, split: SplitName, count: int, side: int, start: int
) -> int:
    numbers = range(start, min(start + BATCH, count))
    for i in numbers:
        path = directory / video_path(i)
        if not path.exists():  # by an earlier run that was ended
            temporary = path.with_name(f".{path.name}.tmp")
            write_film(temporary, pictures(film(seed, split, i), side), FPS)
            os.replace(temporary, path)
    return len(numbers)


def video_path(index: int) -> str:
    """Of a film, below the folder of its split."""
    return f"video/{index:06d}.mp4"


def live_line(index: int, plan: Film) -> list[dict[str, Any]]:
    """A line of Live-WhisperX's JSONL."""
    clip = {
        "type": "video",
        "video": video_path(index),
        "video_start": 0.0,
        "video_end": plan.seconds,
    }
    text = {"type": "text", "text": PROMPT, "previous": "", "title": ""}
    words = {"type": "text_stream", "text_stream": plan.words()}
    return [{"role": "user", "content": [clip, text]}, {"role": "assistant", "content": [words]}]


def question_row(index: int, plan: Film) -> dict[str, Any]:
    """A row of LLaVA-Video: all questions about a film, one turn each."""
    questions = plan.questions()
    first = index % len(questions)  # each question is asked first equally often
    turns: list[dict[str, str]] = []
    for question, answer in [*questions[first:], *questions[:first]]:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {
        "id": f"{index:06d}",
        "conversations": turns,
        "data_source": SUBSET,
        "video": video_path(index),
    }
