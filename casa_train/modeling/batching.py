"""Encoded conversations side by side: padding, masks and loaded images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from .encoding import Encoded
from .image_processing_casa import CasaImageProcessor
from .image_sources import Bounded
from .messages import are_frames


class CasaBatch(BatchFeature):
    """What the processor returns; `.to` also moves the lists of images."""

    def to(self, *args: Any, **kwargs: Any) -> CasaBatch:
        for name, value in list(self.items()):
            if isinstance(value, Tensor):
                # A dtype is for pixels: ids and masks stay integers.
                self[name] = _move(value, name == "pixel_values", *args, **kwargs)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                self[name] = [_move(v, name == "pixel_values", *args, **kwargs) for v in value]
        return self


def batch_of(
    encoded: Sequence[Encoded],
    tokenizer: Any,
    image_processor: CasaImageProcessor,
    *,
    return_tensors: str | None = "pt",
    padding: bool | str | None = None,
    padding_side: str | None = None,
    max_length: int | None = None,
    return_assistant_tokens_mask: bool = False,
    **options: Any,
) -> CasaBatch:
    """Encoded samples side by side.

    :param return_tensors: "pt" gives tensors and pads if needed; None lists of ids, padded only
        if `padding` says so.
    :param padding_side: None: the tokenizer's.
    :param options: anything else must be None or False.
    """
    # The template holds the special tokens, and cutting a prompt could cut off its images.
    unknown = {k: v for k, v in options.items() if v is not None and v is not False}
    if unknown or return_tensors not in ("pt", None):
        found = unknown or {"return_tensors": return_tensors}
        raise ValueError(
            f"the processor does not take {found}; it takes return_tensors ('pt' or None), "
            "padding (True, False, 'longest' or 'max_length'), padding_side and max_length"
        )
    lengths = [len(e.ids) for e in encoded]
    width = max(lengths, default=0)
    if padding == "max_length":
        width = max(width, max_length or 0)
    elif padding not in (None, True, False, "longest"):
        raise ValueError(f"padding={padding!r}; expected True, False, 'longest' or 'max_length'")
    pad_it = bool(padding) or (padding is None and return_tensors == "pt")
    if return_tensors == "pt" and not pad_it and len(set(lengths)) > 1:
        raise ValueError(
            f"padding=False, but the samples have {lengths} tokens: tensors need padding=True"
        )
    side = padding_side or tokenizer.padding_side
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r}; expected 'left' or 'right'")
    left = side == "left"
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    ids, mask, answers, points = [], [], [], []
    for e, length in zip(encoded, lengths, strict=True):
        before, after = 0, width - length if pad_it else 0
        if left:
            before, after = after, before
        ids.append([pad] * before + e.ids + [pad] * after)
        mask.append([0] * before + [1] * length + [0] * after)
        answers.append([0] * before + [int(a) for a in e.answer] + [0] * after)
        points.append(torch.tensor([before + p for p in e.points], dtype=torch.long))
    rows = {"input_ids": ids, "attention_mask": mask}
    if return_assistant_tokens_mask:
        rows["assistant_masks"] = answers
    batch: dict[str, Any] = dict(rows)
    if return_tensors == "pt":
        batch = {name: torch.tensor(values, dtype=torch.long) for name, values in rows.items()}
    batch["image_embeds_insertion_points"] = points
    if any(f for e in encoded for f in e.follows):
        batch["image_follows"] = [e.follows for e in encoded]
    pictures = [image for e in encoded for image in e.images if image is not None]
    batch["pixel_values"] = [
        # A path or a URL names itself.
        image_processor.load(image, None if _names_itself(image) else f"image {i}")
        for i, image in enumerate(pictures)
    ]
    return CasaBatch(batch)


def _names_itself(image: Any) -> bool:
    return isinstance(image.image if isinstance(image, Bounded) else image, str)


def _move(value: Tensor, cast: bool, *args: Any, **kwargs: Any) -> Tensor:
    if not cast:
        args = tuple(a for a in args if not isinstance(a, torch.dtype))
        kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
    return value.to(*args, **kwargs) if args or kwargs else value


def image_lists(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) or are_frames(images) else [images]


def video_lists(videos: Any) -> list[Any]:
    if videos is None:
        return []
    if not isinstance(videos, (list, tuple)):
        return [videos]
    given = [v for v in videos if v is not None]  # a row without any may be None
    many = all(isinstance(v, (list, tuple)) or are_frames(v) for v in given)
    return given if many else [videos]


def distribute(kind: str, given: list[Any], counts: list[int]) -> Iterator[Any]:
    """What is given, in the order of the places for it.

    :raises ValueError: another number of places than of things.
    """
    if kind == "image" and any(isinstance(g, (list, tuple)) for g in given):
        given = [[] if g is None else g for g in given]  # a row without any may be None
    elif all(g is None for g in given) and not sum(counts):
        given = []
    nested = kind == "image" and given and all(isinstance(g, (list, tuple)) for g in given)
    held = [len(g) for g in given] if nested else sum(1 for _ in given)
    expected: Any = counts if nested else sum(counts)
    if held != expected:
        raise ValueError(
            f"the text holds {expected} places for {kind}s ('<{kind}>'), given are {held}: write "
            f"one place for each {kind}, or pass messages to apply_chat_template"
        )
    return iter([x for g in given for x in g] if nested else given)
