"""What may differ when a run goes on, as far as the order of its samples depends on it.

The state of a plan or a stream holds positions: how many samples of every source were drawn, and
which samples lie in packs under way, with their lengths. A field may change where these still mean
the same under its new value. `config.FREE_FIELDS` names fields that have no part in what a run
computes; every other field of the data is decided here, and a test asks for a decision on new ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from casa_train.config.schema import Config, flatten
from casa_train.data.tokens import tokenizer_fingerprint
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor

_ORDER = "positions in the epoch under way are counted along the order that it draws"
_LENGTHS = "the packs under way hold samples as they were cut and measured with it"
_RATES = "rates hold over all draws of the run, so the mixture would first make up for its past"
_PASS = "positions are counted along an order of as many samples"
_TOKENS = "the packs under way hold samples as many tokens long as it gave them"

# By field, `*` standing for any name: why a run that has a checkpoint keeps it.
KEPT: dict[str, str] = {
    "seed": _ORDER,
    "data.locality": _ORDER,
    "data.text_tokens": _LENGTHS,
    "data.image_tokens": _LENGTHS,
    "data.max_pixels": _LENGTHS,
    "data.min_pixels": _LENGTHS,
    "data.ratings.*": _LENGTHS,
    "data.sources.*.weight": _RATES,
    "data.sources.*.repeats": _RATES,
    "data.sources.*.limit": _PASS,
    "data.stream.lanes": "every lane has a position of its own, in row groups dealt to as many",
    "data.stream.datasets.*.schema": _LENGTHS,
    "data.stream.datasets.*.repeats.*": _RATES,
}

_BLOCK = "the block of packs under way is used up as it was begun, the next one is made with it"
_DIGEST = "the digests of the data are compared, whatever names it"

# Why it may change, if `checkpoint.resume_allow` names it.
CHANGEABLE: dict[str, str] = {
    "data.packs_per_step": _BLOCK,
    "data.balance_block": _BLOCK,
    "data.balance_group": _BLOCK,
    "data.video_share": _BLOCK,
    "data.open_packs": "of too many open packs the fullest are finished first",
    "data.stream.open_units": "of too many open row groups none is opened before they are read",
    "data.sources.*.path": _DIGEST,
    "data.stream.datasets.*.source": _DIGEST,
    "data.stream.datasets.*.subsets": _DIGEST,
    "data.stream.datasets.*.exclude": _DIGEST,
    "data.stream.datasets.*.split": _DIGEST,
    "data.stream.datasets.*.revision": _DIGEST,
}


def reason_to_keep(name: str) -> str | None:
    """Why a run with a checkpoint keeps this field; None where `resume_allow` can let it differ."""
    return next((reason for pattern, reason in KEPT.items() if matches(pattern, name)), None)


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name is, or lies below, what a pattern names."""
    return re.match(re.escape(pattern).replace(r"\*", r"[^.]+") + r"(\.|$)", name) is not None


def plan_record(config: Config, processor: CasaProcessor) -> str:
    """What a checkpoint tells of the fields that its plan depends on, as JSON.

    Of tokenizer and template the content, since a tokenizer may move and a template be the
    tokenizer's own.
    """
    fields = {name: value for name, value in flatten(config).items() if reason_to_keep(name)}
    fields["model.tokenizer"] = tokenizer_fingerprint(processor.tokenizer)
    fields |= {f"model.template.{name}": value for name, value in processor.template.items()}
    return json.dumps(fields, sort_keys=True)


def refuse_changes(checkpoint: str, theirs: str | None, ours: str) -> None:
    """Compares two records; what `resume_allow` names makes no difference.

    :param checkpoint: its path, for the message.
    :param theirs: None in a checkpoint that has none, which its plan's state refuses.
    :raises UserError: with both values and the reason of every field.
    """
    if theirs is None:
        return
    there: Mapping[str, Any] = json.loads(theirs)
    now: Mapping[str, Any] = json.loads(ours)
    changed = [
        f"{name}: {there.get(name)!r} there, {now.get(name)!r} now "
        f"({reason_to_keep(name) or _TOKENS})"
        for name in sorted({*there, *now})
        if there.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} cannot go on with another order of samples, whatever "
            f"checkpoint.resume_allow names: {'; '.join(changed)}. Set it back, start over with "
            "checkpoint.resume=never, or begin a new run from an export (model.init_from)."
        )
