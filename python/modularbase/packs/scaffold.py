"""`pack init`: a project folder that people can train and publish a pack from."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from modularbase.errors import InvalidRequestError
from modularbase.packs.archive import README
from modularbase.packs.manifest import Manifest
from modularbase.packs.project import (
    CONFIG_FILE,
    DATA_FOLDER,
    MANIFEST_FILE,
    PROMPTS_FILE,
    WEIGHTS_FOLDER,
    GeometryConfig,
)
from modularbase.storage.disk import disk_errors

N_SITES = 8
_WEIGHT_SUFFIXES = (".safetensors", ".npz", ".gguf")

_EXAMPLES = {
    "train.jsonl": [
        {"prompt": "A question people of this domain ask.", "response": "The answer it deserves."},
        {"text": "Or plain text of the domain, which the pack learns to continue."},
    ],
    "heldout.jsonl": [
        {"prompt": "A question that is not in train.jsonl.", "response": "Its answer."},
    ],
}


def init_project(
    folder: Path,
    *,
    domain: str,
    name: str,
    base_id: str,
    n_layer: int,
    licence: str = "Apache-2.0",
) -> Manifest:
    """Makes a project folder.

    Args:
        folder: Where; it may exist, but none of its files is overwritten.
        domain: What the pack is about; its id is made of it.
        name: What people read.
        base_id: The base it is trained for.
        n_layer: Layers of that base; the sites lie in the upper half.
        licence: SPDX identifier of the pack's licence.

    Raises:
        InvalidRequestError: A file is there already, or the domain or name cannot be used.
        InstallError: The folder cannot be written.
    """
    manifest = _manifest(domain, name, base_id, licence)
    geometry = GeometryConfig(sites=default_sites(n_layer), token_gates=True)
    files = project_files(manifest, geometry)
    for file, rows in _EXAMPLES.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files[f"{DATA_FOLDER}/{file}"] = lines
    write_project(folder, files)
    return manifest


def init_router_project(folder: Path, *, base_id: str, base_digest: str) -> Manifest:
    """Makes the project folder of a router pack, named by the folder.

    Args:
        folder: Where; it may exist, but none of its files is overwritten.
        base_id: The base whose states it takes.
        base_digest: Of that base's file: other weights have other states.

    Raises:
        InvalidRequestError: A file is there already, or the folder's name makes no id.
        InstallError: The folder cannot be written.
    """
    name = folder.resolve().name
    manifest = _manifest(name, name, base_id, "Apache-2.0")
    changes = {"type": "router", "domain": "routing", "base_digest": base_digest}
    manifest = manifest.model_copy(update=changes)
    card = f"# {name}\n\nA ModularBase router pack for {base_id}. Say what it knows.\n"
    files = {MANIFEST_FILE: manifest.to_json(), README: card, ".gitignore": "/dist/\n/weights/\n"}
    write_project(folder, files)
    return manifest


def project_files(manifest: Manifest, geometry: GeometryConfig) -> dict[str, str]:
    """The texts of a project without training data, by their paths in its folder."""
    return {
        MANIFEST_FILE: manifest.to_json(),
        CONFIG_FILE: _config(manifest, geometry),
        README: _card(manifest),
        PROMPTS_FILE: f"What should everybody know about {manifest.domain}?\n",
        f"{DATA_FOLDER}/README.md": _DATA_CARD,
        f"{WEIGHTS_FOLDER}/README.md": _WEIGHTS_CARD,
        ".gitignore": "/dist/\n/runs/\n" + "".join(f"/weights/*{s}\n" for s in _WEIGHT_SUFFIXES),
    }


def write_project(folder: Path, files: Mapping[str, str]) -> None:
    """Writes the texts of a new project.

    Raises:
        InvalidRequestError: A file is there already; then none is written.
        InstallError: The folder cannot be written.
    """
    for file in files:
        if (folder / file).exists():
            raise InvalidRequestError("folder", "one without a project", str(folder / file))
    with disk_errors(str(folder), folder):
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with (folder / file).open("x", encoding="utf-8") as sink:
                sink.write(text)


def id_of(domain: str) -> str:
    """The pack id that a domain suggests: "Family law" gives family_law."""
    normal = unicodedata.normalize("NFC", domain).casefold()
    return re.sub(r"[^\w.-]+", "_", normal).strip("_.-")[:64]


def default_sites(n_layer: int) -> tuple[int, ...]:
    """At most eight layers, spread over the upper half of a base."""
    first = n_layer // 2
    n_upper = n_layer - first
    n_sites = min(N_SITES, n_upper)
    return tuple(first + i * n_upper // n_sites for i in range(n_sites))


def _manifest(domain: str, name: str, base_id: str, licence: str) -> Manifest:
    try:
        return Manifest(
            id=id_of(domain),
            version="0.1.0",
            name=unicodedata.normalize("NFC", name),
            domain=domain,
            licence=licence,
            base_id=base_id,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        raise InvalidRequestError(
            "domain" if field == "id" else field, first["msg"], repr(first["input"])
        ) from error


def _config(manifest: Manifest, geometry: GeometryConfig) -> str:
    return f"""\
# How this pack is trained. Types of the finished weights are in {MANIFEST_FILE}, `quantisation`.
base = {json.dumps(manifest.base_id, ensure_ascii=False)}

[geometry]
sites = {list(geometry.sites)}  # layers of the base, ascending
d_inner = {geometry.d_inner}  # width of the adapters, a multiple of 256
d_ff = {geometry.d_ff}  # width of an expert, a multiple of 256
n_expert = {geometry.n_expert}
n_expert_used = {geometry.n_expert_used}
norm_eps = {geometry.norm_eps!r}
scale = {geometry.scale!r}
token_gates = {json.dumps(geometry.token_gates)}  # weigh tokens one by one: other text stays alone

[optimisation]
steps = 1000
batch_tokens = 4096
learning_rate = 1e-3
warmup_steps = 50
seed = 0
"""


def _card(manifest: Manifest) -> str:
    return f"""\
# {manifest.name}

A ModularBase pack for {manifest.base_id}: {manifest.domain}.

## What it is for

Say which questions it answers better than the base alone, and which it should not be asked.

## Data

Say where the training data comes from and under which licence.

## Evaluation

Say what was measured on data/heldout.jsonl, with and without the pack.

## Licence

{manifest.licence}
"""


_DATA_CARD = """\
# Training data

One JSON object a line, UTF-8: either `prompt` and `response`, or `text`.

- `train.jsonl`: what the pack learns from. A few thousand lines of one domain are a start.
- `heldout.jsonl`: never trained on; evaluation figures come from it.

Replace the examples. Note sources and licences here.
"""

_WEIGHTS_CARD = """\
# Trained weights

One .safetensors or .npz file with the tensors of docs/pack-format.md (`site.0.in.weight`, ...), in
F32, F16 or (safetensors) BF16. `modularbase pack build` makes the pack from it.
"""
