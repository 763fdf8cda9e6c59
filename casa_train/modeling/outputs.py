"""The cache under both of its names, and what a forward pass returns beside logits.

transformers 5.24 calls `past_key_values` `cache`, in calls and in outputs alike. Scripts written
for either name run with every release that this model supports.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

OLD_NAME, NEW_NAME = "past_key_values", "cache"
# What the installed transformers calls it: it passes and reads this name alone.
CACHE = NEW_NAME if NEW_NAME in {f.name for f in fields(CausalLMOutputWithPast)} else OLD_NAME


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, whichever name it came under.

    :raises ValueError: two different ones.
    :raises TypeError: keys and values as tuples, or anything else that is no cache.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "past_key_values and cache are two names of the same argument, but two different "
            "caches were given: pass one of them"
        )
    one = cache if past_key_values is None else past_key_values
    if one is not None and not hasattr(one, "get_seq_length"):
        raise TypeError(
            f"past_key_values is a {type(one).__name__}, not a cache of transformers: pass "
            "DynamicCache(), which the call fills"
        )
    return one


def with_both_names(output: Any) -> Any:
    """The output of a forward pass or of `generate`, whose cache is then an attribute under either
    name.
    """
    other = OLD_NAME if CACHE == NEW_NAME else NEW_NAME
    # transformers 5.24 has the older name as well.
    if hasattr(output, CACHE) and not hasattr(type(output), other):
        setattr(output, other, getattr(output, CACHE))
    return output


def next_token_loss(logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    """Mean cross-entropy of each next token.

    :param logits: (B, T, vocabulary).
    :param labels: (B, T) ids, -100 where nothing is learned.
    :param items: the tokens to divide the sum by, in place of those of this batch: with gradient
        accumulation, all that are learned before the next update.
    """
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten().to(logits.device),
        ignore_index=-100,
        reduction="mean" if items is None else "sum",
    )
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
