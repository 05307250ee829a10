"""`modularbase pack`: what is installed, and changing it. Making packs is in pack_author.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from modularbase.cli.console import EXIT_FAILED, Json, err, out, print_facts, print_json
from modularbase.cli.pack_author import build, index, init, quantize
from modularbase.cli.progress import install_bar
from modularbase.errors import InstallError, InvalidRequestError, PackNotFoundError
from modularbase.packs import install as packs
from modularbase.packs.archive import SUFFIX, read_archive_manifest
from modularbase.packs.index import open_index
from modularbase.packs.inspection import is_router
from modularbase.packs.lockfile import LOCK_FILE, lock_installed, read_lock, write_lock
from modularbase.packs.pack_file import inspect_pack
from modularbase.packs.resolver import BaseVersion
from modularbase.packs.router_file import RouterWeights, read_router
from modularbase.packs.spec import parse_spec
from modularbase.packs.store import InstalledPack, PackStore
from modularbase.packs.tree import tree_lines
from modularbase.packs.verify import Verdict, verify_file, verify_installed

pack_app = typer.Typer(no_args_is_help=True, help="Make, install, check and remove packs.")
for command in (init, build, quantize, index):
    pack_app.command()(command)

Name = Annotated[str, typer.Argument(help="ID, ID@VERSION or ID@SPECIFIERS.")]
Names = Annotated[
    list[str] | None, typer.Argument(help="ID, ID@VERSION or ID@SPECIFIERS; all if left out.")
]
Indexes = Annotated[
    list[str] | None,
    typer.Option(
        "--index", envvar="MODULARBASE_PACK_INDEX", help="Folder, index.json or URL to look in."
    ),
]
OnBase = Annotated[
    str | None, typer.Option("--base", "-b", help="Base the packs must suit, as ID@VERSION.")
]


@pack_app.command("list")
def list_packs(as_json: Json = False) -> None:
    """Lists installed packs."""
    store = PackStore()
    rows = [_row(store, pack_id, version) for pack_id, version in store.names()]
    if as_json:
        print_json(rows)
        return
    table = Table("id", "version", "type", "name", "base", "experts", "MB", "state")
    for row in rows:
        size = f"{row['n_bytes'] / 1e6:.1f}" if row["n_bytes"] else "?"
        known = ("id", "version", "type", "name", "base_id")
        shown = (row[key] or "?" for key in known)
        table.add_row(*shown, row["experts"] or "", size, row["damage"] or "installed")
    out.print(table)


@pack_app.command()
def install(
    specs: Annotated[
        list[str] | None,
        typer.Argument(help="ID, ID@VERSION, ID@SPECIFIERS, a path with a slash, or a URL."),
    ] = None,
    lock: Annotated[Path | None, typer.Option("--lock", help="Install this lock file.")] = None,
    places: Indexes = None,
    base: OnBase = None,
    as_json: Json = False,
) -> None:
    """Installs packs and all they need: every one of them, or none."""
    if bool(specs) == (lock is not None):
        raise InvalidRequestError("install", "packs, or --lock with a file", "both or neither")
    options: dict[str, Any] = {
        "indexes": [open_index(place) for place in places or ()],
        "base": _base(base),
    }
    with install_bar("packs") as show:
        if lock:
            installed = packs.install_locked(read_lock(lock), progress=show, **options)
        else:
            installed = packs.install(specs or [], progress=show, **options)
    if as_json:
        print_json([_installed_row(pack) for pack in installed])
    else:
        for pack in installed:
            err.print(f"{pack} is installed: {pack.path}", soft_wrap=True, markup=False)


@pack_app.command()
def remove(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Remove it though other packs need it.")
    ] = False,
) -> None:
    """Removes all installed versions that suit."""
    store = PackStore()
    take_away = store.remove_needed if force else store.remove
    for removed in take_away(parse_spec(name)):
        err.print(f"{removed} is removed", markup=False)


@pack_app.command()
def info(name: Name, as_json: Json = False) -> None:
    """Prints what an installed pack, or an archive or pack file, says of itself."""
    facts = _facts(name)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts, name)


@pack_app.command()
def verify(names: Names = None, as_json: Json = False) -> None:
    """Checks digests, formats, manifests and dependencies of packs; files may be named too."""
    store = PackStore()
    if names:
        verdicts = [verdict for name in names for verdict in _verdicts(name, store)]
    else:
        verdicts = [verify_installed(*installed, store) for installed in store.names()]
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
    else:
        table = Table("id", "version", "verdict")
        for verdict in verdicts:
            table.add_row(verdict.id, verdict.version, "\n".join(verdict.faults) or "sound")
        out.print(table)
    if any(verdict.faults for verdict in verdicts):
        raise typer.Exit(EXIT_FAILED)


@pack_app.command()
def lock(
    names: Names = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Lock file.")] = Path(LOCK_FILE),
    base: OnBase = None,
) -> None:
    """Writes down exactly which packs are installed, and what they need."""
    requirements = [parse_spec(name) for name in names or ()]
    locked = lock_installed(requirements, _base(base), PackStore())
    write_lock(output, locked)
    err.print(f"{len(locked.packs)} packs are locked in {output}", soft_wrap=True, markup=False)


@pack_app.command()
def tree(names: Names = None) -> None:
    """Prints which installed packs need which."""
    store = PackStore()
    if names:
        roots = [store.find(parse_spec(name)).manifest for name in names]
    else:
        everything = [pack.manifest for pack in store.packs()]
        needed = {need.id for manifest in everything for need in manifest.dependencies}
        roots = [manifest for manifest in everything if manifest.id not in needed] or everything
    for line in tree_lines(roots, store):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _base(text: str | None) -> BaseVersion | None:
    if text is None:
        return None
    base_id, _, version = text.partition("@")
    if not base_id or not version:
        raise InvalidRequestError("--base", "ID@VERSION, such as smollm2-135m@1.0.0", repr(text))
    return BaseVersion(base_id, version)


def _row(store: PackStore, pack_id: str, version: str) -> dict[str, Any]:
    try:
        return _installed_row(store.read(pack_id, version))
    except InstallError as error:
        fields = ("type", "name", "base_id", "experts", "n_bytes", "sha256", "path")
        unknown = dict.fromkeys(fields)
        return {"id": pack_id, "version": version, **unknown, "damage": error.reason}


def _installed_row(pack: InstalledPack) -> dict[str, Any]:
    is_domain = pack.manifest.type == "domain"
    return {
        "id": pack.manifest.id,
        "version": pack.manifest.version,
        "type": pack.manifest.type,
        "name": pack.manifest.name,
        "base_id": pack.manifest.base_id,
        "experts": pack.manifest.quantisation.experts if is_domain else None,
        "n_bytes": pack.record.n_bytes,
        "sha256": pack.record.sha256,
        "path": str(pack.path),
        "damage": None,
    }


def _is_file(name: str) -> bool:
    return os.sep in name or name.endswith((SUFFIX, ".gguf"))


def _facts(name: str) -> dict[str, object]:
    path = Path(name).expanduser()
    if not _is_file(name):
        pack = PackStore().find(parse_spec(name))
        return _manifest_and_shape(pack.path) | asdict(pack.record)
    if path.suffix == SUFFIX:  # the pack file inside stays where it is
        return read_archive_manifest(path).model_dump(mode="json")
    return _manifest_and_shape(path)


def _manifest_and_shape(path: Path) -> dict[str, object]:
    if is_router(path):
        return _router_facts(read_router(path))
    facts = inspect_pack(path)
    shape: Mapping[str, object] = asdict(facts.geometry)
    rest = {
        "scale": facts.scale,
        "has_token_gates": facts.has_token_gates,
        "n_centroids": facts.n_centroids,
        "has_probe": facts.probe is not None,
    }
    return facts.manifest.model_dump(mode="json") | dict(shape) | rest


def _router_facts(router: RouterWeights) -> dict[str, object]:
    manifest = router.manifest.model_dump(mode="json", exclude={"quantisation"})
    return manifest | {
        "n_embd": router.n_embd,
        "layer": router.layer,
        "pooling": router.pooling,
        "packs": [asdict(pack) for pack in router.packs],
        "heads": list(router.heads),
    }


def _verdicts(name: str, store: PackStore) -> list[Verdict]:
    if _is_file(name):
        manifest = verify_file(Path(name).expanduser())
        return [Verdict(manifest.id, manifest.version, ())]
    wanted = parse_spec(name)
    # By folder: `find` would not see what is damaged.
    versions = [v for pack_id, v in store.names() if pack_id == wanted.id and wanted.accepts(v)]
    if not versions:
        raise PackNotFoundError(wanted.id, wanted.version, map(" ".join, store.names()))
    return [verify_installed(wanted.id, version, store) for version in versions]
