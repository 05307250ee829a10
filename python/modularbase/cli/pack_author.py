"""The commands of `modularbase pack` for those who make packs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from modularbase.bases import catalogue, install
from modularbase.cli.console import DEFAULT_BASE, Json, err, out, print_json
from modularbase.engine import Engine
from modularbase.errors import BaseNotFoundError, InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.pack_evaluation import NEUTRAL_TEXT, PackMeasure
from modularbase.packs import build as building
from modularbase.packs.build import BuildReport
from modularbase.packs.index import write_index
from modularbase.packs.manifest import ExpertType
from modularbase.packs.project import (
    PROMPTS_FILE,
    WEIGHTS_FOLDER,
    read_config,
    read_manifest,
)
from modularbase.packs.random_pack import random_weights
from modularbase.packs.scaffold import id_of, init_project
from modularbase.packs.weights import PackGeometry


def init(
    domain: Annotated[str, typer.Option("--domain", help="What the pack is about.")],
    name: Annotated[str | None, typer.Option("--name", help="What people read.")] = None,
    base: Annotated[
        str, typer.Option("--base", "-b", help="Base it is for: a name, or a GGUF file.")
    ] = DEFAULT_BASE,
    licence: Annotated[str, typer.Option(help="SPDX identifier.")] = "Apache-2.0",
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where; by default named by the pack's id.")
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            "--random", help="Adds random weights of this seed, to try the rest before training."
        ),
    ] = None,
) -> None:
    """Makes a project folder to train and publish a pack from."""
    base_id, n_layer = _base_facts(base)
    place = folder or Path(id_of(domain) or "pack")
    manifest = init_project(
        place,
        domain=domain,
        name=name or domain,
        base_id=base_id,
        n_layer=n_layer,
        licence=licence,
    )
    if random is not None:
        _write_random(place, base, random)
    err.print(f"{manifest.id} {manifest.version} is ready to be trained: {place}", markup=False)


def build(
    project: Annotated[Path, typer.Argument(help="Project folder.")] = Path(),
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="Base to try it on; by default the manifest's."),
    ] = None,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Do not try it: no probe, no KL figure.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Makes dist/pack.gguf and an archive from a project's trained weights.

    The pack is tried on its base: what rounding costs is reported, and what it does to a few tokens
    is stored in it, so that every engine can check it.
    """
    manifest = read_manifest(project)
    if unmeasured or manifest.type == "router":  # only a domain pack changes what the base says
        _print_report(building.build(project), as_json)
        return
    name = base or manifest.base_id
    with Engine.load(name, pack_budget="2GB") as engine:
        report = building.build(project, PackMeasure(engine, _test_text(project)))
    _print_report(report, as_json)


def quantize(
    source: Annotated[Path, typer.Argument(help="Archive or pack file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the same kind.")],
    experts: Annotated[ExpertType, typer.Option(help="Type of the experts.")],
    version: Annotated[str, typer.Option(help="Version of the new pack.")],
    as_json: Json = False,
) -> None:
    """Writes a pack anew with another type of experts."""
    _print_report(building.quantize(source, output, experts, version), as_json)


def index(
    folder: Annotated[Path, typer.Argument(help="Folder with archives or pack files.")] = Path(),
) -> None:
    """Writes the index.json of a folder, so that others can install from it."""
    found = write_index(folder)
    err.print(f"{len(found.entries)} packs are in the index of {folder}", markup=False)


def _write_random(project: Path, base: str, seed: int) -> None:
    metadata = read_metadata(install.resolve(base, install=True))
    n_embd = metadata.get(f"{metadata.get('general.architecture')}.embedding_length")
    if not isinstance(n_embd, int):
        raise InvalidRequestError("--base", "a model with an embedding", base)
    said = read_config(project).geometry
    geometry = PackGeometry(n_embd=n_embd, d_inner=said.d_inner, d_ff=said.d_ff, sites=said.sites)
    weights = random_weights(read_manifest(project), geometry, seed=seed)
    np.savez(project / WEIGHTS_FOLDER / "random.npz", allow_pickle=False, **weights.tensors)


def _test_text(project: Path) -> str:
    path = project / PROMPTS_FILE
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return text or NEUTRAL_TEXT


def _base_facts(base: str) -> tuple[str, int]:
    try:
        entry = catalogue.find(base)
    except BaseNotFoundError:
        if not Path(base).is_file():
            raise
    else:
        return entry.name, entry.n_layer
    metadata = read_metadata(base)
    n_layer = metadata.get(f"{metadata.get('general.architecture')}.block_count")
    if not isinstance(n_layer, int) or n_layer < 1:
        raise InvalidRequestError("--base", "a model with layers", base)
    return Path(base).stem, n_layer


def _print_report(report: BuildReport, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "id": report.manifest.id,
                "version": report.manifest.version,
                "size_bytes": report.manifest.size_bytes,
                "quantisation": report.manifest.quantisation.model_dump(),
                "gguf": report.gguf and str(report.gguf),
                "archive": report.archive and str(report.archive),
                "errors": dict(report.errors),
            }
        )
        return
    table = Table("tensor", "relative RMS error of rounding")
    for name, error in report.errors.items():
        table.add_row(name, f"{error:.2e}")
    if report.errors:
        out.print(table)
    kl = report.manifest.quantisation.kl
    if kl is not None:
        err.print(f"KL to F16 experts: {kl:.2e} nats a token")
    for path in filter(None, (report.gguf, report.archive)):
        err.print(f"{report.manifest.id} {report.manifest.version}: {path}", markup=False)
