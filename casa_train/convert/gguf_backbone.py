"""python -m casa_train.convert gguf FILE --out DIR [--tokenizer DIR_OR_HUB_ID]: a Llama in a GGUF
file as a Hugging Face directory, for model.backbone.pretrained.

transformers reads the file (its `gguf_file` option, package gguf) and takes quantised weights for
what they stand for, in float32; what it then refuses to save is saved from a clean model. The
directory is written only if a model loaded from it gives the same logits, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from casa_train.config.bounds import local_path, path_or_hub_id
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import UserError
from casa_train.export.loading import DTYPE_OPTION
from casa_train.io.files import sha256
from casa_train.io.quiet import quiet_libraries

ARCHITECTURE = "llama"
INSTEAD = "Take the model's safetensors instead: model.backbone.pretrained=DIR_OR_HUB_ID."
TOKENS = "tokenizer.ggml.tokens"
# What is written into config.json of one model and says nothing of another one.
OF_THE_FILE = ("quantization_config",)
# What transformers reads of a Llama: any other tensor or setting it leaves out without a word, and
# what lacks begins at random.
TENSORS = ("token_embd.weight", "output_norm.weight")
OF_A_LAYER = tuple(
    f"{name}.weight"
    for name in (
        *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
        *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
    )
)
HEAD = "output.weight"  # of embeddings that are not tied
SETTINGS = (
    *("context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("rope.dimension_count", "rope.freq_base", "tensor_data_layout"),
)
# Settings that say nothing with these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **{name: (0,) for name in ("expert_count", "expert_used_count", "attention.sliding_window")},
    **{name: (0, 1) for name in ("rope.scale_linear", "rope.scaling.factor")},
    "rope.scaling.type": ("none",),
}
# How texts are cut before byte-level BPE, by tokenizer.ggml.pre, for which llama.cpp has a rule for
# each name: whether single digits are cut off before GPT-2's rule, as transformers does for none.
# "default" is what a file says whose writer did not know the rule.
CUTS_DIGITS = {"gpt-2": False, "smollm": True}
BYTE_LEVEL = "gpt2"
# Above this share of other tokens at its ids, a tokenizer is another model's.
OTHER_TOKENS = 0.01
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
    :raises UserError: a target that is there, no GGUF of a Llama, tensors or settings of it that
        would be left out, a tokenizer that is another model's or not known to be read as it was
        trained.
    """
    if out.exists():
        raise UserError(
            f"--out {out} exists already; expected a directory that does not. Choose another one, "
            "or remove it."
        )
    facts = _facts(file)
    with _alone(file) as alone:
        words = (
            _tokenizer(file, alone, facts)
            if tokenizer is None
            else _given_tokenizer(file, tokenizer, facts)
        )
        model = _model(file, alone)
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
    except (OSError, SafetensorError) as error:  # safetensors' own, of a full disk, too
        raise UserError(
            f"--out {out} cannot be written ({error}). Make room, or choose another."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    log(f"{facts.get('general.name', file.stem)}: {size:,} parameters, {len(words):,} tokens")
    log(f"written to {out}; a model loaded from it gives the logits of {file.name} bit for bit")


def _facts(file: Path) -> dict[str, Any]:
    """What the header says, by its keys, but for long lists other than the tokens.

    :raises UserError: no package gguf, no such file, no GGUF, no Llama, more or less than one.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the package gguf, which is not installed: "
            "pip install 'casa_train[real]'"
        ) from error
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "transformers reads GGUF files with the package accelerate, which is not installed: "
            "pip install accelerate"
        )
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a GGUF file.")
    try:
        reader = GGUFReader(file)
        fields = reader.fields
        facts = {
            key: f.contents()
            for key, f in fields.items()
            if len(f.data) <= 1 or key.startswith(f"{ARCHITECTURE}.") or key == TOKENS
        }
        swapped = reader.byte_order != "I"
        names = [tensor.name for tensor in reader.tensors]
    except Exception as error:  # the reader has no type of its own for what is no GGUF
        raise UserError(
            f"{file} cannot be read as GGUF ({error}); expected a whole file of that format. "
            "Download it again."
        ) from error
    found = facts.get("general.architecture")
    if found != ARCHITECTURE:
        raise UserError(
            f"{file} holds the architecture {found!r}; expected {ARCHITECTURE!r}, the one whose "
            f"conversion is tested. {INSTEAD}"
        )
    if swapped:
        raise UserError(
            f"{file} has the byte order of another machine, by which quantised weights would be "
            f"read wrongly; expected this one's. {INSTEAD}"
        )
    _check_settings(file, facts)
    _check_tensors(file, facts, names)
    return facts


def _check_settings(file: Path, facts: dict[str, Any]) -> None:
    """:raises UserError: settings of the model that transformers does not read."""
    own = {
        key.removeprefix(f"{ARCHITECTURE}."): value
        for key, value in facts.items()
        if key.startswith(f"{ARCHITECTURE}.")
    }
    width = own.get("rope.dimension_count")
    if width is None and isinstance(own.get("attention.head_count"), int):
        width = own.get("embedding_length", 0) // max(own["attention.head_count"], 1)
    neutral = {**NEUTRAL, "attention.key_length": (width,), "attention.value_length": (width,)}
    lost = {
        f"{ARCHITECTURE}.{name}": value
        for name, value in own.items()
        if (isinstance(value, list) or name not in SETTINGS) and value not in neutral.get(name, ())
    }
    if lost:
        raise UserError(
            f"{file} sets {lost}, which transformers does not read out of GGUF: the model would "
            f"be another one; expected a Llama without. {INSTEAD}"
        )


def _check_tensors(file: Path, facts: dict[str, Any], names: Sequence[str]) -> None:
    """:raises UserError: tensors that transformers does not read, or too few of them."""
    if (files := int(facts.get("split.count", 1))) > 1:
        raise UserError(
            f"{file} is one of {files} files of one model; expected a single file. Put them "
            "together first: llama-gguf-split --merge FIRST OUT."
        )
    layers = range(int(facts.get(f"{ARCHITECTURE}.block_count", 0)))
    expected = {*TENSORS, *(f"blk.{layer}.{name}" for layer in layers for name in OF_A_LAYER)}
    more = sorted(set(names) - expected - {HEAD})
    if more:
        stretched = " (the RoPE of Llama 3.1 and later, stretched)" if "rope_" in more[-1] else ""
        raise UserError(
            f"{file} holds {len(more)} tensors that transformers does not read, such as "
            f"{more[-1]}{stretched}: the model would be another one; expected a Llama without. "
            f"{INSTEAD}"
        )
    if lacking := sorted(expected - set(names)):
        raise UserError(
            f"{file} lacks {len(lacking)} tensors of {len(layers)} layers, such as {lacking[0]}, "
            "which would begin at random; expected a whole model. Download it again."
        )


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers would rather take a file of its name in the
    working directory, and a tokenizer.json beside it.
    """
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(file.resolve())
        yield link


def _tokenizer(file: Path, alone: Path, facts: dict[str, Any]) -> Any:
    """The file's tokenizer, which cuts texts as the model was trained.

    :raises UserError: a kind that transformers would read otherwise, or is not known not to.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    kind, cut = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != BYTE_LEVEL:
        raise UserError(
            f"{file}: its tokenizer is of the kind {kind!r}; expected {BYTE_LEVEL!r}, byte-level "
            "BPE, the one that is tested. Name the model's own tokenizer by --tokenizer."
        )
    if cut not in CUTS_DIGITS:
        raise UserError(
            f"{file}: its tokenizer cuts texts by the rule {cut!r}; expected one out of "
            f"{sorted(CUTS_DIGITS)}, since another would be read wrongly without a word. Name the "
            "model's own tokenizer by --tokenizer."
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(alone.parent, gguf_file=str(alone))
    if CUTS_DIGITS[cut]:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def _given_tokenizer(file: Path, name: str, facts: dict[str, Any]) -> Any:
    """A tokenizer in place of the file's own.

    :raises UserError: it cannot be loaded, or has other tokens.
    """
    tokenizer = load_tokenizer(name)
    there = facts.get(TOKENS, [])
    vocabulary = tokenizer.get_vocab()
    differ = [token for token, i in vocabulary.items() if i < len(there) and there[i] != token]
    if len(differ) > OTHER_TOKENS * len(vocabulary):
        raise UserError(
            f"--tokenizer {name} has other tokens than {file} in {len(differ)} of "
            f"{len(vocabulary)} places, such as {differ[0]!r}; expected the model's own."
        )
    return tokenizer


def _model(file: Path, alone: Path) -> Any:
    """The file's model in float32, clean of what keeps transformers from saving it.

    :raises UserError: transformers takes it for another model.
    """
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    as_read: dict[str, Any] = {"gguf_file": str(alone), DTYPE_OPTION: torch.float32}
    with contextlib.redirect_stderr(io.StringIO()):  # bars of its progress
        read: Any = AutoModelForCausalLM.from_pretrained(alone.parent, **as_read)
    config = read.config
    if config.model_type != ARCHITECTURE:  # by its name: some are called mistral
        raise UserError(
            f"transformers takes {file} for a model of type {config.model_type!r}; expected "
            f"{ARCHITECTURE!r}. {INSTEAD}"
        )
    for name in OF_THE_FILE:
        config.__dict__.pop(name, None)
    config._name_or_path = ""
    # float32 in the file: 9.999999747378752e-06 is 1e-05 there.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.7g}")
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval()


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
