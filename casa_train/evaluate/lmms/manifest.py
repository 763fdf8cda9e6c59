"""What lmms-eval reads as it starts: the model's name, and where its classes are."""

from __future__ import annotations

from typing import Any

ADAPTER = "casa_train.evaluate.lmms.adapter"


def manifest() -> Any:
    """The `ModelManifest` behind the entry point `casa` of the group `lmms_eval.models`.

    Both ways of asking have a class: the chat one takes a task's messages; with `--force_simple`
    tasks hand out text and pictures, among them those that lmms-eval has for no chat model, which
    compare log-likelihoods.
    """
    # Here, because importing it loads every entry point, this one too.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="casa",
        chat_class_path=f"{ADAPTER}.CasaChat",
        simple_class_path=f"{ADAPTER}.CasaSimple",
    )
