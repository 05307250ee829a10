"""A bar on stderr for what takes a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from modularbase.cli.console import err
from modularbase.storage.progress import InstallProgress, ProgressCallback


@contextlib.contextmanager
def install_bar(title: str) -> Iterator[ProgressCallback]:
    """Gives a callback that moves the bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(title, total=None)

        def show(step: InstallProgress) -> None:
            description = f"{step.name}: {step.stage}"
            progress.update(
                task, description=description, completed=step.n_done, total=step.n_total
            )

        yield show
