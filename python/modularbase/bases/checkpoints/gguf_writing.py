"""Writes a checkpoint as a 16-bit GGUF file, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from modularbase.bases.checkpoints.tensor_plan import PlannedTensor
from modularbase.errors import BaseLoadError
from modularbase.types import FloatArray

FloatType = Literal["auto", "bf16", "f16"]
"""How matrices are stored; "auto" is BF16 where the checkpoint has BF16, else F16."""

_TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "f16": gguf.GGMLQuantizationType.F16}
_FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
}
_F32 = gguf.GGMLQuantizationType.F32
_ROPE_FACTORS = "rope_freqs.weight"


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Sequence[PlannedTensor],
    *,
    float_type: FloatType,
    rope_factors: FloatArray | None,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Writes a file; equal arguments give equal bytes.

    Args:
        path: The new file.
        metadata: Its keys, beside those on its type.
        tensors: What it holds; vectors are stored as F32.
        float_type: Type of the matrices.
        rope_factors: Llama 3's frequency divisors, or None.
        on_bytes: Called with the bytes done and all bytes behind every tensor.

    Raises:
        BaseLoadError: A value cannot be read, is not finite, or does not fit the type.
    """
    chosen = _chosen(tensors) if float_type == "auto" else float_type
    writer = gguf.GGUFWriter(None, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    writer.add_file_type(_FILE_TYPES[chosen])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    n_total = _declare(writer, tensors, chosen, rope_factors)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        n_done = 0
        if rope_factors is not None:
            writer.write_tensor_data(rope_factors)
        for tensor in tensors:
            values = _stored(tensor, _type(tensor, chosen))
            writer.write_tensor_data(values)
            n_done += values.nbytes
            on_bytes(n_done, n_total)
    finally:
        writer.close()


def _chosen(tensors: Sequence[PlannedTensor]) -> Literal["bf16", "f16"]:
    return "bf16" if any(tensor.source.dtype == "BF16" for tensor in tensors) else "f16"


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def _declare(
    writer: gguf.GGUFWriter,
    tensors: Sequence[PlannedTensor],
    chosen: str,
    rope_factors: FloatArray | None,
) -> int:
    """Announces all tensors; returns their bytes."""
    if rope_factors is not None:
        writer.add_tensor_info(
            _ROPE_FACTORS, rope_factors.shape, rope_factors.dtype, rope_factors.nbytes, _F32
        )
    n_total = 0
    for tensor in tensors:
        kind = _type(tensor, chosen)
        shape = tensor.source.shape
        n_bytes = math.prod(shape) * (4 if kind == _F32 else 2)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, kind)
        n_total += n_bytes
    return n_total


def _type(tensor: PlannedTensor, chosen: str) -> gguf.GGMLQuantizationType:
    return _TYPES[chosen] if len(tensor.source.shape) > 1 else _F32


def _stored(tensor: PlannedTensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below, with the tensor's name
        stored: np.ndarray = gguf.quants.quantize(tensor.read(), kind)
    if kind == _TYPES["f16"] and not np.isfinite(stored).all():
        source = tensor.source
        expected = "values that fit F16; write the base as bf16"
        raise BaseLoadError(str(source.file), source.name, expected, "larger ones")
    return stored
