"""Configuration -> a model with values under the engine, ready for its first step."""

from __future__ import annotations

from functools import partial

from torch import nn

from casa_train.config.micro_steps import micro_steps
from casa_train.config.schema import Config
from casa_train.distributed.random_state import seed_all
from casa_train.distributed.ranks import Ranks
from casa_train.engine.compiling import CompileClock, choose_compiler
from casa_train.engine.engine import Engine, shard
from casa_train.io.precision import DTYPES
from casa_train.modeling.decoder import FusedLayer
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.regions import in_region
from casa_train.modeling.vision_block import ALIGNED, NEEDED, VisionBlock, VisionMLP
from casa_train.modeling.vision_qwen import PatchMerger
from casa_train.setup.fusion_start import start_warning
from casa_train.setup.model import joins_image_keys
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
    dtype, trainable = DTYPES[config.parallel.precision], config.model.backbone.trainable
    sharded = partial(shard, parallel=config.parallel)
    start_weights(model, start, config.seed, ranks.device, dtype, sharded)
    for account in start.accounts if start is not None else []:
        ranks.log(account.line())
        if account.resized and trainable is not True:
            ranks.log(
                f"note: model.backbone.trainable is {str(trainable).lower()}, so the rows of new "
                "tokens stay as they start: the model will not learn to tell them apart"
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
    :raises UserError: parameter groups that do not fit the model, or a compiler that is missing.
    """
    parallel = config.parallel
    model.checkpoint_activations(parallel.activation_checkpointing)
    model.joint_image_keys = joins_image_keys(parallel)
    compiler = choose_compiler(parallel, ranks)
    model.compile_regions(compiler)
    model.visual.repeats = False  # a graph would keep memory that the next step needs
    columns: int = model.visual.config.intermediate_size
    if ranks.device.type == "cuda" and parallel.precision == "bf16" and columns % NEEDED:
        model.visual.align_ffn(ALIGNED)
    padded = any(m.aligned > 1 for m in model.modules() if isinstance(m, VisionMLP))
    groups = build_groups(model.named_parameters(), config.optim.groups)
    engine = Engine(
        model,
        build_optimizer(groups, config.optim, fused),
        ranks,
        parallel,
        micro_steps(config.data, ranks.world),
        config.optim.clip,
        whole=[VisionMLP] if padded else [],
        borrowed=[] if compiler is None or parallel.zero_stage < 3 else _norms(model),
        clock=None if compiler is None else CompileClock(),
    )
    engine.train()
    return engine


def _norms(model: CasaForConditionalGeneration) -> list[nn.Parameter]:
    """The weights that blocks use in compiled regions, past the hooks of the norms themselves."""
    return [
        parameter
        for block in model.modules()
        if isinstance(block, FusedLayer | VisionBlock | PatchMerger)
        for norm in block.modules()
        if in_region(norm)
        for parameter in norm.parameters(recurse=False)
    ]
