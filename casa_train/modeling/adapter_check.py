"""An export that keeps its low-rank adapters (LoRA) apart is another model without them."""

from __future__ import annotations

from typing import Any


class AdapterCheck:
    """The part of a model that refuses to answer without the adapters it was trained with."""

    config: Any
    model: Any
    _adapted = False

    def require_adapter(self) -> None:
        """:raises ValueError: adapters lie apart, says the configuration, and there are none."""
        folder = getattr(self.config, "kept_adapter", None)
        if folder is None or self._adapted:
            return
        if not any("base_layer" in module._modules for module in self.model.modules()):
            raise ValueError(
                f"this model was trained with adapters, which its export keeps in {folder}/ and "
                "which are not loaded: its weights alone give other answers. Load them, model = "
                f'peft.PeftModel.from_pretrained(model, PATH, subfolder="{folder}"); or, where '
                "they have been merged or are not wanted, set model.config.kept_adapter = None"
            )
        self._adapted = True
