"""A CASA model that shares no line with this project: the remote code of a published checkpoint.

Decoder and vision tower are transformers' own. The layers that read images are written from the
equations of the paper (arXiv 2512.19535, section 3), one loop over samples, text tokens and heads:

    CA(x_T) = 1[T > K] MHA(x_T | y_1..y_N)
    CASA(x_T) = MHA(x_T | y_1..y_N, x_K+1..x_T)

in parallel to self-attention, h <- h + SA(norm(h)) + CASA(norm(h), y). Like any remote code it
imports transformers and torch alone, and is copied into checkpoint directories as it is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    HeliumConfig,
    HeliumModel,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as qwen_configuration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

# 4.51.3 knows the text decoder under the name of the whole, and one configuration for both.
QWEN_TEXT = getattr(qwen, "Qwen2_5_VLTextModel", qwen.Qwen2_5_VLModel)
QWEN_CONFIG = getattr(
    qwen_configuration, "Qwen2_5_VLTextConfig", qwen_configuration.Qwen2_5_VLConfig
)
DECODERS = {
    "llama": (LlamaConfig, LlamaModel),
    "helium": (HeliumConfig, HeliumModel),
    "qwen2_5_vl_text": (QWEN_CONFIG, QWEN_TEXT),
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class NaiveConfig(PretrainedConfig):
    """Fields as config.json has them."""

    model_type = "CASA_Helium1_VL_2B"


class NaiveReader(nn.Module):
    """The layer that reads images, beside a decoder layer's self-attention.

    :param settings: `shared` (D1: no parameters of its own), `text_keys` (D2: CASA), and the
        decoder's sizes and RoPE.
    """

    def __init__(self, settings: Any, layer: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self._layer = [layer]  # not a child: it is its parent's
        if not settings.shared:
            beside: Any = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                of: nn.Linear = getattr(beside, name)
                own = nn.Linear(of.in_features, of.out_features, bias=of.bias is not None)
                setattr(self, name, own)
            self.norm = nn.Module()
            self.norm.weight = nn.Parameter(torch.ones(settings.width))

    def forward(self, x: Tensor, image_tokens: list[Tensor], points: list[int]) -> Tensor:
        """
        :param x: (T, C) normalised text of one sample.
        :param image_tokens: of each image (rows, columns, C); :param points: text before each.
        :return: (T, C) what to add to the output of self-attention.
        """
        layer: Any = self._layer[0]
        own = layer.self_attn if self.settings.shared else self
        scale = layer.input_layernorm.weight if self.settings.shared else self.norm.weight
        out = []
        for at in range(len(x)):
            before = [i for i, point in enumerate(points) if point <= at]
            if not before:
                out.append(torch.zeros_like(x[0]))
                continue
            start = points[before[-1]]
            # Images with no text between them share one window.
            there = [i for i in before if points[i] == start]
            keys, values = [], []
            for i in there:
                rows, columns, _ = image_tokens[i].shape
                for row in range(rows):
                    for column in range(columns):
                        y = image_tokens[i][row, column]
                        y = scale * y / (y.square().mean() + self.settings.eps).sqrt()
                        place = (start, start + row, start + column)
                        keys.append(self._turned(own.k_proj(y), place))
                        values.append(own.v_proj(y))
            if self.settings.text_keys:
                for t in range(start, at + 1):
                    keys.append(self._turned(own.k_proj(x[t]), (t, t, t)))
                    values.append(own.v_proj(x[t]))
            q = self._turned(own.q_proj(x[at]), (at, at, at))
            out.append(own.o_proj(self._attend(q, torch.stack(keys), torch.stack(values))))
        return torch.stack(out)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One query (H * D,) over keys and values (n, H' * D), each of H' heads for H / H'."""
        side = self.settings.head
        heads, of = len(q) // side, len(keys[0]) // side
        read = []
        for head in range(heads):
            shared = head // (heads // of)
            mine = slice(shared * side, (shared + 1) * side)
            scores = keys[:, mine] @ q[head * side : (head + 1) * side] / math.sqrt(side)
            read.append(scores.softmax(0) @ values[:, mine])
        return torch.cat(read)

    def _turned(self, x: Tensor, place: tuple[int, int, int]) -> Tensor:
        """RoPE of one token's heads; `place` is its time, row and column.

        A pair (a, b) is the complex number a + bi, which turns by position * frequency.
        """
        if not self.settings.text_keys:
            return x  # plain cross-attention has no positions
        side = self.settings.head
        half = side // 2
        sections = self.settings.sections or (half, 0, 0)
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
        angle = torch.tensor(
            [place[axes[i]] * self.settings.theta ** (-2 * i / side) for i in range(half)]
        )
        turn = torch.polar(torch.ones(half), angle)
        heads = x.view(-1, side)
        if self.settings.pairs:  # neighbours
            turned = torch.complex(heads[:, 0::2], heads[:, 1::2]) * turn
            return torch.stack([turned.real, turned.imag], -1).flatten()
        turned = torch.complex(heads[:, :half], heads[:, half:]) * turn
        return torch.cat([turned.real, turned.imag], -1).flatten()


class NaiveCasa(PreTrainedModel):
    """The whole model, by the interface of the published ones."""

    config_class = NaiveConfig
    _supports_sdpa = True

    def __init__(self, config: NaiveConfig) -> None:
        super().__init__(config)
        # With no more than config.json says, and eager attention everywhere.
        fields = json.loads(Path(config.naive_fields).read_text())
        vision = qwen_configuration.Qwen2_5_VLVisionConfig(**fields["vision"])
        text_config, decoder = DECODERS[fields["decoder"]]
        text = text_config(**fields["text"])
        for part in (vision, text):
            part._attn_implementation = "eager"
        self.model = decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.image_prefix = nn.Module()
        owner: Any = self.image_prefix
        if fields["tower"] == "enc":
            owner = self.image_prefix.enc = nn.Module()
        owner.visual = qwen.Qwen2_5_VisionTransformerPretrainedModel._from_config(vision)
        self._tower = [owner.visual]
        settings = SimpleNamespace(
            shared=fields["shared"],
            text_keys=fields["text_keys"],
            width=text.hidden_size,
            head=text.hidden_size // text.num_attention_heads,
            theta=fields["theta"],
            sections=fields["sections"],
            eps=text.rms_norm_eps,
            pairs=fields["decoder"] == "helium",
        )
        self._images: list[Tensor] = []
        self._points: list[int] = []
        for layer in self.model.layers:
            layer.casa_attn = NaiveReader(settings, layer)
            layer.self_attn.register_forward_hook(self._beside(layer.casa_attn), with_kwargs=True)
        self._multimodal = fields["sections"] is not None
        self._patch = vision.patch_size

    def _beside(self, reader: NaiveReader) -> Any:
        """What adds a reader's output to that of self-attention over the same input."""

        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            read = reader(x[0], self._images, self._points)
            return (output[0] + read[None], *output[1:])

        return add

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        """Values out of one safetensors file, by the modules' own names."""
        from safetensors.torch import load_file

        config.naive_fields = str(Path(path) / "naive_fields.json")
        model = cls(config)
        stored = load_file(Path(path) / "model.safetensors")
        model.load_state_dict(stored, strict=True)
        return model.to(options.get("dtype", options.get("torch_dtype"))).eval()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Any = None,
        image_embeds_insertion_points: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One sample, (1, T) -> logits (1, T, vocabulary)."""
        self._images = [self._see(image) for image in pixel_values]
        self._points = [int(point) for point in image_embeds_insertion_points[0]]
        places = torch.arange(input_ids.shape[1])[None]
        if self._multimodal:
            places = places.expand(3, 1, -1)
        out = self.model(input_ids=input_ids, position_ids=places, use_cache=False)
        return SimpleNamespace(logits=self.lm_head(out.last_hidden_state))

    def _see(self, image: Tensor) -> Tensor:
        """(3, H, W) levels -> (rows, columns, C) image tokens.

        Patches are cut in the order of Qwen2.5-VL's image processor: cells of 2x2 patches by rows,
        a still image twice in time.
        """
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        levels = (image.float() / 255 - mean) / std
        side = self._patch
        rows, columns = image.shape[1] // side, image.shape[2] // side
        patches = []
        for row in range(0, rows, 2):
            for column in range(0, columns, 2):
                for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    top, left = (row + r) * side, (column + c) * side
                    patch = levels[:, top : top + side, left : left + side]
                    patches.append(torch.stack([patch, patch], 1).flatten())
        grid = torch.tensor([[1, rows, columns]])
        seen = self._tower[0](torch.stack(patches), grid_thw=grid)
        tokens = seen if isinstance(seen, Tensor) else seen.pooler_output
        return tokens.reshape(rows // 2, columns // 2, -1)


class NaiveProcessor:
    """Conversations into ids and pixels, by hand.

    Sides are the nearest multiples of 28; where that is over `most` pixels, those below the sides
    of an image of `most` pixels.
    """

    most = 84 * 84

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """transformers 4.51 calls it on what it finds."""

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> NaiveProcessor:
        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=True))

    def tokenize_messages(self, messages: list[Any], **options: Any) -> dict[str, Any]:
        """One conversation of text and images."""
        ids = self._ids("<|bos|><|user|>system\nAnswer briefly.<|end|>\n")
        images, points = [], []
        for message in messages:
            ids += self._ids("<|user|>" if message["role"] == "user" else "<|assistant|>")
            for part in message["content"]:
                if part["type"] == "text":
                    ids += self._ids(part["text"])
                    continue
                ids += self._ids("<|user|>")
                points.append(len(ids))
                ids += self._ids("<|end|>")
                picture = part["image"]
                picture = picture.resize(self._size(picture))
                levels = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.uint8)
                images.append(levels.view(picture.height, picture.width, 3).permute(2, 0, 1))
            ids += self._ids("<|end|>")
        if messages[-1]["role"] == "user":
            ids += self._ids("<|assistant|>")
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "image_embeds_insertion_points": [torch.tensor(points)],
            "pixel_values": images,
        }

    def _size(self, picture: Any) -> tuple[int, int]:
        sides = picture.size
        width, height = (max(1, round(side / 28)) * 28 for side in sides)
        if width * height > self.most:
            factor = math.sqrt(self.most / (sides[0] * sides[1]))
            width, height = (max(1, int(side * factor / 28)) * 28 for side in sides)
        return width, height

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
