"""What a run begins with: text, base and pack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from modularbase.bases.identity import BaseIdentity
from modularbase.errors import InvalidRequestError, PackFormatError
from modularbase.gguf_file import read_metadata
from modularbase.packs.pack_file import read_pack
from modularbase.packs.project import (
    CONFIG_FILE,
    DATA_FOLDER,
    GeometryConfig,
    read_config,
    read_manifest,
)
from modularbase.packs.weights import PackGeometry
from modularbase.storage.disk import data_folder
from modularbase.training.base_model import load_base
from modularbase.training.data import (
    Corpus,
    Mixture,
    TokenBlocks,
    check_blocks,
    pack_blocks,
    split_blocks,
)
from modularbase.training.encoding import Encoder
from modularbase.training.engine_states import StateJob, StateWatch, channel_name, fill_cache
from modularbase.training.evaluation import HeldOut
from modularbase.training.initialisation import initialise
from modularbase.training.objective import Objective
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.rounding import Rounding
from modularbase.training.state_cache import BlockIds, StateCache
from modularbase.training.states import (
    CachedStates,
    StateSource,
    TorchStates,
    entering_kind,
    final_kind,
)
from modularbase.training.texts import read_documents
from modularbase.training.trainer import Trainer, make_autocast
from modularbase.training.twin import Twin


def prepare(
    options: TrainOptions, objective: Objective, state_watch: StateWatch
) -> tuple[Trainer, PackModule]:
    """Reads base, text and weights; the trainer is at step 0.

    Args:
        options: The run's.
        objective: What the domain's text teaches.
        state_watch: Called for every block that an engine computes.

    Raises:
        InvalidRequestError: Options or text make no sense.
        PackFormatError: The project or the parent is not sound, or they differ.
        ChatTemplateError: There are prompts, and the base has no template for them.
        BaseLoadError: The base cannot be trained on.
        TrainingError: The engine process failed, or the cache of states is too small.
    """
    if options.n_threads:
        torch.set_num_threads(options.n_threads)
    config = read_config(options.project)
    encoder = Encoder(read_metadata(options.base))
    domain, neutral = _domain(options, encoder), _neutral(options, encoder)
    base = load_base(options.base)
    geometry = _geometry(config.geometry, base.config.hidden_size, base.config.num_hidden_layers)
    pack = PackModule(
        geometry,
        seed=options.seed,
        scale=config.geometry.scale,
        token_gates=config.geometry.token_gates,
    )
    twin = Twin(base.to(options.device), pack.to(options.device))
    if options.parent:
        _begin_with(pack, options.parent)
    else:
        initialise(twin, domain.train, neutral.train, options)
    mixture = Mixture(
        domain.train,
        neutral.train,
        n_domain=options.n_domain,
        n_neutral=options.n_neutral,
        seed=options.seed,
    )
    used = mixture.used(options.steps)
    states = _states(
        options,
        twin,
        np.concatenate([used.domain.ids, domain.heldout.ids]),
        np.concatenate([used.neutral.ids, neutral.heldout.ids]),
        state_watch,
    )
    heldout = HeldOut(
        twin, domain.heldout, neutral.heldout, states, make_autocast(options), objective
    )
    digest = f"{domain.digest()} {neutral.digest()}"
    types = read_manifest(options.project).quantisation
    rounding = Rounding(pack, types, has_parent=options.parent is not None)
    return Trainer(twin, mixture, heldout, states, options, digest, rounding, objective), pack


def _states(
    options: TrainOptions,
    twin: Twin,
    domain: BlockIds,
    neutral: BlockIds,
    state_watch: StateWatch,
) -> StateSource:
    """Those of all blocks of a run."""
    autocast = make_autocast(options)
    if not options.from_engine:
        return TorchStates(twin, autocast)
    identity = BaseIdentity(options.base, read_metadata(options.base))
    cache = StateCache(data_folder() / "states", identity.digest, twin.head.shape[1])
    every = np.concatenate([domain, neutral])
    kinds = {entering_kind(twin.first_site): every, final_kind(twin, autocast): neutral}
    cache.make_room(kinds, options.state_cache_bytes)
    job = StateJob(
        base=options.base,
        layer=twin.first_site,
        blocks=every,
        n_threads=options.n_threads,
        channel=channel_name(options.project),
    )
    fill_cache(cache, job, state_watch)
    return CachedStates(cache, twin, autocast)


def _domain(options: TrainOptions, encoder: Encoder) -> Corpus:
    folder = options.project / DATA_FOLDER
    data = options.data or (folder / "train.jsonl",)
    held = options.heldout or (() if options.data else (folder / "heldout.jsonl",))
    blocks = pack_blocks(read_documents(data), encoder, options.block_tokens)
    if not held:
        share, most = options.heldout_share, options.heldout_blocks
        return split_blocks(blocks, share=share, most=most, seed=options.seed, kind="data")
    measured = pack_blocks(read_documents(held), encoder, options.block_tokens)
    check_blocks(blocks, 1, "data")
    check_blocks(measured, 1, "heldout")
    return Corpus(blocks, measured[: options.heldout_blocks])


def _neutral(options: TrainOptions, encoder: Encoder) -> Corpus:
    if not options.neutral:
        nothing = TokenBlocks.of(np.zeros((0, options.block_tokens), np.int64))
        return Corpus(nothing, nothing)
    blocks = pack_blocks(read_documents(options.neutral), encoder, options.block_tokens)
    share, most = options.heldout_share, options.heldout_blocks
    return split_blocks(blocks, share=share, most=most, seed=options.seed, kind="neutral")


def _geometry(said: GeometryConfig, n_embd: int, n_layer: int) -> PackGeometry:
    if said.sites[-1] >= n_layer:
        expected = f"layers of the base, below {n_layer}"
        raise InvalidRequestError("geometry.sites", expected, str(said.sites[-1]))
    return PackGeometry(
        n_embd=n_embd,
        d_inner=said.d_inner,
        d_ff=said.d_ff,
        n_expert=said.n_expert,
        n_expert_used=said.n_expert_used,
        sites=said.sites,
        norm_eps=said.norm_eps,
    )


def _begin_with(pack: PackModule, parent: Path) -> None:
    """Takes a pack file's weights; token gates that it lacks stay as those of a new pack."""
    found = read_pack(parent)
    has_gates = any("token_gate" in name for name in found.tensors)
    shape = replace(pack.geometry, norm_eps=_as_stored(pack.geometry.norm_eps))
    for field, there, wanted in (
        ("geometry", found.geometry, shape),
        ("scale", found.scale, _as_stored(pack.scale)),
        ("token gates", has_gates, has_gates and pack.token_gates),
    ):
        if there != wanted:
            expected = f"{wanted}, as {CONFIG_FILE} says"
            raise PackFormatError(str(parent), field, expected, str(there))
    pack.load_arrays(found.tensors)


def _as_stored(value: float) -> float:
    return float(np.float32(value))
