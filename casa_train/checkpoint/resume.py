"""Whether a run may go on from a checkpoint, and going on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from casa_train.checkpoint.saved import SavedCheckpoint
from casa_train.config.schema import Config
from casa_train.distributed.random_state import (
    derive_seed,
    load_rng_state,
    seed_all,
    set_rng_state,
)
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.io.numbers import count
from casa_train.run.resume_fields import refuse_changes


class Loads(Protocol):
    """An engine that loads what another one saved; collective."""

    def load(self, directory: Path) -> None: ...


class Continues(Protocol):
    """A loader that goes on from a state."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def restore(
    found: SavedCheckpoint | None, engine: Loads, loader: Continues, ranks: Ranks, seed: int
) -> dict[str, Any]:
    """Puts a checkpoint, if there is one, into a fresh engine and loader; collective.

    :return: how far it was; empty where there is none.
    """
    if found is None:
        return {}
    engine.load(found.path)
    loader.load_state_dict(found.state["data"])
    saved_by = found.manifest["world_size"]
    if saved_by == ranks.world:
        set_rng_state(load_rng_state(found.path / f"rng_{ranks.rank}.pt"))
    else:
        ranks.log(
            f"{found.path} was saved with world size {saved_by}, this start has {ranks.world}: "
            "every rank takes its part of weights and optimiser state, the order of samples goes "
            "on, and random numbers are seeded anew from seed, step and rank"
        )
        seed_all(derive_seed(seed, found.step, ranks.rank))
    progress: dict[str, Any] = found.state["progress"]
    return progress


def check_resume(
    found: SavedCheckpoint, fingerprints: Mapping[str, str], config: Config, earlier: str
) -> None:
    """Refuses a checkpoint whose configuration or data is not this run's.

    :param earlier: the fingerprint as earlier versions took it, paths as they are given included.
    :raises UserError: with both values.
    """
    theirs = found.manifest["fingerprints"]
    same = theirs["config"] in (fingerprints["config"], earlier)
    if not same and not config.checkpoint.resume_allow:
        raise UserError(
            f"{found.path} belongs to another configuration (fingerprint "
            f"{theirs['config'][:12]}... there, {fingerprints['config'][:12]}... now). Restore the "
            "run's config.yaml, name what may differ in checkpoint.resume_allow, or start over "
            "with checkpoint.resume=never."
        )
    refuse_changes(str(found.path), theirs.get("plan"), fingerprints["plan"])
    if theirs["data"] != fingerprints["data"]:
        there, now = json.loads(theirs["data"]), json.loads(fingerprints["data"])
        differing = {
            "not named now": [name for name in there if name not in now],
            "new": [name for name in now if name not in there],
            "of other content": [n for n in there if n in now and there[n] != now[n]],
        }
        parts = [
            f"{len(names)} {what} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
            for what, names in differing.items()
            if names
        ]
        raise UserError(
            f"{found.path} was trained on other data: of {count(len(there), 'source')} there and "
            f"{len(now)} now, {'; '.join(parts)}. Restore the data, or start over with "
            "checkpoint.resume=never."
        )
