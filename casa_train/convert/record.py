"""What a converted export says of itself: where it comes from, by which rules, and whether anybody
has compared it with the original.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casa_train import __version__
from casa_train.convert.rules import Rules
from casa_train.errors import UserError
from casa_train.export.model_card import FRONT, USE
from casa_train.io.files import EXPORT_MARKER, sha256, write_atomic
from casa_train.modeling.configuration_casa import OLDEST, SINCE
from casa_train.modeling.image_processing_casa import SIDE
from casa_train.setup.parts import FUSION, TEXT, VISION, part_sizes

CARD_FILE = "README.md"
UNVERIFIED = (
    "**Not verified**: nobody has compared this export with the original's own code. `python -m "
    "casa_train.convert ... --verify` does, and replaces this line."
)
VERIFIED = (
    "Verified: its logits equal those of the original's own code to {worst:.1e} ({precision})."
)

CARD = FRONT
CARD += """# {name}, converted

The published checkpoint `{source}` in the layout of casa_train {version}: a {backbone} text decoder
that sees images through **{mechanism}**, fed by a Qwen2.5-VL vision tower.

{status}

| part | parameters |
|---|---|
| text backbone ({backbone}) | {text_size:,} |
| vision tower | {vision_size:,} |
| fusion ({mechanism}) | {fusion_size:,} |

Rules `{rules}` (verified: {rules_verified}), settings `{fusion}`.

{use}## Licences

These weights are those of `{source}` under the licence on its own model card. The authors of the
CASA models publish theirs under CC-BY-NC-SA-4.0; parts that come from Qwen2.5-VL-3B carry the Qwen
research licence. The code in this directory is MIT-licensed.

## Citation

The method: *CASA: Cross-Attention via Self-Attention*,
arXiv 2512.19535.
"""


def source_digest(directory: Path) -> str:
    """sha256 over the names and contents of a checkpoint's configuration and weights."""
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    for file in files:
        digest.update(f"{file.name}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def provenance(
    source: str, digest: str, rules: Rules, choices: Mapping[str, Any]
) -> dict[str, object]:
    """The content of the marker file of a converted export.

    :param source: directory or hub id; :param digest: `source_digest` of it.
    :param choices: what the user chose where the rules do, JSON values.
    """
    return {
        "converted_from": source,
        "source_digest": digest,
        "rules": {"name": rules.name, "sha256": rules.digest, "verified": rules.verified},
        "dtype": choices.get("dtype", "as it was"),
        "choices": dict(choices),
        "verified": None,
    }


def card(source: str, rules: Rules, model: Any, processor: Any) -> str:
    """The model card of a converted export.

    :param model: on any device; sizes are counted on it.
    """
    sizes = part_sizes(model)
    fusion = dict(model.config.fusion)
    least = f" and at least {processor.min_pixels:,}" if processor.min_pixels else ""
    backbone = model.config.text_config.model_type
    release = SINCE.get(backbone, OLDEST)
    pixels = processor.max_pixels
    return CARD.format(
        name=Path(source).name,
        source=source,
        version=__version__,
        backbone=backbone,
        mechanism=fusion["mechanism"],
        status=UNVERIFIED,
        text_size=sizes[TEXT],
        vision_size=sizes[VISION],
        fusion_size=sizes[FUSION],
        rules=rules.name,
        rules_verified=str(rules.verified).lower(),
        fusion=json.dumps(fusion),
        use=USE.format(side=SIDE, max_pixels=pixels, least=least, transformers=release),
    )


def conversion_of(export: Path) -> dict[str, Any]:
    """The record of a converted export.

    :raises UserError: a directory that is none.
    """
    try:
        record = json.loads((export / EXPORT_MARKER).read_text())
        if "source_digest" not in record:
            raise ValueError("it was exported, not converted")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--out {export} is no converted export ({error}); expected one that 'python -m "
            "casa_train.convert' wrote. Choose another directory."
        ) from error
    found: dict[str, Any] = record
    return found


def check_same_source(export: Path, digest: str, source: str) -> None:
    """:raises UserError: the export was converted from other files."""
    record = conversion_of(export)
    if record["source_digest"] != digest:
        raise UserError(
            f"{export} was converted from {record['converted_from']} with digest "
            f"{record['source_digest'][:12]}, {source} has {digest[:12]}; expected the same files. "
            "Name the checkpoint that it came from, or convert this one to another directory."
        )


def check_same_choices(export: Path, choices: Mapping[str, Any], rules: Rules | None) -> None:
    """What is given anew would change nothing in an export that is there.

    :param choices: those given; :param rules: those of a file that was given, if one was.
    :raises UserError: another choice than the export was converted with.
    """
    record = conversion_of(export)
    before = record.get("choices", {})
    other = [
        f"{key} {value!r} (it has {before.get(key)!r})"
        for key, value in choices.items()
        if before.get(key) != value
    ]
    if rules is not None and rules.digest != record["rules"]["sha256"]:
        other.append(
            f"the rules {rules.name!r} (it has {record['rules']['name']!r}, or older ones)"
        )
    if other:
        raise UserError(
            f"--out {export} is there and would be compared as it is, but this command says "
            f"{'; '.join(other)}; expected the choices that it was converted with, or none. Name "
            "another --out, or remove this one."
        )


def write_verified(export: Path, facts: Mapping[str, Any]) -> None:
    """Notes in the export's record and card that it computes what the original does.

    :param facts: `worst`, `precision` and what else is known, JSON values.
    """
    record = {**conversion_of(export), "verified": dict(facts)}
    write_atomic(export / EXPORT_MARKER, json.dumps(record, indent=1) + "\n")
    page = export / CARD_FILE
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if UNVERIFIED in text:
        write_atomic(page, text.replace(UNVERIFIED, VERIFIED.format(**facts)))
