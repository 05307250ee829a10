"""Measures packs on a base, all on the same text."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.align.settings import AlignSettings, Say
from modularbase.gguf_file import read_metadata
from modularbase.packs.pack_file import read_pack
from modularbase.packs.scaffold import default_sites
from modularbase.packs.weights import PackGeometry
from modularbase.training.base_model import load_base
from modularbase.training.data import TokenBlocks, pack_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.evaluation import HeldOut
from modularbase.training.objective import NextToken
from modularbase.training.pack_module import PackModule
from modularbase.training.states import TorchStates
from modularbase.training.texts import read_documents
from modularbase.training.twin import Twin


@dataclass(frozen=True, slots=True)
class TrainedPack:
    """A pack file, the tokens it was trained on, and its perplexity on held-out text."""

    path: Path
    n_tokens: int
    heldout_perplexity: float


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


class Scale:
    """A base in F32, and the text to measure on."""

    def __init__(self, settings: AlignSettings, base: Path, say: Say) -> None:
        """Loads both.

        Args:
            settings: The experiment's.
            base: GGUF file.
            say: Told every row.
        """
        self._settings, self._say = settings, say
        self._model = load_base(base).to(settings.device)
        self._encoder = Encoder(read_metadata(base))
        self._domain, self._neutral = map(self._blocks, (settings.domain, "neutral"))

    def row(self, name: str, trained: TrainedPack | None) -> Row:
        """Measures a pack as it is shipped, rounded experts and all; without one, the base."""
        pack = self._identity() if trained is None else _read(trained.path)
        twin = Twin(self._model, pack.to(self._settings.device))
        states = TorchStates(twin, nullcontext)
        heldout = HeldOut(twin, self._domain, self._neutral, states, nullcontext, NextToken())
        found = heldout.measure(with_pack=trained is not None)
        assert found.neutral_loss is not None
        self._say(f"{name}: loss {found.loss:.4f}, neutral {found.neutral_loss:.4f}")
        n_tokens = trained.n_tokens if trained else 0
        return Row(name, n_tokens, found.loss, found.neutral_loss)

    def _blocks(self, name: str) -> TokenBlocks:
        documents = read_documents([self._settings.text(name, "test")])
        blocks = pack_blocks(documents, self._encoder, self._settings.block_tokens)
        return blocks[: self._settings.measured_blocks]

    def _identity(self) -> PackModule:
        config = self._model.config
        sites = default_sites(config.num_hidden_layers)
        geometry = PackGeometry(n_embd=config.hidden_size, d_inner=256, d_ff=256, sites=sites)
        return PackModule(geometry)


def _read(path: Path) -> PackModule:
    weights = read_pack(path)
    has_gates = any("token_gate" in name for name in weights.tensors)
    pack = PackModule(weights.geometry, scale=weights.scale, token_gates=has_gates)
    pack.load_arrays(weights.tensors)
    return pack
