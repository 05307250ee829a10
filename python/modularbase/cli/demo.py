"""`modularbase demo`: what the engine can do, shown on a small base."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modularbase.cli.console import DEFAULT_BASE, Base, err, out
from modularbase.cli.demo_context import context
from modularbase.cli.demo_live import live
from modularbase.engine import Engine
from modularbase.packs.manifest import Manifest
from modularbase.packs.pack_file import write_pack
from modularbase.packs.random_pack import random_weights
from modularbase.packs.scaffold import default_sites
from modularbase.packs.weights import PackGeometry
from modularbase.types import EngineOptions, PackUse, Result

demo_app = typer.Typer(no_args_is_help=True)
demo_app.command()(context)
demo_app.command()(live)

_PROMPT = "The three most important things to know about the ocean are"
_NAMES = ("coral", "tide")


@demo_app.callback()
def demo() -> None:
    """Show what the engine can do."""


@demo_app.command()
def packs(
    base: Base = DEFAULT_BASE,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = _PROMPT,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens a request.")] = 32,
) -> None:
    """Runs the base, two packs and both of them together in one batch.

    The packs are made on the spot with random weights: they show the machinery, not knowledge.
    """
    with (
        tempfile.TemporaryDirectory(prefix="modularbase-") as folder,
        # Whole prompts every time, so that alone and together differ in nothing else.
        Engine.load(base, pack_budget="64MB", options=EngineOptions(prefix_cache="off")) as engine,
    ):
        for seed, name in enumerate(_NAMES):
            path = _write_random_pack(engine, Path(folder), name, seed)
            status = engine.packs.load(str(path))
            err.print(
                f"{name}: {status.n_bytes / 1e6:.1f} MB, {status.load_us / 1e3:.1f} ms to load"
            )
        _show(engine, prompt, max_tokens)


def _write_random_pack(engine: Engine, folder: Path, name: str, seed: int) -> Path:
    info = engine.info
    geometry = PackGeometry(
        n_embd=info["n_embd"], d_inner=256, d_ff=256, sites=default_sites(info["n_layer"])
    )
    manifest = Manifest(
        id=name,
        version="1.0.0",
        name=name,
        domain="demo",
        licence="CC0-1.0",
        base_id=engine.base.id,
    )
    path = folder / f"{name}.gguf"
    write_pack(path, random_weights(manifest, geometry, seed=seed, strength=0.3))
    return path


def _show(engine: Engine, prompt: str, max_tokens: int) -> None:
    rows: dict[str, tuple[PackUse, ...]] = {
        "the base": (),
        **{name: (PackUse(name),) for name in _NAMES},
        " + ".join(_NAMES): tuple(PackUse(name) for name in _NAMES),
    }

    def submit(uses: tuple[PackUse, ...]) -> Result:
        return engine.generate(prompt, packs=uses, max_tokens=max_tokens, temperature=0)

    n_steps = engine.stats["n_steps"]
    running = [
        engine.submit(prompt, packs=uses, max_tokens=max_tokens, temperature=0)
        for uses in rows.values()
    ]
    together = [generation.result() for generation in running]
    n_steps = engine.stats["n_steps"] - n_steps
    n_tokens = sum(len(result.token_ids) for result in together)
    table = Table("packs", "continuation", "same alone", "conflict", show_lines=True)
    for (label, uses), result in zip(rows.items(), together, strict=True):
        alone = submit(uses)
        conflict = result.pack_conflict.values()
        table.add_row(
            label,
            " ".join(result.text.split()),
            "yes" if alone.token_ids == result.token_ids else "no",
            f"{sum(conflict) / len(conflict):+.3f}" if conflict else "",
        )
    out.print(table)
    err.print(f"{n_tokens} tokens of {len(rows)} requests in {n_steps} steps")
