"""What the experiment is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paths import CACHE
from modularbase.bases.identity import BaseIdentity
from modularbase.gguf_file import read_metadata

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignSettings:
    """One run.

    Attributes:
        base: GGUF file of base 1.0.
        texts: Folder with the texts that `python -m packs.texts medical neutral` makes.
        work: Folder for what is made; must not hold an earlier run.
        domain: Text the pack is for.
        base_steps: Steps in which base 1.1 is trained.
        base_rate: Their highest learning rate.
        fit_steps: Steps of stage 1.
        fit_rate: Their highest learning rate.
        align_steps: Steps of stage 2.
        align_rates: Highest learning rates to try there; held-out text decides.
        align_eval_every: Steps between measurements there.
        align_batch_blocks: Sequences of a step there: few, so that few tokens give many steps.
        batch_blocks: Sequences of any other step.
        block_tokens: Tokens of a sequence.
        measured_blocks: Most sequences measured on, of each text.
        eval_every: Steps between measurements while a pack is trained.
        seed: Of all weights and orders.
        device: Where to compute, as PyTorch names it.
        next_version: Of the new base.
    """

    base: Path
    texts: Path = CACHE / "texts"
    work: Path = CACHE / "align"
    domain: str = "medical"
    base_steps: int = 200
    base_rate: float = 3e-4
    fit_steps: int = 120
    fit_rate: float = 2e-3
    align_steps: int = 48
    align_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    align_eval_every: int = 12
    align_batch_blocks: int = 4
    batch_blocks: int = 16
    block_tokens: int = 256
    measured_blocks: int = 64
    eval_every: int = 40
    seed: int = 0
    device: str = "cpu"
    next_version: str = "1.1.0"

    def text(self, name: str, part: str) -> Path:
        """A text's file: part is "train", "heldout" or "test"."""
        return self.texts / name / f"{part}.jsonl"

    def base_identity(self) -> BaseIdentity:
        """What the base is called; the new version has the same name."""
        return BaseIdentity(self.base, read_metadata(self.base))
