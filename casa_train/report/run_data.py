"""What the page is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from casa_train.metrics.sinks.base import Record


@dataclass
class RunData:
    """What a run left behind.

    :param metrics: step records in order, as `read_metrics` gives them.
    :param config_yaml: the run's configuration, shown as it is.
    :param environment: versions, commit and host.
    :param evaluation: scores as shares from 0 to 1, over all questions and by family; all answers.
    :param pictures: encoded image files by answer id; `choose_answers` says which ids are shown.
    :param quarantine: samples that could not be used: source, key, reason, detail.
    :param validations: their records in order; the questions of the last one are shown.
    :param starts: as `read_starts` gives them.
    :param backbone: the `model_type` of the text backbone.
    """

    name: str
    metrics: list[Record]
    config_yaml: str
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    pictures: dict[str, list[bytes]]
    quarantine: list[dict[str, Any]]
    validations: list[Record] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    backbone: str = ""
