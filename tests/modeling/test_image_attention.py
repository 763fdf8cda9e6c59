"""How much of what text reads comes from images, against the independent reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from casa_train.modeling import attention
from casa_train.modeling.attention import attention_on
from casa_train.modeling.image_attention import (
    ATTENTION_GATE,
    FFN_GATE,
    IMAGE_GATE,
    IMAGE_SHARE,
)
from casa_train.modeling.segments import Segments
from tests.helpers.tiny import HARD_PACK, PROPERTY, Layout, fill, layouts, packed_inputs
from tests.helpers.twins import insertion_twins
from tests.helpers.variants import (
    VARIANTS,
    build,
    every_mechanism,
    every_variant,
    packed_logits,
    reference_of,
    shared_model,
    tokens_of,
)


@every_variant
@settings(PROPERTY, max_examples=3)
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_what_is_read_from_images_equals_the_reference(
    variant: str, pack: list[Layout], seed: int
) -> None:
    model, samples = shared_model(variant), fill(pack, seed)
    found = model.image_attention(packed_inputs(samples)).values
    each = [reference_of(model, sample).reads for sample in samples]
    expected = [torch.cat(layer).detach() for layer in zip(*each, strict=True)]
    name = IMAGE_GATE if VARIANTS[variant]["mechanism"] == "hyper_attention" else IMAGE_SHARE
    layers = found.get(name, {})
    fused = model.model.layers
    if not VARIANTS[variant]["mechanism"].endswith("insertion"):
        fused = [layer.fusion for layer in fused if layer.fusion is not None]
    assert len(layers) in (0, len(fused))
    torch.testing.assert_close(list(layers.values()), expected, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("backbone", ["llama", "qwen2_5_vl"])
def test_casa_turned_into_insertion_reads_as_insertion(backbone: str) -> None:
    packed = packed_inputs(fill(HARD_PACK))
    inserted, turned = (twin.image_attention(packed) for twin in insertion_twins(backbone))
    torch.testing.assert_close(
        turned.values[IMAGE_SHARE], inserted.values[IMAGE_SHARE], rtol=0, atol=1e-5
    )
    assert inserted.uniform is not None and turned.uniform is not None
    torch.testing.assert_close(turned.uniform, inserted.uniform)


@pytest.mark.parametrize("variant", ["casa", "insertion"])
def test_the_uniform_share_counts_keys(variant: str) -> None:
    model, samples = shared_model(variant), fill(HARD_PACK)
    uniform = model.image_attention(packed_inputs(samples)).uniform
    expected = []
    for sample in samples:
        tokens = tokens_of(sample.layout)
        for query in (token for token in tokens if token.kind == "text"):
            seen = [t.kind for t in tokens if t.place <= query.place]
            if variant == "casa":
                before = [t for t in tokens if t.place <= query.place and t.window == query.window]
                seen = [t.kind for t in before if query.window is not None]
            expected.append(seen.count("image") / len(seen) if seen else np.nan)
    assert uniform is not None
    np.testing.assert_allclose(uniform.numpy(), expected, atol=1e-12)


def test_the_gates_of_flamingo_are_its_parameters() -> None:
    model = build("gated_cross_attention")
    with torch.no_grad():
        model.model.layers[1].fusion.attention_gate.fill_(0.5)
        model.model.layers[1].fusion.ffn_gate.fill_(-2.0)
    values = model.image_attention(packed_inputs(fill(HARD_PACK))).values
    assert values.keys() == {ATTENTION_GATE, FFN_GATE}
    texts = sum(layout.text for layout in HARD_PACK)
    for name, gate in ((ATTENTION_GATE, 0.5), (FFN_GATE, -2.0)):
        torch.testing.assert_close(values[name][1], torch.full((texts,), gate).tanh())


@every_mechanism
def test_chosen_rows_are_those_of_the_whole_and_nothing_else_changes(mechanism: str) -> None:
    model, samples = build(mechanism), fill(HARD_PACK)
    packed = packed_inputs(samples)
    with torch.no_grad():
        before = packed_logits(model, samples)
    rows = torch.tensor([12, 3, 4, 17])
    whole = model.image_attention(packed)
    some = model.image_attention(replace(packed, logits_index=rows))
    assert some.values.keys() == whole.values.keys()
    for name, layers in whole.values.items():
        expected = {layer: values[rows] for layer, values in layers.items()}
        torch.testing.assert_close(some.values[name], expected, equal_nan=True)
    with torch.no_grad():
        assert torch.equal(packed_logits(model, samples), before)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_of_a_segment_may_stand_anywhere(
    causal: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against dense attention, with rows out of order and one that no segment holds, one query at
    a time, two and all.
    """
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(9, heads, 4, generator=generator).double() for heads in (4, 2))
    queries: Any = [[(6, 9), (1, 3)], [(3, 4)]]
    keys: Any = [[(0, 2), (5, 9)], [(2, 4)]]
    marked = torch.arange(9) % 3 == 0
    rows = torch.tensor([3, 2, 8, 6, 0])
    found = attention_on(q, k, Segments(queries, keys, causal), rows, marked)
    lists = [([6, 7, 8, 1, 2], [0, 1, 5, 6, 7, 8]), ([3], [2, 3])]
    expected = []
    for row in rows.tolist():
        seen: list[int] = []
        for q_rows, k_rows in lists:
            if row in q_rows:
                end = len(k_rows) - (len(q_rows) - 1 - q_rows.index(row)) if causal else None
                seen = k_rows[:end]
        scores = torch.einsum("hd,khd->hk", q[row], k[seen].repeat_interleave(2, 1)) / 2
        share = (scores.softmax(-1) * marked[seen]).sum(-1).mean()
        expected.append(share if seen else torch.tensor(torch.nan).double())
    torch.testing.assert_close(found, torch.stack(expected), equal_nan=True)
