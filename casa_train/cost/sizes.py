"""A model's sizes: out of its configuration, or before any weights are there.

Checkpoints give theirs in config.json. Where it cannot be fetched, recorded sizes stand in: enough
for a dry run, never for training.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from casa_train.config.schema import Config
from casa_train.cost.work import VisionSizes
from casa_train.cost.work_counter import WorkCounter
from casa_train.data.processor import tokenizer_name
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import UserError
from casa_train.modeling.block_work import TextSizes
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.tower_kinds import tower_shape
from casa_train.setup.lora import adapter_ranks
from casa_train.setup.model import describe_model
from casa_train.setup.text_config import backbone_config
from casa_train.setup.tower_weights import export_tower, tower_config

# Qwen2.5-VL-3B's as published copies of its config.json have them. Helium1-2B's config.json was not
# at hand: its layout is Llama's, and these sizes give the 2.02 billion parameters it is known for.
# Neither were SigLIP2's: these are the sizes that its towers are published with.
RECORDED = Path(__file__).parent / "recorded_sizes.json"
HUB_SECONDS = 3.0  # longest wait for the hub
UNKNOWN_VOCABULARY = 1024


def text_sizes(
    config: Any, trainable: bool, adapters: Mapping[str, int] | None = None
) -> TextSizes:
    """The decoder's sizes out of its Hugging Face configuration.

    :param adapters: see `TextSizes`; None: there are none.
    """
    heads = config.num_attention_heads
    return TextSizes(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        trainable=trainable,
        adapters=adapters or {},
    )


def decoder_sizes(config: Config, model: CasaForConditionalGeneration) -> TextSizes:
    """`text_sizes` of a model that is frozen as this configuration does it."""
    whole = config.model.backbone.trainable is True
    return text_sizes(model.config.text_config, whole, adapter_ranks(model))


def vision_sizes(config: CasaConfig, trained: int) -> VisionSizes:
    """The tower's sizes, and its adapter's kind, out of a model's configuration."""
    return VisionSizes(tower_shape(config.vision_config), trained, config.adapter)


def work_counter(config: Config, model: CasaForConditionalGeneration) -> WorkCounter:
    """Counts the work of the model as this configuration trains it."""
    return WorkCounter(
        decoder_sizes(config, model),
        vision_sizes(model.config, config.model.vision.train_last_blocks),
        model.mechanism,
    )


def size_model(config: Config, notes: list[str]) -> CasaConfig:
    """The model's configuration, from the checkpoints' or from recorded sizes.

    :param notes: where each came from is added.
    :raises UserError: sizes that are not to be had.
    """
    model, finder = config.model, SizeFinder(notes)
    base_text: dict[str, Any] = {}
    base_vision: dict[str, Any] = {}
    whole = model.init_from is not None and (Path(model.init_from) / "config.json").is_file()
    if whole:
        assert model.init_from is not None
        export = finder.find(model.init_from, "model.init_from")
        base_text = dict(export["text_config"])
        where = f"model.init_from: {model.init_from}"
        base_vision = export_tower(export, where, model.vision.type)
    elif model.init_from is not None:
        notes.append(f"model.init_from={model.init_from} is no export here, so it gave no sizes")
    if not whole and model.backbone.pretrained is not None:
        found = finder.find(model.backbone.pretrained, "model.backbone.pretrained")
        base_text = backbone_config(found)
    if not whole and model.vision.pretrained is not None:
        setting = "model.vision.pretrained"
        found = finder.find(model.vision.pretrained, setting)
        where = f"{setting}: {model.vision.pretrained}"
        base_vision = tower_config(found, where, model.vision.type)
    if "vocab_size" not in {**base_text, **model.backbone.config}:
        base_text["vocab_size"] = _vocabulary(config, notes)
    elif model.backbone.resize_embeddings and "vocab_size" in base_text:
        rows, tokens = base_text["vocab_size"], _tokens(config) or 0
        if tokens > rows:
            notes.append(f"embedding and head: {rows:,} rows there, {tokens:,} with new tokens")
        base_text["vocab_size"] = max(rows, tokens)
    return describe_model(config, base_text, base_vision, tokenizer=None)


class SizeFinder:
    """Finds the config.json of checkpoints: in directories, on the hub, or recorded here.

    The hub is given up for good once it fails, so that a dry run takes seconds without a network.
    """

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self._found: dict[str, dict[str, Any]] = {}
        self._hub_failed = ""

    def find(self, name: str, setting: str) -> dict[str, Any]:
        """The configuration of a directory or a hub id.

        :raises UserError: none to be had, and no sizes recorded.
        """
        if name not in self._found:
            try:
                if Path(name).is_dir():
                    self._found[name] = json.loads((Path(name) / "config.json").read_text())
                else:
                    self._found[name] = self._from_hub(name)
                self.notes.append(f"sizes of {name}: from its config.json")
            except (OSError, ValueError) as error:
                recorded = json.loads(RECORDED.read_text())
                if name not in recorded:
                    raise UserError(
                        f"{setting}: the config.json of {name!r} cannot be read ({error}), and no "
                        f"sizes are recorded for it, only for {sorted(recorded)}. Give a directory."
                    ) from error
                self._found[name] = recorded[name]
                self.notes.append(f"sizes of {name}: RECORDED, not fetched ({error})")
        return self._found[name]

    def _from_hub(self, name: str) -> dict[str, Any]:
        """One request, no retries; the hub's cache first.

        :raises OSError: with a short reason.
        """
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            content: dict[str, Any] = json.loads(Path(cached).read_text())
            return content
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        if self._hub_failed:
            raise OSError(self._hub_failed)
        answers: list[dict[str, Any] | Exception] = []
        token = huggingface_hub.get_token()

        def ask() -> None:
            try:
                answer = huggingface_hub.get_session().get(
                    huggingface_hub.hf_hub_url(name, "config.json"),
                    headers={"authorization": f"Bearer {token}"} if token else {},
                    timeout=HUB_SECONDS,
                )
                answer.raise_for_status()
                answers.append(answer.json())
            except Exception as error:  # two HTTP libraries, by release, with their own types
                answers.append(error)

        # A thread, because no timeout bounds the look-up of a name.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(HUB_SECONDS)
        if not answers:
            self._hub_failed = f"the hub did not answer within {HUB_SECONDS:g} s"
        elif isinstance(answers[0], Exception):
            self._hub_failed = f"the hub could not be asked: {type(answers[0]).__name__}"
        else:
            return answers[0]
        raise OSError(self._hub_failed)


def _vocabulary(config: Config, notes: list[str]) -> int:
    """The tokenizer's, where it lies on disk."""
    tokens = _tokens(config)
    if tokens is None:
        notes.append(f"no tokenizer at hand: a vocabulary of {UNKNOWN_VOCABULARY:,}")
        return UNKNOWN_VOCABULARY
    return tokens


def _tokens(config: Config) -> int | None:
    """How many tokens the tokenizer has, where it lies on disk."""
    with contextlib.suppress(UserError):
        name = tokenizer_name(config)
        if Path(name).is_dir():
            return len(load_tokenizer(name))
    return None
