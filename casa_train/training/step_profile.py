"""A few steps taken apart: milliseconds by part beside the least that they could take, and a trace.

The steps around them pay nothing: hooks are on the modules from the first mark of such a step to
its last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.io.files import write_atomic
from casa_train.io.numbers import MISSING, count, percent
from casa_train.io.tables import aligned
from casa_train.metrics.meter import Meter
from casa_train.metrics.sinks.base import Record
from casa_train.metrics.timeline import DATA_WAIT, ORDER, Timeline
from casa_train.training.hooks import Hook
from casa_train.training.part_hooks import PartHooks
from casa_train.training.roofline import Roofline
from casa_train.training.state import Log, Progress


@dataclass(frozen=True)
class StepParts:
    """One step of one rank, by part.

    :param milliseconds: they add up to the step.
    :param calls: of blocks and layers.
    :param floors: milliseconds that the part takes at least.
    """

    micro_steps: int
    milliseconds: dict[str, float]
    calls: dict[str, int]
    floors: dict[str, float]


class WatchedStep:
    """Follows one step: what `Meter.watch` takes.

    :param trace: file of a trace of the step for Perfetto or chrome://tracing; None: there is none.
        Recording it costs time in every operation, which the parts then hold.
    """

    def __init__(self, model: Any, device: torch.device, trace: Path | None = None) -> None:
        self.device, self.trace = device, trace
        self.timeline = Timeline(device, ranges=trace is not None)
        self.hooks = PartHooks(model, self.timeline)
        self._profiler: profile | None = None

    def begin(self) -> None:
        self.hooks.attach()
        if self.trace is not None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # a line at every start and stop
            kinds = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=kinds)
            self._profiler.start()
        self.timeline.begin(DATA_WAIT)

    def enter(self, part: str, backward: bool = False) -> None:
        self.timeline.enter(part, backward)

    def end(self) -> None:
        """The step is over, or broken off."""
        running = self.timeline.running
        self.timeline.end()
        self.hooks.remove()
        if running and self._profiler is not None:
            self._profiler.stop()

    def write_trace(self) -> None:
        """:raises OSError: it could not be written."""
        if self._profiler is None or self.trace is None:
            return
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        part = self.trace.with_name(f"{self.trace.name}.tmp.json")
        try:
            self._profiler.export_chrome_trace(str(part))
            os.replace(part, self.trace)
        except RuntimeError as error:  # kineto's own
            raise OSError(str(error)) from error

    def parts(self, roofline: Roofline) -> StepParts:
        """What was measured; waits for the device."""
        packs = self.hooks.packs
        calls = dict(self.timeline.calls)
        return StepParts(len(packs), self.timeline.milliseconds(), calls, roofline.floors(packs))


class StepProfile(Hook):
    """Takes the steps apart that `metrics.profile_steps` names; collective.

    All ranks are measured, and the first one tells of all; the trace is the first rank's.

    :param meter: follows the next step where it is one of them.
    :param directory: takes the files; None: nothing is written, and no trace recorded.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        model: Any,
        meter: Meter,
        log: Log,
        directory: Path | None,
    ) -> None:
        self.ranks, self.model, self.meter, self.log = ranks, model, meter, log
        self.config, self.directory = config, directory
        self.steps = set(config.metrics.profile_steps)
        self._watched: WatchedStep | None = None
        self._roofline: Roofline | None = None

    def begin(self, progress: Progress) -> None:
        self._arm(progress.step + 1)

    def after_step(self, record: Record) -> bool:
        if self._watched is not None:
            self._tell(record["step"], self._watched)
            self._watched = None
        self._arm(record["step"] + 1)
        return False

    def close(self, reason: str | None) -> None:
        if self._watched is not None:  # the step failed
            self.meter.watch = None
            self._watched.end()

    def _arm(self, step: int) -> None:
        """Has the meter follow this step if it is one of those that were asked for."""
        if step not in self.steps:
            return
        if self._roofline is None:
            self._roofline = Roofline(self.config, self.model, self.ranks)
        trace = None
        last = max(s for s in self.steps if s <= self.config.trainer.steps)
        wanted = step == last and self.config.metrics.profile_trace
        if self.directory is not None and self.ranks.first and wanted:
            trace = self.directory / f"step_{step}.trace.json"
        self._watched = self.meter.watch = WatchedStep(self.model, self.ranks.device, trace)

    def _tell(self, step: int, watched: WatchedStep) -> None:
        assert self._roofline is not None
        ranks = self.ranks.gather(watched.parts(self._roofline))
        if not self.ranks.first:
            return
        traced = watched.trace is not None
        lines = [
            f"step {step} by part" + (", with what the trace's recorder costs in it" * traced),
            parts_table(ranks),
            self._roofline.words(),
        ]
        self.log.log("\n".join(lines))
        if self.directory is None:
            return
        numbers = {"step": step, "traced": traced, "ranks": [asdict(parts) for parts in ranks]}
        try:
            self.directory.mkdir(exist_ok=True)
            write_atomic(self.directory / f"step_{step}.txt", "\n".join(lines) + "\n")
            write_atomic(self.directory / f"step_{step}.json", json.dumps(numbers, indent=1) + "\n")
            watched.write_trace()
        except OSError as error:
            self.log.log(f"warning: the profile of step {step} was not written: {error}")
        else:
            what = f"step_{step}.*, the trace among them" if traced else f"step_{step}.*"
            self.log.log(f"profile: {self.directory}/{what}")


def mean_of(steps: Sequence[StepParts]) -> StepParts:
    """Means over steps or ranks; a part that one does not have takes no time there."""
    first = steps[0]

    def mean(values: Sequence[dict[str, float]]) -> dict[str, float]:
        names = {name: None for value in values for name in value}
        return {name: sum(v.get(name, 0.0) for v in values) / len(values) for name in names}

    milliseconds = mean([step.milliseconds for step in steps])
    floors = mean([step.floors for step in steps])
    return StepParts(first.micro_steps, milliseconds, first.calls, floors)


def parts_table(ranks: Sequence[StepParts]) -> str:
    """The parts of a step, those that occurred, with their sum.

    :param ranks: of each rank; times are means, beside those of the slowest.
    """
    mean = mean_of(ranks)
    total = sum(mean.milliseconds.values())
    several = len(ranks) > 1
    slowest = ["slowest rank"] if several else []
    rows = [["part", "calls", "ms", *slowest, "share", "floor, ms", "x the floor"]]
    for part in sorted(mean.milliseconds, key=ORDER.index):
        taken, floor = mean.milliseconds[part], mean.floors.get(part)
        most = max(rank.milliseconds.get(part, 0.0) for rank in ranks)
        rows.append(
            [
                part,
                f"{mean.calls[part]:,}" if mean.calls.get(part) else "",
                f"{taken:,.2f}",
                *([f"{most:,.2f}"] if several else []),
                percent(taken / total),
                MISSING if not floor else f"{floor:,.2f}" if floor >= 1 else f"{floor:.2g}",
                f"{taken / floor:,.1f}" if floor else MISSING,
            ]
        )
    floor = sum(mean.floors.get(part, 0.0) for part in mean.milliseconds)
    whole = f"step, {count(mean.micro_steps, 'micro-step')}"
    most = max(sum(rank.milliseconds.values()) for rank in ranks)
    rows.append(
        [
            *(whole, "", f"{total:,.2f}", *([f"{most:,.2f}"] if several else []), percent(1.0)),
            *((f"{floor:,.2f}", f"{total / floor:,.1f}") if floor else (MISSING, MISSING)),
        ]
    )
    return aligned(rows)
