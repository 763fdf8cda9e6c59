"""Keywords of `AutoProcessor.from_pretrained`: each acts, belongs to another part of the library or
is refused by name.

The two generations of transformers drop what they do not know in silence, and not the same: 4.51
loses `image_size` and a chat template of the caller's, which are then not what he measures with.
"""

from __future__ import annotations

import difflib
from typing import Any

# What the processor is built from; see `CasaProcessor`.
OWN = ("image_size", "max_pixels", "min_pixels", "template", "chat_template", "tokenizer")
# What a tokenizer obeys when it is loaded.
TOKENIZERS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "clean_up_tokenization_spaces",
    "use_fast",
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    "additional_special_tokens",
    "extra_special_tokens",
)
# How files are found; what begins with an underscore is the library's own as well.
FILES = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
    "resume_download",
    "trust_remote_code",
    "code_revision",
    "use_auth_token",
    "return_unused_kwargs",
    "user_agent",
)
# A pipeline hands the processor what was meant for its model.
MODELS = (
    "attn_implementation",
    "device_map",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "torch_dtype",
    "tp_plan",
    "tp_size",
    "use_kernels",
    "use_safetensors",
    "variant",
)


def split_options(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The processor's own keywords, and those for the library; a model's are left out.

    :raises ValueError: naming each keyword that would have no effect, or two that say the same.
    """
    known = (*OWN, *TOKENIZERS, *FILES, *MODELS)
    unknown = {n: v for n, v in given.items() if n not in known and not n.startswith("_")}
    if unknown:
        named = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        close = [n for name in unknown for n in difflib.get_close_matches(name, OWN, n=1)]
        hint = f" (did you mean {' and '.join(close)}?)" if close else ""
        raise ValueError(
            f"from_pretrained would not obey {named}{hint}; this processor takes "
            f"{', '.join(OWN)}, a tokenizer's {', '.join(TOKENIZERS[:3])} and special tokens, and "
            "what says where files are. Images keep their aspect, with sides of whole image "
            "tokens; the model normalises them."
        )
    own = {name: given[name] for name in OWN if given.get(name) is not None}
    if "image_size" in own and "max_pixels" in given:
        raise ValueError(
            f"image_size={own['image_size']} and max_pixels={own['max_pixels']} both bound the "
            "pixels of an image; give one of them"
        )
    if given.get("use_fast") is False:
        raise ValueError("use_fast=False: this processor works with fast tokenizers only")
    passed = {n: v for n, v in given.items() if n not in OWN and n not in MODELS}
    return own, passed
