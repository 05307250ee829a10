"""Which tensor of a checkpoint becomes which tensor of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from modularbase.bases.checkpoints.checkpoint import Checkpoint
from modularbase.bases.checkpoints.hyperparameters import Hyperparameters
from modularbase.bases.checkpoints.safetensors_file import StoredTensor
from modularbase.errors import BaseLoadError
from modularbase.types import FloatArray

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# Old checkpoints store the rotary frequencies, which follow from config.json.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to write.

    Attributes:
        name: In the GGUF file.
        source: Where its values are.
        paired_heads: Heads whose rows change from halves to adjacent pairs, or 0.
    """

    name: str
    source: StoredTensor
    paired_heads: int

    def read(self) -> FloatArray:
        """Its values in the order the file has them, [*shape].

        Raises:
            BaseLoadError: As in `StoredTensor.read`.
        """
        values = self.source.read()
        return _adjacent_pairs(values, self.paired_heads) if self.paired_heads else values


def plan_tensors(checkpoint: Checkpoint, model: Hyperparameters) -> list[PlannedTensor]:
    """Matches a checkpoint's tensors with those of its family.

    Raises:
        BaseLoadError: One is unknown, missing or of another shape.
    """
    found = _by_gguf_name(checkpoint, model)
    expected = _shapes(model)
    config = str(checkpoint.config.file)
    for name, tensor in found.items():
        if name not in expected:
            known = f"a tensor of a {model.family} model of this config.json"
            raise BaseLoadError(str(tensor.file), tensor.name, known, "an unknown one")
    for name, shape in expected.items():
        if name not in found:
            raise BaseLoadError(str(checkpoint.folder), f"tensor {name}", "present", "missing")
        tensor = found[name]
        if tensor.shape != shape:
            wanted = f"shape {shape}, from {config}"
            raise BaseLoadError(str(tensor.file), tensor.name, wanted, str(tensor.shape))
    return [PlannedTensor(name, found[name], _paired_heads(name, model)) for name in expected]


def _by_gguf_name(checkpoint: Checkpoint, model: Hyperparameters) -> dict[str, StoredTensor]:
    names = gguf.get_tensor_name_map(_ARCHITECTURES[model.family], model.n_layer)
    found: dict[str, StoredTensor] = {}
    for theirs, tensor in checkpoint.tensors.items():
        if theirs.endswith(_DERIVED) or (model.tied and theirs == "lm_head.weight"):
            continue
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None or name in found:
            known = f"a tensor of a {model.family} model with {model.n_layer} layers"
            raise BaseLoadError(str(tensor.file), theirs, known, "an unknown one")
        found[name] = tensor
    return found


def _shapes(model: Hyperparameters) -> Mapping[str, tuple[int, ...]]:
    """What a file of this family holds, by name, rows first."""
    n_embd, q, kv = model.n_embd, model.n_head * model.head_dim, model.n_head_kv * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (model.n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
    }
    if not model.tied:
        shapes["output.weight"] = (model.n_vocab, n_embd)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (q, n_embd),
        "attn_k.weight": (kv, n_embd),
        "attn_v.weight": (kv, n_embd),
        "attn_output.weight": (n_embd, q),
        "ffn_norm.weight": (n_embd,),
        "ffn_gate.weight": (model.n_ff, n_embd),
        "ffn_up.weight": (model.n_ff, n_embd),
        "ffn_down.weight": (n_embd, model.n_ff),
    }
    if model.biases:
        layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if model.biases and model.family == "llama":
        layer["attn_output.bias"] = (n_embd,)
    if model.family == "qwen3":
        layer |= {"attn_q_norm.weight": (model.head_dim,), "attn_k_norm.weight": (model.head_dim,)}
    for i in range(model.n_layer):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _paired_heads(name: str, model: Hyperparameters) -> int:
    """Only llama's files have rotated rows in adjacent pairs; the others keep halves."""
    heads = {"attn_q": model.n_head, "attn_k": model.n_head_kv} if model.family == "llama" else {}
    return heads.get(name.split(".")[-2], 0)


def _adjacent_pairs(values: FloatArray, n_head: int) -> FloatArray:
    """Reorders each head's d rows to 0, d/2, 1, d/2 + 1, ...; values are [n_head * d, ...]."""
    halves = values.reshape(n_head, 2, -1, *values.shape[1:])  # [n_head, 2, d / 2, ...]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
