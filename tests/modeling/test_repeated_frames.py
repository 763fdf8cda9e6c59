"""Frames of one size become a graph of the vision tower; tapes stand in for CUDA graphs."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading

import pytest
import torch
from torch import Tensor

from casa_train.modeling import graphs, repeated_frames
from casa_train.modeling.vision_qwen import QwenTower
from tests.helpers import tape
from tests.helpers.tape import Tape, TapeGraphs
from tests.helpers.tiny import random_image, randomise, tiny_vision_config

SIZES = ((4, 6), (5, 2))  # of frames, in cells of 28 pixels


def tower(seed: int = 0) -> QwenTower:
    made = QwenTower(tiny_vision_config(4)).eval()
    randomise(made, torch.Generator().manual_seed(seed))
    return made


def frames(count: int, size: tuple[int, int] = SIZES[0]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [random_image(generator, *size) for _ in range(count)]


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Towers repeat their frames as on a GPU; every tape that is made."""
    made: list[Tape] = []
    monkeypatch.setattr(repeated_frames, "graphs_pay", lambda device: True)
    monkeypatch.setattr(repeated_frames, "Graphs", TapeGraphs)
    monkeypatch.setattr(tape, "Tape", lambda: made.append(Tape()) or made[-1])
    return made


def check(repeating: QwenTower, images: list[Tensor]) -> None:
    """Each frame alone, as a tower says that repeats nothing."""
    plain = copy.deepcopy(repeating)
    plain.repeats = False
    for image in images:
        torch.testing.assert_close(repeating([image]), plain([image]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_frames_that_come_again_are_repeated_and_no_number_changes(tapes: list[Tape]) -> None:
    repeating = tower()
    check(repeating, frames(5))
    assert len(tapes) == 1
    check(repeating, [*frames(3, SIZES[1]), *frames(3)])  # another size between
    assert len(tapes) == 2
    two = [*frames(1), *frames(1, SIZES[1])]
    repeating.repeats = False
    expected = repeating(two)
    repeating.repeats = True
    torch.testing.assert_close(repeating(two), expected, rtol=0, atol=1e-6)
    check(repeating, frames(4))  # with a third kind all were forgotten
    assert len(tapes) == 4


@torch.no_grad()
def test_all_that_a_graph_reads_is_kept_or_looked_at(tapes: list[Tape]) -> None:
    repeating = tower()
    check(repeating, frames(3))
    kept = repeating._repeated
    known = {place for place, _ in kept._read}
    for layout in kept._layouts.values():
        segments = [*layout.full.cu_seqlens, *layout.windowed.cu_seqlens]
        tensors = [*layout.table, layout.order, *segments]
        for of_kind in (layout.full, layout.windowed):  # what attention on a CPU reads
            groups, positions = of_kind.groups
            rows = [rows for group in groups for rows in (group.query, group.key)]
            tensors += [positions, *(group.mask for group in groups if group.mask is not None)]
            tensors += [rows_of.index for rows_of in rows if rows_of.index is not None]
        known |= {tensor.data_ptr() for tensor in tensors}
    known |= {given.data_ptr() for _, given, _ in kept._graphs.tapes.values()}
    read = {tensor.data_ptr() for tensor in tapes[0].outside()}
    assert len(read) > 20 and read <= known


@torch.no_grad()
def test_what_changes_between_two_frames_is_seen(tapes: list[Tape]) -> None:
    repeating = tower()
    check(repeating, frames(2))
    other = tower(seed=1).state_dict()
    repeating.load_state_dict(other)  # into the same memory
    check(repeating, frames(2))
    assert len(tapes) == 1
    repeating.load_state_dict({name: 0.5 * value for name, value in other.items()}, assign=True)
    check(repeating, frames(2))
    assert len(tapes) == 2
    block = repeating.blocks[1]
    handle = block.register_forward_hook(lambda module, given, out: 2 * out)
    check(repeating, frames(2))
    assert len(tapes) == 2
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook
    handle = everywhere(lambda module, given, out: 2 * out if module is block.mlp else None)
    with_hook = repeating(frames(1))
    repeating.repeats = False
    torch.testing.assert_close(repeating(frames(1)), with_hook, rtol=0, atol=1e-6)
    repeating.repeats = True
    handle.remove()
    block.mlp.forward = torch.zeros_like
    check(repeating, frames(2))
    assert len(tapes) == 2
    del block.mlp.forward
    check(pickle.loads(pickle.dumps(copy.deepcopy(repeating))), frames(2))
    assert len(tapes) == 3


def test_what_is_differentiated_or_large_is_not_repeated(
    tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    repeating = tower()
    check(repeating, frames(2))
    assert not tapes
    monkeypatch.setattr(repeated_frames, "MOST_PATCHES", 4 * 4 * 6 - 1)
    with torch.no_grad():
        check(repeating, frames(2))
        assert not tapes
        patches = torch.zeros(40, 3)
        assert repeating._repeated.take(repeating, patches)
        with torch.autocast("cpu", torch.bfloat16):
            assert not repeating._repeated.take(repeating, patches)
        take = torch.compile(lambda x: repeating._repeated.take(repeating, x), backend="eager")
        assert not take(patches)
        check(repeating, frames(2, SIZES[1]))
    assert len(tapes) == 1


def test_threads_do_not_read_one_anothers_frames(
    tapes: list[Tape], request: pytest.FixtureRequest
) -> None:
    """A graph has one place for its input and one for its output."""
    repeating, images = tower(), frames(6)
    plain = copy.deepcopy(repeating)
    plain.repeats = False
    with torch.no_grad():
        expected = [plain([image]) for image in images]
        repeating(images[:1])
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    found: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def one_thread(number: int) -> None:
        for again in range(10):
            found[again, number] = repeating([images[number]])

    threads = [threading.Thread(target=one_thread, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tapes) == 1 and len(found) == 10 * len(images)
    for (_, number), tokens in found.items():
        torch.testing.assert_close(tokens, expected[number], rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_on_a_gpu_are_graphs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BEFORE_CAPTURE", 2)
    repeating = tower().to("cuda", dtype)
    plain = copy.deepcopy(repeating)
    plain.repeats = False
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            for image in frames(5):
                found, expected = repeating([image]), plain([image])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert len(repeating._repeated._graphs._captured) == 2
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        assert not repeating._repeated.take(repeating, torch.zeros(40, 3, device="cuda"))
