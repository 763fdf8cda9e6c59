"""The calls of CASA's published clients of 2026, made as their scripts make them, on an export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, DynamicCache, LogitsProcessor

from tests.helpers import stranger
from tests.helpers.stranger import BLUE, GREEDY, LONG, RED, SHORT, TALL, ask
from tests.helpers.tiny_export import write_tiny_export

MECHANISMS = ("casa", "insertion")
STEPS = 6


@pytest.fixture(scope="module")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    @functools.cache
    def write(mechanism: str) -> str:
        return str(write_tiny_export(tmp_path_factory.mktemp("client") / mechanism, mechanism))

    return write


@pytest.fixture(scope="module")
def loaded(export_of: Callable[[str], str]) -> Callable[[str], tuple[Any, Any]]:
    return functools.cache(lambda mechanism: stranger.load(export_of(mechanism)))


def next_turn(batch: Any, stop: int) -> Any:
    """The turn with the last stop token before it, and its points one further."""
    batch["input_ids"] = torch.cat([torch.tensor([[stop]]), batch["input_ids"]], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["image_embeds_insertion_points"] = [p + 1 for p in batch["image_embeds_insertion_points"]]
    return batch


@pytest.mark.parametrize("mechanism", MECHANISMS)
@torch.no_grad()
def test_tokens_by_forward_alone_are_those_of_generate(
    loaded: Callable[[str], tuple[Any, Any]], mechanism: str
) -> None:
    """A stream of three turns: a prefill under a mask of past and new columns, then one column a
    token, positions that count on.
    """
    model, processor = loaded(mechanism)
    around = {
        "pre_image_tokens": model.config.pre_image_tokens,
        "post_image_tokens": model.config.post_image_tokens,
    }
    assert around["pre_image_tokens"] == processor.pre_image_tokens != []
    assert around["post_image_tokens"] == processor.post_image_tokens != []
    by_hand, by_generate = DynamicCache(), DynamicCache()
    position, last = 0, None
    for turn, picture in enumerate((RED, TALL, BLUE)):
        batch = processor.tokenize_messages(ask("And now?", picture), suppress_bos_token=turn > 0)
        if last is not None:
            batch = next_turn(batch, last)
        ids, (frame,) = batch["input_ids"], batch["pixel_values"]
        expected = model.generate_from_image(
            **batch, past_key_values=by_generate, reset_streaming=turn == 0, **around, **GREEDY
        )
        new = ids.shape[1]
        logits = model.forward(
            input_ids=ids,
            pixel_values=[frame],
            image_embeds_insertion_points=batch["image_embeds_insertion_points"],
            attention_mask=torch.ones(1, position + new),
            position_ids=torch.arange(position, position + new)[None],
            past_key_values=by_hand,
            use_cache=True,
            **around,
        ).logits
        position += new
        said: list[int] = []
        while True:
            # `GREEDY` has a least number of tokens, before which no end is taken.
            logits[:, -1, model.generation_config.eos_token_id] = -torch.inf
            said.append(int(logits[0, -1].argmax()))
            if len(said) == STEPS:
                break
            logits = model.forward(
                input_ids=torch.tensor([said[-1:]]),
                attention_mask=torch.ones(1, 1),
                position_ids=torch.tensor([[position]]),
                past_key_values=by_hand,
                **around,
            ).logits
            position += 1
        assert expected[0, new:].tolist() == said
        assert by_hand.get_seq_length() == by_generate.get_seq_length()
        if hasattr(by_hand, "_seen_tokens"):  # transformers 4.51
            assert by_hand._seen_tokens == by_hand.get_seq_length() > position - 1
        last = said[-1]


@torch.no_grad()
def test_images_without_points_stand_at_the_end_in_forward_too(
    loaded: Callable[[str], tuple[Any, Any]],
) -> None:
    model, processor = loaded("casa")
    frame = processor.image_processor.process_images(RED)
    ids, before, after = torch.tensor([[5, 6, 7]]), [11], [12, 13]
    appended = model(
        input_ids=ids, pixel_values=[frame], pre_image_tokens=before, post_image_tokens=after
    ).logits
    written = torch.tensor([[5, 6, 7, 11, 12, 13]])
    expected = model(
        input_ids=written, pixel_values=[frame], image_embeds_insertion_points=[torch.tensor([4])]
    ).logits
    assert torch.equal(appended, expected)
    with pytest.raises(ValueError, match="2 images for a batch of 1"):
        model(input_ids=ids, pixel_values=[frame, frame], pre_image_tokens=before)
    for more in ({}, {"labels": ids}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="would stand behind the last token"):
            model(input_ids=ids, pixel_values=[frame], **more)
    for around in ({}, {"pre_image_tokens": before}):
        with pytest.raises(ValueError, match="or call generate_from_image"):
            model.generate(input_ids=ids, pixel_values=[frame], **around)


@torch.no_grad()
def test_points_as_tensors_lists_or_arrays(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    model, processor = loaded("casa")
    batch = processor.tokenize_messages([SHORT, LONG, ask("No picture")])
    points = batch["image_embeds_insertion_points"]
    assert [p.dtype for p in points] == [torch.int64] * 3 and points[2].shape == (0,)
    moved = batch.to("cpu", torch.bfloat16)
    assert [p.dtype for p in moved["image_embeds_insertion_points"]] == [torch.int64] * 3
    expected = model(**batch).logits
    for form in (lambda p: p.tolist(), lambda p: p.numpy(), lambda p: p.int(), list):
        given = {**batch, "image_embeds_insertion_points": [form(p) for p in points]}
        assert torch.equal(model(**given).logits, expected)
    packed = model.pack(batch["input_ids"][1], points[1], batch["pixel_values"][1:])
    assert packed.chunks[0].points == tuple(points[1].tolist())


class NeverAgain(LogitsProcessor):
    """Forbids every token that it has let through, in whatever call."""

    def __init__(self) -> None:
        self.said: set[int] = set()
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, sorted(self.said)] = -torch.inf
        self.said |= set(scores.argmax(-1).tolist())
        return scores


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_logits_processors_keep_their_state(
    loaded: Callable[[str], tuple[Any, Any]], mechanism: str
) -> None:
    model, processor = loaded(mechanism)
    rule, cache = NeverAgain(), DynamicCache()
    answers: list[int] = []
    for turn in range(3):
        batch = processor.tokenize_messages(SHORT, suppress_bos_token=turn > 0)
        out = model.generate_from_image(
            **batch,
            past_key_values=cache,
            reset_streaming=turn == 0,
            logits_processor=[rule],
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=[-1, -2],
        )
        answers += out[0, batch["input_ids"].shape[1] :].tolist()
    assert rule.calls == len(answers) == len(set(answers)) == 12 and rule.said == set(answers)


def test_any_of_several_ends_stops(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    model, processor = loaded("casa")
    batch = processor.tokenize_messages(SHORT)
    width = batch["input_ids"].shape[1]
    free = model.generate_from_image(**batch, max_new_tokens=8, do_sample=False, eos_token_id=[-1])
    third = int(free[0, width + 2])
    stop = free[0, width:].tolist().index(third) + 1
    ends = [int(free.max()) + 1, third]
    out = model.generate_from_image(**batch, max_new_tokens=8, do_sample=False, eos_token_id=ends)
    assert torch.equal(out, free[:, : width + stop])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_left_padded_batches_of_sixteen(
    loaded: Callable[[str], tuple[Any, Any]], mechanism: str
) -> None:
    model, processor = loaded(mechanism)
    asked = [ask("Why is it so? " * (i % 5 + 1), *[RED, TALL, BLUE][: i % 4]) for i in range(16)]
    together = model.generate_from_image(**processor.tokenize_messages(asked), **GREEDY)
    for row, question in enumerate(asked):
        alone = model.generate_from_image(**processor.tokenize_messages(question), **GREEDY)
        assert torch.equal(together[row, -STEPS:], alone[0, -STEPS:]), row


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_a_compiled_tower_reads_frames_of_one_size(
    export_of: Callable[[str], str], in_place: bool
) -> None:
    model, processor = stranger.load(export_of("casa"))
    batch = processor.tokenize_messages(SHORT)
    expected = model.generate(**batch, **GREEDY)
    frames, backend = frames_like(batch["pixel_values"][0]), model.attention_backend
    tokens = [model.visual([frame], backend) for frame in frames]
    torch._dynamo.reset()
    if in_place:
        model.visual.compile(backend="eager")
    else:
        model.visual = torch.compile(model.visual, backend="eager")
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frame, plain in zip(frames, tokens, strict=True):
            torch.testing.assert_close(model.visual([frame], backend), plain, rtol=0, atol=1e-5)


def frames_like(frame: Tensor) -> list[Tensor]:
    return [frame, 255 - frame, frame.flip(1)]


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, None])
def test_a_configuration_with_dtypes_loads(
    export_of: Callable[[str], str], device_map: Any, loaded: Callable[[str], tuple[Any, Any]]
) -> None:
    if device_map is not None:
        pytest.importorskip("accelerate")
    config = AutoConfig.from_pretrained(export_of("casa"), trust_remote_code=True)
    config.torch_dtype = torch.bfloat16
    config.vision_config.torch_dtype = torch.bfloat16
    model = AutoModel.from_pretrained(
        export_of("casa"),
        config=config,
        trust_remote_code=True,
        device_map=device_map,
        torch_dtype=torch.bfloat16,
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    _, processor = loaded("casa")
    batch = processor.tokenize_messages(SHORT).to("cpu", torch.bfloat16)
    assert model.generate_from_image(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 6
