"""What `train align` and `train gate` do alike: a pack's next version, in a project of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modularbase.bases import install
from modularbase.cli.train_run import (
    need_extra,
    run_options,
    save_and_print,
    telling_how_to_resume,
)
from modularbase.packs.derive import next_version, open_parent


@dataclass(frozen=True, slots=True)
class NewPack:
    """What is made from what.

    Attributes:
        source: Project or pack to begin with.
        base: Base to train on; None: the pack's.
        folder: The new project; None: named by id and version.
        version: Of the new pack; None: the next minor one.
    """

    source: str
    base: str | None
    folder: Path | None
    version: str | None


def run_stage(
    name: Literal["align", "gate"],
    pack: NewPack,
    given: dict[str, Any],
    licence: str,
    as_json: bool,
) -> None:
    """Makes the new project, trains in it, and prints how that went."""
    need_extra()
    from modularbase.training.stages import ALIGN, GATE, begin_stage

    with open_parent(pack.source) as parent:
        manifest = parent.facts().manifest
        version = pack.version or next_version(manifest.version)
        folder = pack.folder or Path(f"{manifest.id}-{version}")
        base = install.resolve(pack.base or manifest.base_id, install=True)
        stage = {"align": ALIGN, "gate": GATE}[name]
        options = begin_stage(stage, parent, base, folder, version=version, **given)
    with telling_how_to_resume(folder):
        report = run_options(options)
    save_and_print(options, report, licence, as_json)
