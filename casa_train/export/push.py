"""An export onto the Hugging Face hub: its own files, nothing else that lies beside them."""

from __future__ import annotations

import glob
import json
import re
from argparse import ArgumentTypeError
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from casa_train.errors import UserError
from casa_train.io.files import EXPORT_MARKER

FILES = "files"
"""Of the marker: the names of an export's files."""
# Weights of an earlier export there, which none of this one's files replaces, would be loaded. In
# other folders weights are a user's own.
REPLACED = re.compile(
    r"[^/]+\.safetensors(\.index\.json)?|adapter/adapter_(config\.json|model\.safetensors)"
)


def repository(text: str) -> str:
    """The type of `--push`: owner and name of a model on the hub.

    :raises ArgumentTypeError: for argparse to print behind the argument's name.
    """
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise ArgumentTypeError(f"it is {text!r}; expected USER/NAME ({first})") from error
    if text.count("/") != 1:
        raise ArgumentTypeError(f"it is {text!r}; expected USER/NAME, such as me/my-casa")
    return text


def push(directory: Path, repo: str, private: bool = False) -> str:
    """Uploads an export in one commit, into a repository that is made where there is none.

    :param repo: see `repository`.
    :param private: makes the repository a private one; refused where it is there and public.
    :return: its address.
    :raises UserError: a directory that is no whole export; a hub that is out of reach or refuses.
    """
    files = files_of(directory)
    later = (
        f"The export in {directory} is whole; push it later with: python -m casa_train.export "
        f"--out {directory} --push {repo}{' --private' if private else ''}"
    )
    api = huggingface_hub.HfApi(library_name="casa_train")
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError("the environment says offline (HF_HUB_OFFLINE=1): unset it to push")
        if huggingface_hub.get_token() is None:
            raise UserError("there is no login: run `hf auth login`, or set HF_TOKEN")
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                "the repository is there already, and public; expected a private one. Make it "
                "private on its page, or leave --private out"
            )
        there = api.list_repo_files(repo)
        stale = [glob.escape(name) for name in there if REPLACED.fullmatch(name)]
        done = api.upload_folder(
            repo_id=repo,
            folder_path=str(directory),
            allow_patterns=files,
            delete_patterns=stale,
            commit_message="Upload a casa_train export",
        )
    except UserError as error:
        raise UserError(f"{repo} was not pushed: {error}. {later}") from error
    except Exception as error:  # network, permission and validation errors have many types
        raise UserError(f"{repo} was not pushed: {_reason(error)}. {later}") from error
    return str(getattr(done, "repo_url", None) or f"{api.endpoint}/{repo}")


def files_of(directory: Path) -> list[str]:
    """The names of an export's files, as its marker has them.

    :raises UserError: no export, one of an earlier version, or files that are gone.
    """
    marker = directory / EXPORT_MARKER
    try:
        files = json.loads(marker.read_text()).get(FILES)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{directory} is no export of this project ({EXPORT_MARKER} cannot be read); expected "
            "a directory that 'python -m casa_train.export' wrote. Name one with --out."
        ) from error
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise UserError(
            f"{marker} does not list the export's files, so what to push is not known: an earlier "
            "version wrote it. Export it again."
        )
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} lacks {missing[:5]} of the export's files. Export it again.")
    return [*files, EXPORT_MARKER]


def _reason(error: Exception) -> str:
    """What went wrong, in a line, and what a user can do about it."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HfHubHTTPError) and status == 401:
        return f"the hub does not take this login ({first}). Run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError) and status == 403:
        return f"this login may not write there ({first}). Take a token that may, or your own USER"
    return f"{type(error).__name__}: {first}".rstrip(".")
