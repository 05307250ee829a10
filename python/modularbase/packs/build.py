"""From trained weights to a pack that can be installed; and from one expert type to another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modularbase.errors import InvalidRequestError, PackFormatError
from modularbase.packs import archive
from modularbase.packs.manifest import ExpertType, Manifest, Origin, parse_manifest
from modularbase.packs.pack_file import (
    PackFacts,
    read_pack,
    rounding_errors,
    unchanged_tensors,
    write_pack,
)
from modularbase.packs.project import (
    DIST_FOLDER,
    PARENT_FILE,
    ROUTER_FILE,
    WEIGHTS_FOLDER,
    TrainConfig,
    archive_path,
    read_config,
    read_manifest,
)
from modularbase.packs.router_file import read_router, write_router
from modularbase.packs.weights import PackGeometry, PackWeights, Probe
from modularbase.packs.weights_file import SUFFIXES, read_weights
from modularbase.storage.digest import sha256_of
from modularbase.storage.disk import disk_errors
from modularbase.types import FloatArray


@dataclass(frozen=True, slots=True)
class Measured:
    """What the engine found of a pack: its probe, and KL(F16 experts || rounded ones) a token."""

    probe: Probe
    kl: float


Measure = Callable[[Path, Path], Measured]
"""Measures a pack, given its file with F16 experts and with the experts it will have."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was built, and what rounding cost.

    Attributes:
        manifest: As it is in the pack.
        gguf: The pack file, or None where only an archive was made.
        archive: The archive, or None where only a pack file was made.
        errors: Relative RMS error of each rounded matrix, by tensor.
    """

    manifest: Manifest
    gguf: Path | None
    archive: Path | None
    errors: Mapping[str, float]


def build(project: Path, measure: Measure | None = None) -> BuildReport:
    """Builds a project's weights into dist/pack.gguf and dist/ID-VERSION.mbpack.

    Where the pack was made from another (weights/parent.gguf), tensors that still have its values
    and types are copied byte by byte.

    Args:
        project: The project's folder.
        measure: Tries a domain pack on its base; without it the pack has no probe and no KL figure.

    Raises:
        PackFormatError: The project or its weights are not what they should be.
        InstallError: dist/ cannot be written.
    """
    manifest = read_manifest(project)
    gguf, target = project / DIST_FOLDER / archive.GGUF, archive_path(project, manifest)
    if manifest.type == "router":
        router = replace(read_router(project / ROUTER_FILE), manifest=manifest)
        _make_dist(project)
        written, errors = write_router(gguf, router).manifest, {}
    else:
        weights = _domain_weights(project, manifest, measure)
        _make_dist(project)
        written = _write(gguf, weights, project / PARENT_FILE).manifest
        errors = rounding_errors(weights)
    licence = project / archive.LICENCE
    archive.write_archive(
        target,
        gguf,
        _text(project / archive.README),
        _text(licence) if licence.exists() else None,
    )
    return BuildReport(written, gguf, target, errors)


def quantize(source: Path, target: Path, experts: ExpertType, version: str) -> BuildReport:
    """Writes a pack anew with another type of experts.

    Args:
        source: An archive or a pack file.
        target: The same kind of file.
        experts: The type wanted.
        version: Of the new pack: a version has one content.

    Raises:
        InvalidRequestError: The kinds differ, the version is the old one, or none at all.
        PackFormatError: The source is not a sound pack.
        InstallError: The target cannot be written.
    """
    is_archive = source.suffix == archive.SUFFIX
    if source.suffix != target.suffix:
        raise InvalidRequestError("output", f"a {source.suffix} file, as the input", str(target))
    if not is_archive:
        weights = _requantized(source, experts, version)
        return BuildReport(
            write_pack(target, weights).manifest, target, None, rounding_errors(weights)
        )
    with tempfile.TemporaryDirectory(prefix="modularbase-") as name:
        folder = Path(name)
        archive.unpack(source, folder, lambda _: None)
        weights = _requantized(folder / archive.GGUF, experts, version)
        gguf, licence = folder / "quantized.gguf", folder / archive.LICENCE
        write_pack(gguf, weights)
        written = archive.write_archive(
            target,
            gguf,
            _text(folder / archive.README),
            _text(licence) if licence.exists() else None,
        )
        return BuildReport(written, None, target, rounding_errors(weights))


def _make_dist(project: Path) -> None:
    folder = project / DIST_FOLDER
    with disk_errors(folder.name, folder):
        folder.mkdir(exist_ok=True)


def _domain_weights(project: Path, manifest: Manifest, measure: Measure | None) -> PackWeights:
    config = read_config(project)
    if manifest.base_id != config.base:
        raise PackFormatError(str(project), "train.toml base", manifest.base_id, config.base)
    source = _weights_path(project)
    tensors = read_weights(source)
    weights = PackWeights(
        geometry=_geometry(config, tensors, source),
        tensors=tensors,
        manifest=manifest,
        scale=config.geometry.scale,
    )
    return weights if measure is None else _measured(weights, project / PARENT_FILE, measure)


def _write(path: Path, weights: PackWeights, parent: Path) -> PackFacts:
    unchanged = unchanged_tensors(parent, weights) if parent.is_file() else None
    return write_pack(path, weights, unchanged)


def _measured(weights: PackWeights, parent: Path, measure: Measure) -> PackWeights:
    said = weights.manifest.quantisation
    exact = weights.manifest.model_copy(
        update={"quantisation": said.model_copy(update={"experts": "f16"})}
    )
    with tempfile.TemporaryDirectory(prefix="modularbase-") as name:
        paths = Path(name) / "exact.gguf", Path(name) / "rounded.gguf"
        write_pack(paths[0], replace(weights, manifest=exact))
        _write(paths[1], weights, parent)
        found = measure(*paths)
    quantisation = said.model_copy(update={"kl": found.kl})
    manifest = weights.manifest.model_copy(update={"quantisation": quantisation})
    return replace(weights, manifest=manifest, probe=found.probe)


def _requantized(gguf: Path, experts: ExpertType, version: str) -> PackWeights:
    weights = read_pack(gguf)
    old = weights.manifest
    if version == old.version:
        raise InvalidRequestError("version", f"another one than {old.version}", version)
    digest = "sha256:" + sha256_of(gguf, lambda _: None)
    origin = Origin(id=old.id, version=old.version, digest=digest)
    changes = {
        "version": version,
        "quantisation": old.quantisation.model_copy(update={"experts": experts, "kl": None}),
        "training": old.training.model_copy(update={"derived_from": origin}),
    }
    manifest = parse_manifest(old.model_copy(update=changes).to_json(), "the new pack")
    return replace(weights, manifest=manifest)


def _weights_path(project: Path) -> Path:
    folder = project / WEIGHTS_FOLDER
    found = [path for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    if len(found) != 1:
        expected = "one .safetensors or .npz file"
        names = ", ".join(path.name for path in found) or "none"
        raise PackFormatError(str(folder), "weights", expected, names)
    return found[0]


def _geometry(config: TrainConfig, tensors: Mapping[str, FloatArray], source: Path) -> PackGeometry:
    first = tensors.get("site.0.in.weight")
    if first is None or first.ndim != 2:
        found = "none" if first is None else f"{first.ndim} dimensions"
        raise PackFormatError(str(source), "site.0.in.weight", "a matrix", found)
    said = config.geometry
    return PackGeometry(
        n_embd=first.shape[1],
        d_inner=said.d_inner,
        d_ff=said.d_ff,
        n_expert=said.n_expert,
        n_expert_used=said.n_expert_used,
        sites=said.sites,
        norm_eps=said.norm_eps,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PackFormatError(str(path), "file", "UTF-8 text", str(error)) from error
