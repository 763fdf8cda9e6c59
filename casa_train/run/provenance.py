"""Which commit the running code comes from."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from casa_train import __version__

# At the root of code that launch/submit.py froze: a snapshot has no git of its own, and one that
# lies inside a checkout would be taken for that checkout's present state.
SNAPSHOT_FILE = ".snapshot"
CHANGED = "+dirty"  # behind a commit whose code was changed


def code_commit(root: Path) -> str | None:
    """The commit of the code at `root`, with `CHANGED` if it was changed; None: nobody knows.

    Installed code may lie in a checkout of something else, such as that of an environment's owner.
    """
    try:
        if (root / SNAPSHOT_FILE).exists():
            return (root / SNAPSHOT_FILE).read_text().strip()
        git = ["git", "-C", str(root)]
        tracked = [*git, "ls-files", "--error-unmatch", "casa_train/run/provenance.py"]
        if subprocess.run(tracked, capture_output=True).returncode:
            return None
        head = subprocess.run(
            [*git, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        return head.stdout.strip() + (CHANGED if dirty.stdout.strip() else "") or None
    except OSError:
        return None  # no git on this machine


PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "flash-attn",
    "webdataset",
    "hydra-core",
    "numpy",
    "pillow",
)


def environment() -> dict[str, Any]:
    """Versions, commit and host, as they stood when the run started."""
    return {
        "casa_train": __version__,
        "git_commit": code_commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
