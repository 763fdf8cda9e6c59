"""Live captions of an evaluation: scores, and clips with what was due beside what was said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from casa_train.evaluate.live_scores import plain
from casa_train.evaluate.shares import spread

CLIPS = 6  # that are shown, evenly over those that were played


def live_captions(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the section shows; None where no clip was played.

    Of a clip, the frames at which something was due or said, with their times in seconds.
    """
    live = (evaluation or {}).get("live")
    if not live:
        return None
    captions = live["captions"]
    shown = [captions[i] for i in spread({"": range(len(captions))}, CLIPS)[""]]
    return {
        "scores": [("all", live), *(live["sources"].items() if len(live["sources"]) > 1 else ())],
        "clips": [{"id": clip["id"], "rows": _rows(clip)} for clip in shown],
        "count": len(captions),
    }


def _rows(clip: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for time, due, said in zip(clip["times"], clip["due"], clip["said"], strict=True):
        if due or said:
            same = plain(due) == plain(said)
            rows.append({"time": time, "due": due, "said": said, "same": same})
    return rows
