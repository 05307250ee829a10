"""A base from its GGUF file as a PyTorch model of transformers, dequantised to F32.

transformers has a reader of its own, but drops Llama 3's frequency factors; this one takes what the
engine takes, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modularbase.errors import BaseLoadError
from modularbase.gguf_file import read_metadata
from modularbase.training import attention
from modularbase.types import FloatArray

_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"


def load_base(path: Path) -> PreTrainedModel:
    """Reads a base; all its parameters are frozen.

    Raises:
        BaseLoadError: The file is not usable, or of a family that cannot be trained on.
    """
    metadata = read_metadata(path)  # checks the file before anybody else reads it
    family = str(metadata.get("general.architecture"))
    if family not in _FAMILIES:
        raise BaseLoadError(str(path), "general.architecture", " or ".join(_FAMILIES), family)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    make_config, make_model = _FAMILIES[family]
    config = make_config(**_config(path, family, metadata, tensors))
    model = make_model(config).float()
    state = {_their_name(name): name for name in tensors if name != _ROPE_FACTORS}
    loaded = {
        theirs: torch.from_numpy(_values(tensors[name], family, config))
        for theirs, name in state.items()
    }
    if config.tie_word_embeddings:
        loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    try:
        model.load_state_dict(loaded)
    except RuntimeError as error:  # names what is missing, unknown or misshapen
        raise BaseLoadError(str(path), "tensors", f"those of {family}", str(error)) from error
    _scale_rope(model, metadata, family, tensors)
    return model.eval().requires_grad_(False)


def _config(
    path: Path, family: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    def value(name: str, default: Any = None) -> Any:
        found = metadata.get(f"{family}.{name}", default)
        if found is None:
            raise BaseLoadError(str(path), f"{family}.{name}", "a value", "nothing")
        return found

    n_head, n_embd = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", n_embd // n_head)
    if value("rope.dimension_count", head_dim) != head_dim:
        found = str(value("rope.dimension_count"))
        raise BaseLoadError(str(path), f"{family}.rope.dimension_count", str(head_dim), found)
    return {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": n_embd,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": value("attention.head_count_kv", n_head),
        "head_dim": head_dim,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)},
        "attn_implementation": attention.NAME,
        "pad_token_id": None,
    }


def _their_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_PARTS.get(part, part)}.{kind}"
    return f"{_OUTER.get(stem, stem)}.{kind}"


def _values(tensor: Any, family: str, config: Any) -> FloatArray:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    array: FloatArray = np.array(values, dtype=np.float32)
    if family == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        return _split_halves(array, config.head_dim)
    return array


def _split_halves(weight: FloatArray, head_dim: int) -> FloatArray:
    """Reorders rows from adjacent pairs (llama's GGUF layout) to halves (transformers)."""
    n_out, n_in = weight.shape
    pairs = weight.reshape(n_out // head_dim, head_dim // 2, 2, n_in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(n_out, n_in))


def _scale_rope(
    model: Any, metadata: Mapping[str, Any], family: str, tensors: Mapping[str, Any]
) -> None:
    frequencies = model.model.rotary_emb.inv_freq  # [head_dim / 2]
    if metadata.get(f"{family}.rope.scaling.type") == "linear":
        frequencies /= metadata.get(f"{family}.rope.scaling.factor", 1.0)
    if _ROPE_FACTORS in tensors:
        frequencies /= torch.from_numpy(np.array(tensors[_ROPE_FACTORS].data, np.float32))
