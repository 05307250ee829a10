"""What the C++ runtime does with packs, as Python sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from modularbase.packs.manifest import Manifest
from modularbase.packs.weights import Probe
from modularbase.types import PackStatus


class Residency(Protocol):
    """What the C++ runtime does with generations."""

    def open(self, path: str, digest: str, name: str) -> int:
        """Checks a file; the same content is the same generation."""

    def retire(self, id: int) -> None:
        """No new leases."""

    def load(self, id: int, timeout_ms: int) -> bool:
        """Whether it was resident within the time."""

    def preload(self, id: int) -> None:
        """Loads when nothing more urgent is to be done."""

    def evict(self, id: int) -> None:
        """Frees the slot."""

    def pin(self, id: int) -> None:
        """Keeps it from being evicted."""

    def unpin(self, id: int) -> None:
        """Lets it be evicted."""

    def status(self) -> Any:
        """All generations, the budget and counters."""

    def status_of(self, id: int) -> Any:
        """One generation."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One content of a pack that the runtime knows."""

    core_id: int
    digest: str
    manifest: Manifest
    path: Path
    probe: Probe | None  # what it should do to the base, where the file says so

    def __str__(self) -> str:
        return f"{self.manifest.id}@{self.manifest.version}"


def pack_status(name: str, version: str, raw: Any, *, is_retired: bool) -> PackStatus:
    """One generation, as callers see it."""
    return PackStatus(
        id=name,
        version=version,
        digest=raw.digest,
        path=raw.path,
        state=raw.state.name,
        n_bytes=raw.n_bytes,
        slot=raw.slot if raw.slot > 0 else None,
        n_leases=raw.n_leases,
        is_pinned=raw.is_pinned,
        is_retired=is_retired,
        n_hits=raw.n_hits,
        n_loads=raw.n_loads,
        idle_s=raw.idle_s if raw.idle_s >= 0 else None,
        verify_us=raw.verify_us,
        load_us=raw.load_us,
        last_error=raw.last_error,
    )
