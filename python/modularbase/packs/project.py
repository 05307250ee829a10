"""The layout of a pack's project folder: what `pack init` makes and `pack build` reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from modularbase.errors import PackFormatError
from modularbase.packs.archive import SUFFIX
from modularbase.packs.manifest import Manifest, parse_manifest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MANIFEST_FILE = "pack.json"
CONFIG_FILE = "train.toml"
PROMPTS_FILE = "prompts.txt"
DATA_FOLDER = "data"
WEIGHTS_FOLDER = "weights"
PARENT_FILE = f"{WEIGHTS_FOLDER}/parent.gguf"
ROUTER_FILE = f"{WEIGHTS_FOLDER}/router.gguf"
DIST_FOLDER = "dist"


def _check_width(value: int) -> int:
    if value % 256:
        raise ValueError("expected a multiple of 256")
    return value


def _check_sites(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value or value[0] < 0 or list(value) != sorted(set(value)):
        raise ValueError("expected ascending layer numbers, at least one")
    return value


Width = Annotated[PositiveInt, AfterValidator(_check_width)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GeometryConfig(_Part):
    """Where the pack is attached and how wide it is."""

    sites: Annotated[tuple[int, ...], AfterValidator(_check_sites)]
    d_inner: Width = 256
    d_ff: Width = 256
    n_expert: Annotated[int, Field(ge=1, le=64)] = 8
    n_expert_used: Annotated[int, Field(ge=1, le=64)] = 2
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    scale: float = 1.0
    token_gates: bool = False


class OptimisationConfig(_Part):
    """How the pack is trained."""

    steps: PositiveInt = 1000
    batch_tokens: PositiveInt = 4096
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    seed: int = 0


class TrainConfig(_Part):
    """A train.toml."""

    base: str
    geometry: GeometryConfig
    optimisation: OptimisationConfig = OptimisationConfig()


def read_manifest(project: Path) -> Manifest:
    """The manifest of a project.

    Raises:
        PackFormatError: No project, or its manifest is not sound.
    """
    return parse_manifest(_content(project / MANIFEST_FILE), str(project / MANIFEST_FILE))


def read_config(project: Path) -> TrainConfig:
    """The training configuration of a project.

    Raises:
        PackFormatError: There is none, or it is not sound.
    """
    path = project / CONFIG_FILE
    try:
        return TrainConfig.model_validate(tomllib.loads(_content(path).decode()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        found = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise PackFormatError(str(path), field, first["msg"], found) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise PackFormatError(str(path), "file", "TOML", str(error)) from error


def archive_path(project: Path, manifest: Manifest) -> Path:
    """Where the archive of a project's version is built."""
    return project / DIST_FOLDER / f"{manifest.id}-{manifest.version}{SUFFIX}"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise PackFormatError(str(path), "file", "a file of a pack's project", found) from error
