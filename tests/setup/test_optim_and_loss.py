"""Parameter groups, the schedule, the loss and the audit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from casa_train.config.schema import Config, GroupConfig, OptimConfig
from casa_train.errors import UserError
from casa_train.setup.optim import build_groups, describe, fit_schedule, rate_factor, set_rates
from casa_train.training.audit import Audit
from casa_train.training.loss import answer_losses
from tests.helpers.tiny_run import Lines


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.fusion = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def groups(**patterns: str) -> dict[str, GroupConfig]:
    return {n: GroupConfig([p], lr=1e-3, weight_decay=0.1) for n, p in patterns.items()}


def test_each_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    built = build_groups(Toy().named_parameters(), groups(new="fusion", old="body|norm"))
    names = {(g["name"], g["weight_decay"]): g["names"] for g in built}
    assert names == {
        ("new", 0.1): ["fusion.weight"],
        ("new", 0.0): ["fusion.bias"],
        ("old", 0.1): ["body.weight"],
        ("old", 0.0): ["body.bias", "norm.weight", "norm.bias"],
    }


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"a": "fusion", "b": "body"}, "'norm.weight' matches no group"),
        ({"a": "fusion|body|norm", "b": "body"}, r"matches groups \['a', 'b'\]"),
        ({"a": "fusion|body|norm", "b": "misspelt"}, "match no trainable parameter"),
    ],
)
def test_wrong_patterns_are_refused(patterns: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_groups(Toy().named_parameters(), groups(**patterns))


def test_description_counts_everything() -> None:
    toy = Toy()
    built = build_groups(toy.named_parameters(), groups(all="."))
    lines = describe(toy.named_parameters(), built)
    assert "30 parameters in    6 tensors, rate 0.001" in lines[0]
    assert "12 parameters in    2 tensors" in lines[1]


def test_a_schedule_longer_than_the_run_shrinks() -> None:
    assert fit_schedule(100, 10, 20) == (10, 20)
    assert fit_schedule(50, 50, 600) == (3, 47)


def test_schedule() -> None:
    factors = [rate_factor(step, 10, warmup=2, decay=4) for step in range(1, 11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [rate_factor(s, 3, 0, 0) for s in (1, 2, 3)] == [1, 1, 1]
    param_groups = [{"name": "a", "base_lr": 2.0, "lr": 0.0}]
    assert set_rates(param_groups, 0.25) == {"a": 0.5}


def test_loss_sums_over_answers_and_keeps_a_graph_without_any() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    targets = torch.tensor([1, 2, 3, 0])
    rows = torch.log_softmax(logits.detach().double(), -1)
    expected = -rows[torch.arange(4), targets].sum()
    assert answer_losses(logits, targets).sum().item() == pytest.approx(expected.item(), rel=1e-6)
    empty = answer_losses(logits[:0], targets[:0]).sum()
    empty.backward()
    assert empty.item() == 0 and logits.grad is not None and not logits.grad.any()


class PlainEngine:
    """One process without sharding."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def full_gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        return parameter.grad

    def full_parameter(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter


def audit_of(toy: Toy, zero_at_start: Callable[[str], bool]) -> Audit:
    toy.mechanism = SimpleNamespace(zero_at_start=zero_at_start)
    config = Config(optim=OptimConfig(groups={"all": GroupConfig(["."])}))
    return Audit(config, PlainEngine(toy), Lines([]))


def one_step(
    toy: Toy, used: list[nn.Module], moved: list[nn.Module], zero: str = "-", rate: float = 1e-3
) -> str:
    audit = audit_of(toy, lambda name: zero in name)
    assert not audit.due(1, {"all": 0.0}, pairs=3)  # nothing can move
    assert not audit.due(1, {"all": rate}, pairs=0)  # no gradient reaches vision
    assert audit.due(1, {"all": rate}, pairs=3)
    x = torch.randn(2, 3)
    for module in used:
        x = module(x)
    x.square().sum().backward()
    audit.look({"all": rate})
    with torch.no_grad():
        for module in moved:
            for parameter in module.parameters():
                parameter += 1
    line = audit.verdict(1, applied=True)
    assert line is not None
    return line


def test_audit_passes_an_honest_step() -> None:
    toy = Toy()
    parts = [toy.body, toy.fusion, toy.norm]
    line = one_step(toy, [toy.body, toy.norm, toy.fusion], parts)
    assert "6 of 6 trainable tensors got a gradient and moved, 2 frozen ones did not" in line


def test_audit_names_what_is_wrong() -> None:
    toy = Toy()
    with pytest.raises(UserError, match="trainable fusion.weight got no gradient"):
        one_step(toy, [toy.body, toy.norm], [])
    toy = Toy()
    with pytest.raises(UserError, match="trainable body.weight did not move"):
        one_step(toy, [toy.body, toy.norm, toy.fusion], [toy.fusion, toy.norm])
    toy = Toy()
    parts = [toy.body, toy.fusion, toy.norm, toy.frozen]
    with pytest.raises(UserError, match="frozen frozen.weight moved"):
        one_step(toy, [toy.body, toy.norm, toy.fusion], parts)


def test_audit_lets_declared_zeros_pass_once(tmp_path: Path) -> None:
    toy = Toy()
    nn.init.zeros_(toy.fusion.weight)
    used = [toy.body, toy.norm, toy.fusion]
    moved = [toy.body, toy.norm, toy.fusion]
    with pytest.raises(UserError, match="body.weight got an all-zero gradient"):
        one_step(toy, used, moved)
    toy = Toy()
    nn.init.zeros_(toy.fusion.weight)
    used, moved = [toy.body, toy.norm, toy.fusion], [toy.fusion]
    assert "4 wait (zero gradient by design" in one_step(toy, used, moved, zero="o")


def test_audit_waits_for_a_gradient_that_decay_cannot_stand_in_for() -> None:
    toy = Toy()
    nn.init.zeros_(toy.fusion.weight)
    used, everything = [toy.body, toy.norm, toy.fusion], [toy.body, toy.norm, toy.fusion]
    # All of them move, as a weight decay has it; behind the zero weight, no gradient came.
    line = one_step(toy, used, everything, zero="o")
    assert "2 of 6 trainable tensors got a gradient and moved" in line and "4 wait" in line


def test_audit_waits_for_steps_that_are_taken_and_in_which_everything_can_move() -> None:
    toy = Toy()
    audit = audit_of(toy, lambda name: name == "norm.bias")

    def step(number: int, factor: float, still: str = "-") -> str | None:
        """Only a step whose factor is finite is taken; gradients of `still` are zero."""
        assert audit.due(number, {"all": 1.0}, pairs=1)
        toy.zero_grad()
        loss = toy.fusion(toy.norm(toy.body(torch.randn(2, 3)))).square().sum()
        (loss * factor).backward()
        for name, parameter in toy.named_parameters():
            if parameter.grad is not None and name == still:
                parameter.grad.zero_()
        audit.look({"all": 1.0})
        if factor == 1.0:
            with torch.no_grad():
                for parameter in toy.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        return audit.verdict(number, applied=factor == 1.0)

    for number in (1, 2):
        assert step(number, float("nan")) is None and audit.first_step is None
    line = step(3, 1.0, still="norm.bias")
    assert line is not None and "5 of 6 trainable" in line and "1 wait" in line
    # The final look of step 13: nothing that can move, then not taken, then not taken again.
    assert not audit.due(12, {"all": 1.0}, pairs=1)
    assert not audit.due(13, {"all": 1.0}, pairs=0)
    assert step(14, float("inf")) is None and step(15, float("nan")) is None
    with pytest.raises(UserError, match="step 16 .*norm.bias got an all-zero gradient"):
        step(16, 1.0, still="norm.bias")
    line = step(17, 1.0)
    assert line is not None and "6 of 6 trainable" in line
    assert not audit.due(18, {"all": 1.0}, pairs=1)


def test_audit_waits_where_the_rate_is_below_the_resolution_of_fp32() -> None:
    toy = Toy()
    toy.norm.bias.requires_grad_(False)
    used = [toy.body, toy.norm, toy.fusion]
    # A norm's weights are all one: a rate of 1e-9 cannot change them, and no error is raised.
    line = one_step(toy, used, [toy.body, toy.fusion], rate=1e-9)
    assert "wait" in line
