"""The numbers of a model: config.json as GGUF metadata, as far as the engine can run it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from modularbase.bases.catalogue import Family
from modularbase.bases.checkpoints.fields import JsonFields
from modularbase.types import FloatArray

_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """A decoder-only transformer.

    Attributes:
        family: `general.architecture`.
        n_vocab: Rows of the embedding.
        n_ctx: Positions it was trained on.
        n_embd: Width of the residual stream.
        n_layer: Layers.
        n_ff: Width inside the feed-forward network.
        n_head: Query heads.
        n_head_kv: Key and value heads.
        head_dim: Width of a head.
        norm_eps: Of every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_divisor: What positions are divided by (linear scaling), or 1.
        rope_factors: What each frequency is divided by (Llama 3), [head_dim / 2], or None.
        tied: Whether the head is the embedding.
        biases: Whether attention has biases.
    """

    family: Family
    n_vocab: int
    n_ctx: int
    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_divisor: float
    rope_factors: FloatArray | None
    tied: bool
    biases: bool

    def metadata(self) -> dict[str, object]:
        """The keys of a GGUF file."""
        values: dict[str, object] = {
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self.norm_eps,
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": self.rope_theta,
            "vocab_size": self.n_vocab,
        }
        if self.rope_divisor != 1.0:
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": self.rope_divisor}
        return {f"{self.family}.{name}": value for name, value in values.items()}


def read_hyperparameters(config: JsonFields) -> Hyperparameters:
    """Reads config.json.

    Raises:
        BaseLoadError: A field is missing, makes no sense, or asks for what the engine cannot run.
    """
    family = _family(config)
    _refuse_what_cannot_run(config, family)
    n_embd, n_head = config.count("hidden_size"), config.count("num_attention_heads")
    n_head_kv = config.count("num_key_value_heads", n_head)
    if n_head % n_head_kv:
        raise config.fault("num_key_value_heads", f"a divisor of {n_head}", n_head_kv)
    if config.values.get("head_dim") is None and n_embd % n_head:
        raise config.fault("hidden_size", f"a multiple of the {n_head} heads", n_embd)
    head_dim = config.count("head_dim", n_embd // n_head)
    rope, theta = _rope(config)
    kind = _rope_kind(rope, family)
    return Hyperparameters(
        family=family,
        n_vocab=config.count("vocab_size"),
        n_ctx=config.count("max_position_embeddings"),
        n_embd=n_embd,
        n_layer=config.count("num_hidden_layers"),
        n_ff=config.count("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps"),
        rope_theta=theta,
        rope_divisor=rope.number("factor") if kind == "linear" else 1.0,
        rope_factors=_llama3_factors(rope, theta, head_dim) if kind == "llama3" else None,
        tied=config.flag("tie_word_embeddings", False),
        biases=family == "qwen2" or config.flag("attention_bias", False),
    )


def _family(config: JsonFields) -> Family:
    said = config.values.get("architectures")
    name = said[0] if isinstance(said, list) and len(said) == 1 else said
    if not isinstance(name, str) or name not in _FAMILIES:
        raise config.fault("architectures", " or ".join(_FAMILIES), repr(said))
    return _FAMILIES[name]


def _refuse_what_cannot_run(config: JsonFields, family: Family) -> None:
    if (activation := config.values.get("hidden_act", "silu")) != "silu":
        raise config.fault("hidden_act", "silu", repr(activation))
    if config.values.get("quantization_config") is not None:
        raise config.fault("quantization_config", "a checkpoint that is not quantised", "one")
    layers = str(config.values.get("layer_types"))
    if config.flag("use_sliding_window", False) or "sliding_attention" in layers:
        raise config.fault("use_sliding_window", "full attention", "a sliding window")
    if config.flag("mlp_bias", False):
        raise config.fault("mlp_bias", "false: the engine's feed-forward has no biases", "true")
    if family == "qwen3" and config.flag("attention_bias", False):
        raise config.fault("attention_bias", "false: the engine's qwen3 has no biases", "true")


def _rope(config: JsonFields) -> tuple[JsonFields, float]:
    """The rotary parameters and their base, wherever this version of transformers puts them."""
    newer, older = config.child("rope_parameters"), config.child("rope_scaling")
    rope = newer if newer.values else older
    return rope, rope.number("rope_theta", config.number("rope_theta", 10000.0))


def _rope_kind(rope: JsonFields, family: Family) -> str:
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    runs = ("default", "linear", "llama3") if family == "llama" else ("default", "linear")
    if kind not in runs:
        raise rope.fault("rope_type", f"{' or '.join(runs)} for {family}", repr(kind))
    if (part := rope.number("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.fault("partial_rotary_factor", "1", part)
    return str(kind)


def _llama3_factors(rope: JsonFields, theta: float, head_dim: int) -> FloatArray:
    """What Llama 3.1 divides the frequencies by: 1 for short waves, `factor` for long ones."""
    factor = rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    n_ctx = rope.count("original_max_position_embeddings")
    if not low < high:
        raise rope.fault("high_freq_factor", f"more than low_freq_factor {low}", high)
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)  # [head_dim / 2]
    turns = n_ctx * frequencies / (2 * math.pi)  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: FloatArray = (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
    return factors
