"""Code that lies in directories: ours runs, that of others does not, and nobody is asked."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_train.data.tokens import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from casa_train.errors import UserError
from casa_train.export.loading import load_model, load_processor
from casa_train.io.files import EXPORT_MARKER
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import ROOT, TINY, environment, on_data, train_command
from tests.helpers.tiny_export import write_tiny_export


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's failures are no Exceptions, so transformers does not take them for a time-out."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a prompt"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("exports") / "tiny")


def foreign(path: Path, tokenizer_code: bool = False) -> Path:
    """A model with code of its own, as hubs hold them; the code leaves a trace when it runs.

    :param tokenizer_code: the tokenizer has no other class.
    """
    save_tokenizer(build_tokenizer(), path)
    (path / "code.py").write_text(f"open({str(path / 'ran')!r}, 'w').close()\n")
    names = {"AutoConfig": "code.Strange", "AutoTokenizer": [None, "code.Tokens"]}
    names |= {"AutoModel": "code.Model", "AutoProcessor": "code.Processor"}
    config = {"model_type": "strange", "auto_map": names}
    (path / "config.json").write_text(json.dumps(config))
    if tokenizer_code:
        described = json.loads((path / "tokenizer_config.json").read_text())
        described |= {"tokenizer_class": "Tokens", "auto_map": names}
        (path / "tokenizer_config.json").write_text(json.dumps(described))
    return path


def test_an_export_s_tokenizer_runs_no_code(
    export: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("code was imported")

    monkeypatch.setattr(dynamic_module_utils, "get_class_in_module", fail)
    tokenizer = load_tokenizer(str(export))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(build_tokenizer())
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|end|>"
    assert "of type" not in "".join(capfd.readouterr())  # transformers warns of unknown types


def test_an_export_runs_its_code(export: Path) -> None:
    model = load_model(export, torch.float32)
    assert type(model).__module__.startswith("transformers_modules.")
    assert load_processor(export).tokenizer.pad_token == "<|pad|>"


def test_code_of_others_never_runs(tmp_path: Path, export: Path) -> None:
    plain, coded = foreign(tmp_path / "plain"), foreign(tmp_path / "coded", tokenizer_code=True)
    # What needs no code is loaded without.
    assert len(load_tokenizer(str(plain))) == len(build_tokenizer())
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(coded))
    assert str(coded) in str(caught.value) and "tokenizer.json" in str(caught.value)
    shutil.copytree(export, tmp_path / "unmarked")
    (tmp_path / "unmarked" / EXPORT_MARKER).unlink()
    for path in (plain, coded, tmp_path / "unmarked"):
        for load in (load_processor, lambda where: load_model(where, "auto")):
            with pytest.raises(UserError) as caught:
                load(path)
            assert str(path) in str(caught.value) and EXPORT_MARKER in str(caught.value)
    assert not list(tmp_path.glob("*/ran"))


def on_a_terminal(command: list[str], code: int = 0) -> str:
    """What a command says that could ask: its standard input is a terminal where nobody types."""
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == code, done.stdout[-4000:]
    assert "[y/N]" not in done.stdout and "custom code" not in done.stdout
    return done.stdout


@pytest.mark.slow
def test_commands_ask_nothing_on_a_terminal(data_dir: Path, tmp_path: Path) -> None:
    start = ["+experiment=demo", *TINY, *on_data(data_dir)]
    write = [sys.executable, "-m", "casa_train.export"]
    first, second = tmp_path / "first", tmp_path / "second"
    on_a_terminal(train_command([*start, "trainer.steps=1", f"run_dir={first}"]))
    on_a_terminal([*write, str(first), "--out", str(first / "export")])
    # The tokenizer is the export's, too.
    later = [*start, "trainer.steps=1", f"run_dir={second}", f"model.init_from={first / 'export'}"]
    later += ["model.tokenizer=null"]
    said = on_a_terminal(train_command(later, processes=2))
    assert "tensors loaded from" in said
    on_a_terminal([*write, str(second), "--out", str(second / "export")])
    on_a_terminal([sys.executable, "-m", "casa_train.evaluate", str(second)])
    strange = foreign(tmp_path / "strange", tokenizer_code=True)
    refused = [*start, "model.tokenizer=null", f"model.init_from={strange}"]
    said = on_a_terminal(train_command([*refused, f"run_dir={tmp_path / 'third'}"]), code=2)
    assert "error: tokenizer" in said and str(strange) in said
    bench = [sys.executable, "-m", "casa_train.bench", "streaming", "--turns", "1", "--export"]
    on_a_terminal([*bench, str(first / "export")])
    assert EXPORT_MARKER in on_a_terminal([*bench, str(strange)], code=2)
    assert not (strange / "ran").exists()
