"""Pack files: written from arrays, read back, inspected, rounded to another type.

The only module of this folder that imports the C++ extension, which checks every file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modularbase import _core
from modularbase.errors import BaseLoadError, InvalidRequestError, PackFormatError
from modularbase.packs.manifest import Manifest, parse_manifest
from modularbase.packs.weights import (
    PROFILE,
    PackGeometry,
    PackWeights,
    Probe,
    WeightType,
    check_tensors,
    type_of,
)
from modularbase.storage.files import appearing
from modularbase.types import FloatArray

EncodedTensors = dict[str, NDArray[np.uint8]]
"""Bytes of tensors as they lie in a file, by name; shapes are numpy's, with a row's bytes last."""

ARCHITECTURE = "modularbase-pack"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackFacts:
    """What a pack file holds, without its weights.

    Attributes:
        manifest: What it says of itself.
        geometry: Its shape.
        scale: Factor of the pack's output.
        adapter_type: Type of the adapters in the file.
        expert_type: Type of the experts in the file.
        n_bytes: Size of all tensors.
        has_token_gates: Whether it weighs tokens one by one.
        n_centroids: Query centroids for routing.
        probe: What it should do to a base, where known.
    """

    manifest: Manifest
    geometry: PackGeometry
    scale: float
    adapter_type: str
    expert_type: str
    n_bytes: int
    has_token_gates: bool
    n_centroids: int
    probe: Probe | None


def inspect_pack(path: Path) -> PackFacts:
    """Checks a pack file and says what it holds.

    Raises:
        PackFormatError: Not a sound pack, or the manifest says otherwise than the tensors.
    """
    pack = _open(path)
    manifest = parse_manifest(pack.manifest_json, str(path))
    names = {name: shape for name, _, shape, _ in pack.tensors}
    facts = PackFacts(
        manifest=manifest,
        geometry=_geometry(pack),
        scale=pack.scale,
        adapter_type=pack.adapter_type,
        expert_type=pack.expert_type.lower(),
        n_bytes=sum(n_bytes for *_, n_bytes in pack.tensors),
        has_token_gates=any("token_gate" in name for name in names),
        n_centroids=names[PROFILE][1] if PROFILE in names else 0,
        probe=_probe(pack),
    )
    _compare(facts, str(path))
    return facts


def read_pack(path: Path) -> PackWeights:
    """Reads a whole pack; its types are widened to F32.

    Raises:
        PackFormatError: Not a sound pack.
    """
    pack = _open(path)
    manifest = parse_manifest(pack.manifest_json, str(path))
    tensors: dict[str, FloatArray] = {}
    for name, type_name, ggml_shape, _ in pack.tensors:
        shape = _numpy_shape(name, ggml_shape)
        rows = pack.tensor_bytes(name).reshape(math.prod(shape[:-1]), -1)
        tensors[name] = _core.dequantize(rows, type_name.lower()).reshape(shape)
    return PackWeights(
        geometry=_geometry(pack),
        tensors=tensors,
        manifest=manifest,
        scale=pack.scale,
        probe=_probe(pack),
    )


def unchanged_tensors(path: Path, weights: PackWeights) -> EncodedTensors:
    """The bytes of a pack file's tensors that `weights` has the values of, and wants the type of.

    Rounding rounded numbers once more need not give the same bytes; these can be written as they
    are.

    Raises:
        PackFormatError: Not a sound pack.
    """
    pack = _open(path)
    found: EncodedTensors = {}
    for name, type_name, ggml_shape, _ in pack.tensors:
        array, shape = weights.tensors.get(name), _numpy_shape(name, ggml_shape)
        wanted = type_of(name, weights.manifest.quantisation)
        if array is None or array.shape != shape or wanted != type_name.lower():
            continue
        rows = pack.tensor_bytes(name).reshape(math.prod(shape[:-1]), -1)
        if np.array_equal(_core.dequantize(rows, wanted), _rows(array)):
            found[name] = rows.reshape(*shape[:-1], -1)
    return found


def write_pack(
    path: Path, weights: PackWeights, unchanged: EncodedTensors | None = None
) -> PackFacts:
    """Writes a pack file, all at once, in the types of `manifest.quantisation`.

    The manifest's `size_bytes` is set to what the tensors take.

    Args:
        path: Where it goes.
        weights: What it holds.
        unchanged: Bytes of tensors that are not to be rounded anew, as `unchanged_tensors` gives
            them.

    Raises:
        PackFormatError: Tensors that do not fit the geometry or their type.
        InstallError: The file cannot be written.
    """
    check_tensors(weights, str(path))
    ready = unchanged or {}
    encoded = {
        name: ready[name]
        if name in ready
        else _encode(str(path), name, array, type_of(name, weights.manifest.quantisation))
        for name, array in weights.tensors.items()
    }
    n_bytes = sum(rows.nbytes for rows in encoded.values())
    manifest = weights.manifest.model_copy(update={"size_bytes": n_bytes})
    with appearing(path) as part:
        _write_gguf(part, weights, manifest, encoded)
        return inspect_pack(part)


def rounding_errors(weights: PackWeights) -> dict[str, float]:
    """Relative RMS error of each matrix that a pack file would hold in fewer bits."""
    errors = {}
    for name, array in weights.tensors.items():
        wanted = type_of(name, weights.manifest.quantisation)
        if name.split(".")[-2] in ("in", "out") or name.split(".")[-2].startswith("expert_"):
            size = float(np.linalg.norm(array))
            error = float(np.linalg.norm(rounded(array, wanted) - array))
            errors[name] = error / size if size else 0.0
    return errors


def rounded(array: FloatArray, wanted: WeightType) -> FloatArray:
    """The numbers that a pack file holds of an array, in its shape.

    Raises:
        InvalidRequestError: They do not fit the type; they must be finite.
    """
    return _core.dequantize(_core.quantize(_rows(array), wanted), wanted).reshape(array.shape)


def read_metadata(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF file of any kind.

    Raises:
        PackFormatError: It is no sound GGUF file.
    """
    try:
        return _core.read_gguf_metadata(_utf8(path))
    except BaseLoadError as error:
        raise PackFormatError(error.file, error.field, error.expected, error.found) from error


def read_f32_tensors(path: Path) -> dict[str, FloatArray]:
    """All tensors of a GGUF file that holds rows of F32 alone, each [n_rows, n_per_row].

    Raises:
        PackFormatError: It is no sound GGUF file, or holds anything else.
    """
    tensors: dict[str, FloatArray] = {}
    try:
        for name, type_name, (_, _, *more), _ in _core.read_gguf_tensors(_utf8(path)):
            if type_name != "f32" or any(n != 1 for n in more):
                found = "more dimensions" if type_name == "f32" else type_name
                raise PackFormatError(str(path), name, "rows of f32", found)
            tensors[name] = _core.read_gguf_rows(_utf8(path), name)
    except BaseLoadError as error:
        raise PackFormatError(error.file, error.field, error.expected, error.found) from error
    return tensors


def _open(path: Path) -> _core.PackFile:
    return _core.read_pack(_utf8(path))


def _utf8(path: Path) -> str:
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PackFormatError(ascii(text), "path", "UTF-8", "other bytes") from error
    return text


def _geometry(pack: _core.PackFile) -> PackGeometry:
    return PackGeometry(
        n_embd=pack.n_embd,
        d_inner=pack.d_inner,
        d_ff=pack.d_ff,
        n_expert=pack.n_expert,
        n_expert_used=pack.n_expert_used,
        sites=tuple(pack.sites),
        norm_eps=pack.norm_eps,
    )


def _probe(pack: _core.PackFile) -> Probe | None:
    tokens = tuple(pack.probe_tokens)
    return Probe(tokens, tuple(pack.probe_effect)) if tokens else None


def _numpy_shape(name: str, ggml_shape: list[int]) -> tuple[int, ...]:
    """The file has four dimensions for all; the name tells how many are meant."""
    part = name.split(".")[-2]
    n_dims = 1 if part in ("norm", "token_gate") else 3 if part.startswith("expert_") else 2
    return tuple(reversed(ggml_shape[:n_dims]))


def _compare(facts: PackFacts, file: str) -> None:
    said = facts.manifest.quantisation
    for field, manifest_value, tensor_value in (
        ("type", facts.manifest.type, "domain"),
        ("quantisation.experts", said.experts, facts.expert_type),
        ("quantisation.adapters", said.adapters, facts.adapter_type),
        ("size_bytes", facts.manifest.size_bytes or facts.n_bytes, facts.n_bytes),
    ):
        if manifest_value != tensor_value:
            field = f"manifest {field}"
            raise PackFormatError(
                file, field, f"{tensor_value}, as the tensors are", str(manifest_value)
            )


def _rows(array: FloatArray) -> FloatArray:
    return np.ascontiguousarray(array, dtype=np.float32).reshape(-1, array.shape[-1])


def _encode(file: str, name: str, array: FloatArray, wanted: WeightType) -> NDArray[np.uint8]:
    try:
        rows = _core.quantize(_rows(array), wanted)
    except InvalidRequestError as error:
        raise PackFormatError(file, name, error.expected, error.found) from error
    return rows.reshape(*array.shape[:-1], -1)


def _write_gguf(
    path: Path, weights: PackWeights, manifest: Manifest, encoded: Mapping[str, NDArray[np.uint8]]
) -> None:
    import gguf  # late: most uses of packs write none

    geometry = weights.geometry
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    integers = {
        "format_version": FORMAT_VERSION,
        "n_embd": geometry.n_embd,
        "d_inner": geometry.d_inner,
        "d_ff": geometry.d_ff,
        "n_expert": geometry.n_expert,
        "n_expert_used": geometry.n_expert_used,
    }
    for key, value in integers.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    writer.add_array(f"{ARCHITECTURE}.sites", list(geometry.sites))
    writer.add_float32(f"{ARCHITECTURE}.norm_eps", geometry.norm_eps)
    writer.add_float32(f"{ARCHITECTURE}.scale", weights.scale)
    writer.add_string(f"{ARCHITECTURE}.manifest", manifest.to_json())
    if weights.probe:
        writer.add_array(f"{ARCHITECTURE}.probe.tokens", list(weights.probe.tokens))
        writer.add_array(f"{ARCHITECTURE}.probe.effect", list(weights.probe.effect))
    for name, rows in encoded.items():
        type_name = type_of(name, manifest.quantisation)
        raw_type = gguf.GGMLQuantizationType[type_name.upper()]
        writer.add_tensor(name, rows, raw_dtype=raw_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
