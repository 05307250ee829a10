"""The project folder of a router pack: heads go in one by one, `pack build` makes the pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modularbase.bases.identity import BaseIdentity
from modularbase.errors import InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.packs.manifest import Manifest, Training
from modularbase.packs.project import MANIFEST_FILE, ROUTER_FILE, read_manifest
from modularbase.packs.router_file import (
    HeadName,
    LinearHead,
    Pooling,
    RoutedPack,
    RouterWeights,
    read_router,
    write_router,
)
from modularbase.packs.scaffold import init_router_project
from modularbase.storage.disk import disk_errors
from modularbase.storage.files import appearing


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A head, and what its states are.

    Attributes:
        name: Which of the two it is.
        head: Its weights.
        layer: The states are those entering it.
        pooling: How a text's states become one.
        packs: In the order of its outputs.
        figures: What was measured, for the manifest.
    """

    name: HeadName
    head: LinearHead
    layer: int
    pooling: Pooling
    packs: tuple[RoutedPack, ...]
    figures: dict[str, float]


def open_router_project(project: Path, base: Path) -> Manifest:
    """Makes a project for a router pack of a base, unless it is there.

    Raises:
        InvalidRequestError: It is the project of a domain pack, or for another base.
        PackFormatError: Its manifest is not sound.
        InstallError: It cannot be written.
    """
    identity = BaseIdentity(base, read_metadata(base))
    if not (project / MANIFEST_FILE).exists():
        return init_router_project(project, base_id=identity.id, base_digest=identity.digest)
    manifest = read_manifest(project)
    for field, expected, found in (
        ("type", "router", manifest.type),
        ("base_id", identity.id, manifest.base_id),
        ("base_digest", identity.digest, manifest.base_digest),
    ):
        if found != expected:
            place = f"{found} in {project / MANIFEST_FILE}"
            raise InvalidRequestError(f"project {field}", expected, place)
    return manifest


def trained_router(project: Path) -> RouterWeights | None:
    """What has been trained so far.

    Raises:
        PackFormatError: The file is not sound.
    """
    path = project / ROUTER_FILE
    return read_router(path) if path.exists() else None


def save_head(project: Path, trained: TrainedHead, training: Training) -> Path:
    """Puts a head into the project's weights; the other one stays if it goes with it.

    Args:
        project: As `open_router_project` made it.
        trained: The head.
        training: How it can be made again.

    Returns:
        The file with the weights.

    Raises:
        InvalidRequestError: The project has another head, of other packs or states.
        InstallError: The project cannot be written.
    """
    manifest = read_manifest(project)
    figures = {f"{trained.name} {name}": value for name, value in trained.figures.items()}
    changes = {"training": training, "evaluation": {**manifest.evaluation, **figures}}
    manifest = manifest.model_copy(update=changes)
    weights = RouterWeights(
        manifest=manifest,
        layer=trained.layer,
        pooling=trained.pooling,
        packs=trained.packs,
        heads={**_kept(project, trained), trained.name: trained.head},
    )
    path = project / ROUTER_FILE
    with disk_errors(path.name, path):
        path.parent.mkdir(exist_ok=True)
    write_router(path, weights)
    with appearing(project / MANIFEST_FILE) as part:
        part.write_text(manifest.to_json(), encoding="utf-8")
    return path


def check_matches(project: Path, trained_name: HeadName, wanted: tuple[object, ...]) -> None:
    """Refuses to train a head that does not go with the one the project has already.

    Args:
        project: The project's folder.
        trained_name: The head that is to be trained.
        wanted: Its packs, layer and pooling.

    Raises:
        InvalidRequestError: The other head is of other packs or states.
    """
    known = trained_router(project)
    if known is None or not known.heads.keys() - {trained_name}:
        return
    for field, found, there in zip(
        ("packs", "layer", "pooling"),
        wanted,
        (known.packs, known.layer, known.pooling),
        strict=True,
    ):
        if found != there:
            expected = f"{there}, as its other head has, or a project of its own"
            raise InvalidRequestError(field, expected, str(found))


def _kept(project: Path, trained: TrainedHead) -> dict[HeadName, LinearHead]:
    check_matches(project, trained.name, (trained.packs, trained.layer, trained.pooling))
    known = trained_router(project)
    heads = known.heads if known else {}
    return {name: head for name, head in heads.items() if name != trained.name}
