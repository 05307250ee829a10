"""Changed copies of GGUF files, for tests that need another type or a broken file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
# What a tensor becomes: its values and their type, or None to leave it out.
TensorEdit: TypeAlias = Callable[[str, Array, Any], tuple[Array, Any] | None]


def copy_gguf(
    source: Path,
    target: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    edit: TensorEdit | None = None,
) -> Path:
    """Writes `source` to `target` with other metadata or tensors.

    Args:
        source: A sound GGUF file.
        target: Where the copy goes.
        changes: Values of keys; a key that `source` has keeps its type.
        drop: Keys and names of tensors to leave out.
        edit: Asked for every tensor.
    """
    reader = gguf.GGUFReader(source)
    changed = dict(changes or {})
    family = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, changed.pop("general.architecture", family))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        sub_type = field.types[1] if len(field.types) > 1 else None
        value = changed.pop(name, None)
        writer.add_key_value(
            name, field.contents() if value is None else value, field.types[0], sub_type
        )
    for name, value in changed.items():
        writer.add_key_value(name, value, _type_of(value))
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        kept = (np.array(tensor.data), tensor.tensor_type)
        edited = edit(tensor.name, *kept) if edit else kept
        if edited is not None:
            writer.add_tensor(tensor.name, edited[0], raw_dtype=edited[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def dequantised(source: Path, target: Path) -> Path:
    """Copies a file with all matrices in F16."""
    f16, f32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32

    def edit(name: str, data: Array, kind: Any) -> tuple[Array, Any]:
        values = gguf.quants.dequantize(data, kind)
        return (
            (values.astype(np.float32), f32)
            if values.ndim == 1
            else (values.astype(np.float16), f16)
        )

    file_type = int(gguf.LlamaFileType.MOSTLY_F16)
    return copy_gguf(source, target, changes={"general.file_type": file_type}, edit=edit)


def tensor_entry(image: bytes, name: str) -> dict[str, int]:
    """Where a tensor's directory entry keeps its fields, in bytes from the file's begin."""
    key = struct.pack("<Q", len(name)) + name.encode()
    n_dims_at = image.index(key) + len(key)
    (n_dims,) = struct.unpack_from("<I", image, n_dims_at)
    dims_at = n_dims_at + 4
    type_at = dims_at + 8 * int(n_dims)
    return {"n_dims": n_dims_at, "dims": dims_at, "type": type_at, "offset": type_at + 4}


def patched(image: bytes, at: int, layout: str, *values: int) -> bytes:
    """A copy of `image` with values packed at a position."""
    out = bytearray(image)
    struct.pack_into(layout, out, at, *values)
    return bytes(out)


def _type_of(value: object) -> Any:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    return {
        str: gguf.GGUFValueType.STRING,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        list: gguf.GGUFValueType.ARRAY,
    }[type(value)]
