"""The six cases: two versions of a base, plain, and with a pack that was made for it or not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.align.continued import train_next_base
from benchmarks.align.scale import Row, Scale, TrainedPack
from benchmarks.align.settings import AlignSettings, Say
from modularbase.gguf_file import read_metadata
from modularbase.packs.archive import GGUF
from modularbase.packs.build import build
from modularbase.packs.derive import open_parent
from modularbase.packs.project import DIST_FOLDER
from modularbase.packs.scaffold import init_project
from modularbase.training.export import save_result
from modularbase.training.fit import StepReport, Watch, fit
from modularbase.training.options import TrainOptions
from modularbase.training.stages import ALIGN, begin_stage


@dataclass(frozen=True, slots=True)
class Outcome:
    """All cases.

    Attributes:
        plain: Base 1.0.
        next_plain: Base 1.1.
        made_for: Base 1.0 with the pack made for it.
        unaligned: Base 1.1 with that pack as it is.
        aligned: Base 1.1 with that pack behind stage 2.
        anew: Base 1.1 with a pack made for it from the start.
    """

    plain: Row
    next_plain: Row
    made_for: Row
    unaligned: Row
    aligned: Row
    anew: Row

    def rows(self) -> list[Row]:
        """The cases in the order of the table."""
        rest = [self.made_for, self.unaligned, self.aligned, self.anew]
        return [self.plain, self.next_plain, *rest]

    def recovery(self, reference: Row) -> float:
        """The share of what was lost that alignment gives back, by loss in nats a token.

        What was lost is the loss of the unaligned pack above that of `reference`: `made_for` is
        what the pack was worth before the base changed, `anew` what a new one is worth now.
        """
        lost = self.unaligned.loss - reference.loss
        return (self.unaligned.loss - self.aligned.loss) / lost if lost > 0 else math.nan


def run(settings: AlignSettings, say: Say) -> Outcome:
    """Does everything; a case is measured, and told, as soon as it can be.

    Args:
        settings: What to do; `work` must not hold the projects of an earlier run.
        say: Told where the run is.

    Raises:
        ModularBaseError: A text is missing or too short, or training failed.
    """
    settings.work.mkdir(parents=True, exist_ok=True)
    next_base = settings.work / "next.gguf"
    version = settings.base_identity().version
    old, new = f"base {version}", f"base {settings.next_version}"
    first = _fitted(settings, settings.base, "first", say)
    scale = Scale(settings, settings.base, say)
    plain = scale.row(old, None)
    made_for = scale.row(f"{old} + pack made for it", first)
    train_next_base(settings, next_base, say)
    scale = Scale(settings, next_base, say)
    next_plain = scale.row(new, None)
    unaligned = scale.row(f"{new} + that pack, as it is", replace(first, n_tokens=0))
    aligned = scale.row(f"{new} + that pack, aligned", _aligned(settings, first, next_base, say))
    anew = scale.row(f"{new} + pack trained anew", _fitted(settings, next_base, "anew", say))
    return Outcome(plain, next_plain, made_for, unaligned, aligned, anew)


def _fitted(settings: AlignSettings, base: Path, name: str, say: Say) -> TrainedPack:
    """Stage 1 on a base."""
    project = settings.work / name
    init_project(
        project,
        domain=settings.domain,
        name=settings.domain,
        base_id=settings.base_identity().id,
        n_layer=_n_layer(base),
    )
    options = TrainOptions(
        project=project,
        base=base,
        steps=settings.fit_steps,
        learning_rate=settings.fit_rate,
        **_given(settings),
    )
    return _built(options, name, say)


def _aligned(settings: AlignSettings, pack: TrainedPack, next_base: Path, say: Say) -> TrainedPack:
    """Stage 2 on the new base, at the rate that is best on held-out text."""
    tries = []
    for rate in settings.align_rates:
        name = f"aligned-{rate:g}"
        with open_parent(str(pack.path)) as parent:
            options = begin_stage(
                ALIGN,
                parent,
                next_base,
                settings.work / name,
                steps=settings.align_steps,
                learning_rate=rate,
                **_given(settings)
                | {
                    "eval_every": settings.align_eval_every,
                    "batch_blocks": settings.align_batch_blocks,
                },
            )
        tries.append(_built(options, name, say))
    return min(tries, key=lambda tried: tried.heldout_perplexity)


def _given(settings: AlignSettings) -> dict[str, Any]:
    return {
        "data": (settings.text(settings.domain, "train"),),
        "heldout": (settings.text(settings.domain, "heldout"),),
        "neutral": (settings.text("neutral", "train"),),
        "batch_blocks": settings.batch_blocks,
        "block_tokens": settings.block_tokens,
        "eval_every": settings.eval_every,
        "seed": settings.seed,
        "device": settings.device,
    }


def _built(options: TrainOptions, name: str, say: Say) -> TrainedPack:
    report = fit(options, _watch(name, options.eval_every, say))
    save_result(options, report)
    build(options.project)
    path = options.project / DIST_FOLDER / GGUF
    return TrainedPack(path, report.n_tokens, report.figures["perplexity"])


def _watch(name: str, every: int, say: Say) -> Watch:
    def watch(report: StepReport) -> None:
        if report.step % every == 0 or report.step == report.n_steps:
            say(f"{name}: step {report.step}, held-out loss {report.heldout_loss:.4f}")

    return watch


def _n_layer(base: Path) -> int:
    metadata = read_metadata(base)
    n_layer = metadata[f"{metadata['general.architecture']}.block_count"]
    assert isinstance(n_layer, int)
    return n_layer
