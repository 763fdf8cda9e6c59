"""Where every tensor of ours comes from in a published checkpoint, and what becomes of every
tensor there: all of it decided from names and shapes, before a value is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from casa_train.convert.name_tree import name_tree
from casa_train.convert.rules import Rules, TensorRule
from casa_train.errors import UserError
from casa_train.setup.pretrained import Pretrained

MAX_SHOWN = 8
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNKNOWN, UNUSED, USED = "?", "-", "="


@dataclass(frozen=True)
class Piece:
    """How one tensor of ours is made.

    :param sources: tensors of the checkpoint, joined along the first axis in this order.
    :param rows: the part of the one source that is taken; None: all of it.
    :param shape: of ours.
    :param form: of the rule: `patches` may lack the time axis or be a linear.
    :param value: what fills it where there is no source.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    form: str = "same"
    value: float | None = None


@dataclass
class Plan:
    """The account of a conversion.

    :ivar pieces: by our names.
    :ivar ignored: names of the checkpoint -> why they are left out.
    :ivar filled: our names -> why they do not come from the checkpoint.
    :ivar idle: patterns of rules that match nothing and do not say that they may.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)

    def read(self, pretrained: Pretrained, name: str, dtype: torch.dtype | None) -> Tensor:
        """The value of a tensor of ours, in memory of its own.

        :param dtype: None leaves it as the checkpoint has it.
        """
        piece = self.pieces[name]
        if piece.value is not None:
            made = torch.full(piece.shape, piece.value, dtype=dtype or torch.float32)
            return made
        tensors = [pretrained.tensor(source) for source in piece.sources]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if piece.rows is not None:
            tensor = tensor[slice(*piece.rows)]
        if piece.form == "patches":
            tensor = _patches(tensor, piece.shape)
        return tensor.to(dtype or tensor.dtype, copy=True).contiguous()

    def lines(self, total: int) -> list[str]:
        """The account in a few lines; :param total: tensors of the checkpoint."""
        used = total - len(self.ignored)
        lines = [f"{total} tensors there: {used} used, {len(self.ignored)} ignored"]
        for what, names in (("ignored", self.ignored), ("filled", self.filled)):
            for why in dict.fromkeys(names.values()):
                some = [name for name, reason in names.items() if reason == why]
                lines.append(f"{what} {len(some)} ({some[0]}, ...): {why}")
        lines += [f"note: the rule {pattern!r} matches nothing" for pattern in self.idle]
        return lines


def targets_of(names: Sequence[str], rules: Rules) -> set[str]:
    """Names of ours that some tensor of the checkpoint goes to."""
    taken = ((name, rules.rule_of(name)) for name in names)
    return {target for name, rule in taken if rule is not None for target in rule.targets(name)}


def make_plan(
    there: Mapping[str, Sequence[int]],
    ours: Mapping[str, Sequence[int]],
    rules: Rules,
    where: str,
) -> Plan:
    """Plans a conversion.

    :param there: shapes of the checkpoint by name; :param ours: of the model, tied ones once.
    :param where: names the checkpoint in messages.
    :raises UserError: tensors that no rule takes, that lead nowhere or twice to one place, shapes
        that differ, or tensors of ours without a source; with the tree of names.
    """
    plan, problems = Plan(), list[str]()
    marks: dict[str, str] = {}
    joined: dict[str, dict[str, str]] = {}
    used: set[int] = set()
    tied = HEAD not in ours
    for name, shape in there.items():
        rule = rules.rule_of(name)
        if rule is None:
            marks[name] = UNKNOWN
            continue
        used.add(id(rule))
        if rule.ignore is not None:
            plan.ignored[name], marks[name] = rule.ignore, UNUSED
            continue
        marks[name] = USED
        targets = rule.targets(name)
        if tied and targets == [HEAD]:  # the same values, which `tied_head` makes sure of
            plan.ignored[name] = "a tied head is the embedding"
            continue
        lost = [target for target in targets if target not in ours]
        if lost:
            marks[name] = UNKNOWN
            problems.append(f"{name} would be {lost[0]}, which this model has not")
        elif rule.parts:
            part = rule.part_of(name) or ""
            if joined.setdefault(targets[0], {}).setdefault(part, name) != name:
                problems.append(f"{name} and {joined[targets[0]][part]} are one part of one tensor")
        else:
            _add(plan, problems, name, shape, targets, ours, rule)
    _join(plan, problems, joined, there, ours, rules)
    _fill(plan, ours, rules)
    plan.idle = [
        rule.pattern.pattern for rule in rules.tensors if id(rule) not in used and not rule.optional
    ]
    unknown = [name for name, mark in marks.items() if mark == UNKNOWN]
    missing = [name for name in ours if name not in plan.pieces]
    if unknown or missing or problems:
        raise UserError(_complaint(where, unknown, missing, problems, plan, there, ours, marks))
    return plan


def tied_head(pretrained: Pretrained, rules: Rules, tied: bool) -> None:
    """Makes sure that a head which is left out as a tied one is the embedding.

    :raises UserError: it holds other values.
    """
    homes: dict[str, str] = {}
    for name in pretrained.names:
        rule = rules.rule_of(name)
        for target in () if rule is None else rule.targets(name):
            homes[target] = name
    if not tied or not {HEAD, EMBEDDING} <= homes.keys():
        return
    head, embedding = (pretrained.tensor(homes[name]) for name in (HEAD, EMBEDDING))
    if not torch.equal(head, embedding):
        raise UserError(
            f"{pretrained.name}: config.json ties the head to the embedding, but {homes[HEAD]} "
            f"and {homes[EMBEDDING]} hold other values; expected equal ones. Where the head is "
            "right, give its family in the rules text: {values: {tie_word_embeddings: false}}."
        )


def _add(
    plan: Plan,
    problems: list[str],
    name: str,
    shape: Sequence[int],
    targets: Sequence[str],
    ours: Mapping[str, Sequence[int]],
    rule: TensorRule,
) -> None:
    """One tensor that becomes one of ours, or several by its rows."""
    start = 0
    heights = [ours[target][0] for target in targets]
    if len(targets) > 1 and list(shape) != [sum(heights), *ours[targets[0]][1:]]:
        wanted = " + ".join(str(list(ours[target])) for target in targets)
        problems.append(f"{name} has shape {list(shape)}, expected {wanted} by rows")
    for target, height in zip(targets, heights, strict=True):
        if target in plan.pieces:
            problems.append(f"{name} and {plan.pieces[target].sources[0]} would both be {target}")
        expected = tuple(ours[target])
        rows = None if len(targets) == 1 else (start, start + height)
        start += height
        fits = rule.form == "patches" and _patches_fit(tuple(shape), expected)
        if rows is None and tuple(shape) != expected and not fits:
            problems.append(f"{name} has shape {list(shape)}, expected {list(expected)} ({target})")
        plan.pieces[target] = Piece((name,), expected, rows, rule.form)


def _join(
    plan: Plan,
    problems: list[str],
    joined: Mapping[str, Mapping[str, str]],
    there: Mapping[str, Sequence[int]],
    ours: Mapping[str, Sequence[int]],
    rules: Rules,
) -> None:
    """Several tensors that become one of ours."""
    for target, found in joined.items():
        rule = rules.rule_of(next(iter(found.values())))
        assert rule is not None
        lacking = [part for part in rule.parts if part not in found]
        sources = tuple(found[part] for part in rule.parts if part in found)
        shapes = [list(there[source]) for source in sources]
        expected = list(ours[target])
        height = sum(shape[0] for shape in shapes)
        if lacking or set(found) - set(rule.parts):
            problems.append(f"{target} would be {list(found)} joined, expected {list(rule.parts)}")
        elif [height, *shapes[0][1:]] != expected or any(s[1:] != expected[1:] for s in shapes):
            problems.append(f"{' + '.join(sources)} have shapes {shapes}, expected {expected}")
        if target in plan.pieces:
            problems.append(f"{sources[0]} and {plan.pieces[target].sources[0]} both are {target}")
        plan.pieces[target] = Piece(sources, tuple(expected))


def _fill(plan: Plan, ours: Mapping[str, Sequence[int]], rules: Rules) -> None:
    """What the checkpoint has not, and a rule says where it comes from."""
    for name, shape in ours.items():
        for rule in rules.fill if name not in plan.pieces else ():
            match = rule.pattern.fullmatch(name)
            if match is None:
                continue
            if rule.value is not None:
                plan.pieces[name] = Piece((), tuple(shape), value=rule.value)
            else:
                from_ = match.expand(rule.copy or "")
                if from_ not in plan.pieces or tuple(ours[from_]) != tuple(shape):
                    continue  # it stays missing, and is named so
                plan.pieces[name] = plan.pieces[from_]
            plan.filled[name] = rule.why
            break


def _patches_fit(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a patch projection is the same as a linear, or without its time axis."""
    width, channels, _, *patch = expected
    return shape in ((width, math.prod(expected[1:])), (width, channels, *patch))


def _patches(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A patch projection (C, channels, time, patch, patch).

    The model adds up its time slices, so one without that axis becomes the first slice, and zeros
    the others: the sum is exact.
    """
    if tensor.ndim == len(shape) - 1:
        out = tensor.new_zeros(shape)
        out[:, :, 0] = tensor
        return out
    return tensor.reshape(shape)


def _complaint(
    where: str,
    unknown: Sequence[str],
    missing: Sequence[str],
    problems: Sequence[str],
    plan: Plan,
    there: Mapping[str, Sequence[int]],
    ours: Mapping[str, Sequence[int]],
    marks: Mapping[str, str],
) -> str:
    counts = [f"{len(unknown)} tensors that lead nowhere"] if unknown else []
    counts += [f"{len(missing)} of this model that nothing fills"] if missing else []
    counts += [f"{len(problems)} that do not fit"] if problems else []
    parts = [f"{where} does not fit the rules: {', '.join(counts)}."]
    if problems:
        more = " ..." if len(problems) > MAX_SHOWN else ""
        parts.append("; ".join(problems[:MAX_SHOWN]) + more)
    if plan.idle:
        parts.append("rules that match nothing: " + "; ".join(plan.idle))
    signs = f"{UNKNOWN} leads nowhere, {UNUSED} is ignored, {USED} is used"
    parts.append(f"its tensors ({signs}):\n{name_tree(there, marks)}")
    if missing:
        lacking = {name: ours[name] for name in missing}
        parts.append(f"of this model nothing fills:\n{name_tree(lacking)}")
    parts.append(
        "Write a file of rules that says what they are (extends: kyutai, tensors: [{from: ..., to: "
        "...} or {from: ..., ignore: WHY}]), and name it by --rules."
    )
    return "\n".join(parts)
