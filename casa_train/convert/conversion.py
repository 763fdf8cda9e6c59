"""A published checkpoint as an export of this project: rules, account, weights, gate."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from casa_train import modeling
from casa_train.config.ready_templates import read_template
from casa_train.config.schema import Config
from casa_train.convert.record import card, provenance, source_digest
from casa_train.convert.rules import Rules
from casa_train.convert.shard_files import check_room, write_weights
from casa_train.convert.source_config import Described, describe
from casa_train.convert.tensor_plan import EMBEDDING, HEAD, Plan, make_plan, targets_of, tied_head
from casa_train.data.templates import own_jinja, resolve
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import UserError
from casa_train.export.from_run import gate_conversations
from casa_train.export.gate import check_export
from casa_train.export.loading import DTYPE_OPTION
from casa_train.export.writer import check_target, write_export
from casa_train.io.caches import check_cache
from casa_train.io.precision import DTYPES
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.setup.model import build_model, describe_model, ends_of
from casa_train.setup.pretrained import Pretrained

SOURCE = "SOURCE"
# Weights and configuration, tokenizer, and the code that `--verify` runs.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
# By the names that safetensors' headers have.
STORED = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Choices:
    """What a user may choose where the rules do.

    :param dtype: bf16 or fp32; None leaves every tensor as it is.
    :param template: as `model.template`; None: the tokenizer's own or the family's.
    :param tokenizer: directory or hub id; None: the checkpoint's.
    :param max_pixels: None: the family's.
    :param fusion: settings of the mechanism, on top of the rules'.
    """

    dtype: str | None = None
    template: str | None = None
    tokenizer: str | None = None
    max_pixels: int | None = None
    fusion: Mapping[str, Any] = field(default_factory=dict)

    def given(self) -> dict[str, Any]:
        """What was chosen, JSON values by field."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


def open_source(name: str) -> Pretrained:
    """A published checkpoint, fetched where it is a hub id.

    :raises UserError: nothing there, or no network.
    """
    return Pretrained(name, SOURCE, FILES)


def convert(
    source: Pretrained, out: Path, rules: Rules, choices: Choices, log: Callable[[str], None]
) -> None:
    """Writes the export, or nothing.

    :param log: prints one line for the user.
    :raises UserError: a target that is there, a checkpoint that the rules do not fit, no room.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out} exists already; expected a directory that does not. Choose another one, "
            "remove it, or say --verify to compare it with the checkpoint it was converted from."
        )
    check_target(out)
    check_cache(HF_MODULES_CACHE)  # the gate loads the export by its own code
    where = f"{SOURCE} {source.name}"
    described = describe(
        source.config, rules, targets_of(source.names, rules), choices.fusion, where
    )
    processor = build_source_processor(source, described, choices)
    model = build_source_model(source, described, processor)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    there = source.shapes()
    plan = make_plan(there, shapes, rules, where)
    tied_head(source, rules, HEAD not in shapes)
    dtypes = _dtypes(source, plan, choices.dtype)
    sizes = {n: math.prod(shapes[n]) * dtypes[n].itemsize for n in shapes}
    check_room(out.resolve(), sum(sizes.values()))
    log(f"{source.name}: family {described.family}, fusion {described.fusion}")
    for line in plan.lines(len(there)):
        log(line)
    for file in source.strays:
        log(f"note: {file} is not read: no tensor of the checkpoint is said to lie there")
    if not rules.verified:
        log(f"note: the rules {rules.name!r} are not verified: nobody has run --verify with them")

    def save_model(directory: Path) -> None:
        chosen = None if choices.dtype is None else DTYPES[choices.dtype]
        model.config.architectures = [type(model).__name__]
        setattr(model.config, DTYPE_OPTION, dtypes[EMBEDDING])
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        try:
            write_weights(directory, sizes, lambda name: _finite(plan, source, name, chosen))
        except BaseException:  # Ctrl-C too: no gigabytes of half an export stay behind
            shutil.rmtree(directory, ignore_errors=True)
            raise

    verdict = write_export(
        out,
        save_model=save_model,
        save_processor=lambda directory: processor.save_pretrained(directory),
        source=Path(str(modeling.__file__)).parent,
        card=card(source.name, rules, model, processor),
        provenance=provenance(source.name, source_digest(source.directory), rules, choices.given()),
        gate=lambda directory: check_export(
            directory, None, gate_conversations(processor.max_pixels)
        ),
    )
    log(verdict)


def build_source_processor(
    source: Pretrained, described: Described, choices: Choices
) -> CasaProcessor:
    """The checkpoint's tokenizer with a template and the image size of its family.

    :raises UserError: no tokenizer, or a template that gives other tokens around images than
        config.json says.
    """
    name = choices.tokenizer or str(source.directory)
    try:
        tokenizer = load_tokenizer(name, plain=choices.tokenizer is None)
    except UserError as error:
        raise UserError(f"{error} --tokenizer names another directory or hub id.") from error
    spec = choices.template
    if spec is None:
        spec = "auto" if own_jinja(tokenizer) is not None else described.settings["template"]
    resolved = resolve(read_template(spec, "--template"), tokenizer, name, "--template")
    pixels = choices.max_pixels or described.settings["max_pixels"]
    try:
        processor = CasaProcessor(tokenizer, pixels, asdict(resolved.template))
    except ValueError as error:
        raise UserError(f"--template: {error}") from error
    processor.tokenizer.padding_side = "left"  # what generation from a batch needs
    for setting, expected in described.tokens_around.items():
        found = list(getattr(processor, setting))
        if found != list(expected):
            raise UserError(
                f"{SOURCE} {source.name}: config.json has {setting} {list(expected)} "
                f"({_texts(tokenizer, expected)}), the template {spec!r} gives {found} "
                f"({_texts(tokenizer, found)}); expected the same. Give the literals around images "
                "by --template '{image_start: ..., image_end: ...}', or another template's name."
            )
    return processor


def build_source_model(source: Pretrained, described: Described, processor: CasaProcessor) -> Any:
    """The model that a checkpoint describes, on the meta device.

    :raises UserError: settings that no supported model has, fewer rows than tokens.
    """
    config = Config(fusion=dict(described.fusion))
    config.model.vision.train_last_blocks = 0
    text = dict(described.text)
    rows = text.get("vocab_size")
    tokens = len(processor.tokenizer)
    if rows is not None and rows < tokens:
        raise UserError(
            f"{SOURCE} {source.name}: config.json has vocab_size {rows}, its tokenizer {tokens} "
            "tokens; expected a row for each. Name the tokenizer that belongs to it by --tokenizer."
        )
    ends = ends_of(text.get("eos_token_id"), source.generation.get("eos_token_id"))
    if ends is not None:
        text["eos_token_id"] = ends
    described_model = describe_model(config, text, described.vision, None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(described_model.text_config, name, None) is None:
            setattr(described_model.text_config, name, getattr(processor.tokenizer, name))
    return build_model(config, processor, described_model)


def _dtypes(source: Pretrained, plan: Plan, dtype: str | None) -> dict[str, torch.dtype]:
    """What each tensor of ours will be stored as."""
    if dtype is not None:
        return dict.fromkeys(plan.pieces, DTYPES[dtype])
    stored = source.dtypes()
    out = {}
    for name, piece in plan.pieces.items():
        if not piece.sources:
            out[name] = torch.float32
            continue
        found = {stored[one] for one in piece.sources}
        if len(found) > 1 or not found <= STORED.keys():
            raise UserError(
                f"{SOURCE} {source.name}: {piece.sources[0]} is stored as {sorted(found)}; "
                f"expected one out of {sorted(STORED)}. Convert it by its own code first."
            )
        out[name] = STORED[found.pop()]
    return out


def _finite(plan: Plan, source: Pretrained, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of ours.

    :raises UserError: NaN or infinity in it, of the checkpoint's or by rounding to `dtype`.
    """
    tensor = plan.read(source, name, dtype)
    if not bool(torch.isfinite(tensor).all()):
        stored = ", ".join(plan.pieces[name].sources)
        raise UserError(
            f"{SOURCE} {source.name}: {stored} would hold NaN or infinity as {tensor.dtype}; "
            "expected numbers. Download it again; where rounding makes it so, choose --dtype fp32."
        )
    return tensor


def _texts(tokenizer: Any, ids: Any) -> str:
    return repr("".join(map(str, tokenizer.convert_ids_to_tokens(list(ids)))))
