"""What a pack says of itself: the manifest, as JSON in the archive and in the GGUF metadata."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal, TypeVar

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from modularbase.errors import PackFormatError

# Names of folders and parts of "id@version": letters and digits of any script, no separators.
_ID = re.compile(r"[^\W_][\w.-]{0,63}")
_SEMVER = re.compile(r"\d+\.\d+\.\d+(-?(a|b|rc)\d+)?")
_Model = TypeVar("_Model", bound=BaseModel)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def _check_id(value: str) -> str:
    normal = unicodedata.normalize("NFC", value)
    if not _ID.fullmatch(normal) or normal.endswith("."):
        raise ValueError("expected letters or digits of any script, then also '.', '_' and '-'")
    return normal


def _check_version(value: str) -> str:
    if not _SEMVER.fullmatch(value):
        raise ValueError("expected MAJOR.MINOR.PATCH, such as 1.0.0 or 1.1.0rc1")
    return value


def _check_specifier(value: str) -> str:
    text = "" if value.strip() == "*" else value
    # A bare version means exactly that one.
    text = ",".join(f"=={part}" if is_version(part) else part for part in _parts(text))
    try:
        return str(SpecifierSet(text))
    except InvalidSpecifier as error:
        raise ValueError("expected a version or specifiers, such as '>=1.1,<2' or '*'") from error


def _check_digest(value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise ValueError("expected sha256: and 64 hexadecimal digits")
    return value


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def is_version(text: str) -> bool:
    """Whether a text is one version, not specifiers or something else."""
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


PackId = Annotated[str, AfterValidator(_check_id)]
PackVersion = Annotated[str, AfterValidator(_check_version)]
Specifier = Annotated[str, AfterValidator(_check_specifier)]
Digest = Annotated[str, AfterValidator(_check_digest)]
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
AdapterType = Literal["f16", "bf16", "f32"]
ExpertType = Literal["q4_k", "q4_0", "q8_0", "f16"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PackRequirement(_Part):
    """Another pack, in versions that suit: a dependency or a conflict."""

    id: PackId
    version: Specifier = ""

    def __str__(self) -> str:
        return f"{self.id} {self.version}" if self.version else self.id

    def accepts(self, version: str) -> bool:
        """Whether a version of that pack suits; pre-releases count."""
        return SpecifierSet(self.version).contains(version, prereleases=True)


class Quantisation(_Part):
    """Types of the weights, and what rounding them cost."""

    adapters: AdapterType = "f16"
    experts: ExpertType = "q4_0"
    kl: float | None = Field(default=None, ge=0)  # to the unquantised pack, nats a token


class Origin(_Part):
    """The pack that another one was made from."""

    id: PackId
    version: PackVersion
    digest: Digest  # of its pack file


class Training(_Part):
    """Where the weights come from, so that they can be made again."""

    command: str = ""
    seed: int | None = None
    data: tuple[str, ...] = ()
    data_licence: str = ""
    n_tokens: NonNegativeInt = 0
    n_steps: NonNegativeInt = 0
    derived_from: Origin | None = None


class Manifest(_Part):
    """A pack's name, version, base, relations to other packs, and figures.

    Unknown fields are refused: what a reader does not understand must not be ignored silently.
    """

    manifest_version: Literal[1] = 1
    id: PackId
    version: PackVersion
    type: Literal["domain", "router"] = "domain"
    name: Line
    description: str = Field(default="", max_length=4000)
    domain: Line
    languages: tuple[Line, ...] = ()
    licence: Line
    authors: tuple[Line, ...] = ()
    base_id: PackId
    base_compatibility: tuple[Specifier, ...] = ("",)
    base_digest: Digest | None = None
    dependencies: tuple[PackRequirement, ...] = ()
    conflicts: tuple[PackRequirement, ...] = ()
    fallback: tuple[PackId, ...] = ()
    priority: int = Field(default=0, ge=-1000, le=1000)
    size_bytes: NonNegativeInt = 0
    quantisation: Quantisation = Quantisation()
    training: Training = Training()
    evaluation: dict[Line, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _refers_to_others(self) -> Manifest:
        for field in ("dependencies", "conflicts"):
            ids = [requirement.id for requirement in getattr(self, field)]
            if self.id in ids:
                raise ValueError(f"{field}: a pack cannot name itself")
            if len(set(ids)) != len(ids):
                raise ValueError(f"{field}: each pack at most once")
        if self.id in self.fallback:
            raise ValueError("fallback: a pack cannot fall back to itself")
        return self

    def suits_base(self, base_version: str) -> bool:
        """Whether one of `base_compatibility` holds for a version of the base."""
        return any(
            SpecifierSet(specifier).contains(base_version, prereleases=True)
            for specifier in self.base_compatibility
        )

    def to_json(self) -> str:
        """The manifest as it is stored, readable and stable."""
        return self.model_dump_json(indent=2) + "\n"


def parse_manifest(text: str | bytes, file: str) -> Manifest:
    """Reads a manifest.

    Args:
        text: JSON.
        file: Named in the error.

    Raises:
        PackFormatError: Not JSON, a field missing or unknown, or a value out of its range.
    """
    return parse_model(Manifest, text, file)


def parse_model(model: type[_Model], text: str | bytes, file: str) -> _Model:
    """Reads JSON of any pydantic model, with errors as `parse_manifest` has them."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or model.__name__.lower()
        found = "nothing" if first["type"] == "missing" else _shown(first["input"])
        raise PackFormatError(file, field, first["msg"].removeprefix("Value error, "), found) from (
            error
        )


def manifest_schema() -> dict[str, Any]:
    """The JSON schema of a manifest, as published in docs/pack-manifest.schema.json."""
    return Manifest.model_json_schema()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
