"""Steps taken apart: the parts add up, follow every block, and leave nothing behind."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from casa_train.config.schema import Config, GroupConfig, MetricsConfig, OptimConfig, fingerprint
from casa_train.cost.peak import BANDWIDTHS, PEAK_TFLOPS, device_rates
from casa_train.cost.work import count_operations
from casa_train.distributed.ranks import Ranks
from casa_train.metrics import timeline
from casa_train.metrics.timeline import (
    COPY,
    DATA_WAIT,
    DECODER,
    FUSION,
    LOSS,
    ORDER,
    REDUCTION,
    REST,
    UPDATE,
    VISION_FROZEN,
    VISION_TRAINED,
    Timeline,
    backward_of,
)
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.train import build_run
from casa_train.training.part_hooks import PartHooks
from casa_train.training.roofline import PackSizes, Roofline
from casa_train.training.step_profile import StepParts, WatchedStep, mean_of, parts_table
from tests.helpers.tiny import HARD_PACK, fill, packed_inputs
from tests.helpers.tiny_run import Lines, Packs, PlainEngine, tiny_settings
from tests.helpers.variants import build, every_variant

CPU = torch.device("cpu")


class Clock:
    """Shows what it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_time_is_of_whoever_runs_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timeline, "time", clock)
    line = Timeline(CPU)
    line.push(DECODER)  # before the step: nothing
    line.begin(DATA_WAIT)
    script: list[tuple[float, Any]] = [
        (1, lambda: line.enter(COPY)),
        (3, lambda: line.enter("forward, rest")),
        (4, lambda: line.push(DECODER, counted=True)),
        (6, lambda: line.push(DECODER)),
        (7, lambda: line.push(FUSION, counted=True)),
        (10, line.pop),
        (11, line.pop),
        (12, line.pop),
        (13, lambda: line.enter(LOSS, backward=True)),
        (15, lambda: line.turn(backward_of(DECODER))),
        (18, lambda: line.push(DECODER, counted=True)),  # a checkpointed block runs again
        (19, lambda: line.push(FUSION)),
        (21, line.pop),
        (22, line.pop),
        (23, lambda: line.enter(REST)),
        (30, line.end),
        (99, lambda: line.enter(UPDATE)),  # after it: nothing
    ]
    for now, act in script:
        clock.now = now
        act()
    assert line.milliseconds() == {
        DATA_WAIT: 1000,
        COPY: 2000,
        "forward, rest": 2000,
        DECODER: 5000,
        FUSION: 3000,
        backward_of(LOSS): 2000,
        backward_of(DECODER): 6000,
        backward_of(FUSION): 2000,
        REST: 7000,
    }
    assert line.calls == {DECODER: 1, FUSION: 1, backward_of(DECODER): 1}


def test_on_a_gpu_marks_are_events_of_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = Clock(), []

    class Event:
        """Counts milliseconds, once it is reached."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, later: Event) -> float:
            assert waited, "the device may not have come so far"
            return later.at - self.at

    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    line = Timeline(device)
    line.begin(DATA_WAIT)
    for now, act in ((2.0, lambda: line.enter(UPDATE)), (9.5, line.end)):
        clock.now = now
        act()
    assert line.milliseconds() == {DATA_WAIT: 2.0, UPDATE: 7.5} and waited == [device]


def settings(**metrics: Any) -> Config:
    optim = OptimConfig(groups={"all": GroupConfig(["."], 1e-3)})
    config = tiny_settings(optim, stage=2, packs=1)
    config.model.vision.train_last_blocks = -1
    return replace(config, metrics=MetricsConfig(tensorboard=False, **metrics))


def hooks_on(model: nn.Module) -> int:
    """All hooks on a model's modules and parameters."""
    on_modules = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
    on_parameters = sum(
        len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ())
        for p in model.parameters()
    )
    return on_modules + on_parameters


def followed(
    model: CasaForConditionalGeneration, watched: WatchedStep | None, micro_steps: int = 2
) -> float:
    """One step as the loop takes it, without its engine; the sum of the losses."""
    model.train()
    enter = (lambda *_: None) if watched is None else watched.enter
    if watched is not None:
        watched.begin()
    total = 0.0
    for seed in range(micro_steps):
        inputs = packed_inputs(fill(HARD_PACK, seed))
        inputs.input_ids = inputs.input_ids.to(model.device)
        enter("forward, rest")
        logits = model(packed=inputs).logits
        enter(LOSS)
        loss = logits.double().square().mean()
        total += float(loss.detach())
        enter(LOSS, True)
        loss.backward()
        enter(UPDATE)
    if watched is not None:
        watched.end()
    return total


@every_variant
def test_every_block_is_followed_and_leaves_no_hook(variant: str) -> None:
    model = build(variant)
    watched = WatchedStep(model, CPU)
    followed(model, watched)
    parts = watched.parts(Roofline(settings(peak_tflops=2.0), model, Ranks()))
    layers = model.model.layers
    of_fusion = sum(layer.fusion is not None for layer in layers)
    of_fusion += (model.resampler is not None) + (not isinstance(model.adapter, nn.Identity))
    expected = {VISION_TRAINED: len(model.visual.blocks) + 1, DECODER: len(layers), LOSS: 1}
    expected |= {FUSION: of_fusion} if of_fusion else {}
    assert parts.micro_steps == 2
    assert parts.calls == {part: 2 * calls for part, calls in expected.items()}
    assert min(parts.milliseconds.values()) >= 0
    assert set(parts.milliseconds) <= set(ORDER)
    # Whatever has work has time, forward and backward, and the other way round.
    worked = set(parts.floors) - {UPDATE}
    modelled = {*expected, *map(backward_of, expected)}
    assert worked == modelled == set(parts.milliseconds) & modelled
    assert REDUCTION in parts.milliseconds and hooks_on(model) == 0


def test_numbers_are_the_same_with_and_without() -> None:
    losses, gradients, joined = [], [], []
    for watch in (False, True):
        model = build("casa-qwen2_5_vl")
        model.joint_image_keys = True
        model.joint_keys.register_forward_hook(lambda module, args, out: joined.append(len(out)))
        losses.append(followed(model, WatchedStep(model, CPU) if watch else None))
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1]
    assert joined == [2 * len(model.model.layers)] * 4  # of two micro-steps each
    for plain, watched in zip(*gradients, strict=True):
        assert torch.equal(plain, watched)


def test_the_parts_are_the_whole_step() -> None:
    model = build("hyper_attention")
    watched = WatchedStep(model, CPU)
    before = time.perf_counter()
    followed(model, watched)
    elapsed = 1e3 * (time.perf_counter() - before)
    marks = watched.timeline._marks
    whole = 1e3 * (marks[-1][1] - marks[0][1])
    assert sum(watched.timeline.milliseconds().values()) == pytest.approx(whole)
    assert marks[0][1] >= before and whole <= elapsed


def test_frozen_blocks_and_blocks_that_run_again() -> None:
    model = build("casa")
    model.visual.set_trainable(1)
    model.checkpoint_activations("all")
    watched = WatchedStep(model, CPU)
    followed(model, watched, micro_steps=1)
    blocks, layers = len(model.visual.blocks), len(model.model.layers)
    calls = watched.timeline.calls
    assert calls[VISION_FROZEN] == blocks - 1 and calls[VISION_TRAINED] == 2  # the merger
    assert calls[DECODER] == calls[FUSION] == layers
    again = {DECODER: layers, FUSION: layers, VISION_TRAINED: 1}  # blocks alone are checkpointed
    assert {part: calls[backward_of(part)] for part in again} == again
    assert backward_of(VISION_FROZEN) not in watched.timeline.milliseconds()


class Noting(Timeline):
    """Notes what is pushed."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.pushed: list[str] = []

    def push(self, part: str, counted: bool = False) -> None:
        self.pushed.append(part)
        super().push(part, counted)


@pytest.mark.parametrize(
    ("variant", "of_images"),
    [
        # Calls of a layer's own modules on image tokens: norm, keys, values.
        ("casa-shared-biased", 3),
        # Norm and feed-forward network with its four modules, in the first of two layers; fusion's
        # norm, keys, values, queries and output in both.
        ("cross_attention-ffn", 5 + 6 / 2),
        ("insertion", -1),
    ],
)
def test_a_layers_own_modules_on_image_tokens_are_fusion(variant: str, of_images: float) -> None:
    model = build(variant)
    noting = Noting()
    hooks = PartHooks(model, noting)
    hooks.attach()
    model(packed=packed_inputs(fill(HARD_PACK, 3)))
    hooks.remove()
    own = noting.pushed.count(FUSION)
    layers = len(model.model.layers)
    assert own == layers * (of_images + 1)  # and `fusion` itself


def test_floors_are_work_over_rate_and_bytes_over_bandwidth() -> None:
    model = build("qformer_insertion")
    config = settings(peak_tflops=0.5)
    roofline = Roofline(config, model, Ranks(world=4))
    packed = packed_inputs(fill(HARD_PACK, 0))
    pack = PackSizes.of(packed)
    floors = roofline.floors([pack, pack])
    work = count_operations(
        roofline.work.text, roofline.work.vision, model.mechanism, packed.chunks, pack.answers
    )
    total = sum(operations.total for operations in work.values())
    update = floors.pop(UPDATE)
    assert sum(floors.values()) == pytest.approx(2 * total / 0.5e12 * 1e3)
    assert COPY not in floors  # on a CPU nothing goes anywhere
    values = sum(p.numel() for p in model.parameters())
    assert update == pytest.approx(1e3 * 32 * values / 4 / roofline.rates.memory)
    assert pack.size == 8 * len(packed.input_ids) + sum(image.numel() for image in packed.images)
    assert "500 GFLOP/s" in roofline.words() and "metrics.peak_tflops" in roofline.words()


def test_a_card_with_a_peak_has_bandwidths(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in BANDWIDTHS]
    assert {name.removesuffix(" NVL") for name, _ in PEAK_TFLOPS} <= set(names)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    rates = device_rates(torch.device("cuda", 0), "bf16", None)
    assert (rates.flops, rates.memory, rates.link) == (756e12, 2e12, 63e9)
    assert rates.source == "data sheet"


def test_where_no_data_sheet_is_known_rates_are_measured() -> None:
    rates = device_rates(CPU, "fp32", None)
    assert rates.source == "measured here" and rates.link is None
    assert 1e8 < rates.flops < 1e15 and 1e7 < rates.memory < 1e13


def test_a_table_of_several_ranks_shows_the_slowest() -> None:
    one = StepParts(2, {DECODER: 10.0, REST: 5.0}, {DECODER: 4}, {DECODER: 2.0, UPDATE: 1.0})
    other = replace(one, milliseconds={DECODER: 20.0, REST: 5.0, UPDATE: 4.0})
    table = parts_table([one, other]).splitlines()
    cells = {line.split("  ")[0]: line.split() for line in table}
    assert cells["decoder"] == ["decoder", "4", "15.00", "20.00", "68.2", "%", "2.00", "7.5"]
    assert cells["update"] == ["update", "2.00", "4.00", "9.1", "%", "1.00", "2.0"]
    assert cells["step, 2 micro-steps"][-6:] == ["22.00", "29.00", "100.0", "%", "3.00", "7.3"]
    assert [line.split("  ")[0] for line in table[1:3]] == ["decoder", "update"]
    assert mean_of([one]) == one


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_takes_the_steps_apart_that_it_is_asked_for(recorded: bool, tmp_path: Path) -> None:
    config = settings(profile_steps=[3, 2], profile_trace=recorded)
    config.trainer = replace(config.trainer, steps=4, audit=False, gc_every=0)
    lines: list[str] = []
    engine: Any = PlainEngine()
    sinks = [Lines(lines)]
    run = build_run(config, Ranks(), engine, Packs(), tmp_path, sinks=sinks)
    assert run.trainer.run() is None
    directory = tmp_path / "profile"
    expected = {"step_2.json", "step_2.txt", "step_3.json", "step_3.txt"}
    expected |= {"step_3.trace.json"} if recorded else set()
    assert {path.name for path in directory.iterdir()} == expected
    for step, traced in ((2, False), (3, recorded)):
        numbers = json.loads((directory / f"step_{step}.json").read_text())
        (parts,) = numbers["ranks"]
        assert (numbers["step"], numbers["traced"]) == (step, traced)
        assert {DATA_WAIT, COPY, DECODER, FUSION, LOSS, UPDATE, REST} < set(parts["milliseconds"])
        table = (directory / f"step_{step}.txt").read_text()
        assert table.strip() in "\n".join(lines) and "x the floor" in table
    if not recorded:
        return
    trace = json.loads((directory / "step_3.trace.json").read_text())["traceEvents"]
    ranges = {event["name"] for event in trace if event.get("cat") == "user_annotation"}
    assert {DATA_WAIT, COPY, VISION_TRAINED, DECODER, FUSION, LOSS, "backward", UPDATE} <= ranges
    assert hooks_on(engine.module) == 0 and run.state.meter.watch is None


def test_a_step_that_fails_leaves_no_hook(tmp_path: Path) -> None:
    config = settings(profile_steps=[1])
    config.trainer = replace(config.trainer, steps=2, audit=False, gc_every=0)
    engine: Any = PlainEngine()

    def refuse(loss: torch.Tensor) -> None:
        assert hooks_on(engine.module) > 0
        raise RuntimeError("no backward")

    engine.backward = refuse
    run = build_run(config, Ranks(), engine, Packs(), tmp_path, sinks=[Lines([])])
    with pytest.raises(RuntimeError, match="no backward"):
        run.trainer.run()
    assert hooks_on(engine.module) == 0 and run.state.meter.watch is None


def test_a_resumed_run_may_take_other_steps_apart() -> None:
    assert fingerprint(settings(profile_steps=[7])) == fingerprint(settings(profile_steps=[9, 10]))


@pytest.mark.parametrize("hooked", [False, True], ids=["before", "while it is followed"])
def test_a_compiled_region_stays_whole_and_is_its_callers(hooked: bool) -> None:
    model = build("casa")
    torch._dynamo.reset()  # its cache is by code, whatever the model
    layer, noting = model.model.layers[0], Noting()
    hooks = PartHooks(model, noting)
    x = torch.linspace(-1, 1, 192).reshape(3, 64).requires_grad_()

    def region(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = layer.mlp(layer.input_layernorm(x))
        return out

    compiled = torch.compile(region, backend="eager", fullgraph=True)
    if not hooked:
        compiled(x)
    hooks.attach()
    noting.begin(DECODER)
    with torch._dynamo.config.patch(error_on_recompile=not hooked):
        found = compiled(x)
    assert noting.pushed == [] and torch.equal(found, (hooks.remove(), region(x))[1])


@pytest.mark.gpu
def test_on_a_gpu_the_parts_are_the_devices_own() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = build("casa", dtype=torch.bfloat16).to(device)
    watched = WatchedStep(model, device)
    followed(model, watched)
    parts = watched.parts(Roofline(settings(peak_tflops=2.0), model, Ranks(device=device)))
    first, last = watched.timeline._marks[0][1], watched.timeline._marks[-1][1]
    assert sum(parts.milliseconds.values()) == pytest.approx(first.elapsed_time(last), rel=0.05)
    assert {DECODER, FUSION, VISION_TRAINED, backward_of(DECODER)} <= set(parts.milliseconds)
