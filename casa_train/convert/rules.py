"""Rules files: which tensor and which setting of a published checkpoint is which of ours.

The format is explained at the head of the shipped file, `kyutai.yaml` beside this one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from casa_train.errors import UserError

SHIPPED = Path(__file__).parent
FORMS = ("same", "patches")
LISTS = ("tensors", "fill", "fusion", "sources")
KEYS = {*LISTS, "name", "verified", "extends", "families", "config", "verify"}


@dataclass(frozen=True)
class TensorRule:
    """What becomes of tensors whose whole name a pattern matches.

    :param to: names of ours with `\\1` for groups; several split one tensor by its rows.
    :param ignore: why it is left out; None where it is not.
    :param part: which of `parts` it is, where several tensors are joined into one.
    :param rename: endings of what `to` gave -> what they are called here.
    """

    pattern: re.Pattern[str]
    to: tuple[str, ...]
    ignore: str | None
    part: str | None
    parts: tuple[str, ...]
    form: str
    rename: Mapping[str, str]
    optional: bool

    def targets(self, name: str) -> list[str]:
        """Names of ours that a tensor goes to.

        :param name: one that the pattern matches.
        """
        match = self.pattern.fullmatch(name)
        assert match is not None, name
        out = [match.expand(one) for one in self.to]
        for there, here in self.rename.items():
            out = [one.replace(f".{there}.", f".{here}.") for one in out]
        return out

    def part_of(self, name: str) -> str | None:
        """Which part of the joined tensor it is."""
        match = self.pattern.fullmatch(name)
        return None if self.part is None or match is None else match.expand(self.part)


@dataclass(frozen=True)
class FillRule:
    """Where values of ours come from that the checkpoint has not.

    :param copy: a name of ours; None where `value` is given.
    """

    pattern: re.Pattern[str]
    copy: str | None
    value: float | None
    why: str


@dataclass(frozen=True)
class Rules:
    """A rules file, checked.

    :param families: name -> settings as the file has them.
    :param ignored: (pattern of a configuration's key, reason).
    :param fusion: entries with `when` and options of the mechanism.
    :param digest: sha256 of all files that make it up.
    """

    name: str
    verified: bool
    sources: tuple[str, ...]
    families: Mapping[str, Mapping[str, Any]]
    fusion: tuple[Mapping[str, Any], ...]
    ignored: tuple[tuple[re.Pattern[str], str], ...]
    tensors: tuple[TensorRule, ...]
    fill: tuple[FillRule, ...]
    layer: re.Pattern[str]
    vision: re.Pattern[str]
    digest: str

    def rule_of(self, name: str) -> TensorRule | None:
        """The first rule that takes a tensor; None: nothing does."""
        return next((rule for rule in self.tensors if rule.pattern.fullmatch(name)), None)


def load_rules(name: str, file: Path | None = None) -> Rules:
    """The shipped rules of a publisher, or those of a file.

    :param name: of the shipped ones; :param file: the user's own, which may extend them.
    :raises UserError: a file that cannot be read, or entries that say nothing.
    """
    path = SHIPPED / f"{name}.yaml" if file is None else file
    content, digest = _read(path)
    base = content.pop("extends", None)
    if base is not None:
        if not (SHIPPED / f"{base}.yaml").is_file():
            raise UserError(
                f"{path}: extends is {base!r}; expected one of the shipped rules: {shipped_names()}"
            )
        below, more = _read(SHIPPED / f"{base}.yaml")
        content = _over(content, below)
        digest = hashlib.sha256((digest + more).encode()).hexdigest()
    try:
        return _checked(content, path, digest)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (re.error, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} holds an entry that cannot be used ({type(error).__name__}: {error}); "
            f"expected what the head of {SHIPPED / 'kyutai.yaml'} explains."
        ) from error


def shipped_names() -> list[str]:
    """Publishers whose rules come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        raw = path.read_bytes()
        content = yaml.safe_load(raw)
    except (OSError, yaml.YAMLError, UnicodeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"the rules {path} cannot be read ({first}); expected YAML.") from error
    if not isinstance(content, dict) or not set(content) <= KEYS:
        found = sorted(set(content) - KEYS) if isinstance(content, dict) else content
        raise UserError(f"the rules {path} hold {found!r:.200}; expected keys {sorted(KEYS)}.")
    return content, hashlib.sha256(raw).hexdigest()


def _over(own: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """The user's entries in front of the shipped ones."""
    out = {**below, **own, "verified": own.get("verified", False)}
    for key in LISTS:
        out[key] = [*(own.get(key) or ()), *(below.get(key) or ())]
    for key in ("families", "verify"):
        out[key] = {**(below.get(key) or {}), **(own.get(key) or {})}
    mine, theirs = ((part.get("config") or {}).get("ignore") or {} for part in (own, below))
    out["config"] = {"ignore": {**mine, **{k: v for k, v in theirs.items() if k not in mine}}}
    return out


def _checked(content: Mapping[str, Any], path: Path, digest: str) -> Rules:
    if not isinstance(content.get("verified"), bool):
        raise UserError("verified is missing; expected true or false")
    families = content.get("families") or {}
    for name, family in families.items():
        missing = {"model_type", "text", "vision", "template", "max_pixels"} - set(family)
        if missing:
            raise UserError(f"families.{name} lacks {sorted(missing)}")
    verify = content.get("verify") or {}
    return Rules(
        name=str(content.get("name", path.stem)),
        verified=content["verified"],
        sources=tuple(map(str, content.get("sources") or ())),
        families=families,
        fusion=tuple(content.get("fusion") or ()),
        ignored=tuple(
            (re.compile(key), str(why))
            for key, why in ((content.get("config") or {}).get("ignore") or {}).items()
        ),
        tensors=tuple(_tensor_rule(entry) for entry in content.get("tensors") or ()),
        fill=tuple(_fill_rule(entry) for entry in content.get("fill") or ()),
        layer=re.compile(verify["layer"]),
        vision=re.compile(verify["vision"]),
        digest=digest,
    )


def _tensor_rule(entry: Mapping[str, Any]) -> TensorRule:
    known = {"from", "to", "ignore", "part", "parts", "form", "rename", "optional"}
    unknown = set(entry) - known
    if unknown or "from" not in entry or ("to" in entry) == ("ignore" in entry):
        raise UserError(
            f"the rule {dict(entry)} is none; expected `from` and either `to` or `ignore`, and out "
            f"of {sorted(known)}"
        )
    form, parts = entry.get("form", "same"), tuple(entry.get("parts") or ())
    to = _names(entry.get("to"))
    if form not in FORMS or bool(parts) != ("part" in entry) or (parts and len(to) != 1):
        raise UserError(
            f"the rule {dict(entry)} is none; expected a form out of {list(FORMS)}, and `part` "
            "together with `parts` and one `to`"
        )
    return TensorRule(
        re.compile(entry["from"]),
        to,
        entry.get("ignore"),
        entry.get("part"),
        parts,
        form,
        entry.get("rename") or {},
        bool(entry.get("optional", False)),
    )


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _fill_rule(entry: Mapping[str, Any]) -> FillRule:
    if set(entry) not in ({"to", "copy", "why"}, {"to", "value", "why"}):
        raise UserError(
            f"the entry {dict(entry)} of fill is none; expected to, why and one of copy and value"
        )
    value = entry.get("value")
    return FillRule(
        re.compile(entry["to"]),
        entry.get("copy"),
        None if value is None else float(value),
        entry["why"],
    )
