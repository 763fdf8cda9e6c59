"""Exports of tiny models with random weights, written as the real command writes them.

python -m tests.helpers.tiny_export DIR [MECHANISM] writes one, for tests/helpers/stranger.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from casa_train import modeling
from casa_train.export.gate import check_export
from casa_train.export.writer import write_export
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.modeling.tower_kinds import TOWER_KINDS
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import TEMPLATE
from tests.helpers.tiny import tiny_model, tiny_siglip_config, tiny_text_config

MAX_PIXELS = 84 * 84
MIN_PIXELS = 56 * 56
# Every field of a template, tokens around images too.
FULL_TEMPLATE = {
    **TEMPLATE,
    "system": "Answer briefly.",
    "system_start": "<|user|>system\n",
    "system_end": "<|end|>\n",
    "image_start": "<|user|>",
    "image_end": "<|end|>",
}


def write_tiny_export(
    directory: Path,
    mechanism: str = "casa",
    template: dict[str, str] | None = None,
    tower: str = "qwen2_5_vl",
) -> Path:
    """Writes an export of a two-layer model through the gate; returns its directory."""
    tokenizer = build_tokenizer()
    side = TOWER_KINDS[tower].side
    pieces = FULL_TEMPLATE if template is None else template
    processor = CasaProcessor(tokenizer, MAX_PIXELS, pieces, min_pixels=MIN_PIXELS, token_side=side)
    processor.tokenizer.padding_side = "left"
    text = tiny_text_config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = tiny_siglip_config() if tower == "siglip2" else None
    model = tiny_model(mechanism, text_config=text, vision_config=vision)
    # As setup.model.build_model does.
    model.config.pre_image_tokens = processor.pre_image_tokens
    model.config.post_image_tokens = processor.post_image_tokens
    model.config.answer_end_token = processor.answer_end_token
    question = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    write_export(
        directory,
        save_model=lambda path: model.save_pretrained(path),
        save_processor=lambda path: processor.save_pretrained(path),
        source=Path(str(modeling.__file__)).parent,
        card="A tiny model with random weights.\n",
        provenance={"run": "tiny"},
        gate=lambda path: check_export(path, model, [question]),
    )
    return directory


if __name__ == "__main__":
    write_tiny_export(Path(sys.argv[1]), *sys.argv[2:3])
