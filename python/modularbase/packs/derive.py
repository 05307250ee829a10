"""The next version of a pack: a project that begins with the weights of one there is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from packaging.version import Version

from modularbase.errors import InvalidRequestError
from modularbase.packs.archive import GGUF, LICENCE, README, SUFFIX
from modularbase.packs.manifest import Manifest, Origin, Training, parse_manifest
from modularbase.packs.obtain import obtain
from modularbase.packs.pack_file import PackFacts, inspect_pack
from modularbase.packs.project import (
    DATA_FOLDER,
    DIST_FOLDER,
    MANIFEST_FILE,
    PARENT_FILE,
    PROMPTS_FILE,
    GeometryConfig,
    read_manifest,
)
from modularbase.packs.resolver import BaseVersion
from modularbase.packs.scaffold import project_files, write_project
from modularbase.packs.spec import parse_spec
from modularbase.packs.store import PackStore
from modularbase.storage.digest import sha256_of
from modularbase.storage.disk import disk_errors
from modularbase.storage.files import appearing
from modularbase.storage.progress import no_progress


@dataclass(frozen=True, slots=True)
class ParentPack:
    """A pack to begin with.

    Attributes:
        gguf: Its pack file.
        texts: README.md and, where there are any, LICENSE and prompts.txt, by name.
        data: The folder with its training data; None where only the pack is there.
    """

    gguf: Path
    texts: dict[str, str]
    data: Path | None

    def facts(self) -> PackFacts:
        """What the pack file holds.

        Raises:
            PackFormatError: It is not sound.
        """
        return inspect_pack(self.gguf)


@contextmanager
def open_parent(place: str) -> Iterator[ParentPack]:
    """Finds a pack to begin with; an archive is unpacked for as long as it is open.

    Args:
        place: Folder of a project that has been built, an archive, a pack file, or the name of an
            installed pack.

    Raises:
        InvalidRequestError: The project has not been built.
        PackNotFoundError: No such pack is installed.
        PackFormatError: The archive or pack file is not sound.
        InstallError: There is no such file, or no room to unpack it.
    """
    path = Path(place).expanduser()
    if (path / MANIFEST_FILE).is_file():
        gguf = path / DIST_FOLDER / GGUF
        if not gguf.is_file():
            raise InvalidRequestError("project", "one that `pack build` has built", str(path))
        yield ParentPack(gguf, _texts(path), path / DATA_FOLDER)
    elif path.suffix in (SUFFIX, ".gguf"):
        with tempfile.TemporaryDirectory(prefix="modularbase-") as name:
            found = obtain(str(path.absolute()), Path(name), None, no_progress)
            yield ParentPack(found.path, _texts(found.folder), None)
    else:
        pack = PackStore().find(parse_spec(place))
        yield ParentPack(pack.path, _texts(pack.folder), None)


def next_version(version: str) -> str:
    """The next minor version: 1.0.3 gives 1.1.0."""
    major, minor, _ = Version(version).release
    return f"{major}.{minor + 1}.0"


def next_manifest(parent: ParentPack, version: str | None, base: BaseVersion | None) -> Manifest:
    """What the next version of a pack says of itself before it is trained and measured.

    Args:
        parent: The pack it is made from.
        version: Its version; None: the next minor one.
        base: The base it will be for, in that version alone; None: those of the parent.

    Raises:
        PackFormatError: The parent or the version is not sound.
        InvalidRequestError: The version is the parent's.
    """
    old = parent.facts().manifest
    version = version or next_version(old.version)
    if version == old.version:
        raise InvalidRequestError("version", f"another one than {old.version}", version)
    digest = "sha256:" + sha256_of(parent.gguf, lambda _: None)
    origin = Origin(id=old.id, version=old.version, digest=digest)
    changes = {
        "version": version,
        "evaluation": {},
        "quantisation": old.quantisation.model_copy(update={"kl": None}),
        "training": Training(data_licence=old.training.data_licence, derived_from=origin),
    }
    if base is not None:
        required = {"base_compatibility": (f"=={base.version}",), "base_digest": None}
        changes |= {"base_id": base.id, **required}
    return parse_manifest(old.model_copy(update=changes).to_json(), "the new pack")


def derive_project(
    folder: Path, parent: ParentPack, manifest: Manifest, *, token_gates: bool
) -> None:
    """Makes a project whose pack begins with the weights of another, in weights/parent.gguf.

    A project that was begun with the same manifest, and not trained since, is taken as it is.

    Args:
        folder: Where; none of its files is overwritten.
        parent: The pack to begin with.
        manifest: As `next_manifest` gives it.
        token_gates: Whether the pack has them, also where the parent lacks them.

    Raises:
        InvalidRequestError: There is another project already.
        InstallError: The folder cannot be written.
    """
    begun = (folder / MANIFEST_FILE).is_file() and (folder / PARENT_FILE).is_file()
    if begun and read_manifest(folder) == manifest:
        return
    facts = parent.facts()
    shape = facts.geometry
    geometry = GeometryConfig(
        sites=shape.sites,
        d_inner=shape.d_inner,
        d_ff=shape.d_ff,
        n_expert=shape.n_expert,
        n_expert_used=shape.n_expert_used,
        norm_eps=_shortest(shape.norm_eps),
        scale=_shortest(facts.scale),
        token_gates=token_gates or facts.has_token_gates,
    )
    write_project(folder, project_files(manifest, geometry) | parent.texts)
    with disk_errors(manifest.id, folder), appearing(folder / PARENT_FILE) as part:
        shutil.copyfile(parent.gguf, part)


def _texts(folder: Path) -> dict[str, str]:
    names = (README, LICENCE, PROMPTS_FILE)
    found = [name for name in names if (folder / name).is_file()]
    return {name: (folder / name).read_text(encoding="utf-8") for name in found}


def _shortest(value: float) -> float:
    """The shortest number with the same F32: 1e-05 for what a file holds of it."""
    return float(str(np.float32(value)))
