"""Decode steps against whole forward passes of the same model, and what a graph of them reads."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from casa_train.modeling import decoding, graphs, packed_model, room, streaming
from casa_train.modeling.casa import Casa
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers import tape
from tests.helpers.tape import Tape, TapeGraphs
from tests.helpers.tiny import HARD_PACK, VOCABULARY, fill, random_image, tiny_model
from tests.helpers.variants import (
    DAILY,
    MECHANISMS,
    VARIANTS,
    case,
    every_mechanism,
    every_variant,
    padded_batch,
    shared_model,
)

# Which rows of four have ended before each token: none, one, it and another, and all back again.
ENDED = [(), (), (2,), (2,), (2, 0), (2, 0), ()]


def walk(
    model: CasaForConditionalGeneration, ended: list[tuple[int, ...]] = ENDED
) -> tuple[list[Tensor], Any]:
    """Logits of a padded batch's prompt and then of one token after the other, and the cache."""
    batch, generator = padded_batch(fill(HARD_PACK)), torch.Generator().manual_seed(3)
    rows, cache = len(HARD_PACK), DynamicCache()
    with torch.no_grad():
        logits = [model(**batch, past_key_values=cache).logits[:, -1:]]
        for over in ended:
            ids = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
            finished = [row in over for row in range(rows)]
            out = model(ids, past_key_values=cache, finished=finished)
            logits.append(out.logits)
    return logits, cache


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> type[TapeGraphs]:
    """Steps run as on a GPU, with tapes for graphs."""
    monkeypatch.setattr(decoding, "fixed_shapes", lambda device: True)
    monkeypatch.setattr(decoding, "Graphs", TapeGraphs)
    monkeypatch.setattr(TapeGraphs, "replayed", 0)
    return TapeGraphs


def by_whole_passes(
    model: CasaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, *args: Any
) -> tuple[list[Tensor], Any]:
    with monkeypatch.context() as patched:
        patched.setattr(model, "decode_steps", False)
        found = walk(model, *args)
    assert found[1].casa.step is None
    return found


def assert_same_state(cache: Any, expected: Any) -> None:
    """The streams of two caches hold the same, wherever they keep it."""
    for one in (cache.casa, expected.casa):
        one.settle()
    for name in ("text", "span", "slots", "window_lengths", "window_text", "cache_length"):
        assert getattr(cache.casa, name) == getattr(expected.casa, name), name
    assert torch.equal(cache.casa.history, expected.casa.history)
    assert cache.casa.window.keys() == expected.casa.window.keys()
    for index, pair in expected.casa.window.items():
        for found, wanted in zip(cache.casa.window[index], pair, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@every_variant
def test_steps_equal_whole_passes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while rows have ended, and what the stream goes on from afterwards."""
    model = shared_model(variant)
    logits, cache = walk(model)
    expected, other = by_whole_passes(model, monkeypatch)
    assert cache.casa.step.is_open
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert_same_state(cache, other)


@pytest.mark.parametrize("variant", [case(variant) for variant in sorted(DAILY)])
def test_a_repeated_step_knows_nothing_of_the_token_it_was_captured_with(
    variant: str, monkeypatch: pytest.MonkeyPatch, tapes: type[TapeGraphs]
) -> None:
    """As a CUDA graph repeats it: every operation again, in the same memory, and no Python."""
    model = shared_model(variant)
    expected, other = by_whole_passes(model, monkeypatch)
    logits, cache = walk(model)
    # Of seven tokens at most three are the first of their kind: rows end, windows cease to be full.
    assert tapes.replayed >= len(ENDED) - 3
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert_same_state(cache, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [*MECHANISMS, "casa-qwen3", *({"casa-smollm3"} & VARIANTS.keys())]
)
def test_a_compiled_step_equals_whole_passes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph of a whole step, the same for every token until a row ends; for many streams."""
    model, tokens = shared_model(variant), [()] * 4 + [(1,)] * 3
    expected, _ = by_whole_passes(model, monkeypatch, tokens)
    torch.compiler.reset()
    compiled = torch.compile(packed_model._run_step, fullgraph=True, backend="eager")
    monkeypatch.setattr(packed_model, "_compiled_step", lambda: compiled)
    monkeypatch.setattr(model, "compile_decoding", True)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for _ in range(2):
        logits, cache = walk(model, tokens)
        for found, wanted in zip(logits, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert not cache.casa.step.text.exact
    assert 1 <= counters["unique_graphs"] <= 2


@every_mechanism
def test_steps_go_on_while_buffers_grow(
    mechanism: str, monkeypatch: pytest.MonkeyPatch, tapes: type[TapeGraphs]
) -> None:
    model, tokens = shared_model(mechanism), [()] * 9
    expected, other = by_whole_passes(model, monkeypatch, tokens)
    for module, name in ((decoding, "WINDOW_SLOTS"), (streaming, "GROWTH_SLOTS")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(room, "COLUMNS", 1)
    logits, cache = walk(model, tokens)
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert_same_state(cache, other)


@every_mechanism
def test_a_stream_copied_between_two_tokens_goes_on_as_two(mechanism: str) -> None:
    """Both copies write to buffers of their own, whether copied or pickled."""
    model, generator = shared_model(mechanism), torch.Generator().manual_seed(8)
    _, cache = walk(model)
    other = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    first, second = (torch.randint(0, VOCABULARY, (2, 4, 1), generator=generator) for _ in range(2))
    with torch.no_grad():
        logits = {
            name: [model(ids, past_key_values=stream).logits for ids in told]
            for name, stream, told in (("a", cache, first), ("b", other, second))
        }
        _, again = walk(model)
        for ids, expected in zip(second, logits["b"], strict=True):
            torch.testing.assert_close(model(ids, past_key_values=again).logits, expected)
    assert not torch.equal(logits["a"][1], logits["b"][1])


@pytest.mark.parametrize("mechanism", ["casa", "cross_attention", "gated_cross_attention"])
def test_buffers_of_windows_stay_where_they_are_from_turn_to_turn(mechanism: str) -> None:
    """So graphs of them hold, and many turns take no more memory than a few, text aside."""
    model, cache = tiny_model(mechanism), DynamicCache()
    places, sizes = set(), []
    for turn in range(40):
        frame = random_image(torch.Generator().manual_seed(turn), 2, 2)
        ids = torch.full((1, 3), turn)
        options = dict(reset_streaming=False, past_key_values=cache, do_sample=False)
        model.generate_from_image(ids, [frame], [[1]], max_new_tokens=3, **options)
        buffers = cache.casa.step.window.room.layers
        places.add(tuple(keys.data_ptr() for keys, _ in buffers.values()))
        sizes.append([cache.casa.step.window.used, len(cache.casa.window)])
    assert len(places) == 1
    assert all(size == sizes[1] for size in sizes[1:])


def test_hidden_states_of_steps_are_those_of_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = shared_model("casa"), padded_batch(fill(HARD_PACK))
    ids, finished = torch.arange(4)[:, None], [False, True, False, False]

    def states() -> tuple[Tensor, ...]:
        cache = DynamicCache()
        with torch.no_grad():
            model(**batch, past_key_values=cache)
            options = dict(past_key_values=cache, finished=finished, output_hidden_states=True)
            found = model(ids, **options).hidden_states
        assert (cache.casa.step is None) == (not model.decode_steps)
        return found

    found = states()
    monkeypatch.setattr(model, "decode_steps", False)
    for one, expected in zip(found, states(), strict=True):
        assert one.shape == (4, 1, 64) and not one[1].any()
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-9)


def turns_of(model: CasaForConditionalGeneration, cache: Any, between: Any = None) -> list[Tensor]:
    """Logits of two turns with an image each and four tokens behind it.

    :param between: called between the turns, with the model; returns the model of the second.
    """
    logits, generator = [], torch.Generator().manual_seed(12)
    for turn in range(2):
        if turn == 1 and between is not None:
            model = between(model)
        told = torch.randint(0, VOCABULARY, (1, 8), generator=generator)
        frame = random_image(generator, 2, 2)
        with torch.no_grad():
            model(told[:, :4], [frame], past_key_values=cache, image_embeds_insertion_points=[[2]])
            for column in range(4, 8):
                ids = told[:, column : column + 1]
                logits.append(model(ids, past_key_values=cache).logits)
    return logits


def with_other_weights(model: CasaForConditionalGeneration) -> CasaForConditionalGeneration:
    state = {name: 1.1 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def with_a_hook(model: CasaForConditionalGeneration) -> CasaForConditionalGeneration:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    return model


def with_another_forward(model: CasaForConditionalGeneration) -> CasaForConditionalGeneration:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    return model


def another_model(model: CasaForConditionalGeneration) -> CasaForConditionalGeneration:
    return with_other_weights(copy.deepcopy(model))


@every_variant
def test_what_a_graph_reads_is_looked_at_before_it_is_repeated(
    variant: str, monkeypatch: pytest.MonkeyPatch, tapes: type[TapeGraphs]
) -> None:
    """Anything else may have been freed by the next turn, and its memory may hold other numbers."""
    made: list[Tape] = []
    monkeypatch.setattr(tape, "Tape", lambda: made.append(Tape()) or made[-1])
    _, cache = walk(shared_model(variant))
    step = cache.casa.step
    looked_at = {place for place, *_ in step._read_by_graphs[0]}
    looked_at |= {given.data_ptr() for _, given, _ in step.graphs.tapes.values()}
    read = {tensor.data_ptr() for made_one in made for tensor in made_one.outside()}
    assert len(read) > 10 and read <= looked_at


@pytest.mark.parametrize(
    "between", [with_other_weights, with_a_hook, with_another_forward, another_model]
)
def test_what_changes_between_two_turns_is_seen(
    between: Any, monkeypatch: pytest.MonkeyPatch, tapes: type[TapeGraphs]
) -> None:
    """Graphs of the first turn would still read the weights and run the modules of then."""
    found = turns_of(tiny_model("casa", seed=2), DynamicCache(), between)
    assert tapes.replayed >= 3
    model = tiny_model("casa", seed=2)
    monkeypatch.setattr(CasaForConditionalGeneration, "decode_steps", False)
    unchanged = turns_of(tiny_model("casa", seed=2), DynamicCache())
    expected = turns_of(model, DynamicCache(), between)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-4)
    assert (expected[-1] - unchanged[-1]).abs().max() > 0.1


def test_graphs_are_forgotten_when_a_whole_pass_has_moved_the_buffers(
    monkeypatch: pytest.MonkeyPatch, tapes: type[TapeGraphs]
) -> None:
    """A token with gradients goes through the library's cache, which copies all keys."""

    def results() -> list[Tensor]:
        model, cache = tiny_model("casa", seed=2), DynamicCache()

        def with_gradients(model: CasaForConditionalGeneration) -> CasaForConditionalGeneration:
            model(torch.tensor([[5]]), past_key_values=cache)
            return model

        return turns_of(model, cache, with_gradients)

    found = results()
    assert tapes.replayed >= 5
    monkeypatch.setattr(CasaForConditionalGeneration, "decode_steps", False)
    for one, wanted in zip(found, results(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fixed", [True, False])
@every_mechanism
def test_a_token_that_fails_leaves_no_trace(
    mechanism: str, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model(mechanism)
    expected, other = by_whole_passes(model, monkeypatch, ENDED[:3])
    monkeypatch.setattr(decoding, "fixed_shapes", lambda device: fixed)
    monkeypatch.setattr(decoding, "Graphs", TapeGraphs)

    def failing(*arguments: Any, **options: Any) -> Tensor:
        raise KeyboardInterrupt

    generator, cache = torch.Generator().manual_seed(3), DynamicCache()
    with torch.no_grad():
        model(**padded_batch(fill(HARD_PACK)), past_key_values=cache)
        for over, wanted in zip(ENDED[:3], expected[1:], strict=True):
            ids = torch.randint(0, VOCABULARY, (len(HARD_PACK), 1), generator=generator)
            options = dict(past_key_values=cache, finished=[row in over for row in range(4)])
            with monkeypatch.context() as patched:
                patched.setattr(model.model.norm, "forward", failing)
                patched.setattr(Tape, "replay", failing)
                with pytest.raises(KeyboardInterrupt):
                    model(ids, **options)
            found = model(ids, **options).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert_same_state(cache, other)


@pytest.mark.parametrize("copied", [True, False])
@every_mechanism
def test_the_window_of_a_single_row_is_taken_over(mechanism: str, copied: bool) -> None:
    """By a copy of the model, or again by a model whose token failed: it lies in the buffers."""
    model = shared_model(mechanism)
    ids, frame = (
        torch.tensor([[5, 9, 2, 7, 3]]),
        random_image(torch.Generator().manual_seed(5), 3, 2),
    )
    first = dict(pixel_values=[frame], image_embeds_insertion_points=[[1]])
    cache, found = DynamicCache(), []
    with torch.no_grad():
        expected = model(ids, **first).logits[:, 2:]
        model(ids[:, :2], **first, past_key_values=cache)
        found.append(model(ids[:, 2:3], past_key_values=cache).logits)
        if copied:
            model = copy.deepcopy(model)
        else:
            with pytest.raises(IndexError):
                model(torch.tensor([[VOCABULARY]]), past_key_values=cache)
        for column in (3, 4):
            found.append(model(ids[:, column : column + 1], past_key_values=cache).logits)
    assert cache.casa.step.is_open
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-9)


def test_a_point_without_an_image_is_refused_as_ever() -> None:
    model = shared_model("casa")
    _, cache = walk(model)
    with torch.no_grad(), pytest.raises(ValueError, match="1 insertion points but 0 images"):
        points = [[0], [], [], []]
        ids = torch.arange(4)[:, None]
        model(ids, past_key_values=cache, image_embeds_insertion_points=points)


@every_mechanism
def test_a_stream_leaves_inference_mode_between_two_tokens(
    mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generator = shared_model(mechanism), torch.Generator().manual_seed(6)
    told = torch.randint(0, VOCABULARY, (3, 4, 1), generator=generator)

    def logits(*modes: Any) -> list[Tensor]:
        with modes[0]():
            _, cache = walk(model, [()] * 20)
        found = []
        for mode, ids in zip(modes, told, strict=True):
            with mode():
                found.append(model(ids, past_key_values=cache).logits.clone())
        assert cache.casa.step.is_open
        return found

    # The windows' buffers grow in inference mode, too.
    monkeypatch.setattr(decoding, "WINDOW_SLOTS", 1)
    expected = logits(torch.no_grad, torch.no_grad, torch.no_grad)
    mixed = logits(torch.inference_mode, torch.no_grad, torch.inference_mode)
    for one, wanted in zip(mixed, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-10)


class Told:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning_once(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    logger = Told()
    monkeypatch.setattr(packed_model, "logger", logger)
    return logger.lines


def test_a_forward_of_ones_own_takes_steps_where_its_class_says_so(told: list[str]) -> None:
    """What it does beside the pieces that know steps, nobody can tell from outside."""

    class Doubled(Casa):
        def run_layer(self, layer: Any, h: Tensor, images: Tensor, context: Any) -> Any:
            h, images = super().run_layer(layer, h, images, context)
            return 2 * h, images

    class Declared(Doubled):
        decode_steps = True

    model = tiny_model("casa", seed=4)
    results = []
    for base in (Doubled, Declared):
        model.mechanism.__class__ = base
        with torch.no_grad():
            results.append(walk(model))
    (expected, slow), (logits, fast) = results
    assert slow.casa.step is None and fast.casa.step.is_open
    assert "'casa' has a run_layer of its own" in told[0] and "decode_steps = True" in told[0]
    assert len(set(told)) == 1
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_cache_that_does_more_than_grow_is_left_to_whole_passes(told: list[str]) -> None:
    class Counting(DynamicCache):
        """Its layers are of a class of its own."""

    model, cache = tiny_model("insertion"), Counting()
    batch = padded_batch(fill(HARD_PACK))
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        if hasattr(cache, "layers"):
            for layer in cache.layers:
                layer.__class__ = type("CountingLayer", (type(layer),), {})
        out = model(torch.arange(4)[:, None], past_key_values=cache).logits
    assert out.isfinite().all() and cache.casa.step is None
    assert told == [
        "every token is decoded by a whole forward pass, slower than a decode step: the cache, a "
        "Counting, does more than grow"
    ]


def test_gradients_go_through_whole_passes(told: list[str]) -> None:
    model, cache = tiny_model("casa"), DynamicCache()
    model(**padded_batch(fill(HARD_PACK)), past_key_values=cache)
    out = model(torch.arange(4)[:, None], past_key_values=cache)
    out.logits.sum().backward()
    assert cache.casa.step is None and told == []
    assert all(p.grad is not None for p in model.model.layers[0].fusion.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_mechanism
def test_graphs_on_a_gpu_equal_whole_passes(
    mechanism: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row by lengths and four rows by masks; over turns, which bring other images."""
    monkeypatch.setattr(graphs, "BEFORE_CAPTURE", 2)
    model = tiny_model(mechanism).to("cuda", dtype)
    for rows in (HARD_PACK[:1], HARD_PACK):
        found: dict[bool, list[Tensor]] = {}
        for steps in (True, False):
            monkeypatch.setattr(model, "decode_steps", steps)
            cache, logits = DynamicCache(), []
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for _ in range(3):
                    batch = padded_batch(fill(rows))
                    batch["input_ids"] = batch["input_ids"].cuda()
                    follows = [[False] * len(points) for points in batch["image_follows"]]
                    model(**{**batch, "image_follows": follows}, past_key_values=cache)
                    for _ in range(5):
                        ids = torch.randint(0, VOCABULARY, (len(rows), 1), generator=generator)
                        logits.append(model(ids.cuda(), past_key_values=cache).logits)
            found[steps] = logits
            if steps:
                assert cache.casa.step.graphs._captured
        for one, expected in zip(found[True], found[False], strict=True):
            atol = 1e-4 if dtype == torch.float32 else 0.15
            torch.testing.assert_close(one, expected, rtol=0, atol=atol)
