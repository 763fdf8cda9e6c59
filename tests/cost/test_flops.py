"""Counted work and memory: against torch's own counters on tiny real models, and pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from casa_train.cost.sizes import text_sizes, vision_sizes
from casa_train.cost.work import count_operations, repeated_operations
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.mechanisms import build_mechanism
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.windows import Chunk
from casa_train.setup.lora import adapter_ranks
from tests.helpers.adapted import adapt
from tests.helpers.counted_models import FUSIONS, dense_pairs, frozen_model, names, shapes
from tests.helpers.tiny import (
    HIDDEN,
    PROPERTY,
    Layout,
    fill,
    layouts,
    packed_inputs,
    tiny_siglip_config,
    tiny_text_config,
    tiny_vision_config,
)

# Leading text, two images of one window size, and text behind: twice.
PACK = [Layout(14, (2, 8), ((8, 8), (8, 8)))] * 2


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        pytest.param(True, -1, id="trained, whole tower"),
        pytest.param(True, 1, id="trained, a block of the tower", marks=SLOW),
        pytest.param(True, 0, id="trained, frozen tower", marks=SLOW),
        pytest.param(False, -1, id="frozen, whole tower", marks=SLOW),
        pytest.param(False, 1, id="frozen, a block of the tower"),
        pytest.param(False, 0, id="frozen, frozen tower", marks=SLOW),
    ],
)
@pytest.mark.parametrize("fusion", FUSIONS, ids=names)
def test_work_is_what_torch_counts(fusion: dict[str, Any], trainable: bool, trained: int) -> None:
    check_work("llama", fusion, trainable, trained)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [{"mechanism": "casa"}, {"mechanism": "hyper_attention"}])
@pytest.mark.parametrize("trainable", [True, False])
def test_work_of_wide_heads_with_norms_is_what_torch_counts(
    fusion: dict[str, Any], trainable: bool
) -> None:
    """Qwen3's heads are wider than width / heads; their norms are no products."""
    check_work("qwen3", fusion, trainable, 1)


def check_work(backbone: str, fusion: dict[str, Any], trainable: bool, trained: int) -> None:
    model = frozen_model(
        CasaConfig(
            text_config=tiny_text_config(backbone, layers=3),
            vision_config=tiny_vision_config(width=48 if trained else HIDDEN),
            fusion=fusion,
        ),
        trainable,
        trained,
    )
    parts = count_operations(
        text_sizes(model.config.text_config, trainable),
        vision_sizes(model.config, trained),
        model.mechanism,
        shapes(PACK),
        answers=sum(layout.text for layout in PACK),
        pairs=dense_pairs(model, [layout.chunk() for layout in PACK]),
    )
    inputs = packed_inputs(fill(PACK))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(packed=inputs).logits.sum()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    assert sum(part.forward for part in parts.values()) == forward.get_total_flops()
    assert sum(part.backward for part in parts.values()) == backward.get_total_flops()


@pytest.mark.parametrize("trained", [-1, 1, 0])
@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_work_of_a_second_tower_is_what_torch_counts(adapter: str, trained: int) -> None:
    text, vision = tiny_text_config(layers=1), tiny_siglip_config()
    model = frozen_model(
        CasaConfig(text_config=text, vision_config=vision, adapter=adapter), True, trained
    ).train()
    sizes = text_sizes(text, True), vision_sizes(model.config, trained)
    pairs = dense_pairs(model, [layout.chunk() for layout in PACK])
    shaped, answers = shapes(PACK), sum(layout.text for layout in PACK)
    parts = count_operations(*sizes, model.mechanism, shaped, answers, pairs)
    inputs = packed_inputs(fill(PACK, side=32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(packed=inputs).logits.sum()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    assert sum(part.forward for part in parts.values()) == forward.get_total_flops()
    assert sum(part.backward for part in parts.values()) == backward.get_total_flops()
    blocks = "vision" if trained else "decoder"
    plain, repeated = (counted(model, which, side=32) for which in ("none", blocks))
    expected = repeated_operations(*sizes, model.mechanism, shaped, blocks, pairs)
    assert repeated - plain == expected > 0


def counted(model: CasaForConditionalGeneration, blocks: str, side: int = 28) -> int:
    """Operations of both passes as torch counts them, with what checkpointed blocks repeat."""
    model.zero_grad()
    model.checkpoint_activations(blocks)
    inputs = packed_inputs(fill(PACK, side=side))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(packed=inputs).logits.sum().backward()
    total: int = counter.get_total_flops()
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "trained"), [(True, -1), (False, 1), (False, 0)], ids=["trained", "part", "least"]
)
@pytest.mark.parametrize("fusion", FUSIONS, ids=names)
def test_repeated_work_is_what_torch_counts(
    fusion: dict[str, Any], trainable: bool, trained: int
) -> None:
    text, vision = tiny_text_config(layers=3), tiny_vision_config(width=48 if trained else HIDDEN)
    config = CasaConfig(text_config=text, vision_config=vision, fusion=fusion)
    model = frozen_model(config, trainable, trained).train()
    blocks = "all" if trained else "decoder"
    repeated = repeated_operations(
        text_sizes(text, trainable),
        vision_sizes(config, trained),
        model.mechanism,
        shapes(PACK),
        blocks,
        pairs=dense_pairs(model, [layout.chunk() for layout in PACK]),
    )
    assert counted(model, blocks) - counted(model, "none") == repeated


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["k_proj", "layers.2.mlp.*"]])
@pytest.mark.parametrize(
    "fusion", [pytest.param(f, marks=[] if i in (0, 2) else SLOW) for i, f in enumerate(FUSIONS)]
)
def test_work_of_adapters_is_what_torch_counts(
    fusion: dict[str, Any], targets: list[str] | None
) -> None:
    """Of each its two products, and through frozen linears gradients of the inputs alone; keys and
    values may differ in whether they carry one.
    """
    if fusion.get("placement") == "replace" and "history" in fusion:
        targets = targets and ["up_proj", "gate_proj"]  # no block has self-attention
    text, vision = tiny_text_config(layers=3), tiny_vision_config(width=48)
    config = CasaConfig(text_config=text, vision_config=vision, fusion=fusion)
    model = adapt(frozen_model(config, False, 1), targets).train()
    whole = [layout.chunk() for layout in PACK]
    sizes = text_sizes(text, False, adapter_ranks(model)), vision_sizes(config, 1)
    told = model.mechanism, shapes(PACK)
    parts = count_operations(
        *sizes, *told, answers=sum(p.text for p in PACK), pairs=dense_pairs(model, whole)
    )
    assert counted(model, "none") == sum(part.total for part in parts.values())
    repeated = repeated_operations(*sizes, *told, "all", pairs=dense_pairs(model, whole))
    assert counted(model, "all") - counted(model, "none") == repeated


def visible(fusion: dict[str, Any], sample: Chunk) -> tuple[int, int]:
    """Pairs of text queries and of image queries, asked one by one."""
    tokens: list[tuple[str, int, int]] = []  # kind, index of its window (-1: before all), place
    window, done, frames = -1, 0, -1
    scopes: list[int] = []  # the scope that each window belongs to
    for i, point in enumerate(sample.points):
        tokens += [("text", window, t) for t in range(done, point)]
        if i == 0 or point > sample.points[i - 1]:
            window += 1
            frames = frames if any(sample.follows[i : i + 1]) else window
            scopes.append(frames)
        done = point
        rows, columns = sample.grids[i]
        tokens += [("image", window, 0)] * (rows * columns)
    tokens += [("text", window, t) for t in range(done, sample.text)]
    text_keys = fusion["mechanism"] == "casa" and fusion.get("text_in_window", True)
    whole = fusion["mechanism"] == "hyper_attention" or fusion.get("history") == "all"
    counts = {"text": 0, "image": 0}
    for at, (kind, query_window, _) in enumerate(tokens):
        for key_kind, key_window, _ in tokens[: at + 1]:
            if key_kind == "text" and not text_keys:
                continue
            if kind == "text" and query_window < 0 and fusion.get("placement") != "replace":
                continue  # before the first image
            if whole:
                counts[kind] += 1
            elif min(query_window, key_window) >= 0:
                together = fusion.get("window_scope") == "all_frames"
                query, key = (scopes[w] if together else w for w in (query_window, key_window))
                counts[kind] += query == key
    return counts["text"], counts["image"]


@pytest.mark.parametrize(
    "fusion",
    [
        {"mechanism": "casa"},
        {"mechanism": "casa", "text_in_window": False},
        {"mechanism": "casa", "history": "all"},
        {"mechanism": "casa", "history": "all", "placement": "replace"},
        {"mechanism": "casa", "window_scope": "all_frames"},
        {"mechanism": "cross_attention"},
        {"mechanism": "cross_attention", "window_scope": "all_frames"},
        {"mechanism": "gated_cross_attention"},
        {"mechanism": "hyper_attention"},
    ],
    ids=names,
)
@PROPERTY
@given(pack=layouts(), data=st.data())
def test_pairs_are_those_that_may_see_each_other(
    fusion: dict[str, Any], pack: list[Layout], data: st.DataObject
) -> None:
    samples = []
    for layout in pack:
        follows = [i > 0 and data.draw(st.booleans()) for i in range(len(layout.points))]
        samples.append(Chunk.of_grids(layout.text, layout.points, layout.grids, follows))
    pairs = build_mechanism(fusion, tiny_text_config()).pairs(samples)
    asked = [visible(fusion, sample) for sample in samples]
    assert pairs.text == sum(text for text, _ in asked)
    # Of image queries only where image tokens attend.
    updated = {**fusion, "update_image_tokens": "ffn_and_attention"}
    if fusion["mechanism"] in ("casa", "cross_attention"):
        assert pairs.image == 0
        pairs = build_mechanism(updated, tiny_text_config()).pairs(samples)
        assert pairs.text == sum(text for text, _ in asked)
        assert pairs.image == sum(image for _, image in asked)
    assert pairs.stream == sum(s.text * (s.text + 1) // 2 for s in samples)
