"""A toy domain, neutral text and a project, for runs that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modularbase.packs.manifest import Manifest
from modularbase.packs.project import CONFIG_FILE
from modularbase.packs.scaffold import init_project
from modularbase.packs.weights import PackGeometry
from modularbase.training.options import TrainOptions
from tests.tools.tiny_models import N_EMBD, N_LAYER, TinyModel

_DOMAIN = ("fever", "of", "the", "left", "knee", "acute", "chronic", "unspecified")
_NEUTRAL = ("RIVER", "MOON", "QUARTZ", "BOLD", "JUMPY", "WAX", "KID", "VEX")

LONGER: dict[str, Any] = {"steps": 40, "batch_blocks": 8, "eval_every": 20, "save_every": 40}

GEOMETRY = PackGeometry(n_embd=N_EMBD, d_inner=256, d_ff=256, n_expert=4, sites=(1, 2))


def text(words: tuple[str, ...], n_words: int, seed: int) -> str:
    """Random words of a list, seven a line."""
    drawn = np.random.default_rng(seed).choice(words, n_words)
    lines = (" ".join(drawn[i : i + 7]) for i in range(0, n_words, 7))
    return "\n".join(lines)


def make_project(folder: Path, model: TinyModel) -> Manifest:
    """A project for the tiny base, with the domain and neutral text beside it."""
    manifest = init_project(
        folder, domain="toy", name="Toy", base_id=model.path.stem, n_layer=N_LAYER
    )
    config = folder / CONFIG_FILE
    content = config.read_text().replace("n_expert = 8", f"n_expert = {GEOMETRY.n_expert}")
    config.write_text(content)
    (folder / "domain.txt").write_text(text(_DOMAIN, 3000, seed=1))
    (folder / "neutral.txt").write_text(text(_NEUTRAL, 2000, seed=2))
    return manifest


def toy_options(folder: Path, model: TinyModel, **changes: Any) -> TrainOptions:
    """A very short run over the toy domain: it begins to learn. `LONGER` is enough to learn it."""
    given: dict[str, Any] = {
        "project": folder,
        "base": model.path,
        "data": (folder / "domain.txt",),
        "neutral": (folder / "neutral.txt",),
        "steps": 16,
        "batch_blocks": 4,
        "block_tokens": 32,
        "learning_rate": 4e-3,
        "precision": "f32",
        "heldout_blocks": 6,
        "eval_every": 4,
        "save_every": 8,
        "warmup_steps": 3,
    }
    return TrainOptions(**{**given, **changes})
