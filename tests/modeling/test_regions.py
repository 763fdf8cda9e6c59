"""Compiled regions: the same numbers, few graphs, and only where they were asked for."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from casa_train.modeling import vision_block
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.regions import add_normed, compiling, normed
from casa_train.modeling.vision_block import RMSNorm
from tests.helpers.plain_kernels import plain_kernels
from tests.helpers.tiny import HARD_PACK, Layout, Sample, fill, packed_inputs
from tests.helpers.variants import MECHANISMS, VARIANTS, build, gradients_of, packed_logits

# For every day one mechanism with layers of its own and one without.
EVERY_DAY = ("casa", "insertion")
BACKBONES = (
    "insertion-helium",
    "casa-qwen2",
    "casa-qwen2_5_vl",
    "casa-shared-biased",
    "casa-qwen3",
    *({"casa-smollm3"} & VARIANTS.keys()),
)
CASES = [
    pytest.param(variant, marks=[] if variant in EVERY_DAY else pytest.mark.slow)
    for variant in (*MECHANISMS, *BACKBONES)
]


@pytest.fixture(autouse=True)
def forgotten_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that counts the graphs it is given, alike ones together.

    It generates no code: what becomes a graph, and how often, is the same without.
    """

    def __init__(self) -> None:
        self.counts: dict[Any, int] = collections.Counter()

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        sizes = [
            tuple(size if isinstance(size, int) else "any" for size in value.shape)
            for value in inputs
            if isinstance(value, torch.Tensor)
        ]
        self.counts[graph.code, str(sizes)] += 1
        return graph


def random_packs(count: int) -> list[list[Sample]]:
    """Packs of other lengths each, one with a single text and a single image token among them."""
    numbers = random.Random(5)
    packs = [fill([Layout(1, (0,), ((1, 1),))], 0)]
    for seed in range(1, count):
        layouts = []
        for _ in range(numbers.randint(1, 3)):
            grids = [(numbers.randint(1, 4), numbers.randint(1, 4)) for _ in range(2)]
            text = numbers.randint(3, 12)
            points = sorted(numbers.sample(range(text), 2))
            layouts.append(Layout(text, tuple(points), tuple(grids)))
        packs.append(fill(layouts, seed))
    return [*packs[1:4], packs[0], *packs[4:]]


def trained(
    model: CasaForConditionalGeneration, pack: list[Sample], compiler: Any
) -> dict[str, torch.Tensor]:
    """Logits and gradients of a training step's forward and backward pass."""
    model.train().zero_grad()
    model.compile_regions(compiler)
    logits = packed_logits(model, pack)
    logits.square().sum().backward()
    return {"logits": logits.detach(), **gradients_of(model)}


@pytest.mark.parametrize("variant", CASES)
def test_packs_of_any_length_share_a_few_graphs_and_keep_their_numbers(variant: str) -> None:
    model = build(variant)
    model.visual.set_trainable(1)
    graphs = Graphs()
    for number, pack in enumerate(random_packs(20 if variant in EVERY_DAY else 5)):
        expected = trained(model, pack, None)
        found = trained(model, pack, graphs)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (number, name)
        if number == 0:
            first = dict(graphs.counts)
    assert first and graphs.counts == first  # the first pack made them all
    # Once for frozen blocks, without autograd; for trained ones where what comes in has a gradient
    # and, at the first that trains, where it has none.
    assert max(graphs.counts.values()) <= 3


def test_a_block_that_runs_again_is_compiled_both_times() -> None:
    model = build("casa")
    expected = trained(model, fill(HARD_PACK), None)
    model.checkpoint_activations("all")
    graphs = Graphs()
    found = trained(model, fill(HARD_PACK), graphs)
    assert set(graphs.counts.values()) == {1}  # where all trains, also for both passes
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_training_compiles_and_no_file_knows() -> None:
    model = build("casa")
    before, keys = model.config.to_json_string(), list(model.state_dict())
    graphs = Graphs()
    model.compile_regions(graphs)
    model.eval()
    packed_logits(model, fill(HARD_PACK))
    model.generate(input_ids=torch.arange(5)[None], max_new_tokens=2)
    assert not graphs.counts
    assert model.config.to_json_string() == before and list(model.state_dict()) == keys
    assert copy.deepcopy(model).compiler is not None


def test_a_region_gives_the_gradient_of_one_parameter_at_most() -> None:
    """Those of several would arrive in no order, which ZeRO-2 takes for the order of all ranks."""
    model = build("gated_cross_attention").train()
    parameters: list[int] = []

    def counted(graph: Any, inputs: list[Any]) -> Any:
        parameters.append(sum(isinstance(value, torch.nn.Parameter) for value in inputs))
        return graph

    model.compile_regions(counted)
    packed_logits(model, fill(HARD_PACK))
    assert set(parameters) == {0, 1}


def test_a_compiler_that_fails_names_the_switch() -> None:
    def failing(graph: Any, inputs: list[Any]) -> Any:
        raise ValueError("no kernel for this")

    model = build("casa").train()
    model.compile_regions(failing)
    with pytest.raises(RuntimeError, match="could not be compiled by .*parallel.compile=off"):
        packed_logits(model, fill(HARD_PACK))


@pytest.mark.slow
def test_kernels_of_a_code_generator_agree_with_eager_ones() -> None:
    """Both passes of one region, whose kernels take rows by any number: what becomes a graph, and
    that its numbers are right, the other tests see without a C++ compiler's minutes.
    """
    norm = RMSNorm(16)
    torch.nn.init.uniform_(norm.weight)
    random = torch.Generator().manual_seed(4)
    with plain_kernels():
        for rows in (5, 12, 700):
            inputs = [torch.randn(rows, 16, generator=random) for _ in range(4)]
            results = []
            for compiler in (None, "inductor"):
                h, more = (x.clone().requires_grad_() for x in inputs[:2])
                with compiling(compiler):
                    outputs = add_normed(norm, h, more)
                gradients = torch.autograd.grad(outputs, (h, more, norm.weight), inputs[2:])
                results.append((*outputs, *gradients))
            for expected, found in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


class Centred(torch.nn.LayerNorm):
    """A norm whose name does not say so."""


def refused(graph: Any, inputs: list[Any]) -> Any:
    raise AssertionError("this was to run eagerly")


@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.LayerNorm(8),  # its bias would be a region's second parameter
        torch.nn.LayerNorm(8, elementwise_affine=False),
        Centred(8, bias=False),
    ],
    ids=["bias", "weightless", "other name"],
)
def test_norms_that_are_not_ordinary_run_as_modules(norm: torch.nn.Module) -> None:
    calls: list[torch.Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: calls.append(output))
    h, more = torch.randn(5, 8), torch.randn(5, 8)
    with compiling(refused):
        alone = normed(norm, h)
        total, after = add_normed(norm, h, more)
    assert len(calls) == 2 and calls[0] is alone and calls[1] is after
    assert torch.equal(total, h + more) and torch.equal(after, norm(h + more))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["class", "instance", "hook"])
def test_a_network_with_a_forward_of_its_own_keeps_it(where: str) -> None:
    model = build("gated_cross_attention")
    for layer in model.model.layers:
        for mlp in (layer.mlp, layer.fusion.mlp):
            kind = type(mlp)
            if where == "class":

                def halved(self: Any, x: torch.Tensor, kind: Any = kind) -> torch.Tensor:
                    return 0.5 * kind.forward(self, x)

                mlp.__class__ = type("Halved", (kind,), {"forward": halved})
            elif where == "instance":
                mlp.forward = lambda x, forward=mlp.forward: 0.5 * forward(x)
            else:
                mlp.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    plain = trained(build("gated_cross_attention"), fill(HARD_PACK), None)["logits"]
    expected = trained(model, fill(HARD_PACK), None)
    found = trained(model, fill(HARD_PACK), Graphs())
    assert not torch.allclose(expected["logits"], plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_activation_that_learns_stays_a_module() -> None:
    mlp = build("gated_cross_attention").model.layers[0].fusion.mlp
    mlp.act_fn = torch.nn.PReLU(init=0.4)
    x = torch.randn(5, mlp.gate_proj.in_features)
    with compiling(refused):
        found = mlp(x)
    assert torch.equal(found, mlp(x))


def test_kinds_of_layers_are_not_limited_to_torchs_few() -> None:
    """Here as on a thread of autograd's, where blocks run again: torch keeps settings by thread."""
    graphs, widths = Graphs(), range(8, 26, 2)  # nine

    def run() -> None:
        with compiling(graphs):
            for width in widths:
                normed(torch.nn.RMSNorm(width), torch.randn(5, width))

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()
    assert sum(graphs.counts.values()) == len(widths)


def test_what_does_not_count_tokens_is_constant() -> None:
    """The axis of tokens alone is free, also beside a norm of another width."""
    graphs = Graphs()
    for width in (8, 12):
        norm = torch.nn.RMSNorm(width)
        for tokens in (3, 8, 12, 5):
            x = torch.randn(tokens, width)
            with compiling(graphs):
                assert torch.equal(normed(norm, x), norm(x))
    assert list(graphs.counts.values()) == [1, 1]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_padded_vision_ffn_changes_no_number(frozen: bool) -> None:
    tower = build("casa", dtype=torch.float64).visual
    if frozen:
        tower.set_trainable(1)
    images = packed_inputs(fill(HARD_PACK)).images
    results = []
    for aligned in (1, 56):  # 48 columns become 56
        tower.align_ffn(aligned)
        tower.zero_grad()
        with torch.utils.flop_counter.FlopCounterMode(display=False) as work:
            tokens = tower(images)
        tokens.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
        results.append((work.get_total_flops(), {"tokens": tokens.detach(), **gradients}))
    (plain_work, plain), (padded_work, padded) = results
    mlp = tower.blocks[0].mlp
    patches = sum(image.shape[1] * image.shape[2] for image in images) // 14**2
    more = 2 * 3 * patches * mlp.gate_proj.in_features * 8 * len(tower.blocks)
    assert padded_work - plain_work == more  # it was padded
    assert padded.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [LlamaRMSNorm, HeliumRMSNorm, RMSNorm])
def test_a_norm_of_one_kernel_is_nearer_to_the_exact_one(kind: Any) -> None:
    norm = kind(1280, 1e-3).to("cuda", torch.bfloat16).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    norm.weight.data = torch.randn(1280, generator=generator).to(norm.weight)
    x = torch.randn(300, 1280, generator=generator).to(norm.weight)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * norm.weight.double()
    written_out = norm.to("cpu")(x.cpu()).double().cuda()
    found = normed(norm.to("cuda"), x).double()
    error, other = ((y - exact).norm() / exact.norm() for y in (found, written_out))
    assert 0 < error < 2.0**-8 and error < 1.01 * other


class OnGpu:
    """What is asked of patches before weights are padded: many, in half precision on a GPU."""

    is_cuda = True

    def element_size(self) -> int:
        return 2

    def __len__(self) -> int:
        return vision_block.PADDED_FROM


@pytest.mark.parametrize("change", ["nothing", "hook", "hook before", "forward", "kind of weight"])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_linears_that_do_more_are_not_padded_in_inference(change: str, name: str) -> None:
    mlp = build("casa").visual.blocks[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        torch.nn.Linear(*widths) for widths in ((32, 75), (32, 75), (75, 32))
    )
    linear = getattr(mlp, name)
    if change == "hook":
        linear.register_forward_hook(lambda module, given, out: 2 * out)
    elif change == "hook before":
        linear.register_forward_pre_hook(lambda module, given: None)
    elif change == "forward":
        linear.forward = lambda x: x
    elif change == "kind of weight":  # as those of a quantised linear
        linear.weight = torch.nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data))
    assert mlp._padding_pays(OnGpu()) == (change == "nothing")


@pytest.mark.gpu
def test_an_ffn_that_is_not_trained_pads_itself_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_block, "PADDED_FROM", 8)
    mlp = build("casa").visual.blocks[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        torch.nn.Linear(*widths) for widths in ((32, 75), (32, 75), (75, 32))
    )
    mlp = mlp.to("cuda", torch.bfloat16)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)).to("cuda", torch.bfloat16)
    work = []
    for trains in (True, False):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            with torch.set_grad_enabled(trains):
                out = mlp(x)
        work.append((counter.get_total_flops(), out.detach().float()))
    assert work[1][0] / work[0][0] == 128 / 75  # it was padded
    torch.testing.assert_close(work[0][1], work[1][1], rtol=0, atol=0.02)


@pytest.mark.gpu
def test_kernels_and_padding_on_a_gpu() -> None:
    model = build("casa", dtype=torch.bfloat16).cuda()
    packs = [packed_inputs(pack) for pack in random_packs(4)]
    results: list[list[torch.Tensor]] = []
    for compiler, aligned in ((None, 1), ("inductor", 64)):
        model.train().compile_regions(compiler)
        model.visual.align_ffn(aligned)
        results.append([])
        for pack in packs:
            pack.input_ids = pack.input_ids.cuda()
            model.zero_grad()
            logits = model(packed=pack).logits.float()
            logits.square().sum().backward()
            gradients = gradients_of(model).values()
            results[-1] += [logits.detach(), *(g.float() for g in gradients)]
    for plain, other in zip(*results, strict=True):
        scale = plain.norm() + 1e-3  # bf16 rounds at other places
        assert (other - plain).norm() <= 0.05 * scale
