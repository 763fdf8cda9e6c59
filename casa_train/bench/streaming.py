"""Streams of frames: what the first turns cost and what the last ones cost, model beside model."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from casa_train.bench import _held_streams, _marks, _paths, _published_streams
from casa_train.bench._benchmark import (
    Benchmark,
    Report,
    describe_machine,
    device_and_dtype,
    machine,
)
from casa_train.bench._streamed_models import SIZES, load_models, sources
from casa_train.bench._streams import TURN_ROWS, Script, Stream, Turn
from casa_train.bench._sweep_exports import LeftOut, SweepExport, sweep_exports
from casa_train.bench._timing import tensor_bytes
from casa_train.bench._turn_forms import LARGEST, TurnForm, frame_side, ordinary_ids
from casa_train.config.bounds import local_path
from casa_train.distributed.threads import use_threads
from casa_train.errors import UserError
from casa_train.io.tables import aligned
from casa_train.modeling.image_processing_casa import SIDE
from casa_train.run.layout import STREAMING_FILE

METHOD = f"""\
Each turn gives generate_from_image(reset_streaming=False) one frame, then a few text tokens, and
takes N new tokens greedily. Exports get turns of their chat template: the message of a user with an
image and text behind it, with all that the template has around them, and the end of the answer
before, which was cut off. Random models have no template. The streams take turns in one process, so
that noise hits all of them: the first turns are those of a second stream, which starts when the
last turns of the long one begin and alternates with them. Two turns of a stream that is thrown away
warm each model up. Time to first token runs from the call until the token is on the host, vision
tower included; tokens/s count the new tokens after it. The first turn of a stream has the prompt
before its frame. First and last are medians over up to eight turns, last/first their ratio; cache
tokens, bytes and memory are those of the long stream's first and last turn. Streaming state: the
keys and values of the open window, and the ids of the stream.

{_marks.METHOD}
--sweep DIR takes the exports of a sweep's jobs (JOB/export), of jobs that differ in their seed
alone the one with the lowest, names what it leaves out, and writes DIR/streaming.json.

--published adds the sessions that CASA (arXiv 2512.19535) publishes, in their layout: from the
first tenth of the turns to the last (medians), every row with the machine that it was measured on.
Theirs have the default prompt, text and new tokens; with random weights of the published sizes
    python -m casa_train.bench streaming --published --size helium1-2b --image-size 896 --turns 256
takes about 45 GiB of GPU memory.

{_held_streams.METHOD}
--compare-paths decodes single turns in three ways instead: by decode steps, as streams do; by a
whole forward pass a token; and transformers' own generate on the plain backbone, without image.
Medians over --turns turns.
"""

TURNS = 48
WARM_UP_TURNS = 2
MEDIAN_OF = 8  # first and last turns, and at most a quarter of all
OPENINGS = 7  # streams of one turn
ROUNDS, MOST = 20, 256  # of --fps


# What the JSON tells elsewhere or not at all.
NOT_TOLD = ("name", "json", "export", "sweep")


def _numbers(text: str) -> list[int]:
    """1,16 of a command line."""
    return [int(number) for number in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--export",
        nargs="+",
        type=local_path,
        metavar="DIR",
        help="exports to compare (default: random models of casa and insertion)",
    )
    whose.add_argument(
        "--sweep",
        type=local_path,
        metavar="DIR",
        help=f"exports of a sweep's jobs, one a variant; writes DIR/{STREAMING_FILE} unless --json "
        "says another",
    )
    parser.add_argument("--only", metavar="PATTERN", help="of --sweep: 'demo,*' (default: all)")
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="of random models (default: small)"
    )
    parser.add_argument("--turns", type=int, help="default: 48; the last mark of --sweep")
    parser.add_argument(
        "--marks",
        type=_numbers,
        metavar="N,N",
        help="show what streams cost after so many images (default of --sweep: "
        f"{','.join(map(str, _marks.MARKS))}, those up to --turns)",
    )
    parser.add_argument("--new-tokens", type=int, default=16, help="a turn (default: 16)")
    parser.add_argument("--text-tokens", type=int, default=2, help="a turn (default: 2)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=22, help="before the first frame (default: 22)"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help=f"side of a frame in pixels (default: {LARGEST}, or the largest below it that every "
        "export takes as it is)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--published",
        action="store_true",
        help="also the published sessions, and these in their layout",
    )
    instead.add_argument(
        "--fps",
        type=float,
        metavar="X",
        help="how many streams of X frames/s one process holds, instead of first and last turns",
    )
    instead.add_argument(
        "--compare-paths",
        action="store_true",
        help="ways to decode instead of first and last turns",
    )
    parser.add_argument(
        "--rounds", type=int, help=f"of --fps, for each number of streams (default: {ROUNDS})"
    )
    parser.add_argument(
        "--most", type=int, help=f"streams at which --fps stops asking (default: {MOST})"
    )


def run(arguments: argparse.Namespace) -> Report:
    """Runs the streams side by side.

    :raises UserError: sizes that make no stream, or a directory that is no export.
    """
    chosen, left = _of_sweep(arguments)
    marks = _marks.marks_up_to(arguments.turns, arguments.marks)
    check(arguments)
    device, dtype = device_and_dtype(arguments)
    torch.manual_seed(arguments.seed)
    models, processors = load_models(arguments, device, dtype, [one.job for one in chosen])
    arguments.image_size = frame_side(arguments.image_size, processors)
    forms = {label: TurnForm.of(processor) for label, processor in processors.items()}
    facts = machine(device, dtype)
    options = {k: v for k, v in vars(arguments).items() if k not in NOT_TOLD}
    data: dict[str, Any] = {"machine": facts, "arguments": options}
    lines = [describe_machine(facts), *sources(models, arguments), *_left_out(left)]
    if arguments.sweep:
        data["exports"] = {o.job: {"seed": o.seed, "step": o.step} for o in chosen}
        data["left_out"] = [asdict(one) for one in left]
    entering = script(models, processors, arguments)
    if arguments.compare_paths:
        paths = _paths.compare_paths(models, arguments)
        return Report("\n".join([*lines, "", _paths.table(paths)]), {**data, "paths": paths})
    shape = (
        f"{arguments.turns} turns of one {arguments.image_size}x{arguments.image_size} frame, "
        f"{arguments.text_tokens} text tokens and {arguments.new_tokens} new ones"
    )
    if arguments.fps is not None:
        held = _held_streams.held_streams(models, forms, entering, arguments)
        lines += [f"{shape}; {arguments.rounds} rounds", "", _held_streams.table(held, arguments)]
        return Report("\n".join(lines), {**data, "held": held})
    k = max(1, min(MEDIAN_OF, arguments.turns // 4))
    turns, young, openings = play(models, forms, entering, arguments.turns, k)
    streams = {
        label: {
            **summary(turns[label], young[label]),
            "marks": _marks.at_marks(
                turns[label], openings[label], marks, tensor_bytes(list(model.parameters()))
            ),
            "turns": [asdict(turn) for turn in turns[label]],
            "first_turns": [asdict(turn) for turn in young[label]],
        }
        for label, model in models.items()
    }
    data["streams"] = streams
    if arguments.marks or arguments.sweep:
        lines += [shape, "", _marks.table(streams, marks)]
    else:
        lines += [f"{shape}; first and last: medians of {k}", "", table(streams)]
    if arguments.published:
        side, new = arguments.image_size, arguments.new_tokens
        ours = [
            _published_streams.session(label, facts, turns[label], side, new) for label in models
        ]
        sessions = [*ours, *_published_streams.PUBLISHED]
        data["sessions"] = [session.record() for session in sessions]
        lines += ["", _published_streams.table(sessions), _published_streams.NOTE]
    return Report("\n".join(lines), data)


def _of_sweep(arguments: argparse.Namespace) -> tuple[list[SweepExport], list[LeftOut]]:
    """The exports of --sweep, which the arguments then name; sets how long streams are.

    :raises UserError: options that do not go together, or a sweep without exports.
    """
    sweep = arguments.sweep
    if sweep is None and arguments.only is not None:
        raise UserError(f"--only is {arguments.only}, but only --sweep reads it; leave it out.")
    if arguments.turns is None:
        arguments.turns = max(arguments.marks or (_marks.MARKS if sweep else [TURNS]))
    for option in ("fps", "compare_paths"):
        name = f"--{option.replace('_', '-')}"
        if sweep is not None and getattr(arguments, option):
            raise UserError(
                f"{name} beside --sweep, which measures streams alone; name the exports with "
                "--export JOB/export ..."
            )
        if arguments.marks and getattr(arguments, option):
            raise UserError(
                f"--marks beside {name}, which measures no costs after so many images; give one of "
                "the two."
            )
    if sweep is None:
        return [], []
    chosen, left = sweep_exports(sweep, arguments.only or "*")
    arguments.export = [one.path for one in chosen]
    arguments.json = arguments.json or sweep / STREAMING_FILE
    threads = {one.threads for one in chosen}
    if len(threads) == 1:
        use_threads(threads.pop())
    return chosen, left


def _left_out(left: Sequence[LeftOut]) -> list[str]:
    return [f"left out: {one.job}: {one.why}" for one in left]


def check(arguments: argparse.Namespace) -> None:
    """Refuses arguments that make no stream.

    :raises UserError: naming the argument.
    """
    for name, least in (("turns", 1), ("new_tokens", 2), ("text_tokens", 1), ("prompt_tokens", 0)):
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {getattr(arguments, name)}; it must be at least {least}.")
    size = arguments.image_size
    if not arguments.export and size is not None and (size < SIDE or size % SIDE):
        raise UserError(
            f"--image-size is {size}; it must be a positive multiple of {SIDE}, the side of an "
            "image token."
        )
    if arguments.fps is not None and not (math.isfinite(arguments.fps) and arguments.fps > 0):
        raise UserError(f"--fps is {arguments.fps}; expected a number of frames/s above 0.")
    for name, default in (("rounds", ROUNDS), ("most", MOST)):
        value = getattr(arguments, name)
        if value is not None and arguments.fps is None:
            raise UserError(f"--{name} is {value}, but only --fps reads it; leave it out.")
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1.")
        if value is None and arguments.fps is not None:
            setattr(arguments, name, default)
    for path in arguments.export or []:
        if not (path / "config.json").is_file():
            raise UserError(
                f"--export {path}: config.json is missing. Expected a directory that "
                "'python -m casa_train.export' wrote."
            )


def script(
    models: dict[str, Any], processors: dict[str, Any], arguments: argparse.Namespace
) -> Script:
    """What enters, in ids that every model has, and that are plain text to every processor."""
    ids = min(model.config.text_config.vocab_size for model in models.values())
    return Script(
        seed=arguments.seed,
        image_size=arguments.image_size,
        vocabulary=ordinary_ids(ids, processors.values()),
        prompt_tokens=arguments.prompt_tokens,
        text_tokens=arguments.text_tokens,
        new_tokens=arguments.new_tokens,
    )


def play(
    models: dict[str, Any], forms: dict[str, TurnForm], entering: Script, turns: int, k: int
) -> tuple[dict[str, list[Turn]], dict[str, list[Turn]], dict[str, list[Turn]]]:
    """All turns of a long stream of each model, the first `k` turns of a young one that alternate
    with the last `k` of the long one, and meanwhile the first turns of others.

    :param forms: of the models that have a template; :param entering: what every stream gets.
    """

    def started(label: str) -> Stream:
        return Stream(models[label], form=forms.get(label))

    def turn(stream: Stream, index: int) -> Turn:
        return stream.turn(*entering.given(stream, index))

    for label in models:
        warm_up = started(label)
        for index in range(WARM_UP_TURNS):
            turn(warm_up, index)
    old, young = ({label: started(label) for label in models} for _ in range(2))
    played: dict[str, list[Turn]] = {label: [] for label in models}
    first_turns: dict[str, list[Turn]] = {label: [] for label in models}
    openings: dict[str, list[Turn]] = {label: [] for label in models}
    opened_at = {turns * n // OPENINGS for n in range(OPENINGS)}
    order = list(models)
    for index in tqdm(range(turns), desc="turns", disable=None):
        for label in order:
            played[label].append(turn(old[label], index))
            if (young_index := index - (turns - k)) >= 0:
                first_turns[label].append(turn(young[label], young_index))
            if index in opened_at:
                openings[label].append(turn(started(label), 0))
        order.reverse()
    return played, first_turns, openings


def summary(turns: Sequence[Turn], young: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """For each quantity that was measured its value in the first and in the last turns."""
    found: dict[str, dict[str, float]] = {}
    for name in ("first_token", "tokens_per_second"):
        first, last = (
            statistics.median(getattr(turn, name) for turn in part)
            for part in (young, turns[-len(young) :])
        )
        found[name] = {"first": first, "last": last}
    for name in ("cache_tokens", "cache_bytes", "state_bytes", "memory_bytes"):
        if getattr(turns[0], name) is not None:
            found[name] = {"first": getattr(turns[0], name), "last": getattr(turns[-1], name)}
    return found


ROWS = (*TURN_ROWS, ("memory at the peak, GiB", "memory_bytes", 2.0**-30, ",.2f"))


def table(streams: dict[str, dict[str, Any]]) -> str:
    """First, last and their ratio for every quantity, the streams side by side."""
    head, columns = [""], [""]
    for label in streams:  # an empty column keeps them apart
        head += ["", "", "", label]
        columns += ["", "first", "last", "last/first"]
    rows = [head, columns]
    for title, name, unit, style in ROWS:
        if any(name not in values for values in streams.values()):
            continue  # memory on the CPU
        row = [title]
        for values in streams.values():
            first, last = values[name]["first"], values[name]["last"]
            row += ["", f"{first * unit:{style}}", f"{last * unit:{style}}", f"{last / first:.2f}"]
        rows.append(row)
    return aligned(rows)


BENCHMARK = Benchmark(
    measures="first and last turns of a stream of frames: time to first token, tokens/s, KV cache "
    "and memory; how many streams one process holds",
    description=METHOD,
    add_arguments=add_arguments,
    run=run,
)
