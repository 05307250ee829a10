"""Stages that begin with a pack there is: the loop of `fit` with other parts and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modularbase.bases.identity import BaseIdentity
from modularbase.errors import InvalidRequestError, PackIncompatibleError
from modularbase.gguf_file import read_metadata
from modularbase.packs.derive import ParentPack, derive_project, next_manifest
from modularbase.packs.pack_file import PackFacts
from modularbase.packs.project import PARENT_FILE
from modularbase.packs.resolver import BaseVersion
from modularbase.training.options import PartRates, TrainOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a stage is for.

    Attributes:
        rates: The parts it trains; all others are frozen.
        defaults: Its defaults where they are not those of `TrainOptions`, by name.
        for_new_base: Whether the next version is for another base than the parent.
        adds_token_gates: Whether a pack without them gets them.
    """

    rates: PartRates
    defaults: Mapping[str, Any]
    for_new_base: bool = False
    adds_token_gates: bool = False


ALIGN = Stage(
    rates=PartRates(router=0.0, experts=0.0, w_out=0.0, token_gate=0.0),
    defaults={"steps": 100, "warmup_steps": 10, "learning_rate": 5e-4, "eval_every": 10},
    for_new_base=True,
)
"""Stage 2: a pack meets a new base. Only the input adapter and its norm learn."""

GATE = Stage(
    rates=PartRates(w_in=0.0, norm=0.0, router=0.0, experts=0.0, w_out=0.0),
    defaults={
        "steps": 100,
        "warmup_steps": 10,
        "learning_rate": 1e-2,
        "neutral_share": 0.5,
        "eval_every": 10,
    },
    adds_token_gates=True,
)
"""Token gates alone, so that packs that were trained apart can be mixed."""


def begin_stage(
    stage: Stage,
    parent: ParentPack,
    base: Path,
    folder: Path,
    *,
    version: str | None = None,
    **given: Any,
) -> TrainOptions:
    """Makes the project of a pack's next version; `fit` and `save_result` do the rest.

    Args:
        stage: ALIGN or GATE.
        parent: The pack to begin with.
        base: GGUF file of the base to train on.
        folder: The new project's.
        version: Of the new pack; None: the next minor one.
        given: Fields of `TrainOptions` that differ from the stage's defaults.

    Raises:
        InvalidRequestError: Options make no sense, there is no text, or a project is there already.
        PackFormatError: The pack is not sound.
        PackIncompatibleError: The pack was made for another base, and the stage is not for that.
        InstallError: The folder cannot be written.
    """
    metadata, facts = read_metadata(base), parent.facts()
    identity = BaseIdentity(base, metadata)
    found = BaseVersion(identity.id, identity.version)
    if not stage.for_new_base:
        found.check(facts.manifest)
    _check_fit(facts, metadata)
    texts = _own_text(parent) if "data" not in given else {}
    options = TrainOptions(
        project=folder,
        base=base,
        parent=folder / PARENT_FILE,
        rates=stage.rates,
        **{**stage.defaults, **texts, **given},
    )
    for path in (*options.data, *options.heldout, *options.neutral):
        if not path.exists():
            raise InvalidRequestError("data", "a file or folder", str(path))
    manifest = next_manifest(parent, version, found if stage.for_new_base else None)
    derive_project(folder, parent, manifest, token_gates=stage.adds_token_gates)
    return options


def _check_fit(facts: PackFacts, metadata: Mapping[str, object]) -> None:
    """Refuses a base that the pack's sites do not fit."""
    family, shape, pack_id = metadata.get("general.architecture"), facts.geometry, facts.manifest.id
    width, n_layer = (
        metadata.get(f"{family}.{key}") for key in ("embedding_length", "block_count")
    )
    if width != shape.n_embd:
        raise PackIncompatibleError(pack_id, "n_embd", str(shape.n_embd), str(width))
    if not isinstance(n_layer, int) or n_layer <= shape.sites[-1]:
        needed = f"more than {shape.sites[-1]}"
        raise PackIncompatibleError(pack_id, "layers of the base", needed, str(n_layer))


def _own_text(parent: ParentPack) -> dict[str, tuple[Path, ...]]:
    """The text of the parent's project."""
    if parent.data is None:
        raise InvalidRequestError("data", "text of the pack's domain", "none")
    return {
        "data": (parent.data / "train.jsonl",),
        "heldout": (parent.data / "heldout.jsonl",),
    }
