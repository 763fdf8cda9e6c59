"""What may change when a run goes on: no sample is lost or repeated, or the change is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from casa_train.checkpoint.resume import check_resume
from casa_train.checkpoint.saved import SavedCheckpoint
from casa_train.config.data_schema import DataConfig, SourceConfig, StreamDatasetConfig
from casa_train.config.resume_marks import Changeable, Free, Kept, marks, matches
from casa_train.config.schema import Config, flatten
from casa_train.data.mixture import Mixture
from casa_train.data.prepared.plan import Pack, Planner, PlanSource
from casa_train.data.stream.lanes import Lane
from casa_train.data.stream.row_reader import Rows
from casa_train.data.stream.stream_source import StreamSource, row_group_mixture
from casa_train.errors import UserError
from casa_train.run.resume_fields import plan_record, refuse_changes
from tests.helpers.plan_sources import MIXED, SEED, SETTINGS, SOURCES
from tests.helpers.stream_data import SEED as STREAM_SEED
from tests.helpers.stream_data import SETTINGS as STREAM
from tests.helpers.stream_data import (
    changed,
    loaders,
    open_all,
    processor,
    read_step,
    saved,
    write_finevision,
)

# --------------------------------------------------------------------------- prepared data

# By field: before and after the change.
PLANS: dict[str, tuple[DataConfig, DataConfig]] = {
    "data.packs_per_step": (SETTINGS, replace(SETTINGS, packs_per_step=9)),
    "data.balance_block": (SETTINGS, replace(SETTINGS, balance_block=7)),
    "data.balance_group": (SETTINGS, replace(SETTINGS, balance_group=8)),
    "data.video_share": (SETTINGS, replace(SETTINGS, video_share=0.6)),
    "data.open_packs": (replace(SETTINGS, open_packs=9), replace(SETTINGS, open_packs=3)),
    "more open packs": (SETTINGS, replace(SETTINGS, open_packs=9)),
    "all of them": (
        SETTINGS,
        replace(
            SETTINGS,
            packs_per_step=10,
            balance_block=2,
            balance_group=5,
            video_share=0.4,
            open_packs=2,
        ),
    ),
}


def through_json(state: Mapping[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    return loaded


def account(
    sources: Mapping[str, PlanSource], packs: list[Pack], state: Mapping[str, Any]
) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """What was trained or waits at the start of a block, and what the mixture drew until there."""
    found = Counter((name, row) for pack in packs for name, row, _, _ in pack.items)
    drawn: Counter[tuple[str, int]] = Counter()
    for stream in state["streams"].values():
        waiting = [pack["items"] for pack in stream["packer"]["bins"]]
        waiting += [items for items, _, _ in stream["finished"]]
        found.update((name, row) for items in waiting for name, row, _, _ in items)
        for name, count in stream["drawn"].items():
            source = sources[name]
            _, rows = Mixture({name: source.size}, SEED).take(count)
            fits = (source.text <= SETTINGS.text_tokens - 1) & (
                source.images <= SETTINGS.image_tokens - 1
            )
            drawn.update((name, row) for row in rows.tolist() if fits[row])
    return found, drawn


@pytest.mark.parametrize("sources", [SOURCES, MIXED], ids=["images", "mixed"])
@pytest.mark.parametrize("field", PLANS)
def test_a_changed_plan_loses_and_repeats_nothing(
    sources: dict[str, PlanSource], field: str
) -> None:
    """At every pack of a block; saved again before the block is used up, and twice changed."""
    before, after = PLANS[field]
    for consumed in (0, 1, 23, 24, 25, 36, 95):
        running = Planner(sources, before, SEED)
        reference = [next(running) for _ in range(consumed + 30)]
        state = through_json(running.state_dict(consumed))
        packs = reference[:consumed]
        end = state["block"]["first"] + state["block"]["packs"]
        for settings in (after, after, before, after):
            planner = Planner(dict(reversed(sources.items())), settings, SEED)
            planner.load_state_dict(state)
            packs += [next(planner) for _ in range(3)]
            state = through_json(planner.state_dict(len(packs)))
            if state["block"]["first"] >= end:
                break
        # The block that was begun is used up as it was.
        same = min(end, len(reference), len(packs))
        assert packs[:same] == reference[:same]
        planner = Planner(sources, after, SEED)
        planner.load_state_dict(state)
        while len(packs) < 200 or state["block"]["first"] != len(packs):
            packs.append(next(planner))
            state = planner.state_dict(len(packs))
        assert [pack.index for pack in packs] == list(range(len(packs)))
        found, drawn = account(sources, packs, state)
        assert found == drawn
        assert state["block"]["packs"] == after.packs_per_step * after.balance_block
        assert state["block"]["group"] == after.balance_group
        assert all(
            len(stream["packer"]["bins"]) <= after.open_packs
            for stream in state["streams"].values()
        )


def test_steps_of_another_size_go_on_at_the_next_pack(data_dir: Path) -> None:
    """12 packs a step on 3 ranks, then 15 on 5, 18 on 2 and 12 on 4: none begins at rank 0."""
    from tests.helpers import data_stream

    whole = data_stream.loaders(data_dir, 1, 0)
    expected = [pack for _ in range(2) for pack in data_stream.read_step(whole)]
    found: list[list[str]] = []
    state: dict[str, Any] | None = None
    for size, world in ((12, 3), (15, 5), (18, 2), (12, 4)):
        ranks = data_stream.loaders(data_dir, world, 0, size)
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        step = data_stream.read_step(ranks)
        assert len(step) == size
        found += step
        states = [through_json(loader.state_dict()) for loader in ranks]
        assert all(s == states[0] for s in states)
        state = states[0]
        assert state["consumed"] == len(found)
    # The first block, 24 packs, was begun with 12 packs a step; later ones are of other sizes.
    assert found[:24] == expected[:24] and len(found) == 57


def test_the_order_in_which_sources_are_named_does_not_matter() -> None:
    one, other = (Planner(s, SETTINGS, SEED) for s in (MIXED, dict(reversed(MIXED.items()))))
    assert [next(one) for _ in range(100)] == [next(other) for _ in range(100)]


def test_a_state_of_an_earlier_version_is_refused() -> None:
    """It had the number of its block alone, in units of what may have changed since."""
    state = Planner(SOURCES, SETTINGS, SEED).state_dict(0)
    with pytest.raises(UserError, match="plan of samples is of an older version"):
        Planner(SOURCES, SETTINGS, SEED).load_state_dict({**state, "block": 0})
    with pytest.raises(UserError, match="other kinds of sources"):
        Planner(MIXED, SETTINGS, SEED).load_state_dict(state)


# --------------------------------------------------------------------------------- streams

STREAMS: dict[str, dict[str, Any]] = {
    "data.packs_per_step": {},
    "data.balance_block": {"balance_block": 5},
    "shorter blocks": {"balance_block": 1},
    "data.open_packs": {"open_packs": 2},
    "data.stream.open_units": {"open_units": 1},
    "more open row groups": {"open_units": 3},
    "all of them": {"balance_block": 3, "open_packs": 7, "open_units": 4},
}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StreamSource]:
    return open_all(write_finevision(tmp_path_factory.mktemp("hub")), {"small": 2})


def drawn_rows(
    sources: Mapping[str, StreamSource], settings: DataConfig, states: list[Any]
) -> Counter[tuple[str, int, int]]:
    """Rows that the lanes have drawn: all of closed row groups, of open ones what was taken."""
    rows = Rows(sources, settings, processor())
    mixture = row_group_mixture(sources, STREAM_SEED)
    drawn: Counter[tuple[str, int, int]] = Counter()
    for number, state in enumerate(states):
        lane = Lane(number, rows, mixture, settings, STREAM_SEED)
        for _ in range(state["opened"]):
            lane._open_row_group()
        taken = {serial: count for _, _, serial, count in state["units"]}
        for group in lane._open:
            order = group.order[: taken.get(group.serial, len(group.order))].tolist()
            drawn.update((group.source, group.row_group, row) for row in order)
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("field", STREAMS)
def test_a_changed_stream_loses_and_repeats_nothing(
    streamed: dict[str, StreamSource], field: str
) -> None:
    """12 packs a step, then 8 on 4 ranks, which begins within a round of lanes, then 6 on 2."""
    before = changed(STREAM, lanes=4, open_packs=5)
    after = changed(before, **STREAMS[field])
    rows = Rows(streamed, before, processor())
    ranks = loaders(streamed, 1, 0, before, 3)
    packs = [pack for _ in range(3) for pack in read_step(ranks)]
    state = saved(ranks[0])
    for world, size, settings, steps in ((4, 8, after, 2), (2, 6, before, 1), (4, 8, after, 3)):
        ranks = loaders(streamed, world, 0, settings, size)
        for loader in ranks:
            loader.load_state_dict(state)
        for _ in range(steps):
            step = read_step(ranks)
            assert len(step) == size
            packs += step
        states = [saved(loader) for loader in ranks]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert state["consumed"] == len(packs) == 9 + 16 + 6 + 24
    waiting: Counter[tuple[str, int, int]] = Counter()
    for lane in state["lanes"]:
        held = [pack["items"] for pack in lane["packer"]["bins"]]
        held += [pack[0] for name in ("finished", "arrived", "ordered") for pack in lane[name]]
        waiting.update((n, group, row) for items in held for n, group, row, _, _ in items)
    drawn = drawn_rows(streamed, after, state["lanes"])
    assert drawn.total() > 150
    expected = Counter({f"{n}/{rows.key(n, g, r)}": 0 for n, g, r in drawn})
    for (name, group, row), count in (drawn - waiting).items():
        expected[f"{name}/{rows.key(name, group, row)}"] += count
    assert Counter(i for pack in packs for i in pack) == +expected
    assert not waiting - drawn


@pytest.mark.slow
@pytest.mark.parametrize("consumed", [13, 15])
def test_lanes_go_on_making_the_same_blocks(
    streamed: dict[str, StreamSource], consumed: int
) -> None:
    """Saved where one lane is a block ahead, or behind; later all are in the same one again."""
    before = changed(STREAM, lanes=4, balance_block=12)
    (loader,) = loaders(streamed, 1, 0, before, 1)
    for _ in range(consumed):
        loader.next_step()
    state = saved(loader)
    blocks = [lane["block"] for lane in state["lanes"]]
    assert state["sizes"] == [[0, 3]] and len(set(blocks)) == 2
    (loader,) = loaders(streamed, 1, 0, changed(before, balance_block=20), 1)
    loader.load_state_dict(state)
    assert loader.sizes == [(0, 3), (max(blocks) + 1, 5)]
    for _ in range(4 * (3 * (max(blocks) + 1) + 5) - consumed):
        loader.next_step()
    # Every lane has just given the last pack of the first block of 5.
    lanes = saved(loader)["lanes"]
    assert [(lane["block"], lane["ordered"]) for lane in lanes] == [(max(blocks) + 2, [])] * 4


def test_a_stream_s_state_of_an_earlier_version_is_refused(
    streamed: dict[str, StreamSource],
) -> None:
    state = saved(loaders(streamed)[0])
    del state["sizes"]
    with pytest.raises(UserError, match="stream is of an older version"):
        loaders(streamed)[0].load_state_dict(state)


# ---------------------------------------------------------------------------------- fields


def example() -> Config:
    """With an entry in every dict of the data."""
    config = Config()
    config.data.sources = {"a": SourceConfig("shards")}
    config.data.validation = {"b": SourceConfig("shards")}
    config.data.ratings = {"relevance": 3}
    config.data.stream.datasets = {"fv": StreamDatasetConfig("hub", repeats={"small": 2})}
    return config


MARKS = marks(Config)
KEPT = {name: mark.why for name, mark in MARKS.items() if isinstance(mark, Kept)}
CHANGEABLE = {name: mark.why for name, mark in MARKS.items() if isinstance(mark, Changeable)}
# Which fields have no part in what a run computes: the fingerprints of stored checkpoints are made
# without them, so the list changes with new fields alone.
FREE_FIELDS = {
    "name",
    "run_dir",
    "dry_run",
    "planned_ranks",
    "parallel.activation_checkpointing",
    "parallel.compile",
    "parallel.joint_image_keys",
    "data.workers",
    "data.max_bad_share",
    "data.stream.memory_mib",
    "data.stream.attempts",
    "data.stream.retry_seconds",
    "trainer.log_every",
    "trainer.audit",
    "trainer.worst_case",
    "trainer.gc_every",
    "trainer.max_hours",
    "trainer.watchdog_minutes",
    "trainer.max_skipped_steps",
    "checkpoint",
    "evaluation",
    "export",
    "data.validation",
    "metrics",
}


def test_what_is_free_is_what_earlier_fingerprints_left_out() -> None:
    assert {name for name, mark in MARKS.items() if isinstance(mark, Free)} == FREE_FIELDS


def test_every_field_of_the_data_is_decided_once() -> None:
    """A new field: may it change under a plan's state? See casa_train/config/data_schema.py."""
    names = [n for n in flatten(example()) if n == "seed" or n.startswith("data.")]
    assert len(names) > 30
    for name in names:
        assert sum(matches(pattern, name) for pattern in MARKS) == 1, name
    patterns = {*KEPT, *CHANGEABLE}
    assert {p for p in patterns if not any(matches(p, name) for name in names)} == set()


def test_every_change_that_is_right_is_tried() -> None:
    digests = {name for name, reason in CHANGEABLE.items() if "digests" in reason}
    assert {*CHANGEABLE} - digests == {n for n in (*PLANS, *STREAMS) if n.startswith("data.")}


VALUES: dict[str, Any] = {
    "seed": 1,
    "data.locality": 4,
    "data.text_tokens": 1024,
    "data.image_tokens": 999,
    "data.max_pixels": 784,
    "data.min_pixels": 3136,
    "data.ratings.relevance": 4,
    "data.sources.a.weight": 2.0,
    "data.sources.a.repeats": 3,
    "data.sources.a.limit": 10,
    "data.stream.lanes": 8,
    "data.stream.datasets.fv.schema": "llava_onevision",
    "data.stream.datasets.fv.repeats.small": 5,
}


@pytest.mark.parametrize("name", VALUES)
def test_a_field_that_positions_are_counted_by_is_refused_though_allowed(name: str) -> None:
    before = plan_record(example(), processor())
    config = example()
    assert flatten(config)[name] != VALUES[name]
    put(config, name, VALUES[name])
    config.checkpoint.resume_allow = [name]
    now = plan_record(config, processor())
    found = SavedCheckpoint(
        7, Path("run/checkpoints/step_7"), {}, {"fingerprints": prints(before)}, None
    )
    with pytest.raises(UserError) as error:
        check_resume(found, prints(now), config, "earlier")
    message = str(error.value)
    reason = next(why for pattern, why in KEPT.items() if matches(pattern, name))
    assert f"{flatten(example())[name]!r} there, {VALUES[name]!r} now ({reason})" in message
    assert "step_7" in message and name in message and "model.init_from" in message


def test_every_field_that_is_kept_is_tried() -> None:
    assert all(any(matches(pattern, name) for name in VALUES) for pattern in KEPT)


def test_other_data_and_other_tokens_are_refused() -> None:
    record = plan_record(example(), processor())
    found = SavedCheckpoint(7, Path("run/step_7"), {}, {"fingerprints": prints(record)}, None)
    with pytest.raises(UserError, match="trained on other data"):
        check_resume(found, {**prints(record), "data": "{}"}, example(), "earlier")
    fields = json.loads(record)
    assert fields["model.template.system"] == ""
    system = json.dumps({**fields, "model.template.system": "Be kind."})
    with pytest.raises(UserError, match=r"template.system: '' there, 'Be kind.' now \(.*tokens"):
        refuse_changes("step_7", record, system)
    tokenizer = json.dumps({**fields, "model.tokenizer": "0123"})
    with pytest.raises(UserError, match=r"model.tokenizer: '\w+' there, '0123' now"):
        refuse_changes("step_7", record, tokenizer)


def prints(record: str) -> dict[str, str]:
    return {"config": "same", "data": '{"a": "digest"}', "plan": record}


def put(config: Config, name: str, value: Any) -> None:
    node: Any = config
    *path, last = name.split(".")
    for key in path:
        node = node[key] if isinstance(node, dict) else getattr(node, key)
    if isinstance(node, dict):
        node[last] = value
    else:
        setattr(node, last, value)
