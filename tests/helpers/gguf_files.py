"""Small GGUF files, written by the format's own package, in llama.cpp's layout of a Llama."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Bytes as GPT-2's BPE writes those that occur in the tests' texts, then merges.
LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ", "ĉ"]
MERGES = ["Ġ Ġ", "i n", "Ġ c", "Ġc a", "Ġca t"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, CONTROL = 1, 3
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _pairs_of_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's rotation pairs them: (heads, 2, D/2, C) -> (heads, D/2, 2, C)."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_llama(
    path: Path,
    model: Any,
    architecture: str = "llama",
    cut: str = "smollm",
    tokens: Sequence[str] = TOKENS,
    kind: str = "gpt2",
    more: Callable[[Any], None] = lambda writer: None,
    lacking: Sequence[str] = (),
) -> None:
    """A LlamaForCausalLM as a GGUF file in float32.

    :param cut: the rule by which its tokenizer cuts texts, tokenizer.ggml.pre.
    :param kind: of its tokenizer, tokenizer.ggml.model.
    :param more: writes what else it holds; :param lacking: tensors that are left out.
    """
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(list(tokens))
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    more(writer)
    for name, tensor in _tensors(model):
        if name not in lacking:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> list[tuple[str, np.ndarray]]:
    config, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    tensors = [("token_embd.weight", state["model.embed_tokens.weight"])]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                weight = _pairs_of_neighbours(weight, config.num_attention_heads)
            if theirs == "attn_k":
                weight = _pairs_of_neighbours(weight, config.num_key_value_heads)
            tensors.append((f"blk.{layer}.{theirs}.weight", weight))
    tensors.append(("output_norm.weight", state["model.norm.weight"]))
    if not config.tie_word_embeddings:
        tensors.append(("output.weight", state["lm_head.weight"]))
    return [(name, np.ascontiguousarray(tensor)) for name, tensor in tensors]
