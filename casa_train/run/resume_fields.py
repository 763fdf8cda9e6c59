"""What may differ when a run goes on, as far as the order of its samples depends on it.

It is decided beside the fields, in `config/data_schema.py`. A checkpoint tells of those that its
plan or stream depends on; here two such records are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from casa_train.config.resume_marks import Kept
from casa_train.config.schema import Config, flatten, resume_mark
from casa_train.data.tokens import tokenizer_fingerprint
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor

_TOKENS = "the packs under way hold samples as many tokens long as it gave them"


def reason_to_keep(name: str) -> str | None:
    """Why a run with a checkpoint keeps this field; None where `resume_allow` can let it differ."""
    mark = resume_mark(name)
    return mark.why if isinstance(mark, Kept) else None


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
