"""What the start says of how the fusion layers begin, where that costs the run its first steps."""

from __future__ import annotations

from casa_train.config.schema import Config
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration


def start_warning(config: Config, model: CasaForConditionalGeneration) -> str | None:
    """A warning where copies of a text decoder's self-attention read images beside it, frozen.

    Qwen2.5-VL's own decoder has learned to read image tokens with these very weights; that of a
    text-only model has not, and cannot adapt where it is frozen; adapters (LoRA) begin at nothing.

    :param model: on any device; its weights are not looked at.
    :return: None where nothing is to be said: a later stage's layers do not begin, either.
    """
    mechanism = model.mechanism
    later = config.model.init_from is not None
    if config.model.backbone.trainable is True or later or mechanism.multimodal:
        return None
    advice = mechanism.start_advice()
    if advice is None:
        return None
    chosen, instead = advice
    return (
        f"warning: {chosen} reads images with the weights of a frozen "
        f"{model.config.text_config.model_type} backbone's self-attention, which never learned to: "
        f"the loss begins far above that of the text alone. {instead} begins at the text's "
        "(conf/README.md, What fusion layers begin with)"
    )
