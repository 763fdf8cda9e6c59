"""Writes and reads exports, as a script that each environment of `make test-compat` runs.

`write DIR` exports one tiny model per backbone, tied and untied, one per fusion mechanism, with
the other vision tower and adapter, and one with a mechanism of a user's own, with what each
computes beside it;
`read DIR` loads them as a user would, through the code in the export, and compares.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoProcessor, DynamicCache

TOLERANCE = 1e-5
NEW_TOKENS = 6
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,  # no backbone's default
}
# Fields of one backbone alone.
OWN: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_text": {"rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 24},
    "smollm3": {"no_rope_layers": [0, 1]},
}
# Llama 3.1's RoPE, stretched from a length that the conversation exceeds.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Backbones whose layers lie in an export as Llama's do: tied or not, as most of them are published.
ALIKE = {"mistral", "qwen3", "smollm3"}
# Backbones that transformers 4.51.3 lacks, and what it says of them.
LATER = {"smollm3": "'smollm3' needs transformers 4.53 or newer"}


def conversation() -> list[dict[str, Any]]:
    """Two turns with an image each."""

    def user(colour: str, words: str) -> dict[str, Any]:
        picture = {"type": "image", "image": Image.new("RGB", (84, 56), colour)}
        return {"role": "user", "content": [picture, {"type": "text", "text": words}]}

    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    return [user("red", "What colour is this?"), answer, user("navy", "And this?")]


@torch.no_grad()
def computed(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    """Logits, greedily generated ids and what is read from images, of the conversation."""
    batch = processor.tokenize_messages(conversation())
    greedy = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    ids = model.generate_from_image(**batch, past_key_values=DynamicCache(), **greedy)
    points = batch["image_embeds_insertion_points"][0]
    reads = model.image_attention(model.pack(batch["input_ids"][0], points, batch["pixel_values"]))
    layers = [layer for layers in reads.values.values() for layer in layers.values()]
    return {
        "input_ids": batch["input_ids"],
        "logits": model(**batch).logits,
        "ids": ids,
        "reads": torch.cat([torch.zeros(1), *layers]).nan_to_num(-1),
    }


def write(directory: Path) -> None:
    """One export per backbone and tying and per mechanism; `computed` in NAME.safetensors."""
    from casa_train import modeling
    from casa_train.data.tokens import portable_tokenizer_config
    from casa_train.export.gate import check_export
    from casa_train.export.writer import write_export
    from casa_train.io.environment import MECHANISMS_VARIABLE
    from casa_train.modeling.backbones import BACKBONES
    from casa_train.modeling.configuration_casa import CasaConfig
    from casa_train.modeling.mechanisms import MECHANISMS
    from casa_train.modeling.processing_casa import CasaProcessor
    from casa_train.modeling.tower_kinds import TOWER_KINDS
    from casa_train.setup.own_mechanisms import own_class, register_own
    from data_recipes.synthetic import build_tokenizer
    from tests.helpers.commands import TEMPLATE
    from tests.helpers.tiny import tiny_model, tiny_siglip_config
    from tests.helpers.toy_mechanism import write_toy

    os.environ[MECHANISMS_VARIABLE] = str(write_toy(directory / "mine")[0])
    register_own()
    tokenizer = build_tokenizer()

    def save_processor(processor: CasaProcessor, out: Path) -> None:
        processor.save_pretrained(out)
        portable_tokenizer_config(out)

    plain = "qwen2_5_vl", "linear"
    cases = {
        f"{backbone}_{'tied' if tied else 'untied'}": (backbone, tied, "casa", *plain)
        for backbone in BACKBONES
        for tied in ((True, False) if backbone not in ALIKE else (backbone != "mistral",))
    }
    cases |= {mechanism: ("llama", True, mechanism, *plain) for mechanism in MECHANISMS}
    cases |= {"llama_stretched": ("llama", True, "casa", *plain)}
    others = [("qwen2_5_vl", "mlp"), ("siglip2", "linear"), ("siglip2", "mlp")]
    cases |= {"_".join(other): ("llama", True, "casa", *other) for other in others}
    for name, (backbone, tied, mechanism, tower, adapter) in cases.items():
        vision = tiny_siglip_config() if tower == "siglip2" else None
        side = TOWER_KINDS[tower].side
        processor = CasaProcessor(tokenizer, 7056, dict(TEMPLATE), token_side=side)
        text = {"model_type": backbone, **SIZES, **OWN.get(backbone, {})}
        if name == "llama_stretched":
            text["rope_scaling"] = dict(LLAMA3_ROPE)
        text |= {"vocab_size": len(processor.tokenizer), "tie_word_embeddings": tied}
        text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        model = tiny_model(
            mechanism,
            text_config=CasaConfig(text_config=text).text_config,
            vision_config=vision,
            adapter=adapter,
        )
        model.generation_config.eos_token_id = processor.asst_end_tokens[0]
        write_export(
            directory / name,
            save_model=model.save_pretrained,
            save_processor=partial(save_processor, processor),
            source=Path(str(modeling.__file__)).parent,
            card="A tiny model.\n",
            provenance={},
            gate=lambda out, model=model: check_export(out, model, [conversation()]),
            mechanism=own_class(model.mechanism),
        )
        save_file(computed(model, processor), directory / f"{name}.safetensors")


def refused(export: str, words: str) -> None:
    """Raises unless loading an export fails with these words."""
    try:
        AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{export} was loaded")


def read(directory: Path) -> None:
    """Raises unless every export in `directory` computes what its writer computed."""
    answers = sorted(directory.glob("*.safetensors"))
    assert answers, f"{directory} holds no exports"
    for answer in answers:
        export = str(answer.with_suffix(""))
        backbone = answer.stem.split("_")[0]
        if backbone in LATER and backbone not in CONFIG_MAPPING:
            refused(export, LATER[backbone])
            continue
        processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(
            export, trust_remote_code=True, torch_dtype=torch.float32
        ).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        expected, given = load_file(answer), computed(model, processor)
        for name in ("input_ids", "ids"):
            assert torch.equal(given[name], expected[name]), (answer.stem, name)
        for name in ("logits", "reads"):
            difference = float((given[name] - expected[name]).abs().max())
            assert difference < TOLERANCE, (answer.stem, name, difference)
    print(f"transformers {transformers.__version__}: {len(answers)} exports")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
