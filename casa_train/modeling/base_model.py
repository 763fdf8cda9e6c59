"""What transformers' loading, saving and training need to know of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .activation_checkpointing import CheckpointedBlocks
from .adapter_check import AdapterCheck
from .configuration_casa import CasaConfig
from .decoder import FUSED
from .joint_keys import JointImageKeys
from .outputs import NEW_NAME, OLD_NAME
from .regions import CompiledRegions
from .towers import TOWERS


class CasaPreTrainedModel(
    CheckpointedBlocks, CompiledRegions, JointImageKeys, AdapterCheck, PreTrainedModel
):
    config_class = CasaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_cache_class = True
    # With a device_map the cache stays where it is: its layers lie on their own devices.
    _skip_keys_device_placement = [OLD_NAME, NEW_NAME]
    # Class names of what a device_map keeps on one device.
    _no_split_modules = [
        *(fused.__name__ for fused in FUSED.values()),
        *(tower.__name__ for tower in TOWERS.values()),
        "QFormer",
    ]

    def _init_weights(self, module: Any) -> None:
        """The first weights of what is not loaded, alike in both transformers generations."""
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
        elif type(module).__name__.endswith("Norm"):
            nn.init.ones_(module.weight)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
            return
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)
