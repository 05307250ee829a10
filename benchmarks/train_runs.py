"""Two training runs on one base: states by PyTorch, and states that an engine computed before."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import ours
from modularbase.bases.identity import BaseIdentity
from modularbase.gguf_file import read_metadata
from modularbase.packs.manifest import Quantisation
from modularbase.packs.scaffold import default_sites
from modularbase.packs.weights import PackGeometry
from modularbase.training.base_model import load_base
from modularbase.training.data import Batch, Mixture, TokenBlocks
from modularbase.training.engine_states import StateJob, channel_name, fill_cache
from modularbase.training.evaluation import HeldOut
from modularbase.training.objective import NextToken
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.rounding import Rounding
from modularbase.training.state_cache import StateCache
from modularbase.training.states import CachedStates, StateSource, TorchStates
from modularbase.training.trainer import Trainer, make_autocast
from modularbase.training.twin import Twin

N_DOMAIN, N_NEUTRAL, BLOCK_TOKENS = 6, 2, 256
PLAIN, FROM_ENGINE = "plain", "from engine"
N_STEPS_OF_TEXT = 3
N_REPEATS = 2
WIDTH = 256  # of geometry S


class Runs:
    """A plain run and one from an engine, with packs of geometry S, on the same random text."""

    def __init__(self, base: Path, n_threads: int, folder: Path) -> None:
        """Loads the base, and lets an engine fill a cache.

        Args:
            base: GGUF file.
            n_threads: Of PyTorch, and of the engine.
            folder: For the cache.
        """
        torch.set_num_threads(n_threads)
        self._folder = folder
        self._options = TrainOptions(
            project=folder,
            base=base,
            neutral=(folder,),
            batch_blocks=N_DOMAIN + N_NEUTRAL,
            neutral_share=N_NEUTRAL / (N_DOMAIN + N_NEUTRAL),
            block_tokens=BLOCK_TOKENS,
            n_threads=n_threads,
        )
        self._text = Batch(_blocks(N_DOMAIN, seed=1), _blocks(N_NEUTRAL, seed=2))
        self._base = load_base(base)
        self._identity = BaseIdentity(base, read_metadata(base))
        self._config = self._base.config
        self._sites = default_sites(self._config.num_hidden_layers)
        self._trainers = {PLAIN: self._trainer(None), FROM_ENGINE: self._trainer(self._fill())}
        for _ in range(N_STEPS_OF_TEXT):  # through all blocks once
            self._trainers[FROM_ENGINE].train_step()

    def step_tps(self, label: str) -> float:
        """Returns the tokens per second of a step."""
        trainer = self._trainers[label]
        return statistics.median(trainer.train_step()["tokens_per_s"] for _ in range(N_REPEATS))

    def pass_tps(self) -> float:
        """Returns the tokens per second of an engine's pass into an empty cache, with its start."""
        start = time.monotonic()
        self._fill("empty")
        seconds = time.monotonic() - start
        shutil.rmtree(self._folder / "empty")
        return self._text.n_tokens / seconds

    def _fill(self, name: str = "states") -> StateCache:
        cache = StateCache(self._folder / name, self._identity.digest, self._config.hidden_size)
        cache.make_room({}, 1 << 30)
        job = StateJob(
            base=self._options.base,
            layer=self._sites[0],
            blocks=np.concatenate([self._text.domain.ids, self._text.neutral.ids]),
            n_threads=self._options.n_threads,
            channel=channel_name(self._folder),
        )
        fill_cache(cache, job, lambda _: None)
        return cache

    def _trainer(self, cache: StateCache | None) -> Trainer:
        geometry = PackGeometry(
            n_embd=self._config.hidden_size, d_inner=WIDTH, d_ff=WIDTH, sites=self._sites
        )
        twin, autocast = Twin(self._base, PackModule(geometry)), make_autocast(self._options)
        states: StateSource = TorchStates(twin, autocast)
        if cache is not None:
            states = CachedStates(cache, twin, autocast)
        text = self._text
        objective = NextToken()
        heldout = HeldOut(twin, text.domain[:1], text.neutral[:1], states, autocast, objective)
        mixture = Mixture(text.domain, text.neutral, n_domain=N_DOMAIN, n_neutral=N_NEUTRAL, seed=0)
        rounding = Rounding(twin.pack, Quantisation(), has_parent=False)
        return Trainer(twin, mixture, heldout, states, self._options, "", rounding, objective)


def _blocks(n_a_step: int, seed: int) -> TokenBlocks:
    n = N_STEPS_OF_TEXT * n_a_step
    ids = ours.random_tokens(n * BLOCK_TOKENS, seed)
    return TokenBlocks.of(np.asarray(ids, np.int64).reshape(n, BLOCK_TOKENS))
