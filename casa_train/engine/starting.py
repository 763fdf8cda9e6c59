"""Configuration -> a model with values under the engine, ready for its first step."""

from __future__ import annotations

from functools import partial

from casa_train.config.micro_steps import micro_steps
from casa_train.config.schema import Config
from casa_train.distributed.random_state import seed_all
from casa_train.distributed.ranks import Ranks
from casa_train.engine.engine import Engine, shard
from casa_train.io.precision import DTYPES
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.setup.fusion_start import start_warning
from casa_train.setup.optim import build_groups, build_optimizer, describe
from casa_train.setup.weights import Start, start_weights


def start_model(
    config: Config, model: CasaForConditionalGeneration, start: Start | None, ranks: Ranks
) -> None:
    """Gives a model its first values on the device, sharded where it will be, and says how it
    starts; collective.

    :param model: on the meta device.
    :param start: None: a checkpoint replaces everything, so nothing is read or drawn before.
    """
    dtype = DTYPES[config.parallel.precision]
    sharded = partial(shard, parallel=config.parallel)
    start_weights(model, start, config.seed, ranks.device, dtype, sharded)
    for account in start.accounts if start is not None else []:
        ranks.log(account.line())
        if account.resized and not config.model.backbone.trainable:
            ranks.log(
                "note: model.backbone.trainable is false, so the rows of new tokens stay as they "
                "start: the model will not learn to tell them apart"
            )
    if start is not None and (warning := start_warning(config, model)) is not None:
        ranks.log(warning)
    groups = build_groups(model.named_parameters(), config.optim.groups)
    ranks.log(*describe(model.named_parameters(), groups))
    # The weights are the same on every rank; what is drawn from here on may differ.
    seed_all(config.seed + ranks.rank)


def build_engine(
    config: Config, model: CasaForConditionalGeneration, ranks: Ranks, fused: bool | None = None
) -> Engine:
    """Puts a model and its optimiser under the engine, in training mode; collective.

    :param model: with its values, on the device, sharded where ZeRO-3 will have it so.
    :param fused: of the optimiser, see `build_optimizer`.
    :raises UserError: parameter groups that do not fit the model.
    """
    model.checkpoint_activations(config.parallel.activation_checkpointing)
    groups = build_groups(model.named_parameters(), config.optim.groups)
    engine = Engine(
        model,
        build_optimizer(groups, config.optim, fused),
        ranks,
        config.parallel,
        micro_steps(config.data, ranks.world),
        config.optim.clip,
    )
    engine.train()
    return engine
