"""`modularbase train fusion`: in which shares packs are blended, from the base's hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from modularbase.bases import install
from modularbase.cli.console import DEFAULT_BASE, Base, Json, err, out, print_facts, print_json
from modularbase.cli.labelled_packs import LabelledPacks, parse_labelled
from modularbase.cli.train_run import need_extra, typed_command

if TYPE_CHECKING:
    from modularbase.training.fusion import FusionOptions, FusionReport, FusionStep


def fusion(
    project: Annotated[Path, typer.Argument(help="Project folder; made where there is none.")],
    packs: LabelledPacks,
    base: Base = DEFAULT_BASE,
    layer: Annotated[
        int | None,
        typer.Option(help="Take the states entering it; by default as before, or the middle."),
    ] = None,
    pooling: Annotated[
        Literal["mean", "last"] | None,
        typer.Option(help="How a prompt's states become one; by default the project's, or mean."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 60,
    batch_blocks: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 0.05,
    heldout_blocks: Annotated[
        int, typer.Option(help="Sequences of each pack's text to measure on.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Of the order of the sequences.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Trains fusion weights: in which shares packs are blended, told from a prompt's hidden states.

    Base and packs are frozen. The weights go to the project's weights/ folder, beside a router's
    if it knows the same packs; `pack build` makes a router pack of them.
    """
    need_extra()
    from modularbase.training.fusion import FusionOptions, train_fusion
    from modularbase.training.router_project import (
        check_matches,
        open_router_project,
        trained_router,
    )

    path = install.resolve(base, install=True)
    labelled = parse_labelled(packs)
    open_router_project(project, path)
    known = trained_router(project)
    options = FusionOptions(
        base=path,
        packs=labelled,
        layer=known.layer if layer is None and known else layer,
        pooling=pooling or (known.pooling if known else "mean"),
        block_tokens=block_tokens,
        steps=steps,
        batch_blocks=batch_blocks,
        learning_rate=learning_rate,
        heldout_blocks=heldout_blocks,
        seed=seed,
        n_threads=threads or 0,
    )
    if options.layer is not None:
        routed = tuple(each.pack for each in labelled)
        check_matches(project, "fusion", (routed, options.layer, options.pooling))
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("reading prompts", total=None)

        def show(step: FusionStep) -> None:
            loss = f"loss {step.loss:.3f}"
            progress.update(task, total=step.n_steps, completed=step.step, description=loss)

        report = train_fusion(options, show)
    _print_report(options, report, _save(project, options, report), as_json)


def _save(project: Path, options: FusionOptions, report: FusionReport) -> Path:
    from modularbase.packs.manifest import Training
    from modularbase.training.router_project import TrainedHead, save_head

    training = Training(
        command=typed_command(),
        seed=options.seed,
        data=tuple(f"{each.pack.id}: {path}" for each in options.packs for path in each.paths),
        n_tokens=report.n_tokens,
        n_steps=options.steps,
    )
    figures = {
        f"perplexity of {pack_id} {way}": value
        for pack_id, found in report.perplexity.items()
        for way, value in found.items()
    }
    packs = tuple(each.pack for each in options.packs)
    head = TrainedHead("fusion", report.head, report.layer, options.pooling, packs, figures)
    return save_head(project, head, training)


def _print_report(
    options: FusionOptions, report: FusionReport, weights: Path, as_json: bool
) -> None:
    facts = {"weights": str(weights), "layer": report.layer, "n_tokens": report.n_tokens}
    ids = [each.pack.id for each in options.packs]
    if as_json:
        print_json(
            {**facts, "packs": ids, "perplexity": report.perplexity, "shares": report.shares}
        )
        return
    ways = next(iter(report.perplexity.values()))
    table = Table("text for", *ways, *(f"share of {pack_id}" for pack_id in ids))
    for pack_id, shares in zip(ids, report.shares, strict=True):
        values = [f"{value:.4g}" for value in report.perplexity[pack_id].values()]
        table.add_row(pack_id, *values, *(f"{share:.2f}" for share in shares))
    out.print(table)
    print_facts(facts, "trained")
