"""Everything about a model that a user can get wrong, checked with the model on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from casa_train.config.micro_steps import micro_steps
from casa_train.config.schema import Config
from casa_train.data.processor import open_processor
from casa_train.data.templates import verdict
from casa_train.errors import UserError
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.setup.equal_parameters import match_parameters
from casa_train.setup.fp8 import check_fp8
from casa_train.setup.model import build_model, build_model_config
from casa_train.setup.optim import build_groups
from casa_train.setup.weights import Start, find_weights, open_sources


@dataclass(frozen=True)
class Checked:
    """What a run needs, checked; the model is on the meta device.

    :param config: with the numbers that matched parameters took (`equal_parameters.py`).
    :param notes: lines about whose tokenizer and chat template are in force, and those numbers.
    """

    config: Config
    processor: CasaProcessor
    model: CasaForConditionalGeneration
    start: Start
    notes: list[str]


def check_inputs(config: Config, world: int, kept: Path | None = None) -> Checked:
    """Opens, and checks together, processor, checkpoints, model and parameter groups.

    :param kept: where a run that goes on has kept its tokenizer, in case its source is gone.
    :raises UserError: whatever the user can mend.
    """
    micro_steps(config.data, world)  # refuses ranks that do not divide the packs of a step
    notes = []
    try:
        processor, resolved = open_processor(config)
    except UserError as error:
        if kept is None or not kept.is_dir():
            raise
        processor, resolved = open_processor(config, kept)
        notes.append(f"tokenizer: this run's own copy in {kept}, since {error}")
    sources = open_sources(config)
    matching = match_parameters(config, build_model_config(config, processor, sources))
    config, notes = matching.config, [*notes, *matching.notes]
    model = build_model(config, processor, matching.model_config)
    start = find_weights(model, sources, config.model.backbone.resize_embeddings)
    build_groups(model.named_parameters(), config.optim.groups)
    notes += check_fp8(config, model.visual)
    notes.append(verdict(resolved, processor.tokenizer, processor))
    return Checked(config, processor, model, start, notes)
