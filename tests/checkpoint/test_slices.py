"""What some ranks wrote of parameters any other cut reads; what is not whole is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casa_train.checkpoint.slices import (
    FROZEN,
    MASTER,
    MOMENTS,
    STATE_DIRECTORY,
    SavedSlices,
    Slice,
    read_weights,
    write_slices,
)
from casa_train.distributed.random_state import derive_seed
from casa_train.errors import UserError
from tests.helpers.tiny import PROPERTY, tiny_model

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 3), "frozen": (7,)}
KINDS = (MASTER, *MOMENTS)


def value(name: str, kind: str) -> torch.Tensor:
    """The whole parameter, flat; every element is its own."""
    count = torch.Size(SHAPES[name]).numel()
    start = 1000 * sorted(SHAPES).index(name) + 100 * [*KINDS, FROZEN].index(kind)
    return torch.arange(start, start + count, dtype=torch.float32)


def cut(name: str, start: int, end: int) -> Slice:
    kinds = (FROZEN,) if name == "frozen" else KINDS
    values = {kind: value(name, kind)[start:end].clone() for kind in kinds}
    return Slice(name, SHAPES[name], start, values)


def ranks_of(bounds: list[int]) -> list[list[Slice]]:
    """All parameters as one vector, cut at the bounds: what each rank holds."""
    first, ranks = 0, []
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for last in [*sorted(bounds), total]:
        offset, held = 0, []
        for name, shape in SHAPES.items():
            count = torch.Size(shape).numel()
            start, end = max(first - offset, 0), min(last - offset, count)
            if start < end:
                held.append(cut(name, start, end))
            offset += count
        ranks.append(held)
        first = last
    return ranks


BOUNDS = st.lists(st.integers(0, 36), max_size=5)


@PROPERTY
@given(written=BOUNDS, wanted=BOUNDS)
def test_any_cut_reads_any_other(
    tmp_path_factory: pytest.TempPathFactory, written: list[int], wanted: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    for rank, held in enumerate(ranks_of(written)):
        write_slices(directory / STATE_DIRECTORY, rank, held, updates=9)
    saved = SavedSlices(directory / STATE_DIRECTORY)
    saved.check(SHAPES, ["frozen"])
    assert saved.updates == 9
    for expected in ranks_of(wanted):
        for piece in expected:
            blank = {kind: torch.full_like(v, -1) for kind, v in piece.values.items()}
            saved.fill(Slice(piece.name, piece.shape, piece.start, blank))
            for kind, v in piece.values.items():
                assert torch.equal(blank[kind], v)
    for name, weight in read_weights(directory).items():
        kind = FROZEN if name == "frozen" else MASTER
        assert torch.equal(weight, value(name, kind).view(SHAPES[name]))


def test_views_of_one_tensor_are_written_once(tmp_path: Path) -> None:
    flat = torch.zeros(100_000)
    slices = [
        Slice(str(i), (1000,), 0, {MASTER: flat[i : i + 1000]}) for i in range(0, 100_000, 1000)
    ]
    write_slices(tmp_path, 0, slices, 0)
    assert (tmp_path / "rank_00000.pt").stat().st_size < 1.1 * 400_000


@pytest.mark.parametrize(
    ("shapes", "frozen", "words"),
    [
        ({**SHAPES, "new": (2,)}, ["frozen"], "new was not saved"),
        ({k: v for k, v in SHAPES.items() if k != "b"}, ["frozen"], "b is not in the model"),
        ({**SHAPES, "a": (4, 3)}, ["frozen"], r"a has shape \(3, 4\) there, \(4, 3\) now"),
        (SHAPES, [], "frozen was frozen there and is trained now"),
        (SHAPES, ["frozen", "c"], "c was trained there and is frozen now"),
    ],
)
def test_another_model_is_refused_by_name(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], frozen: list[str], words: str
) -> None:
    write_slices(tmp_path, 0, ranks_of([])[0], 1)
    with pytest.raises(UserError, match=words):
        SavedSlices(tmp_path).check(shapes, frozen)


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no rank_\*\.pt"):
        SavedSlices(tmp_path)
    first, second = ranks_of([16])
    write_slices(tmp_path, 0, first, 1)
    with pytest.raises(UserError, match="4 of the 5 elements of b were saved"):
        SavedSlices(tmp_path).check(SHAPES, ["frozen"])
    write_slices(tmp_path, 1, second, 2)
    with pytest.raises(UserError, match=r"different updates \[1, 2\]"):
        SavedSlices(tmp_path)


@pytest.mark.parametrize(
    "mechanism", ["casa", "insertion", "qformer_insertion", "gated_cross_attention"]
)
def test_parameters_are_all_there_is_to_save(mechanism: str) -> None:
    model = tiny_model(mechanism)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert set(model.state_dict()) == names  # no buffers that a checkpoint would lack


def test_seeds_differ_by_step_and_rank() -> None:
    seeds = {derive_seed(3, step, rank) for step in range(20) for rank in range(20)}
    assert len(seeds) == 400
    assert derive_seed(3, 1, 2) == derive_seed(3, 1, 2) < 2**63
