"""The model files that are measured: the default base as it comes, and made F16 and BF16.

Both sides read the same files. The 16-bit ones are made by the peer's own llama-quantize, once,
and verified by their digest before every use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.digest import sha256_of
from benchmarks.paths import MODELS

BASE_NAME = "SmolLM2-135M-Instruct"
BASE_FILE = f"{BASE_NAME}.Q4_1.gguf"
BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_VARIABLE = "MODULARBASE_BENCH_BASE"


class ModelFileError(RuntimeError):
    """A model file is missing, is not the expected one, or could not be made."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one base, one a weight type."""

    shipped: Path
    f16: Path
    bf16: Path


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide how many bytes a token reads."""

    weight_bytes: int  # read once a token: all tensors, the tied embedding as the output head
    head_bytes: int  # the output head alone
    n_layer: int
    n_head_kv: int
    head_dim: int

    def kv_bytes(self, n_tokens: int, value_bytes: int = 2) -> int:
        """Returns the size of the K and V rows of `n_tokens` tokens."""
        return 2 * self.n_layer * self.n_head_kv * self.head_dim * value_bytes * n_tokens


def locate_base() -> Path:
    """Returns the default base as shipped, verified.

    Raises:
        ModelFileError: There is none, or it is not the file the benchmarks are defined on.
    """
    named = os.environ.get(BASE_VARIABLE)
    if named:
        path = Path(named)
    else:
        from benchmarks.ours import installed_base

        try:
            path = installed_base()
        except ImportError as error:
            raise ModelFileError(
                f"{error}; install ModularBase, or name {BASE_FILE} in {BASE_VARIABLE}"
            ) from error
    if not path.is_file():
        raise ModelFileError(f"{BASE_VARIABLE}: expected {BASE_FILE}, found no file {path}")
    found = sha256_of(path)
    if found != BASE_SHA256:
        raise ModelFileError(f"{path}: sha256: expected {BASE_SHA256}, found {found}")
    return path


def is_verified(path: Path) -> bool:
    """Says whether a made file is the one its stamp describes, made of the current base."""
    try:
        stamp = json.loads(path.with_suffix(".json").read_text())
        if stamp["source_sha256"] != BASE_SHA256 or stamp["n_bytes"] != path.stat().st_size:
            return False
    except (OSError, ValueError, KeyError):
        return False
    return bool(stamp["sha256"] == sha256_of(path))


def ensure_requantized(tools: Path, base: Path, weight_type: str, folder: Path = MODELS) -> Path:
    """Makes the F16 or BF16 file of the base where it is missing and returns its path.

    Raises:
        ModelFileError: llama-quantize failed.
    """
    path = folder / f"{BASE_NAME}.{weight_type}.gguf"
    if is_verified(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    command = [str(tools / "llama-quantize"), "--allow-requantize", str(base)]
    command += [str(unfinished), weight_type]
    print(f"making {path.name}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise ModelFileError(f"{' '.join(command)}: {done.stderr[-500:]}")
    stamp = {
        "source_sha256": BASE_SHA256,
        "n_bytes": unfinished.stat().st_size,
        "sha256": sha256_of(unfinished),
    }
    unfinished.replace(path)
    path.with_suffix(".json").write_text(json.dumps(stamp, indent=2) + "\n")
    return path


def ensure_models(tools: Path) -> ModelFiles:
    """Returns every file that is measured, making what is missing.

    Raises:
        ModelFileError: The base is missing or a file could not be made.
    """
    base = locate_base()
    f16 = ensure_requantized(tools, base, "F16")
    bf16 = ensure_requantized(tools, base, "BF16")
    return ModelFiles(shipped=base, f16=f16, bf16=bf16)


def read_geometry(path: Path) -> Geometry:
    """Reads the sizes of a model; kept beside the cache, since reading the vocabulary is slow."""
    cached = MODELS / f"{path.stem}.geometry.json"
    try:
        return Geometry(**json.loads(cached.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def number(key: str) -> int:
        field = reader.get_field(key)
        if field is None:
            raise ModelFileError(f"{path}: {key}: expected a number, found nothing")
        return int(field.contents())

    architecture = reader.get_field("general.architecture")
    family = str(architecture.contents()) if architecture else ""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    head = sizes.get("output.weight", sizes["token_embd.weight"])
    tied = "output.weight" not in sizes
    geometry = Geometry(
        weight_bytes=sum(sizes.values()) - (0 if tied else sizes["token_embd.weight"]),
        head_bytes=head,
        n_layer=number(f"{family}.block_count"),
        n_head_kv=number(f"{family}.attention.head_count_kv"),
        head_dim=number(f"{family}.embedding_length") // number(f"{family}.attention.head_count"),
    )
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(asdict(geometry), indent=2) + "\n")
    return geometry
