"""`modularbase train gate`: token gates alone, for packs that lack them."""

from __future__ import annotations

from typing import Annotated

import typer

from modularbase.cli import train_options as o
from modularbase.cli.console import Json
from modularbase.cli.train_stage import NewPack, run_stage


def gate(
    source: o.PackSource,
    base: Annotated[str | None, typer.Option("--base", "-b", help="Instead of the pack's.")] = None,
    data: o.Data = None,
    heldout: o.HeldOut = None,
    neutral: o.Neutral = None,
    folder: o.NewFolder = None,
    version: o.NewVersion = None,
    steps: o.Steps = None,
    batch_blocks: o.BatchBlocks = None,
    block_tokens: o.BlockTokens = None,
    neutral_share: o.NeutralShare = None,
    learning_rate: o.LearningRate = None,
    precision: o.Precision = None,
    heldout_blocks: o.HeldOutBlocks = None,
    eval_every: o.EvalEvery = None,
    seed: o.Seed = None,
    device: o.Device = None,
    threads: o.Threads = None,
    data_licence: o.DataLicence = "",
    as_json: Json = False,
) -> None:
    """Trains a pack's token gates alone, so that it can be mixed with others.

    Copies the weights into the project of a new version and trains gates that stay shut on neutral
    text; the rest of the pack is frozen. `pack build` makes the pack, with the rest in it byte by
    byte.
    """
    given = o.given(
        data=data,
        heldout=heldout,
        neutral=neutral,
        steps=steps,
        batch_blocks=batch_blocks,
        block_tokens=block_tokens,
        neutral_share=neutral_share,
        learning_rate=learning_rate,
        precision=precision,
        heldout_blocks=heldout_blocks,
        eval_every=eval_every,
        seed=seed,
        device=device,
        n_threads=threads,
    )
    place = NewPack(source, base, folder, version)
    run_stage("gate", place, given, data_licence, as_json)
