"""Tiny real models, images and packs that the model tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from casa_train.modeling.configuration_casa import (
    QWEN_TEXT,
    QWEN_WHOLE,
    ROPE_IN_ONE_DICT,
    CasaConfig,
)
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration, PackedInputs
from casa_train.modeling.windows import Chunk
from tests.helpers.reference import Settings

VOCABULARY = 101
HIDDEN = 64
# (rows, columns) of image tokens: every shape of one to four tokens.
GRIDS = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1))
CONFIGS = {
    "llama": LlamaConfig,
    "llama3": LlamaConfig,
    "helium": HeliumConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
if "smollm3" in CONFIG_MAPPING:  # from transformers 4.53 on
    CONFIGS["smollm3"] = CONFIG_MAPPING["smollm3"]
# What `tiny_text_config` takes.
BACKBONES = (*CONFIGS, "qwen2_5_vl")
# Llama 3.1's RoPE with an original length at which a tiny head has frequencies of all three kinds.
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Which of the eight RoPE frequencies of a tiny head turn by time, by height and by width.
MROPE_SECTION = (2, 3, 3)

# Property tests draw the same examples on every run.
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def tiny_text_config(backbone: str = "llama", layers: int = 2, **options: Any) -> PretrainedConfig:
    """A decoder of 4 query and 2 key heads that never stops generating by itself.

    :param backbone: one of `BACKBONES`: Hugging Face's model types, qwen2_5_vl for Qwen2.5-VL's
        decoder, llama3 for a Llama with Llama 3.1's RoPE. Qwen3's heads are wider than its width
        would have them, SmolLM3's blocks 0, 3, 6, ... have no RoPE, and Mistral has no windows.
    """
    values: dict[str, Any] = dict(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if backbone == "qwen2_5_vl":
        del values["head_dim"]
        rope = {"rope_type": "default", "mrope_section": list(MROPE_SECTION)}
        if ROPE_IN_ONE_DICT:
            values["rope_parameters"] = {"rope_theta": 10000.0, **rope}
        else:
            values |= {"rope_theta": 10000.0, "rope_scaling": rope}
        # transformers 4.51 keeps the text fields in the whole model's configuration.
        known = CONFIG_MAPPING[QWEN_TEXT if QWEN_TEXT in CONFIG_MAPPING else QWEN_WHOLE]
        return known(**{**values, **options})
    own: dict[str, dict[str, Any]] = {
        "llama3": {"rope_theta": 10000.0, "rope_scaling": dict(LLAMA3_ROPE)},
        "mistral": {"sliding_window": None},
        "qwen3": {"head_dim": 24},
        "smollm3": {
            "no_rope_layers": [int(i % 3 > 0) for i in range(layers)],
            "tie_word_embeddings": False,
        },
    }
    return CONFIGS[backbone](**{**values, **own.get(backbone, {}), **options})


def tiny_vision_config(
    depth: int = 2, width: int = HIDDEN, **options: Any
) -> Qwen2_5_VLVisionConfig:
    """A tower whose odd blocks see the whole image, the others windows of 112 pixels."""
    values: dict[str, Any] = dict(
        depth=depth,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=width,
        fullatt_block_indexes=list(range(1, depth, 2)),
        window_size=112,
    )
    return Qwen2_5_VLVisionConfig(**{**values, **options})


def tiny_siglip_config(depth: int = 2, **options: Any) -> Siglip2VisionConfig:
    """A SigLIP2 tower with learned positions of 5 x 5 patches, whose tokens are 128 wide."""
    values: dict[str, Any] = dict(
        num_hidden_layers=depth,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_patches=25,
    )
    return Siglip2VisionConfig(**{**values, **options})


def tiny_model(
    mechanism: str = "casa",
    blocks: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text_config: PretrainedConfig | None = None,
    vision_width: int = HIDDEN,
    perturb: bool = True,
    vision_config: PretrainedConfig | None = None,
    adapter: str = "linear",
    **fusion_options: Any,
) -> CasaForConditionalGeneration:
    """A whole model with random weights, in eval mode.

    :param blocks: decoder blocks, unless `text_config` says.
    :param dtype: float64 also gives norms of that precision (see `ExactNorm`).
    :param vision_config: another tower's than Qwen2.5-VL's.
    :param perturb: moves the fusion weights away from their initial values, so that an initial copy
        of the self-attention hides no mix-up of the two.
    """
    config = CasaConfig(
        text_config=text_config or tiny_text_config(layers=blocks),
        vision_config=vision_config or tiny_vision_config(width=vision_width),
        fusion={"mechanism": mechanism, **fusion_options},
        adapter=adapter,
    )
    model = CasaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    model.initialise_fusion()
    if perturb:
        for layer in model.model.layers:
            if layer.fusion is not None:
                randomise(layer.fusion, generator, keep=0.5)
    if dtype == torch.float64:
        use_exact_norms(model)
    return model.to(dtype)


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator, keep: float = 0.0) -> None:
    """Draws every parameter: norms around 1, biases around 0, matrices that keep a vector's scale.

    :param keep: how much of the old value stays.
    """
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
            new = noise / fan_in**0.5
        elif name.endswith("bias"):
            new = 0.3 * noise
        else:
            new = 1 + 0.3 * noise
        parameter.copy_(keep * parameter + (1 - keep) * new)


class ExactNorm(nn.Module):
    """A backbone's RMSNorm in the precision of its input; the original rounds to float32 inside."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        # The backbones and the vision tower name it differently.
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def use_exact_norms(model: CasaForConditionalGeneration) -> None:
    """Replaces every RMSNorm of a model, so that float64 tests may compare to 1e-9."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, ExactNorm(child))


def reference_settings(model: CasaForConditionalGeneration) -> Settings:
    """The hyper-parameters that `reference.py` needs, with the mechanisms' defaults once more."""
    text = model.config.text_config
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        scaling = getattr(text, "rope_scaling", None) or {}
        rope = {"rope_theta": text.rope_theta, **scaling}
    multimodal = text.model_type.startswith("qwen2_5_vl")
    options = dict(model.config.fusion)
    if options["mechanism"] == "cross_attention":
        options["text_in_window"] = False
    if options["mechanism"] == "qformer_insertion":
        options.setdefault("queries", 128)
        options["resampler_layers"] = options.pop("layers", 2)
        options["resampler_heads"] = options.pop("heads", 0) or max(1, HIDDEN // 64)
    if options["mechanism"] == "hyper_attention":
        last = text.num_hidden_layers - 1
        spread = {0, (last + 1) // 3, 2 * (last + 1) // 3, last}
        options["hyper_layers"] = tuple(options.pop("layers", None) or sorted(spread))
    for name in ("init", "ffn_width"):  # what the reference reads from the weights
        options.pop(name, None)
    still = text.no_rope_layers if text.model_type == "smollm3" else ()
    return Settings(
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or HIDDEN // text.num_attention_heads,
        norm_eps=text.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        mrope_section=MROPE_SECTION if multimodal else None,
        paired=text.model_type == "helium",
        llama3=tuple(rope[name] for name in list(LLAMA3_ROPE)[1:])
        if rope.get("rope_type") == "llama3"
        else None,
        still_blocks=tuple(i for i, turned in enumerate(still) if not turned),
        **options,
    )


def random_image(generator: torch.Generator, rows: int, columns: int, side: int = 28) -> Tensor:
    """Noise of rows x columns image tokens, (3, side * rows, side * columns) uint8."""
    size = (3, side * rows, side * columns)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


@dataclass(frozen=True)
class Layout:
    """The shape of one sample.

    :param text: number of text tokens.
    :param points: for each image the number of text tokens before it, sorted.
    :param grids: for each image its rows and columns of image tokens.
    :param follows: for each image, whether it is a frame of the same video as the image before it;
        all alone if left out.
    """

    text: int
    points: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()
    follows: tuple[bool, ...] = ()

    @property
    def image_tokens(self) -> tuple[int, ...]:
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(rows for rows, _ in self.grids)

    def chunk(self) -> Chunk:
        return Chunk(
            self.text,
            self.points,
            self.image_tokens,
            rows=self.rows,
            follows=self.follows or (False,) * len(self.points),
        )


@dataclass
class Sample:
    """A layout with ids and pixels: ids (T,), images (3, H, W) uint8 each."""

    layout: Layout
    ids: Tensor
    images: list[Tensor]


@st.composite
def sample_layouts(draw: st.DrawFn, longest: int = 12, most_images: int = 4) -> Layout:
    """One sample; images may stand anywhere, also together or behind all text, and follow any."""
    text = draw(st.integers(1, longest))
    points = sorted(draw(st.lists(st.integers(0, text), max_size=most_images)))
    grids = [draw(st.sampled_from(GRIDS)) for _ in points]
    follows = draw(st.tuples(*[st.booleans() if i else st.just(False) for i in range(len(points))]))
    return Layout(text, tuple(points), tuple(grids), follows)


def layouts() -> st.SearchStrategy[list[Layout]]:
    """Packs of one to four samples."""
    return st.lists(sample_layouts(), min_size=1, max_size=4)


# Every special case at once: text before an image, consecutive images, a window without text, a
# sample without images, an image at the very start, a sample whose only window has no text, videos
# of two windows, and an image that follows inside its window.
HARD_PACK = [
    Layout(7, (2, 2, 5, 7), ((1, 2), (2, 1), (2, 2), (1, 1)), (False, True, True, False)),
    Layout(4),
    Layout(6, (0, 0, 3), ((1, 3), (1, 1), (2, 2)), (False, False, True)),
    Layout(1, (1,), ((1, 2),)),
]


def fill(pack: list[Layout], seed: int = 0, side: int = 28) -> list[Sample]:
    """Random ids and pixels for a pack of layouts; :param side: pixels of a token's side."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(
            layout,
            torch.randint(0, VOCABULARY, (layout.text,), generator=generator),
            [random_image(generator, *grid, side) for grid in layout.grids],
        )
        for layout in pack
    ]


def packed_inputs(samples: list[Sample]) -> PackedInputs:
    """The samples one after another, as training feeds them."""
    return PackedInputs(
        input_ids=torch.cat([sample.ids for sample in samples]),
        chunks=[sample.layout.chunk() for sample in samples],
        images=[image for sample in samples for image in sample.images],
    )


def bytes_kept(tower: Any, images: Any) -> int:
    """Bytes that a tower's forward pass keeps for the backward pass, parameters aside."""
    parameters = {p.data_ptr() for p in tower.parameters()}
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        if x.data_ptr() not in parameters:
            kept += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tower(images).sum()
    return kept
