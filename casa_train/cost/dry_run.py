"""What a run would be: parameters, memory of a rank, floating-point work. Nothing is run.

The model is built with its real sizes on the meta device, where tensors have shapes but no memory,
and frozen and grouped as a run would do it. Data, tokenizer, GPU and DeepSpeed stay untouched.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence

from torch import nn

from casa_train.config.micro_steps import PLANNED_RANKS, micro_steps
from casa_train.config.schema import Config
from casa_train.cost.full_pack import MemoryOfRank, full_pack, memory_of_rank
from casa_train.cost.peak import PEAK_TFLOPS
from casa_train.cost.sizes import decoder_sizes, size_model, vision_sizes
from casa_train.cost.work import VisionSizes, count_operations, repeated_operations
from casa_train.data.processor import token_side_of
from casa_train.io.numbers import GIB, count, duration, rate, short, with_unit
from casa_train.io.tables import aligned
from casa_train.modeling.block_work import Operations, TextSizes
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.windows import Chunk
from casa_train.setup.equal_parameters import match_parameters, new_parameters
from casa_train.setup.model import meta_model
from casa_train.setup.optim import build_groups, fit_schedule
from casa_train.setup.parts import PARTS, part_of

H100_TFLOPS = dict(PEAK_TFLOPS)["H100"]
H100_BYTES = 79 << 30  # what torch sees of the 80 GB
UTILISATION = 0.4


def dry_run(config: Config) -> list[str]:
    """The report, line by line.

    :raises UserError: as a run would, for what can be known without data.
    """
    began = time.perf_counter()
    world = config.planned_ranks or 1
    in_turn = micro_steps(config.data, world, PLANNED_RANKS)
    notes: list[str] = []
    matching = match_parameters(config, size_model(config, notes))
    config, model_config = matching.config, matching.model_config
    model = meta_model(config, model_config)
    new = [
        f"{new_parameters(config, model_config):,} parameters more than with fusion=insertion",
        *matching.notes,
    ]
    seconds = time.perf_counter() - began

    text = decoder_sizes(config, model)
    vision = vision_sizes(model_config, config.model.vision.train_last_blocks)
    mechanism = model.mechanism
    pack = full_pack(config)
    work = count_operations(text, vision, mechanism, pack, config.data.text_tokens)
    repeated = repeated_operations(
        text, vision, mechanism, pack, config.parallel.activation_checkpointing
    )
    sections = [
        [*_headline(config, text, vision, model, seconds), *_new(new)],
        _parameters(config, model),
        _memory(config, memory_of_rank(config, model, world), world),
        _work(work, repeated),
        _step(config, world, in_turn, pack, sum(part.total for part in work.values()), repeated),
        _assumptions(config, pack, notes),
    ]
    return [line for section in sections for line in (*section, "")][:-1]


def _table(rows: Sequence[Sequence[str]], rules: Sequence[int] = ()) -> list[str]:
    """Aligned lines: the first column to the left, numbers to the right.

    :param rules: rows above which a line is drawn.
    """
    lines = aligned(rows, gap="   ").splitlines()
    rule = "-" * max(map(len, lines))
    for index in sorted(rules, reverse=True):
        lines.insert(index, rule)
    return ["  " + line for line in lines]


def _headline(
    config: Config,
    text: TextSizes,
    vision: VisionSizes,
    model: CasaForConditionalGeneration,
    seconds: float,
) -> list[str]:
    """What is built."""
    mechanism = model.mechanism
    trained = "all" if vision.trained < 0 else f"the last {vision.trained}"
    blocks = sum(layer.fusion is not None for layer in model.model.layers)
    where = f"in {blocks} of {text.layers} blocks" if blocks else "in the text stream"
    lines = [
        f"casa_train dry run: {config.name}, built on the meta device in {seconds:.1f} s",
        "",
        f"  backbone   {text.layers} blocks of width {text.width:,}, "
        + ("trained" if text.trainable else "frozen")
        + (
            f", beside it LoRA of rank {config.model.backbone.lora.rank} on "
            f"{count(len(text.adapters), 'linear')}"
            if text.adapters
            else ""
        ),
        f"  vision     {vision.tower.depth} blocks of width {vision.tower.width:,}, "
        + (f"{trained} trained" if vision.trained else "frozen"),
        f"  fusion     {mechanism.name} {where}",
    ]
    changed = [
        f"{key}={value}"
        for key, value in mechanism.fusion.items()
        if value != mechanism.options[key]
    ]
    if changed:
        lines[-1] += ": " + ", ".join(changed)
    return lines


def _new(lines: Sequence[str]) -> list[str]:
    """What is new beside backbone and tower, and how it was matched."""
    wrapped = [part for line in lines for part in textwrap.wrap(line, 75)]
    return [f"  {'new' if number == 0 else '':<11}{line}" for number, line in enumerate(wrapped)]


def _parameters(config: Config, model: nn.Module) -> list[str]:
    groups = build_groups(model.named_parameters(), config.optim.groups)
    rates = {name: group["base_lr"] for group in groups for name in group["names"]}
    counts = {part: [0, 0] for part in PARTS}
    used: dict[str, set[float]] = {part: set() for part in counts}
    for name, parameter in model.named_parameters():
        counts[part_of(name)][0 if parameter.requires_grad else 1] += parameter.numel()
        if parameter.requires_grad:
            used[part_of(name)].add(rates[name])
    counts["total"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [["Parameters", "trained", "frozen", "rate"]]
    for part, (trained, frozen) in counts.items():
        own = "/".join(map(rate, sorted(used.get(part, ()))))
        rows.append([part, f"{trained:,}", f"{frozen:,}", own])
    return _table(rows, rules=[1, len(rows) - 1])


def _memory(config: Config, memory: MemoryOfRank, world: int) -> list[str]:
    stage, precision = config.parallel.zero_stage, config.parallel.precision

    def row(name: str, size: int) -> list[str]:
        return [name, f"{size / GIB:.2f}"]

    title = f"Memory of a rank: ZeRO-{stage}, {precision}, {count(world, 'rank')}"
    rows = [[title, "GiB"]]
    rows += [row(name, size) for name, size in memory.state.items()]
    first_sum = len(rows)
    rows.append(row("state", sum(memory.state.values())))
    rows += [row(f"{name}, estimate", size) for name, size in memory.activations.items()]
    rows.append(row("total, estimate", memory.total))
    lines = _table(rows, rules=[1, first_sum, first_sum + 1, len(rows) - 1])
    if memory.total > H100_BYTES:
        text = (
            f"More than the {H100_BYTES // GIB} GiB of an H100: set parallel.activation_"
            "checkpointing=all, or lower data.image_tokens and data.text_tokens and raise "
            "data.packs_per_step by as much."
        )
        lines += ["", *textwrap.wrap(text, 88, initial_indent="  ", subsequent_indent="  ")]
    return lines


def _work(work: Mapping[str, Operations], repeated: int) -> list[str]:
    total = Operations(
        sum(part.forward for part in work.values()), sum(part.backward for part in work.values())
    )
    unit, name = (1e12, "TFLOP") if total.total > 1e12 else (1e9, "GFLOP")

    def row(label: str, part: Operations) -> list[str]:
        numbers = [f"{n / unit:,.2f}" for n in (part.forward, part.backward, part.total)]
        return [label, *numbers, f"{part.total / total.total:.1%}"]

    rows = [[f"Work of a pack, {name}", "forward", "backward", "total", "share"]]
    rows += [row(label, part) for label, part in work.items()]
    rows.append(row("total", total))
    lines = _table(rows, rules=[1, len(rows) - 1])
    if repeated:
        lines += [
            "",
            f"  activation checkpointing repeats {repeated / unit:,.2f} {name} of the forward "
            "pass; MFU does not count them",
        ]
    return lines


def _step(
    config: Config,
    world: int,
    in_turn: int,
    pack: Sequence[Chunk],
    operations: int,
    repeated: int,
) -> list[str]:
    packs, steps = config.data.packs_per_step, config.trainer.steps
    warmup, decay = fit_schedule(steps, config.optim.warmup_steps, config.optim.decay_steps)
    images = sum(sample.image_tokens for sample in pack)
    rows = [["", "a pack", "a step", "the run"]]
    for label, one in (("text tokens", config.data.text_tokens), ("image tokens", images)):
        rows.append([label, f"{one:,}", f"{one * packs:,}", short(one * packs * steps)])
    total = operations * packs
    rows.append(["work", *(with_unit(n, "FLOP") for n in (operations, total, total * steps))])
    # What is repeated takes its time, too.
    speed = UTILISATION * 1e12 * H100_TFLOPS
    operations, total = operations + repeated, total + repeated * packs
    times = (operations / speed, total / world / speed, total * steps / world / speed)
    rows.append([f"H100s at {UTILISATION:.0%}", *map(duration, times)])
    rows[0][0] = "Size"
    return [
        *_table(rows, rules=[1]),
        "",
        f"  a step: {packs} packs on {count(world, 'rank')}, {in_turn} on each in turn",
        f"  the run: {steps:,} steps, {warmup:,} of warm-up, {decay:,} of decay at the end",
    ]


def _assumptions(config: Config, pack: Sequence[Chunk], notes: Sequence[str]) -> list[str]:
    (rows, columns), side = pack[0].grids[0], token_side_of(config)
    assumed = [
        *notes,
        f"full packs: {len(pack)} images of up to {rows * side}x{columns * side} pixels "
        f"({rows * columns:,} tokens), each a sample with an even share of the text behind it",
        "every text token needs logits, though only answers do",
        "work: attended pairs alone, and nothing that activation checkpointing repeats; an H100's "
        f"peak is {H100_TFLOPS:.0f} TFLOP/s in bf16, and its hours include what is repeated",
        "state: the tensors of DeepSpeed's ZeRO, its reduction bucket at most the default of "
        "500 million elements; fragmentation and communication buffers come on top",
        "estimates: what eager code saves for the backward pass, counted on the model itself; "
        "compiled code saves less, and tensors that live for one operation come on top",
    ]
    wrapped = [
        line
        for text in assumed
        for line in textwrap.wrap(text, 88, initial_indent="  - ", subsequent_indent="    ")
    ]
    return ["  Assumed", *wrapped]
