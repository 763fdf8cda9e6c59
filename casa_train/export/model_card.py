"""The README.md of an export: base models, data, configuration, licences, citation, use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from casa_train import __version__
from casa_train.config.places import shown
from casa_train.config.schema import Config
from casa_train.modeling.configuration_casa import OLDEST, SINCE
from casa_train.modeling.tower_kinds import kind_of
from casa_train.setup.parts import part_sizes

# What is known of licences; anything else is left to the base model's own card.
KNOWN_LICENCES = {"Qwen/Qwen2.5-VL-3B-Instruct": "Qwen research licence"}

FRONT_LICENCE = re.compile(r"---\n(?:(?!---\n).*\n)*?license: *([\w.-]+) *\n")

USE = """## Use

```sh
pip install torch "transformers>={transformers}" einops pillow numpy
```

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "PATH/TO/THIS/DIRECTORY"
model = AutoModelForImageTextToText.from_pretrained(
    path, trust_remote_code=True, torch_dtype=torch.float32
).eval()
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
messages = [{{"role": "user", "content": [
    {{"type": "image", "image": "picture.png"}},
    {{"type": "text", "text": "What is in the picture?"}},
]}}]
batch = processor.tokenize_messages(messages).to(model.device)
out = model.generate_from_image(**batch, max_new_tokens=32)
print(processor.tokenizer.decode(out[0, batch["input_ids"].shape[1]:], skip_special_tokens=True))
```

Images are resized as in training: aspect kept, sides multiples of {side}, at most {max_pixels:,}
pixels{least}. `AutoProcessor.from_pretrained(..., image_size=896)` takes at most 896x896 instead.

"""

FRONT = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- casa
- vision-language
---

"""
"""By which a hub finds any export."""

KEPT = """, which lie apart in `adapter/`, in peft's format.
Without them the model refuses to run; `pip install peft`, and after `model = ...` below:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, path, subfolder="adapter").eval()
```"""
"""Of an export that keeps its adapters."""

CARD = FRONT
CARD += """# {name}

A vision-language model trained with casa_train {version}: a {backbone} text decoder that sees
images through **{mechanism}**, fed by a {tower} vision tower. {tokens}

| part | parameters |
|---|---|
| text backbone ({backbone}, {layers} layers, width {width}) | {backbone_size:,} |
| vision tower ({depth} blocks, width {vision_width}) | {vision_size:,} |
| fusion ({mechanism}) | {fusion_size:,} |

Checkpoint of step {step}, {steps} steps planned, {packs} packed sequences a step.{adapters}

"""
CARD += USE
CARD += """## Base models and licences

{licences}

The tower's architecture is {tower}'s and the backbone's is {backbone}'s, as implemented in
transformers (Apache-2.0). The code in this directory is MIT-licensed.

## Data

{sources}

The licences of these datasets apply to what is made with them.

## Configuration

```yaml
{yaml}```

## Citation

The method: *CASA: Cross-Attention via Self-Attention*,
arXiv 2512.19535.
"""


def model_card(config: Config, step: int, model: Any, lora: str | None = None) -> str:
    """The card's text.

    :param lora: what became of adapters, merge or keep; None: there were none.
    :param model: the model that is exported; sizes are counted on it.
    """
    licences = _licences(config)
    config = shown(config)
    text, kind = model.config.text_config, kind_of(model.config.vision_config)
    vision = kind.shape(model.config.vision_config)
    sizes = part_sizes(model)
    inserts = model.mechanism.inserts
    sources = [
        f"- `{name}` ({source.path})" + (f", {source.repeats} passes" if source.repeats > 1 else "")
        for name, source in config.data.sources.items()
    ]
    sources += [
        f"- `{name}` ({dataset.source}), streamed"
        for name, dataset in config.data.stream.datasets.items()
    ]
    adapters = "" if lora is None else _adapters(config, lora)
    card = CARD.replace(FRONT, _front(config), 1)
    return card.format(
        adapters=adapters,
        name=config.name,
        version=__version__,
        backbone=text.model_type,
        mechanism=config.fusion["mechanism"],
        tokens="Image tokens join the text stream and the KV cache."
        if inserts
        else "Only text enters the KV cache.",
        side=kind.side,
        tower=kind.title,
        max_pixels=config.data.max_pixels,
        transformers=SINCE.get(text.model_type, OLDEST),
        least=f" and at least {config.data.min_pixels:,}" if config.data.min_pixels else "",
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        depth=vision.depth,
        vision_width=vision.width,
        backbone_size=sizes["text backbone"],
        vision_size=sizes["vision tower"],
        fusion_size=sizes["fusion"],
        step=step,
        steps=config.trainer.steps,
        packs=config.data.packs_per_step,
        licences=licences,
        sources="\n".join(sources),
        yaml=OmegaConf.to_yaml(OmegaConf.structured(config)),
    )


def _front(config: Config) -> str:
    """`FRONT` with the base models that a hub knows."""
    model = config.model
    names = (model.backbone.pretrained, model.vision.pretrained, model.init_from)
    ids = dict.fromkeys(n for n in names if n is not None and _is_hub_id(n))
    lines = "".join(f"- {name}\n" for name in ids)
    return FRONT.replace("tags:\n", f"base_model:\n{lines}tags:\n") if ids else FRONT


def _is_hub_id(name: str) -> bool:
    """Whether a name is owner/name on a hub and no directory here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def _adapters(config: Config, lora: str) -> str:
    """What is to be known of LoRA."""
    settings = config.model.backbone.lora
    told = (
        "\n\nThe text backbone stayed frozen but for LoRA adapters of rank "
        f"{settings.rank} (alpha {settings.alpha:g})"
    )
    return f"{told}, merged into its weights." if lora == "merge" else told + KEPT


def _licences(config: Config) -> str:
    """What the weights started from, and whose terms they carry."""
    starts, names = (
        {
            "text backbone": model.backbone.pretrained,
            "vision tower": model.vision.pretrained,
            "whole model": model.init_from,
        }
        for model in (config.model, shown(config).model)
    )
    lines = [
        f"- {part}: `{names[part]}` ({_licence(name)})"
        for part, name in starts.items()
        if name is not None
    ]
    if not lines:
        return "All weights were initialised at random: no weights, so no licences, were inherited."
    return "These weights were trained from others and inherit their terms:\n\n" + "\n".join(lines)


def _licence(name: str) -> str:
    """What is known of a checkpoint's licence: its own card's front matter says it, if any does."""
    if name in KNOWN_LICENCES:
        return KNOWN_LICENCES[name]
    card = Path(name) / "README.md"
    found = FRONT_LICENCE.match(card.read_text(errors="replace")) if card.is_file() else None
    if found is None:
        return "see its own model card for the licence"
    return f"licence {found[1]}, by its own model card"
