"""Trained weights into the project, for `pack build`, or straight into a pack file."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.numpy import save_file

from modularbase.errors import InvalidRequestError
from modularbase.packs.manifest import AdapterType, ExpertType, Manifest, Training
from modularbase.packs.pack_file import PackFacts, read_pack, write_pack
from modularbase.packs.project import MANIFEST_FILE, PARENT_FILE, WEIGHTS_FOLDER, read_manifest
from modularbase.packs.weights import PROFILE, PackWeights
from modularbase.packs.weights_file import SUFFIXES
from modularbase.storage.disk import disk_errors
from modularbase.storage.files import appearing
from modularbase.training.fit import FitReport
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule

WEIGHTS_FILE = "trained.safetensors"


def check_target(project: Path) -> None:
    """Refuses a project whose weights come from elsewhere, before a run wastes its time.

    Raises:
        InvalidRequestError: Naming the file.
    """
    folder = project / WEIGHTS_FOLDER
    for path in sorted(folder.glob("*")):
        if path.suffix in SUFFIXES and path.name != WEIGHTS_FILE:
            raise InvalidRequestError("project", "no weights but trained ones", str(path))


def provenance(
    before: Training, options: TrainOptions, report: FitReport, command: str, licence: str
) -> Training:
    """How a run's weights can be made again.

    Args:
        before: What the project's manifest says; what is not known better stays.
        options: What the run was told.
        report: How it ended.
        command: What a user typed, or "".
        licence: Of the text, or "".
    """
    sources = [*map(_shown, options.data), *(f"neutral: {_shown(p)}" for p in options.neutral)]
    if options.teacher:
        sources.append(f"teacher: {options.teacher.name}")
    changes = {
        "command": command,
        "seed": options.seed,
        "data": tuple(sources),
        "data_licence": licence or before.data_licence,
        "n_tokens": report.n_tokens,
        "n_steps": report.n_steps,
    }
    return before.model_copy(update=changes)


def trained_manifest(manifest: Manifest, training: Training, report: FitReport) -> Manifest:
    """A manifest that says where the weights come from, and what was measured.

    A figure behind which nothing was measured, or which is not finite, is left out.
    """
    found = {f"heldout {name}": value for name, value in report.figures.items()}
    found |= {f"heldout {name} of the base": value for name, value in report.base.items()}
    if manifest.training.derived_from:
        found |= {f"heldout {name} of the parent": value for name, value in report.start.items()}
    kept = {name.replace("_", " "): value for name, value in found.items() if math.isfinite(value)}
    changes = {"training": training, "evaluation": {**manifest.evaluation, **kept}}
    return manifest.model_copy(update=changes)


def write_weights(project: Path, pack: PackModule, manifest: Manifest) -> Path:
    """Puts weights and manifest into a project, so that `pack build` makes a pack of them.

    Args:
        project: The project's folder.
        pack: The trained pack.
        manifest: As `trained_manifest` gives it.

    Returns:
        The file with the weights.

    Raises:
        InstallError: The folder cannot be written.
    """
    tensors = pack.to_arrays()
    parent = project / PARENT_FILE
    if parent.is_file():  # what queries the pack is for is not trained
        tensors |= {n: a for n, a in read_pack(parent).tensors.items() if n == PROFILE}
    path = project / WEIGHTS_FOLDER / WEIGHTS_FILE
    with disk_errors(path.name, path):
        path.parent.mkdir(exist_ok=True)
    with appearing(path) as part:
        save_file(tensors, part)
    with appearing(project / MANIFEST_FILE) as part:
        part.write_text(manifest.to_json(), encoding="utf-8")
    return path


def export_pack(
    path: Path,
    pack: PackModule,
    manifest: Manifest,
    *,
    experts: ExpertType | None = None,
    adapters: AdapterType | None = None,
) -> PackFacts:
    """Writes a pack file.

    Args:
        path: Where it goes.
        pack: The pack.
        manifest: What it says of itself.
        experts: Type of the experts; None takes the manifest's.
        adapters: Type of the adapters; None takes the manifest's.

    Raises:
        PackFormatError: The weights do not fit their type; they must be finite.
        InstallError: The file cannot be written.
    """
    said = manifest.quantisation
    types = {"experts": experts or said.experts, "adapters": adapters or said.adapters, "kl": None}
    manifest = manifest.model_copy(update={"quantisation": said.model_copy(update=types)})
    return write_pack(path, to_weights(pack, manifest))


def to_weights(pack: PackModule, manifest: Manifest) -> PackWeights:
    """The pack as the rest of the package knows it."""
    return PackWeights(
        geometry=pack.geometry, tensors=pack.to_arrays(), manifest=manifest, scale=pack.scale
    )


def save_result(
    options: TrainOptions, report: FitReport, *, command: str = "", licence: str = ""
) -> Path:
    """Puts a finished run's pack into its project.

    Args:
        options: What the run was told.
        report: How it ended.
        command: What a user typed.
        licence: Of the text; "" keeps what the manifest says.
    """
    manifest = read_manifest(options.project)
    training = provenance(manifest.training, options, report, command, licence)
    return write_weights(options.project, report.pack, trained_manifest(manifest, training, report))


def _shown(path: Path) -> str:
    """A path as a user of the working directory would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
