"""The samples that could not be used, by source and reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def bad_samples(quarantine: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each source and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for entry in quarantine:
        groups[str(entry["source"]), str(entry["reason"])].append(entry)
    rows = [
        {
            "source": source,
            "reason": reason,
            "samples": len({entry["key"] for entry in entries}),
            "key": entries[0]["key"],
            "detail": entries[0]["detail"],
        }
        for (source, reason), entries in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row["samples"], row["source"], row["reason"]))
