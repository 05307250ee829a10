"""Router packs: small linear heads over the resident base's hidden states, as GGUF files.

A file has the head that tells which packs a text is for, the one that weighs packs against each
other, or both; see docs/router-pack.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

import numpy as np
from pydantic import TypeAdapter, ValidationError

from modularbase.errors import PackFormatError
from modularbase.packs.manifest import Manifest, PackId, PackVersion, parse_manifest
from modularbase.packs.pack_file import read_f32_tensors, read_metadata
from modularbase.storage.files import appearing
from modularbase.types import FloatArray

ARCHITECTURE = "modularbase-router"
FORMAT_VERSION = 1
MANIFEST_KEY = f"{ARCHITECTURE}.manifest"
MAX_PACKS = 64

Pooling = Literal["mean", "last"]
HeadName = Literal["router", "fusion"]

_MAX_LAYER = 1 << 16
_IDS, _VERSIONS = TypeAdapter(list[PackId]), TypeAdapter(list[PackVersion])


@dataclass(frozen=True, slots=True)
class RoutedPack:
    """A pack that a router knows."""

    id: str
    version: str


@dataclass(frozen=True, slots=True)
class LinearHead:
    """softmax((weight x + bias) / temperature) of a normalised state x.

    Attributes:
        weight: [n_outputs, n_embd].
        bias: [n_outputs].
        temperature: Above 1 where the training made it too sure of itself.
    """

    weight: FloatArray
    bias: FloatArray
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterWeights:
    """A whole router pack.

    Attributes:
        manifest: What it says of itself; its type is "router", its base the one the states are of.
        layer: The states are those entering it; n_layer + 1 is behind the output norm.
        pooling: How a text's states become one.
        packs: Those it knows, in the order of the heads' outputs.
        heads: One or both. "router" has an output for each pack, and a last one for "none of
            them"; "fusion" has one for each pack, its share.
    """

    manifest: Manifest
    layer: int
    pooling: Pooling
    packs: tuple[RoutedPack, ...]
    heads: Mapping[HeadName, LinearHead]

    @property
    def n_embd(self) -> int:
        """Width of the base."""
        return int(next(iter(self.heads.values())).weight.shape[1])


def read_router(path: Path) -> RouterWeights:
    """Reads and checks a router pack.

    Raises:
        PackFormatError: It is not sound, or no router pack.
    """
    metadata = read_metadata(path)
    family = metadata.get("general.architecture")
    if family != ARCHITECTURE:
        _refuse(path, "general.architecture", ARCHITECTURE, repr(family))
    _integer(path, metadata, "format_version", FORMAT_VERSION, FORMAT_VERSION)
    n_embd = _integer(path, metadata, "n_embd", 1, 1 << 20)
    packs = _packs(path, metadata)
    tensors = read_f32_tensors(path)
    n_outputs: dict[HeadName, int] = {"router": len(packs) + 1, "fusion": len(packs)}
    heads = {
        name: _head(path, metadata, tensors, name, (n, n_embd))
        for name, n in n_outputs.items()
        if any(tensor.startswith(f"{name}.") for tensor in tensors)
    }
    n_bytes = sum(array.nbytes for array in tensors.values())
    for name in [f"{head}.{part}" for head in heads for part in ("weight", "bias")]:
        tensors.pop(name)
    if tensors or not heads:
        _refuse(path, "tensors", "a router or fusion head, or both", ", ".join(tensors) or "none")
    return RouterWeights(
        manifest=_manifest(path, metadata, n_bytes),
        layer=_integer(path, metadata, "layer", 0, _MAX_LAYER),
        pooling=_pooling(path, metadata),
        packs=packs,
        heads=heads,
    )


def write_router(path: Path, weights: RouterWeights) -> RouterWeights:
    """Writes a router pack, all at once; returns what is in the file.

    Raises:
        PackFormatError: Weights that make no sound pack.
        InstallError: The file cannot be written.
    """
    import gguf  # late: most uses of packs write none

    n_bytes = sum(4 * (head.weight.size + head.bias.size) for head in weights.heads.values())
    manifest = weights.manifest.model_copy(update={"size_bytes": n_bytes})
    with appearing(path) as part:
        writer = gguf.GGUFWriter(part, ARCHITECTURE)
        writer.add_uint32(f"{ARCHITECTURE}.format_version", FORMAT_VERSION)
        writer.add_uint32(f"{ARCHITECTURE}.n_embd", weights.n_embd)
        writer.add_uint32(f"{ARCHITECTURE}.layer", weights.layer)
        writer.add_string(f"{ARCHITECTURE}.pooling", weights.pooling)
        writer.add_array(f"{ARCHITECTURE}.packs.id", [pack.id for pack in weights.packs])
        writer.add_array(f"{ARCHITECTURE}.packs.version", [pack.version for pack in weights.packs])
        writer.add_string(MANIFEST_KEY, manifest.to_json())
        for name, head in weights.heads.items():
            writer.add_float32(f"{ARCHITECTURE}.{name}.temperature", head.temperature)
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(head.weight, np.float32))
            writer.add_tensor(f"{name}.bias", np.ascontiguousarray(head.bias, np.float32))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return read_router(part)


def _manifest(path: Path, metadata: Mapping[str, Any], n_bytes: int) -> Manifest:
    text = metadata.get(MANIFEST_KEY)
    if not isinstance(text, str):
        _refuse(path, MANIFEST_KEY, "a manifest", "none")
    manifest = parse_manifest(text, str(path))
    if manifest.type != "router":
        _refuse(path, "manifest type", "router, as the file is", manifest.type)
    if manifest.size_bytes not in (0, n_bytes):
        _refuse(path, "manifest size_bytes", str(n_bytes), str(manifest.size_bytes))
    return manifest


def _pooling(path: Path, metadata: Mapping[str, Any]) -> Pooling:
    found = metadata.get(f"{ARCHITECTURE}.pooling")
    for pooling in get_args(Pooling):
        if found == pooling:
            return cast(Pooling, pooling)
    _refuse(path, f"{ARCHITECTURE}.pooling", " or ".join(get_args(Pooling)), repr(found))


def _packs(path: Path, metadata: Mapping[str, Any]) -> tuple[RoutedPack, ...]:
    found = []
    for name, kind in (("id", _IDS), ("version", _VERSIONS)):
        key = f"{ARCHITECTURE}.packs.{name}"
        try:
            found.append(kind.validate_python(metadata.get(key), strict=True))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            _refuse(path, key, first["msg"].removeprefix("Value error, "), repr(first["input"]))
    ids, versions = found
    if not 1 <= len(ids) <= MAX_PACKS or len(set(ids)) != len(ids) or len(versions) != len(ids):
        expected = f"1 to {MAX_PACKS} packs, each once and with a version"
        _refuse(path, f"{ARCHITECTURE}.packs", expected, f"{ids} in {versions}")
    return tuple(map(RoutedPack, ids, versions))


def _head(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, FloatArray],
    name: str,
    shape: tuple[int, int],
) -> LinearHead:
    key = f"{ARCHITECTURE}.{name}.temperature"
    temperature = metadata.get(key)
    if not isinstance(temperature, float) or not 0 < temperature < float("inf"):
        _refuse(path, key, "a number above 0", repr(temperature))
    arrays = []
    for part, wanted in (("weight", shape), ("bias", (1, shape[0]))):
        array = tensors.get(f"{name}.{part}")
        if array is None or array.shape != wanted:
            found = "none" if array is None else str(list(array.shape))
            _refuse(path, f"{name}.{part}", f"a tensor of shape {list(wanted)}", found)
        if not np.isfinite(array).all():
            _refuse(path, f"{name}.{part}", "finite numbers", "NaN or infinity")
        arrays.append(array)
    return LinearHead(arrays[0], arrays[1][0], temperature)


def _integer(path: Path, metadata: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = metadata.get(f"{ARCHITECTURE}.{name}")
    if type(value) is not int or not least <= value <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        _refuse(path, f"{ARCHITECTURE}.{name}", expected, repr(value))
    return value


def _refuse(path: Path, field: str, expected: str, found: str) -> NoReturn:
    raise PackFormatError(str(path), field, expected, found)
