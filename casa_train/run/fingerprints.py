"""What identifies a run in its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping

from casa_train.config.places import places
from casa_train.config.schema import Config, fingerprint
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.run.resume_fields import plan_record


def run_fingerprints(
    config: Config, data: Mapping[str, str], processor: CasaProcessor
) -> dict[str, str]:
    """Fingerprints of the configuration, of its data, and what the order of samples depends on.

    :param config: its paths are left out: a run may be moved.
    :param data: by source, what identifies its content.
    """
    return {
        "config": fingerprint(config, [name for name, *_ in places(config)]),
        "data": json.dumps(data, sort_keys=True),
        "plan": plan_record(config, processor),
    }
