"""Synthetic question answering about small rendered pictures, in FineVision's schema.

What samples show and ask is in `synthetic_scenes` and, of conversations that ask for one ability
each, in `synthetic_abilities`. Here they are rendered by several processes and written as shards,
with a tokenizer and a summary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from casa_train.errors import UserError
from data_recipes import whole
from data_recipes.pipeline import Encoding, Row, check_least
from data_recipes.synthetic_abilities import (
    FAMILIES,
    MOST_DESCRIBED,
    PRACTICE,
    ability_corpus,
    ability_example,
)
from data_recipes.synthetic_scenes import (
    REWORDED,
    SPLITS,
    TASK_NAMES,
    Example,
    Style,
    corpus,
    digest,
    example,
)
from data_recipes.synthetic_wordings import WORDINGS

# The shard writer and the tokenizer load torch: they are imported where a dataset is written, so
# that rendering processes and `--help` start at once.

EVERY_ABILITY = "abilities"
CONVERSATIONS = [*FAMILIES, *PRACTICE]
ABILITY_TEMPLATE = "demo_live"  # with a token behind every image
VERSION = 3  # raise when the same arguments would render something else
ABILITY_VERSION = 4  # the same for conversations about abilities
STYLES = ("short", "free")
SCALES = (0.5, 8.0)

VOCABULARY = 512  # bytes, special tokens and room for every answer as one token or two
IMAGE_END = "<|image_end|>"  # behind a picture: where a model has seen it and says what comes next
PAD, BOS, USER, ASSISTANT, END = "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"

# Its chat template: bare turns.
CHAT = """{{ '<|bos|>' }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|user|>' ~ m.content ~ '<|end|>' }}
{%- else %}{{ '<|assistant|>' ~ m.content ~ '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


# -------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(
    texts: Iterable[str] = (), special: Sequence[str] = (), one_form: bool = False
) -> Any:
    """A small byte-level BPE tokenizer: any text encodes, the usual answers are one or two tokens.

    It does not depend on the arguments of the recipe, so datasets of several runs can be mixed.

    :param texts: what it learns from beside this recipe's own texts.
    :param special: special tokens that it has beside this recipe's own.
    :param one_form: whether a word that begins a turn is the token it is after a space.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=one_form)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, USER, ASSISTANT, END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*corpus(), *texts], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, *special],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


def ability_tokenizer() -> Any:
    """The same with the words of `synthetic_abilities`, and a token that stands behind images.

    A word is the same token wherever it stands: a small model finds again what is the same.
    """
    return build_tokenizer(ability_corpus(), [IMAGE_END], one_form=True)


# ---------------------------------------------------------------------------------------- writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    whole.add_arguments(parser, "rendering")
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="training samples")
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="held-out samples (default: a tenth of --samples, at most 2000)",
    )
    parser.add_argument(
        "--tasks",
        default="all",
        metavar="A,B,...",
        help=f"out of {', '.join(TASK_NAMES)} (default: all of them; text-only samples are always "
        "a small part of the training split); or out of the conversations that ask for one ability "
        f"each, {', '.join(FAMILIES)}, or '{EVERY_ABILITY}', all of these; "
        f"{', '.join(PRACTICE)} is what a text model begins with",
    )
    parser.add_argument(
        "--wording",
        choices=STYLES,
        default=STYLES[0],
        help="short: a few fixed questions, answered in a word; free: many wordings, answered in "
        f"whole sentences, for {', '.join(WORDINGS)} (default: {STYLES[0]})",
    )
    parser.add_argument(
        "--hold-out-wordings",
        action="store_true",
        help="with --wording free: some wordings are never trained, and every second held-out "
        f"sample is asked in them, as TASK{REWORDED}",
    )
    parser.add_argument(
        "--described",
        action="store_true",
        help="with abilities: words in brackets take the place of the pictures, to train a text "
        f"model on; streams have {MOST_DESCRIBED} frames at most",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help=f"of the pictures' sides, {SCALES[0]} to {SCALES[1]} (default: 1, where a shape fits "
        "a token of 28 pixels)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Renders and writes the dataset, or says that it is there already.

    :raises UserError: bad numbers or tasks, or a directory that holds something else.
    """
    tasks = _tasks(arguments.tasks)
    validation = arguments.validation
    if validation is None:
        validation = 0 if tasks == ["text"] else min(max(arguments.samples // 10, 1), 2000)
    check_least(
        ("--samples", arguments.samples, 1),
        ("--seed", arguments.seed, 0),
        ("--validation", validation, 0),
        ("--workers", arguments.workers, 1),
    )
    if tasks == ["text"] and validation:
        raise UserError(
            f"--validation is {validation} with --tasks text; text-only samples are never held "
            "out. Add a task with pictures, or set --validation 0."
        )
    abilities = _are_abilities(tasks)
    if arguments.described and not abilities:
        raise UserError(
            "--described without abilities: pictures of other tasks have no description. Leave it "
            f"out, or set --tasks {EVERY_ABILITY}, or some of {', '.join(CONVERSATIONS)}."
        )
    style = _style(arguments, tasks)
    wanted = {
        "version": ABILITY_VERSION if abilities else VERSION,
        "samples": arguments.samples,
        "validation": validation,
        "seed": arguments.seed,
        "tasks": tasks,
        "tokenizer": arguments.tokenizer,
        "template": arguments.template or (ABILITY_TEMPLATE if abilities else "auto"),
        # Named only where they are set: a dataset of before these options is the same one.
        **({"wording": arguments.wording} if style.free else {}),
        **({"hold_out_wordings": True} if style.hold_out else {}),
        **({"scale": style.scale} if style.scale != 1 else {}),
        **({"described": True} if arguments.described else {}),
    }
    write_splits = partial(_write_splits, arguments.out, wanted, style, arguments.workers)
    build = ability_tokenizer if abilities else build_tokenizer
    whole.prepare(arguments.out, "synthetic", wanted, write_splits, build)


def _tasks(names: str) -> list[str]:
    if {name.strip() for name in names.split(",")} & {*CONVERSATIONS, EVERY_ABILITY}:
        return whole.chosen_tasks(names, list(FAMILIES), EVERY_ABILITY, list(PRACTICE))
    chosen = whole.chosen_tasks(names, TASK_NAMES)
    # "text" always takes part: with or without it the same samples come out.
    return [name for name in TASK_NAMES if name in chosen or name == "text"]


def _are_abilities(tasks: Sequence[str]) -> bool:
    return {*tasks} <= {*CONVERSATIONS}


def _style(arguments: argparse.Namespace, tasks: Sequence[str]) -> Style:
    free = arguments.wording == "free"
    if arguments.hold_out_wordings and not free:
        raise UserError(
            "--hold-out-wordings without --wording free: short questions have no other wordings. "
            "Add --wording free, or leave it out."
        )
    fixed = [task for task in tasks if task not in WORDINGS and task != "text"]
    if free and fixed:
        raise UserError(
            f"--wording free has no wordings for {', '.join(fixed)}; expected --tasks out of "
            f"{', '.join(WORDINGS)}, such as --tasks {','.join(WORDINGS)}."
        )
    least, most = SCALES
    if not least <= arguments.scale <= most:
        raise UserError(f"--scale is {arguments.scale}; expected a number of {least} to {most}.")
    if arguments.scale != 1 and _are_abilities(tasks):
        raise UserError(
            f"--scale is {arguments.scale} with --tasks {','.join(tasks)}, whose pictures are made "
            "of cells of one image token each; expected 1. Leave it out, or name other tasks."
        )
    return Style(free, arguments.hold_out_wordings, arguments.scale)


@dataclass(frozen=True)
class DrawJob:
    """Samples `start` to `stop` of a split.

    :param held_out: pictures that they must not show.
    """

    split: Literal["validation", "train"]
    seed: int
    tasks: tuple[str, ...]
    start: int
    stop: int
    held_out: frozenset[bytes]
    style: Style
    described: bool = False

    @property
    def name(self) -> str:
        return f"{self.split} {self.start} to {self.stop}"

    @property
    def weight(self) -> int:
        return self.stop - self.start

    def rows(self) -> Iterator[Row]:
        draw: Callable[..., Example]
        if _are_abilities(self.tasks):
            ask = partial(ability_example, described=self.described)
            draw = partial(ask, self.seed, self.split, self.tasks)
        else:
            draw = partial(example, self.seed, self.split, list(self.tasks), style=self.style)
        for i in range(self.start, self.stop):
            sample, _ = draw_apart(draw, i, draw(i), self.held_out)
            yield Row(f"{self.split}-{i:07d}", sample.row(), sample.images)


def _write_splits(
    out: Path, wanted: dict[str, Any], style: Style, workers: int, encoding: Encoding
) -> dict[str, Any]:
    """Validation, then training without its pictures; returns what was written, by split."""
    from casa_train.data.prepared.shards import Split

    summary: dict[str, Any] = {}
    held_out: frozenset[bytes] = frozenset()
    for split, size in zip(SPLITS, (wanted["validation"], wanted["samples"]), strict=True):
        if size == 0:
            continue
        jobs = [
            DrawJob(
                split,
                wanted["seed"],
                tuple(wanted["tasks"]),
                start,
                min(start + whole.SHARD, size),
                held_out,
                style,
                "described" in wanted,
            )
            for start in range(0, size, whole.SHARD)
        ]
        summary[split] = whole.write(out / split, jobs, encoding, workers, "synthetic")
        if split == "validation":
            written = Split(out / split)
            held_out = frozenset(digest(image) for sample in written for image in sample.images)
    return summary


def draw_apart(
    draw: Callable[[int, int], Example],
    index: int,
    sample: Example,
    held_out: frozenset[bytes] | set[bytes],
) -> tuple[Example, int]:
    """`sample`, or the first later attempt at it without a held-out picture; and the attempts."""
    attempt = 0
    while sample.digests & held_out:
        attempt += 1
        sample = draw(index, attempt)
    return sample, attempt
