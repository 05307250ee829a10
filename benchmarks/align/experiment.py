"""The six cases: two versions of a base, plain, and with a pack that was made for it or not."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.align.continued import train_next_base
from benchmarks.align.settings import AlignSettings, Say
from modularbase.bases.tokenizer import Tokenizer
from modularbase.engine import read_metadata
from modularbase.packs.build import build
from modularbase.packs.derive import open_parent
from modularbase.packs.pack_file import read_pack
from modularbase.packs.project import DIST_FOLDER
from modularbase.packs.scaffold import init_project
from modularbase.training.base_model import load_base
from modularbase.training.data import pack_blocks
from modularbase.training.evaluation import HeldOut
from modularbase.training.export import save_result
from modularbase.training.fit import StepReport, Watch, fit
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.stages import ALIGN, begin_stage
from modularbase.training.texts import read_documents
from modularbase.training.twin import Twin


@dataclass(frozen=True, slots=True)
class Row:
    """A case.

    Attributes:
        name: What is measured.
        n_tokens: Tokens that its pack was trained on for this base; 0 where it was not.
        loss: Of the domain's test text, in nats a token.
        neutral_loss: Of neutral test text.
    """

    name: str
    n_tokens: int
    loss: float
    neutral_loss: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All cases.

    Attributes:
        plain: Base 1.0.
        next_plain: Base 1.1.
        made_for: Base 1.0 with the pack made for it.
        unaligned: Base 1.1 with that pack as it is.
        aligned: Base 1.1 with that pack behind stage 2.
        retrained: Base 1.1 with a pack made for it from the start.
    """

    plain: Row
    next_plain: Row
    made_for: Row
    unaligned: Row
    aligned: Row
    retrained: Row

    def rows(self) -> list[Row]:
        """The cases in the order of the table."""
        rest = [self.made_for, self.unaligned, self.aligned, self.retrained]
        return [self.plain, self.next_plain, *rest]

    def recovery(self, reference: Row) -> float:
        """The share of what was lost that alignment gives back, by loss in nats a token.

        What was lost is the loss of the unaligned pack above that of `reference`: `made_for` is
        what the pack was worth before the base changed, `retrained` what a new one is worth now.
        """
        lost = self.unaligned.loss - reference.loss
        return (self.unaligned.loss - self.aligned.loss) / lost if lost > 0 else math.nan


def run(settings: AlignSettings, say: Say) -> Outcome:
    """Does everything.

    Args:
        settings: What to do; `work` must not hold the projects of an earlier run.
        say: Told where the run is.

    Raises:
        ModularBaseError: A text is missing or too short, or training failed.
    """
    settings.work.mkdir(parents=True, exist_ok=True)
    base, next_base = settings.base, settings.work / "next.gguf"
    train_next_base(settings, next_base, say)
    first, n_first = _fitted(settings, base, "first", say)
    retrained, n_retrained = _fitted(replace(settings, base=next_base), next_base, "retrained", say)
    aligned, n_aligned = _aligned(settings, first, next_base, say)
    version = settings.base_identity().version
    old, new = f"base {version}", f"base {settings.next_version}"

    def measured(name: str, where: Path, pack: Path | None, n_tokens: int) -> Row:
        twin = _twin(settings, where, pack or first)
        loss, neutral_loss = _losses(settings, where, twin, with_pack=pack is not None)
        say(f"{name}: perplexity {math.exp(loss):.3f}")
        return Row(name, n_tokens, loss, neutral_loss)

    return Outcome(
        plain=measured(old, base, None, 0),
        next_plain=measured(new, next_base, None, 0),
        made_for=measured(f"{old} + pack made for it", base, first, n_first),
        unaligned=measured(f"{new} + that pack, as it is", next_base, first, 0),
        aligned=measured(f"{new} + that pack, aligned", next_base, aligned, n_aligned),
        retrained=measured(f"{new} + pack trained anew", next_base, retrained, n_retrained),
    )


def _fitted(settings: AlignSettings, base: Path, name: str, say: Say) -> tuple[Path, int]:
    """Stage 1 on a base; gives the pack file and the tokens it was trained on."""
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


def _aligned(settings: AlignSettings, pack: Path, next_base: Path, say: Say) -> tuple[Path, int]:
    """Stage 2 on the new base."""
    with open_parent(str(pack)) as parent:
        options = begin_stage(
            ALIGN,
            parent,
            next_base,
            settings.work / "aligned",
            steps=settings.align_steps,
            learning_rate=settings.align_rate,
            **_given(settings),
        )
    return _built(options, "aligned", say)


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


def _built(options: TrainOptions, name: str, say: Say) -> tuple[Path, int]:
    report = fit(options, _watch(name, options.eval_every, say))
    save_result(options, report)
    build(options.project)
    return options.project / DIST_FOLDER / "pack.gguf", report.n_tokens


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


def _twin(settings: AlignSettings, base: Path, pack_file: Path) -> Twin:
    """A base with a pack as it is shipped, in F32."""
    weights = read_pack(pack_file)
    has_gates = any("token_gate" in name for name in weights.tensors)
    pack = PackModule(weights.geometry, scale=weights.scale, token_gates=has_gates)
    pack.load_arrays(weights.tensors)
    return Twin(load_base(base).to(settings.device), pack.to(settings.device))


def _losses(
    settings: AlignSettings, base: Path, twin: Twin, *, with_pack: bool
) -> tuple[float, float]:
    """Losses of the domain's and of neutral test text, in nats a token."""
    tokenizer = Tokenizer.from_metadata(read_metadata(base))
    domain, neutral = (
        pack_blocks(read_documents([settings.text(name, "test")]), tokenizer, settings.block_tokens)
        for name in (settings.domain, "neutral")
    )
    n_blocks = settings.measured_blocks
    found = HeldOut(twin, domain[:n_blocks], neutral[:n_blocks], nullcontext)
    measured = found.measure(with_pack=with_pack)
    assert measured.neutral_loss is not None
    return measured.loss, measured.neutral_loss
