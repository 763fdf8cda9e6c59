"""Mixture, packing and the global order of packs, from lengths alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.mixture import Mixture, SourceSize
from casa_train.data.packing import BestFitPacker
from casa_train.data.prepared.plan import IMAGE, VIDEO, Pack, Planner, PlanSource
from casa_train.errors import UserError

SEED = 5
SETTINGS = DataConfig(
    text_tokens=201,
    image_tokens=101,
    packs_per_step=6,
    open_packs=4,
    balance_block=4,
    balance_group=3,
)
BLOCK = 24


def source(samples: int, seed: int, modality: str = IMAGE, repeats: int = 1) -> PlanSource:
    """Random lengths; some samples have no image, some exceed the budgets."""
    generator = np.random.default_rng(seed)
    text = generator.integers(1, 230, samples)
    images = generator.integers(0, 110, samples) * (generator.random(samples) < 0.8)
    size = SourceSize(samples, repeats=repeats)
    return PlanSource(text.astype(np.int32), images.astype(np.int32), size, modality)


SOURCES = {"a": source(300, 1), "b": source(40, 2, repeats=6)}
MIXED = {**SOURCES, "v": source(200, 3, VIDEO)}


def first(count: int, planner: Planner) -> list[Pack]:
    return list(itertools.islice(planner, count))


# ------------------------------------------------------------------------------------- mixture


def test_rates_hold_at_every_moment() -> None:
    sources = {"a": SourceSize(7, 0.6), "b": SourceSize(11, 0.3), "c": SourceSize(3, 0.1)}
    mixture = Mixture(sources, seed=0)
    drawn: Counter[str] = Counter()
    for total in range(1, 1001):
        drawn[mixture.names[int(mixture.take(1)[0][0])]] += 1
        assert all(abs(drawn[n] - mixture.rates[n] * total) < 2 for n in sources)


def test_every_epoch_sees_every_sample_once_in_a_new_order() -> None:
    mixture = Mixture({"a": SourceSize(50)}, seed=0)
    epochs = [mixture.take(50)[1].tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_repeats_oversample() -> None:
    mixture = Mixture({"a": SourceSize(10, repeats=6), "b": SourceSize(60)}, seed=0)
    drawn = Counter(mixture.names[i] for i in mixture.take(1200)[0])
    assert drawn == {"a": 600, "b": 600}


def test_weights_for_some_sources_only_are_refused() -> None:
    with pytest.raises(UserError, match=r"\['b'\] have no weight"):
        Mixture({"a": SourceSize(1, 0.5), "b": SourceSize(1)}, seed=0)


# ------------------------------------------------------------------------------------- packing


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=200),
    st.integers(1, 8),
    st.integers(1, 50),
)
def test_packs_keep_both_budgets_and_lose_nothing(
    sizes: list[tuple[int, int]], open_packs: int, max_age: int
) -> None:
    packer = BestFitPacker(Budget(40, 60), open_packs, max_age)
    finished = []
    for i, (text, images) in enumerate(sizes):
        finished += packer.add((str(i), i), text, images)
        assert len(packer.bins) <= open_packs
        assert all(packer.seen - b.born <= max_age for b in packer.bins)
    everything = [*finished, *packer.bins]
    assert sorted(i for b in everything for _, i in b.items) == list(range(len(sizes)))
    for b in everything:
        assert b.text == sum(sizes[i][0] for _, i in b.items) <= 40
        assert b.images == sum(sizes[i][1] for _, i in b.items) <= 60


def test_best_fit_takes_the_fullest_pack_that_fits() -> None:
    packer = BestFitPacker(Budget(10, 100), open_packs=3)
    for text in (6, 7, 8):
        packer.add(("s", text), text, 0)
    packer.add(("s", 3), 3, 0)
    assert sorted(b.text for b in packer.bins) == [6, 8, 10]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_draws_in_any_portions_give_one_sequence(portions: list[int]) -> None:
    sources = {"a": SourceSize(70), "b": SourceSize(11, repeats=3)}
    whole, parts = Mixture(sources, seed=2), Mixture(sources, seed=2)
    drawn = [parts.take(n) for n in portions]
    expected = whole.take(sum(portions))
    for i in (0, 1):
        assert np.array_equal(np.concatenate([d[i] for d in drawn]), expected[i])
    # What was drawn and not used can be drawn again.
    resumed = Mixture(sources, seed=2)
    resumed.load_drawn(parts.put_back(drawn[-1][0]))
    assert all(map(np.array_equal, resumed.take(portions[-1]), drawn[-1]))


def test_locality_reads_few_shards_at_a_time() -> None:
    shards = np.repeat(np.arange(10), 20)
    mixture = Mixture({"a": SourceSize(200, shards=shards)}, seed=0, locality=2)
    rows = mixture.take(200)[1]
    assert sorted(rows) == list(range(200))
    groups = [set(shards[rows[i : i + 40]]) for i in range(0, 200, 40)]
    assert all(len(group) == 2 for group in groups)
    assert shards[rows[:40]].tolist() != sorted(shards[rows[:40]])


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.sources.b has the rate 0"):
        Mixture({"a": SourceSize(1, 1.0), "b": SourceSize(1, 0.0)}, seed=0)


# ------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("sources", [SOURCES, MIXED], ids=["images", "mixed"])
def test_plan_is_a_pure_function_and_resumes_anywhere(sources: dict[str, PlanSource]) -> None:
    reference = first(130, Planner(sources, SETTINGS, SEED))
    assert [p.index for p in reference] == list(range(130))
    for consumed, ahead in ((0, 0), (0, 9), (1, 1), (23, 60), (24, 24), (72, 80), (100, 130)):
        running = Planner(sources, SETTINGS, SEED)
        first(ahead, running)
        state = json.loads(json.dumps(running.state_dict(consumed)))
        second = Planner(sources, SETTINGS, SEED)
        second.load_state_dict(state)
        again = json.loads(json.dumps(second.state_dict(consumed)))  # save right after restore
        third = Planner(sources, SETTINGS, SEED)
        third.load_state_dict(again)
        for resumed in (second, third):
            assert first(130 - consumed, resumed) == reference[consumed:]


def test_saving_while_planning_ahead_after_a_resume() -> None:
    reference = first(60, Planner(SOURCES, SETTINGS, SEED))
    running = Planner(SOURCES, SETTINGS, SEED)
    running.load_state_dict(Planner(SOURCES, SETTINGS, SEED).state_dict(20))
    first(30, running)
    second = Planner(SOURCES, SETTINGS, SEED)
    second.load_state_dict(running.state_dict(26))
    assert next(second) == reference[26]


def test_state_does_not_grow() -> None:
    planner = Planner(MIXED, SETTINGS, SEED)
    sizes = []
    for block in range(12):
        first(BLOCK, planner)
        sizes.append(len(json.dumps(planner.state_dict(block * BLOCK))))
    assert max(sizes[6:]) < 1.5 * max(sizes[1:6])


def test_every_sample_that_fits_is_planned_once_an_epoch() -> None:
    """Over-sampling included; the last few samples are still in open packs."""
    packs = first(600, Planner(SOURCES, SETTINGS, SEED))
    for name, plan_source in SOURCES.items():
        drawn = Counter(row for pack in packs for n, row, _, _ in pack.items if n == name)
        fits = (plan_source.text <= 200) & (plan_source.images <= 100)
        assert set(drawn) == set(np.flatnonzero(fits).tolist())
        assert max(drawn.values()) - min(drawn.values()) <= 3
    per_epoch = {n: Counter(i[0] for p in packs for i in p.items)[n] for n in SOURCES}
    fitting = {n: ((s.text <= 200) & (s.images <= 100)).sum() for n, s in SOURCES.items()}
    rates = per_epoch["b"] / fitting["b"] / (per_epoch["a"] / fitting["a"])
    assert rates == pytest.approx(6, rel=0.05)


def test_packs_say_what_they_hold_and_keep_the_budgets() -> None:
    for pack in first(100, Planner(MIXED, SETTINGS, SEED)):
        for name, row, text, images in pack.items:
            assert (MIXED[name].text[row], MIXED[name].images[row]) == (text, images)
        assert pack.text_tokens == sum(item[2] for item in pack.items) <= 200
        assert pack.image_tokens == sum(item[3] for item in pack.items) <= 100


def modalities(packs: Sequence[Pack]) -> list[str]:
    found = [{MIXED[name].modality for name, _, _, _ in pack.items} for pack in packs]
    assert all(len(kinds) == 1 for kinds in found)
    return [kinds.pop() for kinds in found]


@pytest.mark.parametrize(("share", "every"), [(0.25, 4), (0.5, 2), (1 / 3, 3)])
def test_every_nth_group_is_video_and_stays_so_after_a_resume(share: float, every: int) -> None:
    plan = replace(SETTINGS, video_share=share)
    packs = first(144, Planner(MIXED, plan, SEED))
    kinds = modalities(packs)
    groups = [kinds[i : i + 3] for i in range(0, 144, 3)]
    expected = [VIDEO if (g + 1) % every == 0 else IMAGE for g in range(48)]
    assert groups == [[kind] * 3 for kind in expected]
    running = Planner(MIXED, plan, SEED)
    first(90, running)
    resumed = Planner(MIXED, plan, SEED)
    resumed.load_state_dict(running.state_dict(77))
    assert modalities(first(40, resumed)) == kinds[77:117]


def test_a_block_is_sorted_into_groups_of_like_size_in_random_order() -> None:
    plan = replace(SETTINGS, balance_block=8, balance_group=6)
    packs = first(48 * 6, Planner(SOURCES, plan, SEED))
    orders = []
    for start in range(0, len(packs), 48):
        block = [p.image_tokens for p in packs[start : start + 48]]
        groups = [block[i : i + 6] for i in range(0, 48, 6)]
        assert all(group == sorted(group) for group in groups)
        ranges = sorted((group[0], group[-1]) for group in groups)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        orders.append([ranges.index((group[0], group[-1])) for group in groups])
    assert any(order != sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_balance_evens_the_load_of_ranks() -> None:
    plan = replace(SETTINGS, packs_per_step=16, balance_block=32, balance_group=8)
    images = np.array([p.image_tokens for p in first(16 * 64, Planner(SOURCES, plan, SEED))])

    def slowest(loads: np.ndarray) -> float:
        ranks = loads.reshape(-1, 8)
        return float(ranks.max(1).sum() / ranks.mean(1).sum())

    shuffled = np.random.default_rng(0).permutation(images)
    assert slowest(images) < 1 + 0.3 * (slowest(shuffled) - 1)


def test_groups_that_do_not_divide_a_block_are_refused() -> None:
    with pytest.raises(UserError, match=r"balance_group is 5.*divisor of 24"):
        Planner(SOURCES, replace(SETTINGS, balance_group=5), SEED)
