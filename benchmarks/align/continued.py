"""The next version of a base: all its weights trained further on general text."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.align.checkpoint import save_checkpoint
from benchmarks.align.settings import AlignSettings, Say
from modularbase.bases.import_checkpoint import ImportOptions, write_base
from modularbase.errors import TrainingError
from modularbase.gguf_file import read_metadata
from modularbase.training.base_model import load_base
from modularbase.training.data import Mixture, TokenBlocks, pack_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.optimiser import rate_factor, set_rates
from modularbase.training.options import TrainOptions
from modularbase.training.texts import read_documents
from modularbase.training.trainer import make_autocast

_REPORT_STEPS = 20


def train_next_base(settings: AlignSettings, path: Path, say: Say) -> None:
    """Trains a base further, saves it as a checkpoint, and imports that as version 1.1.0.

    Args:
        settings: The experiment's.
        path: The new GGUF file.
        say: Told about the steps.

    Raises:
        TrainingError: The loss is not finite any more.
    """
    model = load_base(settings.base).to(settings.device).requires_grad_(True)
    _train(model, settings, say)
    metadata = read_metadata(settings.base)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        save_checkpoint(settings.base, model, Path(folder))
        name = settings.base_identity().id
        write_base(Path(folder), path, ImportOptions(name=name, version=settings.next_version))
    assert read_metadata(path)["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]


def _train(model: torch.nn.Module, settings: AlignSettings, say: Say) -> None:
    mixture = _mixture(settings)
    groups = [{"params": list(model.parameters()), "top_rate": settings.base_rate}]
    optimiser = torch.optim.AdamW(
        groups, lr=settings.base_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    autocast = make_autocast(
        TrainOptions(project=Path(), base=settings.base, device=settings.device)
    )
    for step in range(settings.base_steps):
        set_rates(optimiser, rate_factor(step, settings.base_steps, settings.base_steps // 10))
        ids = torch.from_numpy(mixture.batch(step).domain.ids).to(settings.device)
        optimiser.zero_grad(set_to_none=True)
        with autocast():
            logits = model(ids).logits[:, :-1]  # [n_seq, n_tokens - 1, n_vocab]
            loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss of step {step + 1} is not finite; lower --base-rate")
        optimiser.step()
        if (step + 1) % _REPORT_STEPS == 0 or step + 1 == settings.base_steps:
            say(f"base {settings.next_version}: step {step + 1}, loss {loss.item():.4f}")


def _mixture(settings: AlignSettings) -> Mixture:
    encoder = Encoder(read_metadata(settings.base))
    texts = read_documents([settings.text("neutral", "train")])
    blocks = pack_blocks(texts, encoder, settings.block_tokens)
    nothing = TokenBlocks.of(np.zeros((0, settings.block_tokens), np.int64))
    n_blocks = settings.batch_blocks
    return Mixture(blocks, nothing, n_domain=n_blocks, n_neutral=0, seed=settings.seed)
