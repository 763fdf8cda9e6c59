"""How far text turns to images while a variant learns, by ability, class of tokens and layer, as
its validations recorded it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from casa_train.evaluate.attention_while_training import CLASSES
from casa_train.io.numbers import percent
from casa_train.modeling.image_attention import IMAGE_GATE, IMAGE_SHARE
from casa_train.report.comparison import Comparison
from casa_train.report.series import Array, column
from casa_train.report.significance import LEVEL, Interval, interval
from casa_train.report.variants import Reading, Variant, text_only
from casa_train.report.verdicts import points, span

SHARES = (IMAGE_SHARE, IMAGE_GATE)  # in percent; other gates are open or closed for all alike


@dataclass
class AttentionOverTime:
    """One variant's.

    :param quantity: such as the image share.
    :param uniform: by ability, what equal attention would give its answers; of gates nothing.
    :param steps: those that all seeds were measured at.
    :param values: by (ability, class), (seeds, steps, layers), NaN where nothing was recorded.
    """

    variant: Variant
    quantity: str
    layers: list[int]
    steps: list[int]
    uniform: dict[str, float]
    values: dict[tuple[str, str], Array] = field(default_factory=dict)

    def at_end(self, ability: str, kind: str) -> Array:
        """(seeds,) means over layers at the last step that is drawn."""
        values = self.values.get((ability, kind))
        return np.full(1, np.nan) if values is None else values[:, -1].mean(axis=-1)

    def by_layer(self, kind: str) -> list[tuple[int, list[float | None]]]:
        """At the last step: each layer, and of each ability its mean over seeds."""
        abilities = self.abilities
        found = {
            a: self.values[a, kind][:, -1].mean(axis=0)
            for a in abilities
            if (a, kind) in self.values
        }
        return [
            (layer, [float(found[a][i]) if a in found else None for a in abilities])
            for i, layer in enumerate(self.layers)
        ]

    @property
    def abilities(self) -> list[str]:
        """Those of `by_layer`."""
        return list(dict.fromkeys(ability for ability, _ in self.values))


def attention_over_time(result: Comparison) -> list[AttentionOverTime]:
    """Of each variant that recorded shares, the steps that all its seeds have; nothing of one whose
    record holds no number.
    """
    found = []
    for variant in result.variants:
        own = {trial.seed: trial.readings for trial in variant.trials}
        names = [
            name
            for name in SHARES
            if all(any(r.attention.get(name) for r in x) for x in own.values())
        ]
        if names:
            found.append(_of_variant(result, variant, names[0], list(own.values())))
    return [one for one in found if one.steps and one.values]


def _of_variant(
    result: Comparison, variant: Variant, quantity: str, seeds: Sequence[Sequence[Reading]]
) -> AttentionOverTime:
    by_step = [
        {
            reading.step: reading.attention[quantity]
            for reading in readings
            if reading.attention.get(quantity)
        }
        for readings in seeds
    ]
    steps = sorted(set.intersection(*(set(own) for own in by_step)))
    first = next(iter(by_step[0].values()))
    uniform = {
        ability: found
        for ability, source in result.sources.items()
        if (found := _uniform(first, source)) is not None
    }
    over = AttentionOverTime(variant, quantity, list(first["layers"]), steps, uniform)
    for ability, source in result.sources.items():
        for kind in CLASSES:
            values = np.array(
                [
                    [_layers(own[step], source, kind, len(over.layers)) for step in steps]
                    for own in by_step
                ]
            )
            if np.isfinite(values).any():
                over.values[ability, kind] = values
    return over


def _uniform(quantity: Mapping[str, Any], source: str) -> float | None:
    """Of the answers of a source, or of all where it does not say so."""
    own = (quantity["sources"].get(source) or {}).get("uniform") or {}
    found = own.get("answer", quantity.get("uniform"))
    return None if found is None else float(found)


def _layers(quantity: Mapping[str, Any], source: str, kind: str, count: int) -> Array:
    classes = (quantity["sources"].get(source) or {}).get("classes") or {}
    found = classes.get(kind)
    values = column([] if found is None else found)
    return values if len(values) == count else np.full(count, np.nan)


@dataclass(frozen=True)
class Gate:
    """What the answers of one variant give images at the end, means over layers and seeds.

    :param text: to questions about text alone; :param others: to all others.
    :param equal: of both, what equal attention to everything in sight would give; None: unknown.
    :param gap: of the first two, over seeds.
    :param finding: in words.
    """

    label: str
    step: int
    text: float
    others: float
    equal: tuple[float, float] | None
    gap: Interval
    finding: str


def gate_of(over: AttentionOverTime) -> Gate | None:
    """None where no ability is of text alone, or nothing was measured.

    That the gate closes is said only if the interval over seeds is below 0, and below what equal
    attention would make of fewer images in sight.
    """
    answered = [ability for ability, kind in over.values if kind == "answer"]
    alone = [ability for ability in answered if text_only(ability)]
    others = [ability for ability in answered if not text_only(ability)]
    if not alone or not others:
        return None
    text, about_images = (
        np.mean([over.at_end(ability, "answer") for ability in group], axis=0)
        for group in (alone, others)
    )
    if not np.isfinite([text, about_images]).all():
        return None
    gap = interval((text - about_images).tolist())
    equal = None
    if all(ability in over.uniform for ability in answered):
        of_text, of_others = (
            float(np.mean([over.uniform[ability] for ability in group]))
            for group in (alone, others)
        )
        equal = (of_text, of_others)
    by_equal = 0.0 if equal is None else equal[0] - equal[1]
    finding = _carried(gap, by_equal)
    return Gate(
        over.variant.label,
        over.steps[-1],
        float(text.mean()),
        float(about_images.mean()),
        equal,
        gap,
        finding,
    )


def _carried(gap: Interval, equal: float) -> str:
    """:param equal: the gap that equal attention would show."""
    if gap.seeds == 1:
        return "one seed: nothing is claimed"
    if gap.high < min(0.0, equal):
        return "closes"
    if gap.low > max(0.0, equal):
        return "further open"
    return "not shown to close"


GATE_TITLES = (
    *("at step", "text-only answers", "equal attention", "other answers", "equal attention"),
    *("difference", f"{100 * LEVEL:g} % over seeds", "gate on text-only turns"),
)


def gate_rows(gates: Sequence[Gate]) -> list[list[str]]:
    """By variant, what stands under `GATE_TITLES`."""
    return [
        [
            f"{gate.step:,}",
            percent(gate.text),
            percent(gate.equal and gate.equal[0]),
            percent(gate.others),
            percent(gate.equal and gate.equal[1]),
            points(gate.gap.mean),
            span(gate.gap),
            gate.finding,
        ]
        for gate in gates
    ]
