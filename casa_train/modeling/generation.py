"""Generation from images, in one go or as a stream that keeps only text in its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from .outputs import CACHE, NEW_NAME, OLD_NAME, one_cache, with_both_names
from .padded import append_images, as_ints, check_ids, image_list, valid_columns
from .streaming import StreamingState

# What enters a stream with the first step of `generate`; later steps bring text.
POINTS = "image_embeds_insertion_points"
IMAGE_INPUTS = ("pixel_values", POINTS, "image_follows")
OUTPUT_OPTIONS = ("output_hidden_states", "output_attentions")
# Ways to generate that a stream does not take, and why.
REFUSED = {
    "assistant_model": "a stream's state cannot take tokens back",
    "assistant_early_exit": "a stream's state cannot take tokens back",
    "prompt_lookup_num_tokens": "a stream's state cannot take tokens back",
    "penalty_alpha": "a stream's state cannot take tokens back",
    "token_healing": "it changes the ids that insertion points count",
    "prefill_chunk_size": "a prompt enters in one piece, with its images",
}


class StreamingGeneration(GenerationMixin):
    """What `generate` needs of the model, and the calls of CASA's published clients around it."""

    # The cache of the last `generate_from_image`, which `reset_streaming=False` continues.
    streaming_cache: Any = None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        prompt_columns: int | None = None,
        ends: Sequence[int] = (),
        ends_wait: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cuts `input_ids` down to the columns that the stream has not seen.

        :param prompt_columns: those of `input_ids` that were given, not generated.
        :param ends: ids that end a row of a batch; what is behind one enters no stream.
        :param ends_wait: nor does the end itself: it waits for the next turn, see `_before`.
        """
        cache = one_cache(past_key_values, cache)
        state = getattr(cache, "casa", None)
        new = input_ids[:, (0 if state is None else state.columns) :]
        inputs = {
            "input_ids": new.contiguous(),
            CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }
        for name in (*IMAGE_INPUTS, *OUTPUT_OPTIONS):
            if kwargs.get(name) is not None:
                inputs[name] = kwargs[name]
        if state is not None and prompt_columns is not None and len(input_ids) > 1 and ends:
            said = input_ids[:, prompt_columns:].tolist()
            found = [
                next((i for i in row[: None if ends_wait else -1] if i in ends), None)
                for row in said
            ]
            ended = {row: end for row, end in enumerate(found) if end is not None}
            if ended and len(ended) < len(said):  # where all ended, only other ranks go on
                inputs["finished"] = [row in ended for row in range(len(said))]
                if ends_wait:
                    state.waiting = ended
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Also notes the ends, which the library has settled by now."""
        ends = getattr(generation_config, "_eos_token_tensor", None)
        model_kwargs["ends"] = () if ends is None else ends.flatten().tolist()
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        if updated.get(CACHE) is not None:  # without a cache every step reads all anew
            for name in IMAGE_INPUTS:
                updated.pop(name, None)
        return updated

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`.

        With a cache that holds a stream, `input_ids` are all of its ids and the new ones, and so
        are images and their points: those that entered earlier are left out.

        :raises ValueError: beams, several return sequences, speculative decoding, right padding;
            images without insertion points; ids or images other than those that entered.
        """
        if kwargs.get("pixel_values") is not None and kwargs.get(POINTS) is None:
            raise ValueError(
                "pixel_values without image_embeds_insertion_points: give generate the points, as "
                "the processor returns them, or call generate_from_image with pre_image_tokens and "
                "post_image_tokens, which appends an image to every row"
            )
        state = getattr(one_cache(kwargs.get(OLD_NAME), kwargs.get(NEW_NAME)), "casa", None)
        if state is not None and state.history is not None:
            ids = given_ids(args, kwargs)
            if isinstance(ids, Tensor) and not starts_with(ids, state.history):
                raise ValueError(
                    "input_ids do not begin with the ids that past_key_values holds: give generate "
                    "all ids of the stream, as they entered, and then the new ones; or give the "
                    "new ones alone to generate_from_image(reset_streaming=False)"
                )
            if kwargs.get(POINTS) is not None:
                kwargs |= new_images(kwargs, state)
        return self._generate_text(*args, **kwargs)

    def _generate_text(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` where insertion points count from the first column that has not entered."""
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        config = given or self.generation_config
        for name in ("num_beams", "num_return_sequences"):
            value = kwargs.get(name, getattr(config, name, None))
            if value is not None and value > 1:
                raise ValueError(
                    f"{name}={value} is not supported: a stream's state cannot be reordered or "
                    "repeated yet; use greedy decoding or sampling with one sequence"
                )
        for name, reason in REFUSED.items():
            value = kwargs.get(name, getattr(config, name, None))
            if value:
                raise ValueError(f"{name} is not supported: {reason}; leave it out")
        if kwargs.get("cache_implementation", config.cache_implementation) == "paged":
            raise ValueError(
                "cache_implementation='paged' is not supported: it batches by itself and knows no "
                "images; leave it out"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, -1].all():
            raise ValueError(
                "attention_mask ends in padding, behind which nothing can be generated: pad on the "
                'left, with processor.tokenizer.padding_side = "left"'
            )
        cache = one_cache(kwargs.pop(OLD_NAME, None), kwargs.pop(NEW_NAME, None))
        if cache is not None:
            kwargs[CACHE] = cache
        ids = given_ids(args, kwargs)
        if ids is not None:
            check_ids(ids)
            kwargs["prompt_columns"] = ids.shape[1]
        out = super().generate(*args, **kwargs)
        return out if isinstance(out, Tensor) else with_both_names(out)

    @torch.no_grad()
    def generate_from_image(
        self,
        input_ids: Tensor,
        pixel_values: Sequence[Tensor] | Tensor | None,
        image_embeds_insertion_points: Sequence[Any] | None,
        attention_mask: Tensor | None = None,
        *,
        reset_streaming: bool = True,
        pre_image_tokens: Sequence[int] | None = None,
        post_image_tokens: Sequence[int] | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Generates from text and images, or continues a stream.

        :param input_ids: (B, T) new ids.
        :param pixel_values: images of the new ids.
        :param image_embeds_insertion_points: for each sample, columns of the new ids.
        :param reset_streaming: False continues the stream of `past_key_values` (or of the last
            call). The last id of a call enters the cache with the next one, in the older window: as
            the template has it, see `_before`.
        :param pre_image_tokens: with images but no insertion points for them, these ids are
            appended to every row, then the image stands, then `post_image_tokens`.
        :param cache: another name of `past_key_values`.
        :return: (B, T + new) the given ids and the new ones, as `generate` returns; with
            `return_dict_in_generate` as the `sequences` of its output.
        """
        check_ids(input_ids)
        images = image_list(pixel_values)
        if image_embeds_insertion_points is None and images:
            input_ids, attention_mask, image_embeds_insertion_points = append_images(
                input_ids, attention_mask, len(images), pre_image_tokens, post_image_tokens
            )
        cache = one_cache(past_key_values, cache)
        if cache is None:
            cache = None if reset_streaming else self.streaming_cache
        elif reset_streaming and getattr(cache, "casa", None) is not None:
            raise ValueError(
                "past_key_values holds a stream, but reset_streaming is true: pass "
                "reset_streaming=False to continue it or a new DynamicCache() to start over"
            )
        if cache is None:
            cache = DynamicCache()
        self.streaming_cache = cache
        state = getattr(cache, "casa", None)
        ids, mask, offset, points = input_ids, attention_mask, 0, image_embeds_insertion_points
        if mask is None:
            mask = torch.ones_like(ids)
        if state is not None and state.history is not None:
            ids, mask, points = self._with_history(state, ids, mask, points)
            offset = ids.shape[1] - input_ids.shape[1]
            state.waiting, state.brought = {}, True
        try:
            out = self._generate_text(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=images or None,
                image_embeds_insertion_points=points,
                cache=cache,
                ends_wait=True,
                **generate_kwargs,
            )
        finally:
            if state is not None:
                state.brought = False
        generated: Tensor = out if isinstance(out, Tensor) else out.sequences
        state = cache.casa
        # Cloned, because a view would keep every id of the stream in memory a second time.
        state.pending = generated[:, state.columns :].clone()
        for row, end in state.waiting.items():
            state.pending[row, -1:] = end
        state.waiting = {}
        if isinstance(out, Tensor):
            return generated[:, offset:]
        out.sequences = generated[:, offset:]
        return out

    def _with_history(
        self, state: Any, ids: Tensor, mask: Tensor, points: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor, Sequence[Any] | None]:
        """Every id of a stream, as `generate` wants them, behind those that have entered or wait.

        :param points: count from the first id to enter, here and in what is returned.
        """
        # A caller who forwarded the last ids himself has left none pending.
        earlier = state.history.to(ids.device)
        earlier_mask = torch.ones_like(earlier)
        mask = mask[:, mask.shape[1] - ids.shape[1] :]
        valid = valid_columns(ids, mask if ids.shape[1] else None)
        before = self._before(state, ids, points, valid)
        if before is not None:
            pending, kept = (x.to(ids.device) for x in before)
            shift = pending.shape[1]
            earlier = torch.cat([earlier, pending], 1)
            earlier_mask = torch.cat([earlier_mask, kept.to(earlier_mask.dtype)], 1)
            if points is not None:
                points = [[p + shift for p in as_ints(row)] for row in points]
        return torch.cat([earlier, ids], 1), torch.cat([earlier_mask, mask], 1), points

    def _before(
        self, state: Any, input_ids: Tensor, points: Sequence[Any] | None, valid: np.ndarray
    ) -> tuple[Tensor, Tensor] | None:
        """The generated ids that have not entered a stream yet, as they stand before new ones.

        A turn that goes on with an image, as in live captions, loses the end token that closed it;
        before another turn any end token becomes the one that the chat template has.

        :param valid: (B, T) which of the new columns hold text.
        :return: (B, n) ids, and which of them are to enter; None where there are none, or the new
            ids bring them.
        """
        if state.pending is None or state.brought:
            return None
        pending = state.pending.clone()
        kept = torch.ones_like(pending, dtype=torch.bool)
        ends = self.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        answer_end = getattr(self.config, "answer_end_token", None)
        around = list(getattr(self.config, "pre_image_tokens", None) or [])
        for row, (said, ids) in enumerate(zip(pending.tolist(), input_ids.tolist(), strict=True)):
            new = [i for i, is_text in zip(ids, valid[row], strict=True) if is_text]
            first = as_ints(points[row])[:1] if points is not None and row < len(points) else []
            if not said or new[: len(said)] == said:
                kept[row] = False
            elif first and new[: int(valid[row][: first[0]].sum())] == around:
                # With nothing around images there would be no token left to predict from: it stays.
                kept[row, -1] = said[-1] not in ends or len(said) + len(new) == 1
            elif said[-1] in ends and answer_end is not None:
                pending[row, -1] = answer_end
                kept[row] = new[: len(said)] != [*said[:-1], answer_end]
        return (pending, kept) if kept.any() else None

    def start_ca_streaming_states(self) -> None:
        """Begins a stream: the next `generate_from_image(reset_streaming=False)` continues it."""
        self.streaming_cache = DynamicCache()

    def reset_ca_streaming_states(self) -> None:
        """Forgets the stream that `generate_from_image` keeps."""
        self.streaming_cache = None

    reset_casa_streaming_states = reset_ca_streaming_states


def starts_with(ids: Tensor, head: Tensor) -> bool:
    """Whether every row of `ids` begins with that of `head`."""
    return torch.equal(ids[:, : head.shape[1]], head.to(ids.device))


def given_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The ids among the arguments of `generate`, first or under either name; None: none."""
    return args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))


def new_images(inputs: dict[str, Any], state: StreamingState) -> dict[str, Any]:
    """Those of the images of a whole stream that have not entered yet, as the new columns have
    them.

    :param inputs: of `generate`: points count from the first column of the stream.
    :raises ValueError: points that are neither those that entered and new ones, nor new ones alone.
    """
    rows = [as_ints(row) for row in inputs[POINTS]]
    images, follows = image_list(inputs.get("pixel_values")), inputs.get("image_follows")
    if len(rows) != state.batch or sum(map(len, rows)) != len(images):
        return {}  # `forward` says what does not fit
    points, kept, following = [], [], []
    for row, (given, entered) in enumerate(zip(rows, state.image_columns, strict=True)):
        known = len(entered) if given[: len(entered)] == entered else 0
        new = given[known:]
        if any(column < state.columns for column in new):
            raise ValueError(
                f"insertion points {given} of sample {row}: past_key_values holds the first "
                f"{state.columns} columns of input_ids with images at {entered}. Give generate all "
                "ids of the stream with all its images, or with the new images alone; or give the "
                "new ids alone to generate_from_image(reset_streaming=False)"
            )
        points.append([column - state.columns for column in new])
        first = sum(map(len, rows[:row]))
        kept += images[first + known : first + len(given)]
        if follows is not None:
            following.append(list(follows[row])[known:])
    return {
        POINTS: points,
        "pixel_values": kept or None,
        "image_follows": None if follows is None else following,
    }
