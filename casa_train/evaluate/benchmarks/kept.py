"""Answers are kept on disk as they come, so that nothing is asked twice.

A folder of lines for each combination of weights, benchmark, protocol and batches: under another
export, under the same one written anew or with another limit, nothing is found there. Every rank
appends to a file of its own; whoever goes on, on however many ranks, reads all of them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from casa_train.errors import UserError
from casa_train.io.files import EXPORT_MARKER, sha256
from casa_train.io.log import append, read_json_lines
from casa_train.setup.kept_adapters import FOLDER

KEPT = "kept"
_OF_MODEL = ("*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "*.txt")


def weights_digests(export: Path) -> dict[str, str]:
    """Digests of what decides how an export answers: weights, configuration, tokenizer, code.

    :raises UserError: a file cannot be read, or is gone.
    """
    folders = export, export / FOLDER  # adapters that lie apart
    found = {file for where in folders for p in _OF_MODEL for file in where.glob(p)}
    # The marker says where an export is from, which changes no answer.
    files = sorted(file for file in found if file.name != EXPORT_MARKER)
    try:
        return {str(file.relative_to(export)): sha256(file) for file in files}
    except OSError as error:
        raise UserError(
            f"{export} cannot be read: {error}. Expected an export that is whole and that nothing "
            "writes anew meanwhile."
        ) from error


def check_folder(folder: Path) -> None:
    """Before a model is loaded.

    :raises UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out {folder}: nothing can be written there: {error.strerror}. Expected a folder of "
            "this user's with room; name another one."
        ) from error


class KeptAnswers:
    """The answers of one benchmark under one key.

    :param folder: of all kept answers; :param key: whatever changes the answers.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any], rank: int = 0) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = folder / KEPT / f"{name}-{digest}"
        self._file = self.folder / f"rank{rank}.jsonl"

    def read(self) -> dict[int, dict[str, Any]]:
        """The records of every rank that ever answered, by their number in the benchmark.

        :raises UserError: they cannot be read.
        """
        records = {}
        for file in sorted(self.folder.glob("rank*.jsonl")):
            try:
                for record in read_json_lines(file):
                    if isinstance(record.get("index"), int) and record.keys() & {"answer", "error"}:
                        records[record["index"]] = record
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}") from error
        return records

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends the records of a batch, all or none.

        :raises UserError: the disk takes no more; what was kept before is whole.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            append("".join(f"{json.dumps(record)}\n" for record in records), self._file)
        except OSError as error:
            raise UserError(
                f"{self._file} cannot be written: {error.strerror}. The answers before are kept: "
                "make room, or name a folder on another disk with --out, and run the same command "
                "again."
            ) from error
