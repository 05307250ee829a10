"""Tiny random models of each family, made at test time, for transformers and as GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
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

N_VOCAB = 320
N_LAYER = 3
N_EMBD = 96
N_HEAD = 6
N_HEAD_KV = 2
N_FF = 160
N_CTX = 512

_GGUF_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


@dataclass(frozen=True)
class TinyModel:
    """A random model as transformers has it, and the same in a file."""

    family: str
    path: Path
    reference: PreTrainedModel
    head_dim: int


def make_tiny_model(
    family: str,
    path: Path,
    *,
    dtype: str = "f32",
    tied: bool = False,
    head_dim: int | None = None,
    seed: int = 0,
) -> TinyModel:
    """Makes a random model of a family and writes it to `path`.

    Args:
        family: "llama", "llama3" (frequency divisors), "qwen2" or "qwen3".
        path: Where the GGUF file goes.
        dtype: Type of the matrices in the file; the reference gets the same rounded values.
        tied: Whether the head is the embedding.
        head_dim: Of the attention; only qwen3 may have another than n_embd / n_head.
        seed: Of the weights.
    """
    if head_dim is None:
        head_dim = 32 if family == "qwen3" else N_EMBD // N_HEAD
    model = random_reference(family, head_dim, tied, seed=seed)
    writer = gguf.GGUFWriter(path, "llama" if family == "llama3" else family)
    _write_metadata(writer, family, model, head_dim)
    _write_tensors(writer, family, model, dtype, tied, head_dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(family, path, model.eval(), head_dim)


def random_reference(
    family: str, head_dim: int, tied: bool, *, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A random model of transformers; arguments as in `make_tiny_model`.

    Args:
        family: The family.
        head_dim: Of the attention.
        tied: Whether the head is the embedding.
        seed: Of the weights.
        **config: Fields of its configuration to change.
    """
    torch.manual_seed(seed)
    model = _reference(family, head_dim, tied, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near 1 and biases that matter: neither may be lost unnoticed.
            spread = torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.08)
            parameter.copy_(spread + 1.0 if "norm" in name else spread)
    return model


def reference_logits(model: TinyModel, ids: list[int]) -> np.ndarray:
    """Logits of every position by transformers in F32, [n_tokens, n_vocab]."""
    with torch.no_grad():
        logits: np.ndarray = model.reference(torch.tensor([ids])).logits[0].float().numpy()
    return logits


def _reference(family: str, head_dim: int, tied: bool, config: dict[str, Any]) -> PreTrainedModel:
    common: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "max_position_embeddings": N_CTX,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
    }
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common | config))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common | {"head_dim": head_dim} | config))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    return LlamaForCausalLM(LlamaConfig(**common | {"rope_parameters": rope} | config))


def _write_metadata(
    writer: gguf.GGUFWriter, family: str, model: PreTrainedModel, head_dim: int
) -> None:
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(N_VOCAB)
    # A byte-level vocabulary: every byte, one merge, a stop token, and unused rest.
    pieces = [_byte_piece(byte) for byte in range(256)]
    pieces += [_byte_piece(ord("t")) + _byte_piece(ord("h")), "<|end|>"]
    pieces += [f"<unused{i}>" for i in range(N_VOCAB - len(pieces))]
    types = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL]
    types += [gguf.TokenType.UNUSED] * (N_VOCAB - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges([f"{_byte_piece(ord('t'))} {_byte_piece(ord('h'))}"])
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)


def _byte_piece(byte: int) -> str:
    """The printable character that stands for a byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def _write_tensors(
    writer: gguf.GGUFWriter,
    family: str,
    model: PreTrainedModel,
    dtype: str,
    tied: bool,
    head_dim: int,
) -> None:
    state = model.state_dict()
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if not tied:
        names["lm_head.weight"] = "output.weight"
    for layer in range(N_LAYER):
        for theirs, ours in _LAYER_NAMES.items():
            names[f"model.layers.{layer}.{theirs}"] = f"blk.{layer}.{ours}"
    for theirs, ours in names.items():
        if theirs not in state:
            continue
        values = state[theirs]
        if values.dim() == 2:
            values.copy_(torch.from_numpy(_rounded(values.numpy(), dtype)))
        array = values.float().numpy().copy()
        if family.startswith("llama") and (".attn_q.weight" in ours or ".attn_k.weight" in ours):
            array = _adjacent_pairs(array, head_dim)
        kind = _GGUF_TYPES[dtype] if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(ours, gguf.quants.quantize(array, kind), raw_dtype=kind)
    if family == "llama3":
        plain = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        scaled = model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy().astype(np.float32))


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    kind = _GGUF_TYPES[dtype]
    rounded: np.ndarray = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    return rounded.astype(np.float32)


def _adjacent_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders rows from split halves (transformers) to adjacent pairs (llama's GGUF layout)."""
    n_out, n_in = weight.shape
    halves = weight.reshape(n_out // head_dim, 2, head_dim // 2, n_in)
    pairs: np.ndarray = halves.swapaxes(1, 2).reshape(n_out, n_in)
    return pairs
