"""One optimiser step of every mechanism under ZeRO 1, 2 and 3, beside plain torch.

Started by test_zero_steps.py under torchrun: one launch runs all cases, since starting DeepSpeed
takes longer than any of them. Prints one JSON line a case, and those of norm_steps.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from casa_train.config.schema import GroupConfig, OptimConfig
from casa_train.distributed.ranks import Ranks
from casa_train.engine import compiling
from casa_train.engine.engine import init_processes, leave_processes
from casa_train.engine.starting import build_engine
from casa_train.io.precision import DTYPES
from casa_train.modeling.block import plain_block, project
from casa_train.modeling.fusion import register
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.regions import add_normed, normed
from casa_train.modeling.windowed import WindowedMechanism, linear_like, read_windows
from casa_train.setup.optim import build_groups, build_optimizer, set_rates
from casa_train.training.loss import answer_losses
from tests.helpers import norm_steps
from tests.helpers.tiny import (
    HARD_PACK,
    HIDDEN,
    Layout,
    Sample,
    fill,
    packed_inputs,
    tiny_model,
    tiny_siglip_config,
    tiny_text_config,
)
from tests.helpers.tiny_run import tiny_settings

CLIP = 0.5
# ZeRO-3 keeps tensors below 100,000 numbers whole; the projections of so wide a model are cut.
WIDE = 320


@dataclass(frozen=True)
class Case:
    """A tiny model and how it is trained.

    :param checkpointed: blocks whose activations are checkpointed.
    :param compiled: whether the blocks are.
    :param precision: bf16: compared with eager blocks under the same engine instead of plain torch.
    :param aligned: what the width of the vision FFN is padded to a multiple of.
    """

    model: dict[str, Any]
    clip: float = CLIP
    checkpointed: str = "none"
    frozen: bool = False
    compiled: bool = False
    aligned: int = 1
    precision: str = "fp32"

    @property
    def stages(self) -> tuple[int, ...]:
        return (1, 2, 3) if self.precision == "fp32" else (1,)

    @property
    def side(self) -> int:
        """Pixels of a token's side."""
        return 32 if "siglip" in self.model else 28

    def build(self) -> CasaForConditionalGeneration:
        options = dict(self.model)
        if depth := options.pop("siglip", 0):
            options["vision_config"] = tiny_siglip_config(depth)
        width, backbone = options.pop("width", HIDDEN), options.pop("backbone", "llama")
        text = tiny_text_config(backbone, hidden_size=width, head_dim=width // 4)
        model = tiny_model(text_config=text, vision_width=width, **options)
        if self.frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".fusion." in name)
            model.visual.set_trainable(1)
        return model


class Centred(nn.LayerNorm):
    """A norm whose name does not say so."""


class ForeignNorms(WindowedMechanism):
    """A user's own, with norms that blocks do not compile: each for another reason."""

    name = "foreign_norms"
    options = {"every": 1}

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module:
        return ForeignLayer(layer, layer_idx)

    def run_layer(
        self, layer: Any, h: Tensor, images: Tensor, context: Any
    ) -> tuple[Tensor, Tensor]:
        fusion, width = layer.fusion, layer.self_attn.head_dim
        text = project(layer.self_attn, normed(fusion.text, h), width, keys=False)
        seen = project(fusion, normed(fusion.images, images), width, queries=False)
        read, _ = read_windows(fusion.layer_idx, text, seen, context)
        h, x = add_normed(fusion.after, h, fusion.o_proj(read))
        return plain_block(layer, h + 0.5 * x, context), images

    def count_layer(self, work: Any, layer_idx: int, h: bool, z: bool) -> tuple[bool, bool]:
        raise AssertionError("nobody counts here")


class ForeignLayer(nn.Module):
    def __init__(self, layer: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        width = layer.self_attn.q_proj.in_features
        self.text = Centred(width, bias=False)
        self.images = nn.LayerNorm(width, elementwise_affine=False)
        self.after = nn.LayerNorm(width)
        for name in ("k_proj", "v_proj", "o_proj"):
            setattr(self, name, linear_like(getattr(layer.self_attn, name)))


MODELS: dict[str, dict[str, Any]] = {
    "casa": {"mechanism": "casa"},
    "casa zero output": {"mechanism": "casa", "init": "zero_output"},
    "casa shared, images updated": {
        "mechanism": "casa",
        "share_parameters": True,
        "update_image_tokens": "ffn_and_attention",
        "history": "all",
    },
    "casa before": {"mechanism": "casa", "placement": "before", "image_positions": "advance"},
    "casa replacing": {"mechanism": "casa", "placement": "replace", "every": 2},
    "cross attention after, ffn": {
        "mechanism": "cross_attention",
        "placement": "after",
        "update_image_tokens": "ffn",
    },
    "insertion": {"mechanism": "insertion"},
    "qformer_insertion": {"mechanism": "qformer_insertion", "queries": 3},
    "gated_cross_attention": {"mechanism": "gated_cross_attention"},
    "hyper_attention": {"mechanism": "hyper_attention"},
}
OPTIM = OptimConfig(
    groups={
        "fusion": GroupConfig([r"\.fusion\.", "^resampler"], 1e-2, 0.1, required=False),
        "rest": GroupConfig([r"^(?!resampler)(?!.*\.fusion\.)"], 2e-3, 0.0),
    },
    # A first Adam step is the sign of the gradient; so large an epsilon makes it see the size.
    eps=1e-2,
)
CASES = {
    **{name: Case(model) for name, model in MODELS.items()},
    "casa, frozen": Case({"mechanism": "casa", "every": 2}, clip=0.1, frozen=True),
    "casa, not clipped": Case({"mechanism": "casa"}, clip=0.0),
    **{
        f"{name}, checkpointed": Case(MODELS[name], checkpointed="all")
        for name in ("casa", "casa shared, images updated", "gated_cross_attention", "insertion")
    },
    "casa, frozen and checkpointed": Case(
        {"mechanism": "casa", "every": 2}, clip=0.1, checkpointed="all", frozen=True
    ),
    "casa, wide and checkpointed": Case({"mechanism": "casa", "width": WIDE}, checkpointed="all"),
    "casa, wide, frozen and checkpointed": Case(
        {"mechanism": "casa", "width": WIDE, "every": 2}, clip=0.05, checkpointed="all", frozen=True
    ),
    "casa, padded": Case({"mechanism": "casa", "width": WIDE}, aligned=56),
    "casa, compiled": Case(MODELS["casa"], compiled=True, aligned=56),
    "casa, wide, frozen, checkpointed and compiled": Case(
        {"mechanism": "casa", "width": WIDE, "every": 2},
        clip=0.05,
        checkpointed="all",
        frozen=True,
        compiled=True,
        aligned=56,
    ),
    "norms of heads, wide, checkpointed and compiled": Case(
        {"mechanism": "casa", "width": WIDE, "backbone": "qwen3"},
        checkpointed="all",
        compiled=True,
    ),
    "norms of a user's own, compiled": Case({"mechanism": "foreign_norms"}, compiled=True),
    "siglip2, mlp": Case({"siglip": 2, "adapter": "mlp"}),
    "siglip2, frozen, checkpointed and compiled": Case(
        {"siglip": 2, "every": 2}, clip=0.1, checkpointed="all", frozen=True, compiled=True
    ),
    "casa, compiled in bf16": Case(MODELS["casa"], compiled=True, precision="bf16"),
}
# What the loader makes of a pack without images: a dummy sample keeps all ranks on one graph.
TEXT_ONLY = [Layout(6), Layout(1, (0,), ((1, 1),))]


def packs(side: int) -> list[list[list[Sample]]]:
    """Three micro-steps of two ranks; rank 1 first has text alone, and at last nothing to learn.

    :param side: pixels of a token's side.
    """
    return [
        [fill(HARD_PACK, 1, side), fill(TEXT_ONLY, 2, side)],
        [fill(HARD_PACK[:2], 3, side), fill(HARD_PACK[1:3], 4, side)],
        [fill(HARD_PACK[:1], 5, side), fill([Layout(1, (0,), ((1, 2),))], 6, side)],
    ]


def pack_loss(forward: Any, samples: list[Sample]) -> tuple[Tensor, int]:
    """Summed loss of predicting every token of a sample from the one before it."""
    inputs = packed_inputs(samples)
    first = 0
    rows, targets = [], []
    for sample in samples:
        count = len(sample.ids)
        rows += range(first, first + count - 1)
        targets.append(sample.ids[1:])
        first += count
    inputs.logits_index = torch.tensor(rows, dtype=torch.long)
    losses = answer_losses(forward(packed=inputs).logits, torch.cat(targets))
    return losses.sum(), len(rows)


def plain_step(case: Case, total: int) -> tuple[dict[str, Tensor], float]:
    """The weights after one step of torch's own AdamW on all four packs, and the gradient norm."""
    model = case.build().train()
    groups = build_groups(model.named_parameters(), OPTIM.groups)
    optimizer = build_optimizer(groups, OPTIM)
    set_rates(optimizer.param_groups, 1.0)
    loss = sum(pack_loss(model, samples)[0] for step in packs(case.side) for samples in step)
    (loss / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip or math.inf)
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, float(norm)


def engine_step(
    case: Case, stage: int, ranks: Ranks, total: int
) -> tuple[dict[str, Tensor], float]:
    """The same through the project's engine, each rank with its own packs."""
    count, optim = ranks.world * len(packs(case.side)), replace(OPTIM, clip=case.clip)
    compiled = "on" if case.compiled else "off"
    config = tiny_settings(
        optim,
        stage,
        case.precision,
        packs=count,
        checkpointed=case.checkpointed,
        compile_blocks=compiled,
    )
    model = case.build()
    model.visual.align_ffn(case.aligned)
    engine = build_engine(config, model, ranks)
    # Plain torch, which this is compared with, makes image keys layer by layer.
    assert engine.module.joint_image_keys is (stage < 3)
    made: list[int] = []
    model.joint_keys.register_forward_hook(lambda module, args, out: made.append(len(out)))
    set_rates(engine.param_groups, 1.0)
    for step in packs(case.side):
        loss, _ = pack_loss(engine.forward, step[ranks.rank])
        engine.backward(loss * (2 / total))
        engine.step()
    sources = [model.mechanism.image_keys(layer) for layer in model.model.layers]
    joined = [2 * sum(source is not None for source in sources)] * len(packs(case.side))
    joins = stage < 3 and case.checkpointed == "none" and joined[0] > 2
    assert made == (joined if joins else []), (case, stage, made)
    weights = {n: engine.full_parameter(p).clone() for n, p in engine.module.named_parameters()}
    norm = engine.gradient_norm()
    engine.close()
    return weights, norm


def main() -> None:
    torch.set_num_threads(1)
    compiling.COMPILER = "aot_eager"  # the same graphs, without the minutes of a C++ compiler
    ranks = init_processes()
    assert ranks.world == 2
    total = sum(len(s.ids) - 1 for step in packs(28) for samples in step for s in samples)
    register(ForeignNorms)
    for name, case in CASES.items():
        if case.precision != "fp32":
            expected, norm = engine_step(replace(case, compiled=False), 1, ranks, total)
        elif ranks.first:  # which alone compares
            expected, norm = plain_step(case, total)
        if ranks.first:
            dtype = DTYPES[case.precision]
            start = {n: p.to(dtype) for n, p in case.build().named_parameters()}
            trained = {n: p.requires_grad for n, p in case.build().named_parameters()}
            # A key's bias moves all scores of a query alike where nothing rotates it.
            still = [n for n in start if "visual" in n and n.endswith("k_proj.bias")]
            moves = {n: float((expected[n] - p).detach().abs().max()) for n, p in start.items()}
        for stage in case.stages:
            found, found_norm = engine_step(case, stage, ranks, total)
            if ranks.first:
                worst = max(float((found[n] - expected[n]).abs().max()) for n in expected)
                assert math.isfinite(worst)
                line = {
                    "case": name,
                    "stage": stage,
                    "error": worst,
                    "least_move": min(moves[n] for n in start if trained[n] and n not in still),
                    "frozen_move": max([moves[n] for n in start if not trained[n]], default=0.0),
                    "norm": found_norm,
                    "plain_norm": norm,
                }
                print(json.dumps(line), flush=True)
    for line in norm_steps.lines(ranks):
        if ranks.first:
            print(json.dumps(line), flush=True)
    leave_processes()


if __name__ == "__main__":
    main()
