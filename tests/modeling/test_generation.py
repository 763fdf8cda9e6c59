"""Generation, streams and chunks through a cache, against the full forward, for every variant;
rows that end and buffers that grow, which no switch touches, for those of daily work.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from casa_train.modeling import streaming
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.tiny import (
    BACKBONES,
    HARD_PACK,
    PROPERTY,
    VOCABULARY,
    Layout,
    Sample,
    fill,
    random_image,
    sample_layouts,
    tiny_model,
    tiny_text_config,
)
from tests.helpers.variants import (
    DAILY,
    VARIANTS,
    every_mechanism,
    every_variant,
    follows_of,
    inserts,
    packed_logits,
    padded_batch,
    shared_model,
)


def greedy_check(
    model: CasaForConditionalGeneration, out: Tensor, batch: dict[str, Any], first: int
) -> None:
    """Every id of `out` from column `first` on is the best of a full forward without a cache."""
    new = out.shape[1] - batch["attention_mask"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(out), new, dtype=torch.long)], 1)
    logits = model(**{**batch, "input_ids": out, "attention_mask": mask}).logits
    assert torch.equal(logits[:, first - 1 : -1].argmax(-1), out[:, first:])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_several_ends_are_carried_and_each_ends_an_answer(backbone: str, tmp_path: Path) -> None:
    """As Llama 3 and Qwen publish theirs, without a token that begins or pads."""
    text = tiny_text_config(backbone, eos_token_id=[7, 9])
    model = tiny_model(text_config=text)
    model.save_pretrained(tmp_path)
    again = CasaForConditionalGeneration.from_pretrained(tmp_path).eval()
    for config in (again.config, again.config.text_config, again.generation_config):
        assert config.eos_token_id == [7, 9]
        assert config.bos_token_id is None and config.pad_token_id is None
    ids = torch.arange(5)[None]
    free = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    third = int(free[0, 7])
    stop = int((free[0, 5:] == third).nonzero()[0]) + 6
    for ends in ([VOCABULARY - 1, third], [third, VOCABULARY - 1]):
        again.generation_config.eos_token_id = ends
        assert torch.equal(
            again.generate(input_ids=ids, max_new_tokens=4, do_sample=False), free[:, :stop]
        )


@every_variant
def test_steps_with_the_cache_equal_the_full_forward(variant: str) -> None:
    """Greedy decoding of a batch with left padding: ids, and the logits of every step."""
    model = shared_model(variant)
    batch = padded_batch(fill(HARD_PACK))
    prompt = batch["input_ids"].shape[1]
    result = model.generate(
        **batch,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    out = result.sequences
    assert out.shape == (len(HARD_PACK), prompt + 6)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(out), 6, dtype=torch.long)], 1)
    with torch.no_grad():
        full = model(**{**batch, "input_ids": out, "attention_mask": mask}).logits
    steps = torch.stack(result.logits, 1)
    torch.testing.assert_close(steps.double(), full[:, prompt - 1 : -1], rtol=0, atol=1e-5)
    greedy_check(model, out, batch, prompt)


@every_variant
def test_batched_generation_equals_samples_alone(variant: str) -> None:
    model, samples = shared_model(variant), fill(HARD_PACK)
    batch = padded_batch(samples)
    arguments = [
        batch["input_ids"],
        batch["pixel_values"],
        batch["image_embeds_insertion_points"],
        batch["attention_mask"],
    ]
    together = model.generate_from_image(*arguments, max_new_tokens=5, do_sample=False)
    for row, sample in enumerate(samples):
        alone = model.generate_from_image(
            sample.ids[None],
            sample.images,
            [list(sample.layout.points)],
            None,
            max_new_tokens=5,
            do_sample=False,
        )
        assert torch.equal(alone[0, -5:], together[row, -5:])


@every_mechanism
def test_only_text_enters_the_cache_unless_images_are_inserted(mechanism: str) -> None:
    model = shared_model(mechanism)
    (sample,) = fill(HARD_PACK[:1])
    cache = DynamicCache()
    model.generate_from_image(
        sample.ids[None],
        sample.images,
        [list(sample.layout.points)],
        None,
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
    )
    # The last generated id has not entered: it comes with the next turn.
    text = sample.layout.text + 3
    images = sum(stream_tokens(mechanism, image) for image in sample.images)
    assert cache.get_seq_length() == text + images


def stream_tokens(variant: str, image: Tensor) -> int:
    """Tokens that an image puts into the text stream."""
    if not inserts(variant):
        return 0
    tokens = image.shape[1] * image.shape[2] // 28**2
    return int(VARIANTS[variant].get("queries", tokens))


Turn = tuple[Tensor, Tensor, list[list[int]], list[list[bool]], list[Tensor]]


def stream_turns(seed: int) -> Iterator[Turn]:
    """Three turns of two streams: new ids, their mask, columns of images, which follow, images.

    The first turn is padded, the second brings an image for each stream, the third for one only.
    Each stream has an image that follows one of an earlier turn.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [((2, 6), [[3, 4], [0, 0]]), ((2, 4), [[0], [2]]), ((2, 5), [[], [1]])]
    following = [[[False, True], [False, False]], [[True], [False]], [[], [True]]]
    for turn, (shape, points) in enumerate(shapes):
        ids = torch.randint(0, VOCABULARY, shape, generator=generator)
        mask = torch.ones_like(ids)
        if turn == 0:
            mask[0, :2] = 0
        grids = [(1, 2), (2, 2), (3, 1), (1, 1)]
        images = [random_image(generator, *grids[i]) for i in range(sum(map(len, points)))]
        yield ids, mask, points, following[turn], images


@every_variant
def test_three_turn_stream_equals_the_full_forward(variant: str) -> None:
    """The last id of a turn enters with the next one, in the older window."""
    model = shared_model(variant)
    told = torch.zeros(2, 0, dtype=torch.long)
    masks, points, follows, images = [], [[], []], [[], []], [[], []]
    slots = waiting = 0
    model.start_ca_streaming_states()
    for ids, mask, columns, following, pixels in stream_turns(seed=5):
        remaining = list(pixels)
        for row in range(2):
            points[row] += [told.shape[1] + column for column in columns[row]]
            follows[row] += following[row]
            images[row] += [remaining.pop(0) for _ in columns[row]]
        out = model.generate_from_image(
            ids,
            pixels,
            columns,
            mask,
            reset_streaming=False,
            image_follows=following,
            max_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(out[:, : ids.shape[1]], ids)
        # A batch takes as many cache slots as its longest stream; the last of four ids stays out.
        entered = (mask.sum(1) + waiting).tolist()
        for row, new in enumerate(columns):
            newest = images[row][len(images[row]) - len(new) :]
            entered[row] += sum(stream_tokens(variant, image) for image in newest)
        slots += max(entered) + 3
        if "replace" not in variant:  # the library counts in the first block, which may not attend
            assert model.streaming_cache.get_seq_length() == slots
        masks += [mask, torch.ones(2, 4, dtype=torch.long)]
        prompt = told.shape[1] + ids.shape[1]
        told = torch.cat([told, out], 1)
        waiting = 1
        transcript = {
            "attention_mask": torch.cat(masks, 1),
            "image_embeds_insertion_points": points,
            "image_follows": follows,
            "pixel_values": images[0] + images[1],
        }
        greedy_check(model, told, transcript, prompt)
    model.reset_ca_streaming_states()


@pytest.mark.parametrize(
    ("variant", "answer_end"), [(v, end) for v in sorted(DAILY) for end in (None, 17)]
)
def test_a_row_that_ends_first_goes_on_as_it_does_alone(
    variant: str, answer_end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing behind an end enters; before an image the end goes, elsewhere it is the template's,
    and both are decided row by row.
    """
    model, turns = shared_model(variant), list(stream_turns(seed=5))
    options = {"max_new_tokens": 6, "do_sample": False}
    monkeypatch.setattr(model.config, "answer_end_token", answer_end)
    ids, mask, columns, follows, pixels = turns[0]
    free = model.generate_from_image(ids, pixels, columns, mask, **options)[:, ids.shape[1] :]
    end = next(i for i in free[0].tolist()[:4] if i not in free[1].tolist())
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, VOCABULARY])
    monkeypatch.setattr(model.generation_config, "pad_token_id", 3)

    def answers(rows: list[int]) -> list[list[list[int]]]:
        cache, told = DynamicCache(), []
        for turn, (ids, mask, columns, follows, pixels) in enumerate(turns):
            width = ids.shape[1]
            remaining = list(pixels)
            images = [[remaining.pop(0) for _ in row] for row in columns]
            out = model.generate_from_image(
                ids[rows],
                [image for row in rows for image in images[row]],
                [columns[row] for row in rows],
                mask[rows],
                image_follows=[follows[row] for row in rows],
                past_key_values=cache,
                reset_streaming=turn == 0,
                **options,
            )
            said = out[:, width:].tolist()
            told.append([row[: row.index(end) + 1] if end in row else row for row in said])
        return told

    together = answers([0, 1])
    assert together[0][0][-1] == end and len(together[0][0]) < len(together[0][1])
    for row in range(2):
        assert [turn[0] for turn in answers([row])] == [turn[row] for turn in together]


@every_mechanism
def test_a_batch_of_which_a_row_has_ended_keeps_the_others(mechanism: str) -> None:
    """`generate` with the whole conversation: pads behind an end are text for no row."""
    model = shared_model(mechanism)
    ids, mask, columns, follows, pixels = next(stream_turns(seed=5))
    batch = {"attention_mask": mask, "pixel_values": pixels}
    batch["image_embeds_insertion_points"] = columns
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    free = model.generate(input_ids=ids, **batch, **options)[:, ids.shape[1] :].tolist()
    end = next(i for i in free[0][:4] if i not in free[1])
    cache, options["eos_token_id"] = DynamicCache(), end
    told = model.generate(input_ids=ids, **batch, past_key_values=cache, **options)
    spoken = torch.ones(2, 6, dtype=torch.long)
    spoken[0, free[0].index(end) + 1 :] = 0
    new = torch.arange(8).reshape(2, 4)
    whole = {**batch, "input_ids": torch.cat([told, new], 1)}
    whole["attention_mask"] = torch.cat([mask, spoken, torch.ones_like(new)], 1)
    expected = model.generate(**whole, **options)
    assert torch.equal(model.generate(**whole, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("variant", sorted(DAILY))
def test_a_stream_outgrows_its_buffers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "GROWTH_SLOTS", 3)
    test_three_turn_stream_equals_the_full_forward(variant)


@pytest.mark.skipif(not hasattr(DynamicCache(), "layers"), reason="a cache of transformers 5")
@every_mechanism
def test_cached_keys_are_not_copied_for_every_token(mechanism: str) -> None:
    model, cache = tiny_model(mechanism), DynamicCache()
    places = []
    for _ in range(3):
        ids = torch.zeros(1, 2, dtype=torch.long)
        options = dict(reset_streaming=False, past_key_values=cache, do_sample=False)
        model.generate_from_image(ids, None, [[]], max_new_tokens=3, **options)
        places.append(cache.layers[0].keys.data_ptr())
    assert places[0] == places[1] == places[2]
    assert cache.layers[0].keys.shape[2] == 3 * 5 - 1


@every_variant
@settings(PROPERTY, max_examples=8)
@given(layout=sample_layouts(), data=st.data(), seed=st.integers(0, 999))
def test_chunks_with_a_cache_equal_the_whole(
    variant: str, layout: Layout, data: st.DataObject, seed: int
) -> None:
    """A sample cut anywhere into up to three chunks; images at a cut stay on one side of it."""
    cuts = sorted(data.draw(st.sets(st.integers(1, layout.text), max_size=2)) - {layout.text})
    late = data.draw(st.booleans())
    model, (sample,) = shared_model(variant), fill([layout], seed)
    assert_chunks_equal_whole(model, sample, cut_sample(sample, cuts, late))


@every_mechanism
def test_consecutive_images_share_a_window_over_a_chunk_boundary(mechanism: str) -> None:
    """No text stands between the end of one chunk and the start of the next."""
    model = shared_model(mechanism)
    (sample,) = fill([Layout(5, (1, 3, 3), ((1, 1), (1, 2), (2, 1)))])
    chunks = cut_sample(sample, [3], late=True)
    # Move the first image at the cut to the chunk before.
    chunks[0]["pixel_values"].append(chunks[1]["pixel_values"].pop(0))
    chunks[0]["image_embeds_insertion_points"] = [[1, 3]]
    chunks[1]["image_embeds_insertion_points"] = [[0]]
    chunks[0]["image_follows"], chunks[1]["image_follows"] = [[False] * 2], [[False]]
    assert_chunks_equal_whole(model, sample, chunks)


def cut_sample(sample: Sample, cuts: list[int], late: bool) -> list[dict[str, Any]]:
    """Forward keywords of each chunk of a sample.

    :param cuts: text tokens before each cut.
    :param late: whether images at a cut come with the chunk after it.
    """
    chunks = []
    for start, stop in zip([0, *cuts], [*cuts, sample.layout.text], strict=True):
        last = stop == sample.layout.text
        inside = [
            i
            for i, point in enumerate(sample.layout.points)
            if start < point < stop
            or (point == start and (late or start == 0))
            or (point == stop and (not late or last))
        ]
        chunks.append(
            {
                "input_ids": sample.ids[None, start:stop],
                "image_embeds_insertion_points": [
                    [sample.layout.points[i] - start for i in inside]
                ],
                "image_follows": [[follows_of(sample.layout)[i] for i in inside]],
                "pixel_values": [sample.images[i] for i in inside],
            }
        )
    return chunks


@torch.no_grad()
def assert_chunks_equal_whole(
    model: CasaForConditionalGeneration, sample: Sample, chunks: list[dict[str, Any]]
) -> None:
    """Chunks through one cache give the logits of the whole sample."""
    cache = DynamicCache()
    apart = [model(**chunk, past_key_values=cache).logits[0] for chunk in chunks]
    whole = packed_logits(model, [sample])
    torch.testing.assert_close(torch.cat(apart), whole, rtol=0, atol=1e-9)


@every_variant
def test_a_second_turn_of_generate_with_the_whole_conversation(variant: str) -> None:
    """All ids beside the cache, with all images as Hugging Face's chats have them, or new ones."""
    model, options = shared_model(variant), {"max_new_tokens": 4, "do_sample": False}
    told = torch.zeros(2, 0, dtype=torch.long)
    caches = DynamicCache(), DynamicCache()
    masks: list[Tensor] = []
    points, follows, images = [[], []], [[], []], [[], []]
    for ids, mask, columns, following, pixels in stream_turns(seed=5):
        new = [[told.shape[1] + column for column in row] for row in columns]
        remaining = list(pixels)
        for row in range(2):
            points[row] += new[row]
            follows[row] += following[row]
            images[row] += [remaining.pop(0) for _ in new[row]]
        masks.append(mask)
        whole = {
            "input_ids": torch.cat([told, ids], 1),
            "attention_mask": torch.cat(masks, 1),
            "image_embeds_insertion_points": points,
            "image_follows": follows,
            "pixel_values": images[0] + images[1],
        }
        late = {"image_embeds_insertion_points": new, "image_follows": following}
        told = model.generate(**whole, past_key_values=caches[0], **options)
        greedy_check(model, told, whole, whole["input_ids"].shape[1])
        late = {**whole, **late, "pixel_values": pixels}
        assert torch.equal(model.generate(**late, past_key_values=caches[1], **options), told)
        masks.append(torch.ones(2, 4, dtype=torch.long))
    moved = {"image_embeds_insertion_points": [[], [3]], "pixel_values": pixels}
    with pytest.raises(ValueError, match=r"points \[3\] of sample 1.*with images at \[0, 0, 12"):
        model.generate(told, **moved, past_key_values=caches[0])
    with pytest.raises(ValueError, match="do not begin with the ids that past_key_values holds"):
        model.generate(told[:, 1:], past_key_values=caches[0])


@every_variant
@torch.no_grad()
def test_rows_of_a_cache_take_their_streams_along(variant: str) -> None:
    """Reordered, selected and repeated rows, a pickled copy among them."""
    model, batch = shared_model(variant), padded_batch(fill(HARD_PACK))
    following = torch.arange(len(HARD_PACK))[:, None] + 5
    image = random_image(torch.Generator().manual_seed(1), 1, 2)

    def three_steps(cache: DynamicCache, rows: list[int]) -> Tensor:
        ids, points = following[rows], [[int(row == 2)] * (row % 2) for row in rows]
        images = [image for row in points for _ in row]
        first = model(input_ids=ids, past_key_values=cache).logits
        second = model(
            input_ids=torch.cat([ids, ids], 1),
            pixel_values=images,
            image_embeds_insertion_points=points,
            past_key_values=cache,
        ).logits
        return torch.cat([first, second, model(input_ids=ids, past_key_values=cache).logits], 1)

    def filled() -> DynamicCache:
        cache = DynamicCache()
        model(**batch, past_key_values=cache)
        model(input_ids=following, past_key_values=cache)
        return cache

    expected = three_steps(filled(), [0, 1, 2, 3])
    for rows, move in (
        ([2, 0, 3, 1], lambda c, rows: c.reorder_cache(torch.tensor(rows))),
        ([2, 2, 0, 1], lambda c, rows: c.reorder_cache(torch.tensor(rows))),
        ([3, 1], lambda c, rows: c.batch_select_indices(torch.tensor(rows))),
        ([0, 0, 1, 1, 2, 2, 3, 3], lambda c, rows: c.batch_repeat_interleave(2)),
    ):
        cache = pickle.loads(pickle.dumps(filled()))
        move(cache, rows)
        torch.testing.assert_close(three_steps(cache, rows), expected[rows], rtol=0, atol=1e-9)


@every_mechanism
@torch.no_grad()
def test_an_emptied_cache_begins_a_stream(mechanism: str) -> None:
    model, batch = shared_model(mechanism), padded_batch(fill(HARD_PACK))
    expected = model(**batch).logits
    cache = DynamicCache()
    for rows in (3, 4):  # a new stream may have another number of samples
        model(input_ids=torch.zeros(rows, 2, dtype=torch.long), past_key_values=cache)
        cache.reset()
    assert torch.equal(model(**batch, past_key_values=cache).logits, expected)
    held = cache.get_seq_length()
    cache.crop(-held)
    assert torch.equal(model(**batch, past_key_values=cache).logits, expected)
    assert cache.get_seq_length() == held


@every_mechanism
def test_image_tokens_around_an_appended_image(mechanism: str) -> None:
    """Without insertion points each row ends: ids before the image, the image, ids after it."""
    model = shared_model(mechanism)
    ids = torch.tensor([[5, 6, 7]])
    image = random_image(torch.Generator().manual_seed(0), 2, 2)
    short = model.generate_from_image(
        ids,
        [image],
        None,
        None,
        pre_image_tokens=[11],
        post_image_tokens=[12, 13],
        max_new_tokens=16,
        do_sample=False,
    )
    written = torch.tensor([[5, 6, 7, 11, 12, 13]])
    long = model.generate_from_image(
        written, [image], [[4]], None, max_new_tokens=16, do_sample=False
    )
    assert torch.equal(short, long)


@every_mechanism
def test_without_a_cache_every_token_still_reads_the_images(mechanism: str) -> None:
    model, batch = shared_model(mechanism), padded_batch(fill(HARD_PACK))
    answers = [
        model.generate(**batch, use_cache=use_cache, max_new_tokens=6, do_sample=False)
        for use_cache in (True, False)
    ]
    assert torch.equal(*answers)


def test_what_generation_cannot_do_is_refused_by_name() -> None:
    """Each of these would change the answer without a word."""
    model = shared_model("casa", torch.float32)
    batch, right = (padded_batch(fill(HARD_PACK), left=left) for left in (True, False))
    with pytest.raises(ValueError, match="ends in padding.*padding_side"):
        model.generate(**right, max_new_tokens=2)
    depth = model.model.config.num_hidden_layers
    for name, value in (
        ("prompt_lookup_num_tokens", 2),
        ("assistant_model", model),
        ("assistant_early_exit", 1),
        ("token_healing", True),
        ("penalty_alpha", 0.6),
        ("prefill_chunk_size", 3),
    ):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            model.generate(**batch, **{name: value}, top_k=4, max_new_tokens=2)
        if name != "assistant_model":
            config = GenerationConfig(max_new_tokens=2)
            setattr(config, name, value)
            with pytest.raises(ValueError, match=f"{name} is not supported"):
                model.generate(**batch, generation_config=config)
    assert model.model.config.num_hidden_layers == depth
    with pytest.raises(ValueError, match="cache_implementation='paged' is not supported"):
        model.generate(**batch, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(ValueError, match="StaticCache, whose|cache_implementation='static'"):
        model.generate(**batch, cache_implementation="static", max_new_tokens=2)
    cache = DynamicCache()
    model(**batch, past_key_values=cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match="holds 6 tokens, but 7 entered"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)
