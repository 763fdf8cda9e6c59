"""Writes the Hugging Face directory that plain transformers loads, complete or not at all."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from casa_train.errors import UserError
from casa_train.io.files import EXPORT_MARKER, sync_file

ARCHITECTURE = "modeling_casa.CasaForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_casa.CasaConfig",
    # With AutoModel alone the library's pipelines and the text-generation classes do not find it.
    "AutoModel": ARCHITECTURE,
    "AutoModelForCausalLM": ARCHITECTURE,
    "AutoModelForImageTextToText": ARCHITECTURE,
    "AutoModelForMultimodalLM": ARCHITECTURE,
}
PROCESSOR_MAP = {"AutoProcessor": "processing_casa.CasaProcessor"}


def exported_step(directory: Path) -> int | None:
    """The step of the export that stands there; None where there is no export."""
    try:
        return int(json.loads((directory / EXPORT_MARKER).read_text())["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_export(
    out: Path,
    save_model: Callable[[Path], None],
    save_processor: Callable[[Path], None],
    source: Path,
    card: str,
    provenance: dict[str, object],
    gate: Callable[[Path], str],
    mechanism: type | None = None,
) -> str:
    """Writes beside `out`, runs the gate there, and only then renames.

    :param out: the export; an earlier export there is replaced, anything else refused.
    :param save_model: writes weights and config.json; :param save_processor: tokenizer and
        processor.
    :param source: the folder of model code that travels with the weights.
    :param card: text of the model card.
    :param provenance: which run and step this is.
    :param gate: loads the directory as a user would and compares; raises `UserError` if it differs.
    :param mechanism: the class of a fusion mechanism of the user's own, whose file travels along.
    :return: the gate's verdict.
    :raises UserError: a directory that cannot be used, or a failed gate.
    """
    out = out.resolve()  # so that it has a name, even where it was given as "."
    check_target(out)
    # transformers turns the directory's name into a Python module: a dot would break the import.
    temporary, stale = (out.with_name(out.name + ending) for ending in ("_unfinished", "_stale"))
    try:
        # Killed between the renames below.
        if (stale / EXPORT_MARKER).is_file() and not out.exists():
            os.rename(stale, out)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(temporary)
        save_processor(temporary)
        _edit_json(temporary / "config.json", {"auto_map": AUTO_MAP})
        _edit_json(temporary / "processor_config.json", {"auto_map": PROCESSOR_MAP})
        for file in sorted(source.glob("*.py")):
            if file.name != "__init__.py":
                shutil.copy(file, temporary / file.name)
        if mechanism is not None:
            _add_mechanism(temporary, mechanism)
        for file in temporary.rglob("*"):  # safetensors files are made readable by their owner only
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        (temporary / "README.md").write_text(card, encoding="utf-8")
        files = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
        record = {**provenance, "files": files}  # what is the export's, whatever comes beside it
        (temporary / EXPORT_MARKER).write_text(json.dumps(record, indent=1) + "\n")
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        verdict = gate(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"export to {out} failed: {error}. Nothing was left behind, and an earlier export is "
            "as it was; choose a directory that can be written, on a disk with room."
        ) from error
    shutil.rmtree(temporary / "__pycache__", ignore_errors=True)
    try:
        shutil.rmtree(stale, ignore_errors=True)
        if out.exists():
            os.rename(out, stale)
        os.rename(temporary, out)
    except OSError as error:
        raise UserError(f"the finished export {temporary} cannot become {out}: {error}") from error
    shutil.rmtree(stale, ignore_errors=True)
    return verdict


def _add_mechanism(directory: Path, mechanism: type) -> None:
    """Copies the file of a mechanism and names it in the entry file: importing it registers it, and
    transformers 4.51 copies only what an entry file itself imports.
    """
    file = Path(inspect.getfile(mechanism))
    shutil.copy(file, directory / file.name)
    line = f"from .{file.stem} import {mechanism.__name__} as _OwnMechanism  # noqa: E402, F401"
    with (directory / f"{ARCHITECTURE.split('.')[0]}.py").open("a", encoding="utf-8") as entry:
        entry.write(f"\n# The fusion mechanism of this model.\n{line}\n")


def check_target(out: Path) -> None:
    """Refuses target directories that transformers cannot load from or that hold something else.

    :raises UserError: naming the directory.
    """
    if "." in out.resolve().name:
        raise UserError(
            f"--out {out}: the directory's name must not contain a dot, because transformers "
            "imports the model code under that name."
        )
    ours = (out / EXPORT_MARKER).is_file()
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out} exists and is not an export of this program; choose another directory."
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _edit_json(path: Path, values: dict[str, object]) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content, indent=2) + "\n")
