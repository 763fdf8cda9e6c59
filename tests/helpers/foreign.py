"""Tiny checkpoints as others might publish them: a model of ours under other names, with its own
remote code.

The code is a shell: it puts the tensors under their foreign names into a model of ours, whose
modules stand where the names say. So what it computes is known to the bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.tiny import tiny_model, tiny_text_config
from tests.helpers.tiny_export import FULL_TEMPLATE, MAX_PIXELS

CONFIGURATION = """
from transformers import PretrainedConfig


class ForeignConfig(PretrainedConfig):
    model_type = "@model_type@"
"""

MODELING = """
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration

from .configuration_foreign import ForeignConfig


class ForeignModel(PreTrainedModel):
    config_class = ForeignConfig

    def __init__(self, config, inner):
        super().__init__(config)
        self.model, self.lm_head = inner.model, inner.lm_head
        self.image_prefix = nn.Module()
        owner = self.image_prefix
        if "@tower@" == "image_prefix.enc.visual":
            owner = self.image_prefix.enc = nn.Module()
        owner.visual = inner.visual
        self._run = [inner]

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **options):
        dtype = options.get("dtype", options.get("torch_dtype"))
        inside = json.loads((Path(path) / "inside.json").read_text())
        inner = CasaForConditionalGeneration(CasaConfig(**inside["config"]))
        stored = load_file(Path(path) / "model.safetensors")
        state = {}
        for target, recipe in inside["recipes"].items():
            parts = [stored[name] for name in recipe["from"]]
            value = torch.cat(parts)
            if recipe["rows"]:
                value = value[slice(*recipe["rows"])]
            state[target] = value.reshape(recipe["shape"])
        inner.load_state_dict(state, strict=False)
        inner.tie_weights()
        inner = inner.to(dtype)
        @twist@
        return cls(config, inner)

    def forward(self, **inputs):
        return self._run[0](**inputs)
"""

PROCESSING = """
from casa_train.modeling.processing_casa import CasaProcessor

TEMPLATE = @template@


class ForeignProcessor(CasaProcessor):
    def __init__(self, tokenizer=None, **options):
        super().__init__(tokenizer, max_pixels=@max_pixels@, template=TEMPLATE)
"""

# Names of ours -> theirs; a list: one tensor in several.
Naming = Callable[[str], str | Sequence[str]]


def renamed(
    tower: str = "image_prefix.visual",
    fusion: str = "casa_attn",
    prefix: str = "model.",
    projection: str = r"\1_proj",
) -> Naming:
    """A naming of each layer's modules.

    :param tower: where the vision tower stands; :param fusion: the child of a layer.
    :param prefix: of the text decoder; :param projection: of fusion's projections.
    """

    def name(ours: str) -> str:
        if ours.startswith("visual."):
            return ours.replace("visual.", tower + ".", 1)
        theirs = re.sub(r"\.fusion\.(\w)_proj\.", rf".{fusion}.{projection}.", ours)
        theirs = theirs.replace(".fusion.", f".{fusion}.")
        return re.sub(r"^model\.", prefix, theirs)

    return name


def foreign_model(
    mechanism: str = "cross_attention", backbone: str = "llama", tied: bool = False, **options: Any
) -> CasaForConditionalGeneration:
    """A tiny model with the demo tokenizer's rows."""
    tokenizer = build_tokenizer()
    text = tiny_text_config(
        backbone,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    return tiny_model(mechanism, text_config=text, **options)


def write_foreign(
    directory: Path,
    model: CasaForConditionalGeneration,
    name: Naming,
    model_type: str = "CASA_Helium1_VL_2B",
    tower: str = "image_prefix.visual",
    qkv: str | None = None,
    edit: Callable[[dict[str, Tensor]], None] | None = None,
    twist: str = "",
    more: dict[str, Any] | None = None,
    reshape: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> Path:
    """Writes a checkpoint with configuration, tokenizer, processor and code.

    :param qkv: the name of one tensor for fusion's q, k and v projections, in place of three.
    :param edit: changes the tensors before they are written; the code may then not load them.
    :param twist: lines of the remote code that change `inner`.
    :param more: settings of config.json.
    :param reshape: gives a tensor, by our name, another shape.
    """
    directory.mkdir(parents=True)
    stored: dict[str, Tensor] = {}
    recipes: dict[str, Any] = {}
    state = dict(model.named_parameters())
    for ours, value in state.items():
        fused = qkv is not None and re.search(r"\.fusion\.([qkv])_proj\.(\w+)$", ours)
        if fused:
            assert qkv is not None and fused is not True
            stem, kind = ours[: fused.start()] + ".fusion.", fused[2]
            three = [state[f"{stem}{p}_proj.{kind}"] for p in "qkv"]
            theirs = str(name(f"{stem}{qkv}.{kind}"))
            stored[theirs] = torch.cat(three).detach().clone()
            at = "qkv".index(fused[1])
            start = sum(len(t) for t in three[:at])
            rows: list[int] = [start, start + len(three[at])]
            recipes[ours] = {"from": [theirs], "rows": rows, "shape": list(value.shape)}
            continue
        names = name(ours)
        names = [names] if isinstance(names, str) else list(names)
        whole = reshape(ours, value.detach())
        parts = [whole] if len(names) == 1 else whole.chunk(len(names))
        for one, part in zip(names, parts, strict=True):
            stored[one] = part.clone().contiguous()
        recipes[ours] = {"from": names, "rows": None, "shape": list(value.shape)}
    if edit is not None:
        edit(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    inside = {"config": json.loads(model.config.to_json_string(use_diff=False)), "recipes": recipes}
    (directory / "inside.json").write_text(json.dumps(inside))
    _write_code(directory, model_type, tower, twist)
    _write_config(directory, model, model_type, more or {})
    return directory


def _write_code(directory: Path, model_type: str, tower: str, twist: str) -> None:
    processor = CasaProcessor(build_tokenizer(), MAX_PIXELS, FULL_TEMPLATE)
    processor.save_pretrained(directory)
    for file in ("processor_config.json", "chat_template.jinja", "chat_template.json"):
        (directory / file).unlink(missing_ok=True)
    kept = json.loads((directory / "tokenizer_config.json").read_text())
    kept.pop("chat_template", None)
    kept.pop("processor_class", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    code = {"AutoProcessor": "processing_foreign.ForeignProcessor"}
    settings = {"processor_class": "ForeignProcessor", "auto_map": code}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    files = {
        "configuration_foreign.py": CONFIGURATION.replace("@model_type@", model_type),
        "modeling_foreign.py": MODELING.replace("@tower@", tower).replace("@twist@", twist),
        "processing_foreign.py": PROCESSING.replace("@template@", repr(FULL_TEMPLATE)).replace(
            "@max_pixels@", str(MAX_PIXELS)
        ),
    }
    for name, text in files.items():
        (directory / name).write_text(text)


def _write_config(
    directory: Path,
    model: CasaForConditionalGeneration,
    model_type: str,
    more: dict[str, Any],
) -> None:
    """Text settings at the top, the tower's in a section, as the authors' configurations are."""
    text = model.config.to_dict()["text_config"]
    vision = model.config.vision_config.to_dict()
    config = {
        **{k: v for k, v in text.items() if k not in ("architectures", "dtype", "torch_dtype")},
        "vision_config": vision,
        "model_type": model_type,
        "architectures": ["ForeignModel"],
        "torch_dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_foreign.ForeignConfig",
            "AutoModel": "modeling_foreign.ForeignModel",
        },
        **more,
    }
    (directory / "config.json").write_text(json.dumps(config, default=str))


def write_template(path: Path) -> Path:
    """The template that the remote code has, as a file for `--template`."""
    path.write_text(yaml.safe_dump(FULL_TEMPLATE))
    return path


def convert_command(source: Path, out: Path, *more: str) -> list[str]:
    """The words of a conversion that takes over template and image size of the remote code."""
    template = write_template(source.parent / "template.yaml")
    same = ["--template", str(template), "--image-size", str(isqrt(MAX_PIXELS))]
    return ["kyutai", str(source), "--out", str(out), *same, *more]
