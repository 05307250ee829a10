"""Makes a base of a checkpoint folder, and installs it beside those of the catalogue."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from packaging.version import InvalidVersion, Version

from modularbase.bases import install
from modularbase.bases.checkpoints.checkpoint import Checkpoint
from modularbase.bases.checkpoints.gguf_writing import FloatType, write_gguf
from modularbase.bases.checkpoints.hyperparameters import Hyperparameters, read_hyperparameters
from modularbase.bases.checkpoints.tensor_plan import PlannedTensor, plan_tensors
from modularbase.bases.checkpoints.vocabulary import tokenizer_metadata
from modularbase.bases.install import BaseInfo
from modularbase.bases.store import BaseRecord, BaseStore
from modularbase.errors import InstallError, InvalidRequestError
from modularbase.storage.digest import sha256_of
from modularbase.storage.disk import check_space, disk_errors
from modularbase.storage.files import appearing
from modularbase.storage.progress import InstallProgress, ProgressCallback, no_progress

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """How a checkpoint becomes a base.

    Attributes:
        name: Its `base_id`; None takes the folder's name.
        version: Its `base_version`.
        float_type: Type of its matrices.
    """

    name: str | None = None
    version: str = "1.0.0"
    float_type: FloatType = "auto"


def import_base(
    folder: Path, options: ImportOptions | None = None, progress: ProgressCallback = no_progress
) -> BaseInfo:
    """Installs a checkpoint as the base NAME@VERSION; what has the same content stays as it is.

    Args:
        folder: As `save_pretrained` of transformers writes it.
        options: How to make it.
        progress: Told about the steps.

    Raises:
        InvalidRequestError: A name or version that is none.
        BaseLoadError: The checkpoint is damaged, or the engine cannot run it.
        InstallError: It cannot be written, or another base has this name and version.
    """
    plan = _Plan.of(folder, options or ImportOptions())
    name, store = f"{plan.name}@{plan.version}", BaseStore()
    with store.lock(name, progress), store.staging(name) as stage, disk_errors(name, store.root):
        gguf = stage / f"{plan.name}-{plan.version}.gguf"
        plan.write(gguf, name, progress)
        n_bytes = gguf.stat().st_size
        sha256 = sha256_of(gguf, lambda n: progress(InstallProgress(name, "verify", n, n_bytes)))
        record = BaseRecord(
            name=name,
            source=f"checkpoint:{folder.resolve().name}",
            revision=None,
            sha256=sha256,
            licence=plan.checkpoint.licence(),
            filename=gguf.name,
            n_bytes=n_bytes,
            installed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            family=plan.model.family,
        )
        if not _is_there(store, record):
            store.publish(gguf, record, stage)
    progress(InstallProgress(name, "done"))
    return install.info(name)


def write_base(
    folder: Path,
    path: Path,
    options: ImportOptions | None = None,
    progress: ProgressCallback = no_progress,
) -> None:
    """Writes a checkpoint to a GGUF file, which appears when it is complete.

    Args:
        folder: As `save_pretrained` of transformers writes it.
        path: The GGUF file; one that is there is replaced.
        options: How to make it.
        progress: Told about the steps.

    Raises:
        InvalidRequestError: A name or version that is none.
        BaseLoadError: The checkpoint is damaged, or the engine cannot run it.
        InstallError: It cannot be written.
    """
    plan = _Plan.of(folder, options or ImportOptions())
    with appearing(path) as part:
        plan.write(part, plan.name, progress)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checkpoint of which everything but the tensors' values has been checked."""

    checkpoint: Checkpoint
    model: Hyperparameters
    tensors: list[PlannedTensor]
    tokenizer: dict[str, object]
    name: str
    version: str
    float_type: FloatType

    @classmethod
    def of(cls, folder: Path, options: ImportOptions) -> _Plan:
        name = _checked_name(folder, options.name)
        version = _checked_version(options.version)
        checkpoint = Checkpoint(folder)
        model = read_hyperparameters(checkpoint.config)
        tensors = plan_tensors(checkpoint, model)
        tokenizer = tokenizer_metadata(folder, model.n_vocab, checkpoint.end_ids())
        return cls(checkpoint, model, tensors, tokenizer, name, version, options.float_type)

    def write(self, path: Path, shown: str, progress: ProgressCallback) -> None:
        n_bytes = sum(2 * math.prod(tensor.source.shape) for tensor in self.tensors)
        check_space(shown, path.parent, n_bytes)
        metadata = {
            "general.architecture": self.model.family,
            "general.type": "model",
            "general.name": self.name,
            "general.version": self.version,
            "general.license": self.checkpoint.licence(),
            **self.model.metadata(),
            **self.tokenizer,
        }
        write_gguf(
            path,
            metadata,
            self.tensors,
            float_type=self.float_type,
            rope_factors=self.model.rope_factors,
            on_bytes=lambda n, total: progress(InstallProgress(shown, "convert", n, total)),
        )


def _checked_name(folder: Path, name: str | None) -> str:
    chosen = folder.resolve().name.lower() if name is None else name
    if not _NAME.fullmatch(chosen):
        expected = "letters a-z, digits, '.', '_' and '-', at most 64, a letter or digit first"
        raise InvalidRequestError("name", expected, repr(chosen))
    return chosen


def _checked_version(version: str) -> str:
    try:
        return str(Version(version))
    except InvalidVersion as error:
        raise InvalidRequestError("version", "a version such as 1.1.0", repr(version)) from error


def _is_there(store: BaseStore, record: BaseRecord) -> bool:
    try:
        found = store.record(record.name)
    except InstallError:  # damaged: install over it
        return False
    if found is not None and found.sha256 != record.sha256:
        reason = (
            f"another base has this name and version (sha256 {found.sha256[:12]}..., the "
            f"checkpoint gives {record.sha256[:12]}...); give another version, or remove it first"
        )
        raise InstallError(reason, "exists", name=record.name, path=str(store.folder(record.name)))
    return found is not None
