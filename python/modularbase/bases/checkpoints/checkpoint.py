"""A checkpoint folder as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import gguf

from modularbase.bases.checkpoints.fields import JsonFields
from modularbase.bases.checkpoints.safetensors_file import StoredTensor, read_header
from modularbase.errors import BaseLoadError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """What a folder holds; tensors are read when they are asked for.

    Attributes:
        folder: The folder.
        config: config.json.
        tensors: All tensors by the name transformers gives them.
    """

    def __init__(self, folder: Path) -> None:
        """Reads config.json and the headers of the tensor files.

        Raises:
            BaseLoadError: A file is missing or damaged.
        """
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing there"
            raise BaseLoadError(str(folder), "folder", "the folder of a checkpoint", found)
        self.folder = folder
        self.config = JsonFields.read(folder / "config.json")
        self.tensors = _tensors(folder)

    def end_ids(self) -> list[int]:
        """Tokens after which its generation ends, as generation_config.json says."""
        file = self.folder / "generation_config.json"
        if not file.exists():
            return []
        fields = JsonFields.read(file)
        said = fields.values.get("eos_token_id")
        ids = said if isinstance(said, list) else [] if said is None else [said]
        if any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise fields.fault("eos_token_id", "token ids", repr(said))
        return ids

    def licence(self) -> str:
        """What the model card (README.md) names as licence, or "unknown"."""
        try:
            said = gguf.Metadata.load_model_card(self.folder).get("license")
        except Exception:  # whatever the YAML parser raises: a card is no part of the model
            return "unknown"
        return said if isinstance(said, str) else "unknown"


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    if (folder / _INDEX).exists():
        return _sharded(folder)
    if not (folder / _SINGLE).exists():
        raise BaseLoadError(str(folder), "tensors", f"{_SINGLE} or {_INDEX}", "neither")
    return read_header(folder / _SINGLE)


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index = JsonFields.read(folder / _INDEX)
    shard_of = index.child("weight_map").values
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise index.fault("weight_map", "names of files in the folder", repr(shard))
    headers = {shard: read_header(folder / shard) for shard in sorted(set(shard_of.values()))}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            expected = f"{name}, as {_INDEX} says"
            raise BaseLoadError(str(folder / shard), "tensors", expected, "no such tensor")
    return {name: headers[shard][name] for name, shard in shard_of.items()}
