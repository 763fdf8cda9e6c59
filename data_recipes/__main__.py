"""`python -m data_recipes NAME --out DIR ...`: prepares one dataset for training."""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment()  # before anything imports torch

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from casa_train.errors import UserError
from data_recipes import (
    easyvqa,
    finevision,
    live_whisperx,
    llava_onevision,
    llava_video,
    mixture,
    retokenize,
    synthetic,
    synthetic_clips,
)


@dataclass(frozen=True)
class Recipe:
    """A subcommand: how its options are declared and what runs it."""

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


RECIPES = {
    "finevision": Recipe(
        "FineVision: about 185 subsets of images with questions, rated turn by turn.",
        finevision.add_arguments,
        finevision.run,
    ),
    "llava_onevision": Recipe(
        "LLaVA-OneVision-1.5-Instruct: the subsets that FineVision lacks, and Docmatix.",
        llava_onevision.add_arguments,
        llava_onevision.run,
    ),
    "llava_video": Recipe(
        "LLaVA-Video-178K: questions about videos, decoded to 2 frames a second.",
        llava_video.add_arguments,
        llava_video.run,
    ),
    "live_whisperx": Recipe(
        "Live-WhisperX-526K: videos with captions word by word, decoded to 2 frames a second.",
        live_whisperx.add_arguments,
        live_whisperx.run,
    ),
    "synthetic": Recipe(
        "Renders small pictures with questions: no download, answers known by construction.",
        synthetic.add_arguments,
        synthetic.run,
    ),
    "synthetic_clips": Recipe(
        "Renders films of shapes with captions and questions, in the formats of published videos.",
        synthetic_clips.add_arguments,
        synthetic_clips.run,
    ),
    "easyvqa": Recipe(
        "easy-VQA: one shape in one colour a picture, from its package on PyPI.",
        easyvqa.add_arguments,
        easyvqa.run,
    ),
    "mixture": Recipe(
        "Not a dataset: writes the configuration of a mixture of everything that is prepared.",
        mixture.add_arguments,
        mixture.run,
    ),
    "retokenize": Recipe(
        "Not a dataset: a second index, for another tokenizer, over data that is prepared.",
        retokenize.add_arguments,
        retokenize.run,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one recipe; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_recipes", description=__doc__)
    commands = parser.add_subparsers(dest="recipe", required=True, metavar="NAME")
    for name, recipe in RECIPES.items():
        command = commands.add_parser(name, help=recipe.description, description=recipe.description)
        recipe.add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        RECIPES[arguments.recipe].run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
