"""Which pack needs which, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modularbase.packs.manifest import Manifest, PackRequirement
from modularbase.packs.resolver import PackSource, preference


def tree_lines(roots: Sequence[Manifest], source: PackSource) -> list[str]:
    """A tree for each root; each dependency with the newest version that suits, or "missing"."""
    lines = []
    for root in roots:
        lines.append(f"{root.id} {root.version}")
        lines.extend(_branches(root, source, "", (root.id,)))
    return lines


def missing_dependencies(manifest: Manifest, source: PackSource) -> list[PackRequirement]:
    """What a pack needs and the source does not have."""
    return [need for need in manifest.dependencies if _newest(need, source) is None]


def _branches(
    manifest: Manifest, source: PackSource, indent: str, path: tuple[str, ...]
) -> Iterator[str]:
    for i, need in enumerate(manifest.dependencies):
        is_last = i + 1 == len(manifest.dependencies)
        found = _newest(need, source)
        asked = f" (needs {need.version})" if need.version else ""
        text = f"{need.id} {found.version if found else 'missing'}{asked}"
        is_circle = need.id in path
        yield f"{indent}{'└── ' if is_last else '├── '}{text}{' (circle)' if is_circle else ''}"
        if found and not is_circle:
            deeper = indent + ("    " if is_last else "│   ")
            yield from _branches(found, source, deeper, (*path, need.id))


def _newest(need: PackRequirement, source: PackSource) -> Manifest | None:
    suitable = [m for m in source.versions(need.id) if need.accepts(m.version)]
    return max(suitable, key=preference, default=None)
