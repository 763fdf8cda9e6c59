"""The configuration of a published checkpoint in our words, with every setting accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from casa_train.convert.rules import Rules
from casa_train.convert.tensor_plan import HEAD
from casa_train.errors import UserError
from casa_train.modeling.backbones import BACKBONES
from casa_train.modeling.configuration_casa import ALIASES, CasaConfig
from casa_train.setup.model import NOT_SIZES
from casa_train.setup.text_config import TEXT_TOKENS

TIES = "tie_word_embeddings"
# What some text configurations do not list and their model reads all the same.
MORE_TEXT = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "head_dim",
    TIES,
    "mlp_bias",
)
# What every configuration has, and says nothing of the model's sizes.
GENERIC = {*PretrainedConfig().to_dict(), *NOT_SIZES, *TEXT_TOKENS, TIES, "model_type"}


@dataclass(frozen=True)
class Described:
    """What a checkpoint's config.json says.

    :param family: its name in the rules; :param settings: what the rules say of it.
    :param text: fields of the text decoder, `model_type` among them; :param vision: of the tower.
    :param fusion: the mechanism and its options.
    :param tokens_around: `pre_image_tokens` and `post_image_tokens`, where they are given.
    """

    family: str
    settings: Mapping[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    fusion: dict[str, Any]
    tokens_around: Mapping[str, list[int]]


def describe(
    config: Mapping[str, Any],
    rules: Rules,
    targets: Iterable[str],
    options: Mapping[str, Any],
    where: str,
) -> Described:
    """Reads a configuration by the rules.

    :param config: config.json; :param targets: names of ours that its tensors go to.
    :param options: fusion settings of the user's, on top of those of the rules.
    :param where: names the checkpoint in messages.
    :raises UserError: a model type of no family, or settings that nothing reads.
    """
    model_type = str(config.get("model_type"))
    fitting = [f for f, s in rules.families.items() if re.fullmatch(s["model_type"], model_type)]
    if not fitting:
        known = {name: one["model_type"] for name, one in rules.families.items()}
        raise UserError(
            f"{where}: config.json has model_type {model_type!r}; expected one of the families "
            f"{known} of the rules {rules.name!r}. Add a family to a rules file (extends: "
            f"{rules.name}), and name it by --rules."
        )
    family, settings = fitting[0], rules.families[fitting[0]]
    text_type = _decoder(config, settings["text"], where)
    goes_to = set(targets)
    default: Any = CasaConfig(text_config={"model_type": text_type}).text_config
    known_text = {*default.to_dict()} - GENERIC | {*TEXT_TOKENS, *MORE_TEXT}
    known_text -= {"vision_config"}  # transformers 4.51 has one configuration for all of Qwen's
    known_vision = {*Qwen2_5_VLVisionConfig().to_dict()} - GENERIC
    unread: dict[str, Any] = {}
    text = _section(config, settings["text"], known_text, rules, unread)
    vision = _section(config, settings["vision"], known_vision, rules, unread)
    if TIES not in text:
        text[TIES] = HEAD not in goes_to
    if "" not in settings["text"]["at"]:
        unread |= _unread(config, (), rules, "")
    if unread:
        shown = ", ".join(f"{key}: {json.dumps(value)}"[:200] for key, value in unread.items())
        raise UserError(
            f"{where}: config.json has settings that nothing reads: {shown}. Say in a rules file "
            f"(extends: {rules.name}) what they mean: config: {{ignore: {{KEY: WHY}}}} where they "
            "say nothing of the model, rename: {THEIRS: OURS} under text or vision of the family "
            f"{family!r} where ours has another name for them."
        )
    around = {
        name: config[name]
        for name in ("pre_image_tokens", "post_image_tokens")
        if isinstance(config.get(name), list)
    }
    return Described(
        family,
        settings,
        {**text, "model_type": text_type},
        vision,
        _fusion(config, rules, goes_to, options, where),
        around,
    )


def _decoder(config: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> str:
    """The kind of text decoder: what the checkpoint calls its own section, or else what the rules
    say. Helium's names and sizes are Llama's, its RoPE is not, so no tensor would tell.

    :raises UserError: a kind that no model here has.
    """
    given = (settings.get("values") or {}).get("model_type")
    for place in filter(None, () if given else settings["at"]):
        section = config.get(place)
        found = section.get("model_type") if isinstance(section, Mapping) else None
        if found:
            kind = ALIASES.get(found, found)
            if kind not in BACKBONES:
                raise UserError(
                    f"{where}: config.json has {place}.model_type {found!r}; expected one of the "
                    f"decoders {sorted(BACKBONES)}. Where it computes what one of them does, give "
                    "its family in the rules text: {values: {model_type: ONE}}."
                )
            return str(kind)
    return str(given or settings["model_type"])


def _section(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    known: set[str],
    rules: Rules,
    unread: dict[str, Any],
) -> dict[str, Any]:
    """Fields out of every place where they may stand; earlier places come first.

    :param known: fields that our configuration has; :param unread: takes what nothing reads.
    """
    rename = settings.get("rename") or {}
    fields: dict[str, Any] = {}
    for place in settings["at"]:
        section = config.get(place) if place else config
        if not isinstance(section, Mapping):
            continue
        named = {str(rename.get(key, key)): value for key, value in section.items()}
        for key, value in named.items():
            if key in known:
                fields.setdefault(key, value)
        unread |= _unread(named, known, rules, place)
    # Releases of transformers differ in where they tie: at the top, or in the text's section.
    sections = [(config.get(place) or {}) if place else config for place in settings["at"]]
    ties = [section[TIES] for section in sections if TIES in section]
    if TIES in fields:
        fields[TIES] = any(ties)
    return {**fields, **(settings.get("values") or {})}


def _unread(
    section: Mapping[str, Any], known: Iterable[str], rules: Rules, place: str
) -> dict[str, Any]:
    """Settings that neither our configuration, nor the library, nor a rule knows."""
    out = {}
    for key, value in section.items():
        if key in known or key in GENERIC:
            continue
        if any(pattern.fullmatch(key) for pattern, _ in rules.ignored):
            continue
        out[f"{place}.{key}" if place else key] = value
    return out


def _fusion(
    config: Mapping[str, Any],
    rules: Rules,
    targets: Iterable[str],
    options: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """The first entry of the rules that holds, and the user's options on top."""
    for entry in rules.fusion:
        when = entry.get("when") or {}
        unknown = set(when) - {"maps_to", "model_type", "config"}
        if unknown:
            raise UserError(f"the rules {rules.name!r} have a `when` with {sorted(unknown)}")
        if "maps_to" in when and not any(re.fullmatch(when["maps_to"], t) for t in targets):
            continue
        if not re.fullmatch(when.get("model_type", ".*"), str(config.get("model_type"))):
            continue
        wanted = (when.get("config") or {}).items()
        if not all(re.fullmatch(value, json.dumps(config.get(key))) for key, value in wanted):
            continue
        chosen = {key: value for key, value in entry.items() if key != "when"}
        if options.get("mechanism", chosen["mechanism"]) != chosen["mechanism"]:
            kept = ("share_parameters",) if options["mechanism"] == "casa" else ()
            chosen = {key: chosen[key] for key in kept if key in chosen}
        return {**chosen, **options}
    raise UserError(
        f"{where}: no entry of `fusion` in the rules {rules.name!r} holds; expected one. Add one "
        "without `when`, or name the mechanism by --fusion mechanism=casa."
    )
