"""Pushing an export: to a hub on this machine, by the real client, and to none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

from casa_train.config.compose import compose_config
from casa_train.errors import UserError
from casa_train.export.__main__ import main
from casa_train.export.model_card import _front
from casa_train.export.push import push
from casa_train.io.files import EXPORT_MARKER
from tests.helpers.commands import ROOT, TINY, environment
from tests.helpers.model_hub import TOKEN, ModelHub, model_hub
from tests.helpers.tiny_export import write_tiny_export


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelHub]:
    """The hub of this process, with a login and without waits between attempts."""
    with model_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        yield running


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export, and beside its files what is nobody's business."""
    path = Path(write_tiny_export(tmp_path / "tiny", "casa"))
    for name in (".env", "token", "checkpoint.pt", "secrets.json"):
        (path / name).write_text("hf_secret")
    (path / "adapter").mkdir()
    (path / "adapter" / "notes.txt").write_text("hf_secret")
    return path


@pytest.mark.slow
def test_the_command_pushes_an_export_that_is_there(export: Path, tmp_path: Path) -> None:
    with model_hub() as hub:
        kept = {k: v for k, v in environment().items() if not k.startswith("HF_")}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "casa_train.export", "--out", str(export)]
        command += ["--push", "me/tiny-casa"]
        done = [
            subprocess.run(
                command, cwd=ROOT, env={**kept, **own, **more}, capture_output=True, text=True
            )
            for more in ({"HF_TOKEN": "hf_wrong"}, {"HF_TOKEN": TOKEN})
        ]
        assert done[0].returncode == 2 and done[0].stdout == ""
        assert done[0].stderr.startswith("error: me/tiny-casa was not pushed: the hub does not")
        assert done[1].returncode == 0, done[1].stderr
        assert f"pushed {export} to {hub.url}/me/tiny-casa" in done[1].stdout
        assert "model.safetensors" in hub.files["me/tiny-casa"]


def test_a_push_makes_the_repository_and_holds_the_export_alone(
    hub: ModelHub, export: Path
) -> None:
    push(export, "me/tiny-casa", private=True)
    assert hub.repos == {"me/tiny-casa": True}
    files = hub.files["me/tiny-casa"]
    assert set(files) == {*json.loads((export / EXPORT_MARKER).read_text())["files"], EXPORT_MARKER}
    assert all(data == (export / name).read_bytes() for name, data in files.items())
    assert not any(b"hf_secret" in data for data in files.values())
    # Again, into what is there: weights of an earlier export go, what a user put there stays.
    own = ("own.md", "drafts/model.safetensors", "adapter/notes.md")
    old = ("model-00001-of-00002.safetensors", "adapter/adapter_config.json")
    expected = {*files, *own}
    hub.files["me/tiny-casa"] |= {**dict.fromkeys(own, b"mine"), **dict.fromkeys(old, b"old")}
    (export / "README.md").write_text("---\ntags: [casa]\n---\nanother card\n")
    push(export, "me/tiny-casa", private=True)
    assert hub.files["me/tiny-casa"].keys() == expected
    assert b"another card" in hub.files["me/tiny-casa"]["README.md"]
    # A copy that lacks a file is none.
    (export / "config.json").unlink()
    with pytest.raises(UserError, match=r"lacks \['config.json'\]"):
        push(export, "me/tiny-casa")


def test_what_a_hub_refuses_is_said_once_and_the_export_stays(
    hub: ModelHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    hub.repos["me/public"], hub.files["me/public"] = False, {}

    def refused(repo: str, private: bool = False) -> str:
        with pytest.raises(UserError) as caught:
            push(export, repo, private)
        said = str(caught.value)
        assert said.startswith(f"{repo} was not pushed: ")
        command = f"push it later with: python -m casa_train.export --out {export} --push {repo}"
        assert said.endswith(command + (" --private" if private else ""))
        return said

    assert "already, and public" in refused("me/public", private=True)
    hub.refuses = 403
    assert "this login may not write there" in refused("me/tiny-casa")
    hub.refuses = 500
    assert "500" in refused("me/tiny-casa")
    hub.refuses = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub does not take this login" in refused("me/tiny-casa")
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no login: run `hf auth login`" in refused("me/tiny-casa")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError" in refused("me/tiny-casa")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1" in refused("me/tiny-casa")
    assert hub.files == {"me/public": {}}
    assert {path: path.read_bytes() for path in export.rglob("*") if path.is_file()} == before


def test_an_interrupted_upload_commits_nothing_and_a_later_push_does(
    hub: ModelHub, export: Path
) -> None:
    hub.breaks = 1000
    with pytest.raises(UserError, match="me/tiny-casa was not pushed: .*push it later with"):
        push(export, "me/tiny-casa")
    assert hub.breaks < 1000 and hub.files["me/tiny-casa"] == {}
    hub.breaks = 0
    push(export, "me/tiny-casa")
    assert "model.safetensors" in hub.files["me/tiny-casa"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x", "--push", "mine"], "it is 'mine'; expected USER/NAME"),
        (["--out", "x", "--push", "a/b/c"], "it is 'a/b/c'; expected USER/NAME"),
        (["--out", "x", "--push", "me/my model"], "it is 'me/my model'; expected USER/NAME"),
        (["--out", "x"], "expected RUN to export, or --push"),
        (["run", "--out", "x", "--private"], "expected --push USER/NAME beside it"),
        (["--out", "x", "--push", "a/b", "--lora", "keep"], "of an export that is made"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_what_is_no_export_is_not_pushed(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "absent"), "--push", "a/b"]) == 2
    assert "absent is no export of this project" in capsys.readouterr().err
    (export / EXPORT_MARKER).write_text('{"run": "tiny", "step": 3}')
    assert main(["--out", str(export), "--push", "a/b"]) == 2
    assert "does not list the export's files" in capsys.readouterr().err


def test_the_card_names_base_models_that_a_hub_knows(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    starts = ["model.backbone.pretrained=me/a-backbone", f"model.vision.pretrained={tmp_path}/own"]
    config = compose_config(["+experiment=demo", *TINY, "dry_run=true", *starts])
    data = ModelCard(_front(config) + "text").data
    assert data.base_model == ["me/a-backbone"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
