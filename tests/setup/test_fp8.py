"""Frozen vision blocks in fp8: its rounding, torch's own product, what stays bf16, and refusals."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.cost.full_pack import memory_of_rank
from casa_train.cost.sizes import size_model
from casa_train.errors import UserError
from casa_train.modeling.regions import compiling
from casa_train.setup.fp8 import (
    FP8,
    Fp8Linear,
    check_fp8,
    fp8_bytes,
    fp8_rows,
    frozen_linears,
    scaled_product,
    small_product,
    use_fp8,
    what_is_missing,
)
from casa_train.setup.model import meta_model
from tests.helpers.commands import TINY, on_data, run, train_command
from tests.helpers.plain_kernels import plain_kernels
from tests.helpers.runs import exact
from tests.helpers.tiny import HARD_PACK, fill
from tests.helpers.variants import build, gradients_of, packed_logits

FROZEN = ["parallel.frozen_precision=fp8", "model.vision.train_last_blocks=1"]


def values(rows: int, columns: int, seed: int = 0) -> Tensor:
    """bf16 over several orders of magnitude, row by row."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-4, 4, (rows, 1), generator=generator)
    return (sizes * torch.randn(rows, columns, generator=generator)).bfloat16()


def test_rows_are_rounded_to_e4m3_with_a_scale_each() -> None:
    x = values(40, 100)
    x[7] = 0
    rows, scale = fp8_rows(x)
    assert rows.dtype == FP8 and rows.shape == (40, 128) and scale.shape == (40, 1)
    back, exactly = rows.double() * scale.double(), x.double()
    assert not back[:, 100:].any() and not back[7].any() and back.isfinite().all()
    # Three bits behind the first, down to the smallest number of e4m3, 2^-9.
    bound = torch.maximum(exactly.abs() * 2**-4, scale.double() * 2**-10) * (1 + 1e-6)
    error = (back[:, :100] - exactly).abs()
    assert (error <= bound).all() and error.max() > 0
    # The largest number of a row is used up, so that small ones keep their bits.
    assert torch.equal(rows[:7].float().abs().amax(1), torch.full((7,), 448.0))


@pytest.mark.parametrize("bias", [False, True])
def test_the_emulated_product_is_that_of_the_rounded_operands(bias: bool) -> None:
    (x, x_scale), (w, w_scale) = fp8_rows(values(24, 72)), fp8_rows(values(48, 72, 1))
    more = values(1, 48, 2)[0] if bias else None
    found = scaled_product(x, w, x_scale, w_scale, more)
    expected = (x.double() * x_scale.double()) @ (w.double() * w_scale.double()).T
    expected = expected if more is None else expected + more.double()
    size = (x.double() * x_scale.double()).abs() @ (w.double() * w_scale.double()).abs().T
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + size * 1e-5).all()
    try:
        theirs = torch._scaled_mm(
            x, w.T, scale_a=x_scale, scale_b=w_scale.T, bias=more, out_dtype=torch.bfloat16
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        pytest.skip("this build of torch has no scaled products for a CPU")
    # Rounded to bf16 once more before the bias, in torch's own for a CPU.
    torch.testing.assert_close(found, theirs, rtol=2**-7, atol=float(size.max()) * 2**-8)


def test_what_a_gpu_is_asked_for_fits_its_kernels() -> None:
    """Torch's own rules of layouts, types and multiples, on tensors that only say they are there.

    3,420 columns, the width of Qwen2.5-VL's feed-forward network, are no multiple of 16.
    """
    mode = FakeTensorMode()

    def there(tensor: Tensor) -> Tensor:
        with mode:
            layout = tensor.shape, tensor.stride()
            return torch.empty_strided(*layout, dtype=tensor.dtype, device="cuda")

    for inputs, outputs in ((1280, 3420), (3420, 1280), (1280, 3840)):
        linear = nn.Linear(inputs, outputs, dtype=torch.bfloat16)
        linear.__class__ = Fp8Linear
        assert isinstance(linear, Fp8Linear)
        linear.store()
        assert linear.padded_bias is not None
        rows, scale = fp8_rows(values(172, inputs))
        narrower = there(rows[:, :-4].contiguous())
        asked = [there(rows), *map(there, (linear.rows8, scale, linear.scale, linear.padded_bias))]
        with mode:
            out = scaled_product(*asked)
        assert out.shape == (172, -(-outputs // 64) * 64) and out.dtype == torch.bfloat16
        with mode, pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_product(narrower, *asked[1:])


@pytest.mark.gpu
def test_a_gpus_product_is_the_emulated_one() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs a GPU of compute capability 8.9")
    (x, x_scale), (w, w_scale) = fp8_rows(values(172, 3420)), fp8_rows(values(1280, 3420, 1))
    bias = values(1, 1280, 2)[0]
    expected = scaled_product(x, w, x_scale, w_scale, bias).double()
    there = [tensor.cuda() for tensor in (x, w, x_scale, w_scale, bias)]
    found = scaled_product(*there).cpu().double()
    assert (found - expected).norm() < 0.01 * expected.norm()
    with compiling("inductor"):  # which rounds in one kernel
        compiled = fp8_rows(values(172, 3420).cuda())
    found = scaled_product(compiled[0], there[1], compiled[1], *there[3:]).cpu().double()
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_frozen_blocks_alone_change_and_everything_keeps_its_name() -> None:
    model = build("casa").bfloat16().train()
    model.visual.set_trainable(1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = packed_logits(model, fill(HARD_PACK))
        logits.float().pow(2).sum().backward()
        return logits.detach().float(), gradients_of(model)

    plain, gradients = step()
    use_fp8(model.visual)
    lowered, found = step()
    first, last = (list(block.modules()) for block in model.visual.blocks)
    assert sum(isinstance(module, Fp8Linear) for module in first) == 5
    assert not any(isinstance(module, Fp8Linear) for module in last)
    assert 0 < (lowered - plain).norm() < 0.2 * plain.norm()
    assert model.state_dict().keys() == state.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name, gradient in gradients.items():
        trained = not name.startswith(("visual.blocks.0.", "visual.patch_embed."))
        assert bool(found[name].any()) == bool(gradient.any()) == trained, name
    tower = model.visual
    held = [t for linear in frozen_linears(tower) for t in (linear.rows8, linear.scale)]
    assert sum(t.nbytes for t in held) == fp8_bytes(tower)


def test_a_feed_forward_network_rounds_as_its_linears_do() -> None:
    tower = build("casa").bfloat16().visual
    tower.set_trainable(0)
    x = values(24, 32)
    mlp = tower.blocks[1].get_submodule("mlp")
    plain = mlp(x)
    use_fp8(tower)
    with torch.no_grad():
        found = mlp(x)
        gate, up, down = (mlp.get_submodule(f"{name}_proj") for name in ("gate", "up", "down"))
        assert gate(x).shape == (24, 48)  # stored 64 wide
        assert torch.equal(found, down(nn.functional.silu(gate(x)) * up(x)))
    assert 0 < (found - plain).float().norm() < 0.1 * plain.float().norm()


def test_other_weights_are_taken_up_by_asking_again() -> None:
    towers = [build("casa", seed=seed).bfloat16().visual for seed in (1, 2)]
    images = [image for sample in fill(HARD_PACK) for image in sample.images]
    for tower in towers:
        tower.set_trainable(1)
        use_fp8(tower)
    with torch.no_grad():
        towers[0].load_state_dict(towers[1].state_dict())
        expected = towers[1](images)
        assert not torch.equal(towers[0](images), expected)
        use_fp8(towers[0])
        assert torch.equal(towers[0](images), expected)


def test_its_elementwise_work_is_compiled_where_blocks_are() -> None:
    tower = build("casa").bfloat16().visual
    tower.set_trainable(0)
    use_fp8(tower)
    mlp = tower.blocks[1].get_submodule("mlp")
    codes: list[str] = []

    def counted(graph: Any, inputs: list[Any]) -> Any:
        codes.append(graph.code)
        return graph

    for rows in (24, 35):  # of any number one graph each
        x = values(rows, 32)
        with torch.no_grad():
            expected = mlp(x)
            with compiling(counted):
                assert torch.equal(mlp(x), expected)
    torch._dynamo.reset()
    # One rounds what comes in, one the inner width; both have their columns padded in one go.
    found = {name: sum(name in code for code in codes) for name in ("vector_norm", "silu")}
    assert found == {"vector_norm": 2, "silu": 1} and len(codes) == 3


@pytest.mark.slow
def test_a_generated_kernel_rounds_as_eager_ones() -> None:
    x = values(40, 100)
    x[7] = 0
    rows, scale = fp8_rows(x)
    with plain_kernels(), compiling("inductor"):
        found, factors = fp8_rows(x)
    torch._dynamo.reset()
    assert found.dtype == FP8 and torch.equal(found.float(), rows.float())
    assert torch.equal(factors, scale)


def composed(*overrides: str) -> Config:
    return compose_config(["+experiment=demo", *overrides, "dry_run=true"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.precision=fp32"], "parallel.precision is 'fp32'; expected bf16 beside"),
        (["parallel.zero_stage=3"], "parallel.zero_stage is 3; expected 1 or 2 beside"),
        (["parallel.frozen_precision=fp4"], "is 'fp4'; expected bf16 or fp8"),
    ],
)
def test_settings_that_exclude_it_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        composed(*FROZEN, "parallel.precision=bf16", *overrides)


def test_a_model_or_machine_without_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(*FROZEN, "parallel.precision=bf16")
    tower = meta_model(config, size_model(config, [])).visual
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "emulated" in check_fp8(config, tower)[0]
    assert check_fp8(composed("parallel.precision=bf16"), tower) == []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    message = "NVIDIA A100 has compute capability 8.0; expected 8.9 or more. Set parallel.frozen"
    with pytest.raises(UserError, match=re.escape(message)):
        check_fp8(config, tower)

    tower.set_trainable(-1)
    with pytest.raises(UserError, match=r"no frozen blocks \(model.vision.train_last_blocks=1\)"):
        check_fp8(config, tower)


def test_a_build_without_scaled_products_is_named() -> None:
    card = SimpleNamespace(get_device_capability=lambda: (9, 0), get_device_name=lambda: "H100")
    library = SimpleNamespace(
        cuda=card, version=SimpleNamespace(cuda="12.8"), __version__="2.x", _scaled_mm=print
    )
    tried: list[int] = []

    def works() -> None:
        tried.append(1)

    def fails() -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling cublasLtMatmul")

    assert what_is_missing(library, works) is None and tried == [1]
    words = "torch 2.x cannot multiply rows of fp8 on H100: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"
    assert what_is_missing(library, fails) == words
    del library._scaled_mm
    assert what_is_missing(library, works) == "torch 2.x has no scaled products of fp8 for CUDA"
    library._scaled_mm, library.version.cuda = print, None
    assert what_is_missing(library, works) == "torch 2.x has no scaled products of fp8 for CUDA"
    assert tried == [1]


def test_the_product_that_is_tried_is_one_of_rows_and_a_bias() -> None:
    expected = torch.full((64, 64), 64 + 1, dtype=torch.bfloat16)
    assert torch.equal(small_product("cpu"), expected)


def test_the_dry_run_counts_the_copies() -> None:
    config = composed("model.vision.train_last_blocks=1", "parallel.precision=bf16")
    model = meta_model(config, size_model(config, []))
    plain = memory_of_rank(config, model, 1).state
    config.parallel.frozen_precision = "fp8"
    lowered = memory_of_rank(config, model, 1).state
    copies = lowered.pop("fp8 copies of frozen blocks")
    assert lowered == plain
    weights = sum(linear.weight.numel() for linear in frozen_linears(model.visual))
    assert weights < copies < 1.5 * weights  # a byte each, with scales and padding


@pytest.mark.slow
def test_a_run_says_its_error_at_the_start_and_resumes_bit_for_bit(
    data_dir: Path, tmp_path: Path
) -> None:
    def command(name: str) -> list[str]:
        steps = ["trainer.steps=4", "checkpoint.every=2", "optim.warmup_steps=1"]
        settings = [*TINY, *on_data(data_dir), "parallel.precision=bf16", *FROZEN, *steps]
        return train_command(["+experiment=demo", *settings, f"run_dir={tmp_path / name}"])

    straight = run(command("straight")).stdout
    said = re.search(r"fp8: 1 frozen vision block; .* is ([\d.]+)% from bf16's", straight)
    assert said is not None and 0 < float(said[1]) < 20
    assert "note: this machine has no GPU" in straight or torch.cuda.is_available()
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    shutil.rmtree(next((tmp_path / "again" / "checkpoints").glob("*4")))
    resumed = run(command("again")).stdout
    assert "at step 2" in resumed and "fp8: 1 frozen vision block" in resumed
    # Had it taken other weights than the checkpoint's into fp8, the losses would tell.
    assert exact(tmp_path / "again") == exact(tmp_path / "straight")
