"""python -m casa_train.convert gguf FILE --out DIR [--tokenizer DIR_OR_HUB_ID]: a Llama in a GGUF
file as a Hugging Face directory, for model.backbone.pretrained.

transformers reads the file (its `gguf_file` option, package gguf) and takes quantised weights for
what they stand for, in float32; what it then refuses to save is saved from a clean model. The
directory is written only if a model loaded from it gives the same logits, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from casa_train.config.bounds import local_path, path_or_hub_id
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import UserError
from casa_train.export.loading import DTYPE_OPTION
from casa_train.io.files import sha256
from casa_train.io.quiet import quiet_libraries

ARCHITECTURE = "llama"
# What is written into config.json of one model and says nothing of another one.
OF_THE_FILE = ("quantization_config",)
# How texts are cut before BPE, by tokenizer.ggml.pre: llama.cpp has a rule for each name, and
# transformers takes GPT-2's for all. Those of SmolLM cut single digits off before.
CUTS_DIGITS = {"gpt-2": False, "default": False, "smollm": True}
# Any text; the digits and spaces in it are where tokenizers differ.
PROBE = "In  2026,\n\n 12 people  saw 345 cats.\tWho's there?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.convert gguf", description=__doc__)
    parser.add_argument("file", type=local_path, help="a GGUF file of a Llama")
    parser.add_argument("--out", type=local_path, required=True, help="a new directory")
    parser.add_argument("--tokenizer", type=path_or_hub_id, help="default: the one in the file")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    try:
        convert_gguf(arguments.file, arguments.out, arguments.tokenizer, print)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert_gguf(
    file: Path, out: Path, tokenizer: str | None, log: Callable[[str], None] = print
) -> None:
    """Writes config, weights, tokenizer and a card, or nothing.

    :param tokenizer: directory or hub id; None: the one in the file.
    :param log: prints one line for the user.
    :raises UserError: a target that is there, no GGUF of a Llama, a tokenizer that is not known to
        be read as it was trained.
    """
    if out.exists():
        raise UserError(
            f"--out {out} exists already; expected a directory that does not. Choose another one, "
            "or remove it."
        )
    facts = _facts(file)
    words = load_tokenizer(tokenizer) if tokenizer is not None else _tokenizer(file, facts)
    model = _model(file)
    rows = model.config.vocab_size
    if rows < len(words):
        raise UserError(
            f"{file}: its embedding has {rows} rows, the tokenizer {len(words)} tokens; expected a "
            "row for each. Name the tokenizer that belongs to it by --tokenizer."
        )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        words.save_pretrained(partial)
        (partial / "README.md").write_text(_card(file, facts), encoding="utf-8")
        _check(partial, model, words)
        partial.rename(out)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error}). Make room, or choose another."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    log(f"{facts.get('general.name', file.stem)}: {size:,} parameters, {len(words):,} tokens")
    log(f"written to {out}; a model loaded from it gives the logits of {file.name} bit for bit")


def _facts(file: Path) -> dict[str, Any]:
    """What the header says, by its keys, but for long lists.

    :raises UserError: no package gguf, no such file, no GGUF, no Llama.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the package gguf, which is not installed: "
            "pip install 'casa_train[real]'"
        ) from error
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a GGUF file.")
    try:
        fields = GGUFReader(file).fields
        facts = {key: f.contents() for key, f in fields.items() if len(f.data) <= 1}
    except Exception as error:  # the reader has no type of its own for what is no GGUF
        raise UserError(
            f"{file} cannot be read as GGUF ({error}); expected a whole file of that format. "
            "Download it again."
        ) from error
    found = facts.get("general.architecture")
    if found != ARCHITECTURE:
        raise UserError(
            f"{file} holds the architecture {found!r}; expected {ARCHITECTURE!r}, the one whose "
            "conversion is tested. Take the model's safetensors instead: "
            "model.backbone.pretrained=DIR_OR_HUB_ID."
        )
    return facts


def _tokenizer(file: Path, facts: dict[str, Any]) -> Any:
    """The file's tokenizer, which cuts texts as the model was trained.

    :raises UserError: a kind of BPE that transformers would read otherwise.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    kind, cut = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind == "gpt2" and cut not in CUTS_DIGITS:
        raise UserError(
            f"{file}: its tokenizer cuts texts by the rule {cut!r}; expected one out of "
            f"{sorted(CUTS_DIGITS)}, since another would be read wrongly without a word. Name the "
            "model's own tokenizer by --tokenizer."
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if CUTS_DIGITS.get(str(cut), False) and kind == "gpt2":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def _model(file: Path) -> Any:
    """The file's model in float32, clean of what keeps transformers from saving it."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    with _one_dtype(), contextlib.redirect_stderr(io.StringIO()):  # bars of its progress
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = read.config
    for name in OF_THE_FILE:
        config.__dict__.pop(name, None)
    config._name_or_path = ""
    # float32 in the file: 9.999999747378752e-06 is 1e-05 there.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.7g}")
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval()


@contextlib.contextmanager
def _one_dtype() -> Iterator[None]:
    """Float32 for what is built inside, whatever the caller's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def _check(directory: Path, model: Any, tokenizer: Any) -> None:
    """
    :raises UserError: what was written is not what was read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    again: Any = AutoTokenizer.from_pretrained(directory)
    written: Any = AutoModelForCausalLM.from_pretrained(
        directory, **{DTYPE_OPTION: torch.float32}
    ).eval()
    same = again(PROBE)["input_ids"] == ids[0].tolist()
    if not same or not torch.equal(written(ids).logits, model(ids).logits):
        what = "logits" if same else "tokens"
        raise UserError(
            f"the directory gives other {what} than the GGUF file; expected the same, bit for bit. "
            "Nothing was written: report it with the versions of transformers and gguf."
        )


def _card(file: Path, facts: dict[str, Any]) -> str:
    """The directory's README.md, with the licence that the file names."""
    licence = facts.get("general.license")
    front = f"---\nlicense: {licence}\n---\n\n" if licence else ""
    return (
        f"{front}# {facts.get('general.name', file.stem)}\n\nWeights, configuration and tokenizer "
        f"out of the GGUF file `{file.name}` (SHA-256 {sha256(file)}), quantised weights taken for "
        "what they stand for, in float32.\n"
    )
