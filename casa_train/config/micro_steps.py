"""Packs of a step dealt to ranks: every rank trains the same number of them, one after another."""

from __future__ import annotations

from casa_train.config.data_schema import DataConfig
from casa_train.errors import UserError

RANKS = (
    "{world} ranks do not divide; expected a multiple of the number of ranks. Set "
    "data.packs_per_step={world} or a multiple of it, or start another number of ranks."
)
PLANNED_RANKS = "planned_ranks={world} does not divide; expected a multiple of it. Set one of them."
TASKS = (
    "{world} tasks do not divide; expected a multiple. Set data.packs_per_step={world} or a "
    "multiple of it, or choose other --nodes and --gpus-per-node."
)


def micro_steps(data: DataConfig, world: int, refusal: str = RANKS) -> int:
    """Packs of a step for each of `world` ranks.

    :param refusal: what to say where there is no whole number of them, by what the ranks are to
        the user: started, planned or asked of a cluster.
    :raises UserError: ranks that do not divide the packs of a step.
    """
    if data.packs_per_step % world:
        raise UserError(
            f"data.packs_per_step is {data.packs_per_step}, which {refusal.format(world=world)}"
        )
    return data.packs_per_step // world
