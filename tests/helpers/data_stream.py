"""The loader as a run uses it, without a model: a process that can be killed and started again.

`python -m tests.helpers.data_stream DATA OUT WORLD WORKERS STEPS` reads to step STEPS as every rank
of WORLD in turn, appends what each step consumed to OUT/log.jsonl and commits its position every
third step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.loader import PackLoader
from casa_train.data.materialize import Materializer
from casa_train.data.mixture import SourceSize
from casa_train.data.prepared.plan import IMAGE, VIDEO, Planner, PlanSource
from casa_train.data.prepared.shards import Split
from casa_train.data.tokens import load_tokenizer
from casa_train.io.files import write_atomic
from casa_train.modeling.processing_casa import CasaProcessor
from tests.helpers.commands import TEMPLATE
from tests.helpers.counting import sample_lengths

G = 12
TEXT, IMAGES = 160, 64
# One dataset plays three sources: plain, over-sampled six times, and video.
SOURCES = {"plain": (IMAGE, 1), "six": (IMAGE, 6), "film": (VIDEO, 1)}
SEED = 7
SETTINGS = DataConfig(
    text_tokens=TEXT, image_tokens=IMAGES, packs_per_step=G, balance_block=2, balance_group=6
)


def loaders(data: Path, world: int, workers: int, packs_per_step: int = G) -> list[PackLoader]:
    """The loader of every rank."""
    settings = replace(SETTINGS, packs_per_step=packs_per_step, workers=workers)
    processor = CasaProcessor(load_tokenizer(str(data / "tokenizer")), 7056, TEMPLATE)
    split = Split(data / "validation")
    lengths = sample_lengths(split, processor)
    sources = {
        name: PlanSource(*lengths, SourceSize(len(split), repeats=repeats), modality)
        for name, (modality, repeats) in SOURCES.items()
    }
    splits = dict.fromkeys(SOURCES, split)
    return [
        PackLoader(
            Planner(sources, settings, SEED),
            Materializer(splits, processor, Budget(TEXT, IMAGES)),
            rank,
            world,
        )
        for rank in range(world)
    ]


def read_step(ranks: list[PackLoader]) -> list[list[str]]:
    """Ids of the packs of one step, in global order."""
    batches = [batch for loader in ranks for batch in loader.next_step()]
    return [batch.sample_ids for batch in sorted(batches, key=lambda batch: batch.index)]


def main() -> None:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    world, workers, steps = map(int, sys.argv[3:])
    ranks = loaders(data, world, workers)
    state, log = out / "state.json", out / "log.jsonl"
    step = 0
    if state.exists():
        saved = json.loads(state.read_text())
        step = saved["step"]
        for loader in ranks:
            loader.load_state_dict(saved["data"])
    while step < steps:
        packs = read_step(ranks)
        step += 1
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "packs": packs}) + "\n")
        if step % 3 == 0 or step == steps:
            content = {"step": step, "data": ranks[0].state_dict()}
            write_atomic(state, json.dumps(content))


if __name__ == "__main__":
    main()
