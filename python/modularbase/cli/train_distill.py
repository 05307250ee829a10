"""`modularbase train distill`: a pack learns from a teacher."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modularbase.bases import install
from modularbase.cli import train_options as o
from modularbase.cli.console import Json, err
from modularbase.cli.train_fit import fit_options
from modularbase.cli.train_run import (
    need_extra,
    run_options,
    save_and_print,
    telling_how_to_resume,
)
from modularbase.errors import InvalidRequestError

if TYPE_CHECKING:
    from modularbase.training.answers import AnswerProgress, Taught
    from modularbase.training.chat_endpoint import EndpointOptions

_ADDRESS = ("http://", "https://")


def distill(
    project: o.Project,
    teacher: Annotated[
        str,
        typer.Option(
            help="A base's name or GGUF file with the same vocabulary; the http(s) address of an "
            "OpenAI-compatible server, up to /v1; or a .jsonl file with prompts and responses."
        ),
    ],
    teacher_weight: Annotated[
        float | None, typer.Option(help="Of a GGUF teacher, 0 to 1; the text has the rest.")
    ] = None,
    teacher_temperature: Annotated[
        float | None, typer.Option(help="Softens a GGUF teacher's distributions, and the pack's.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="What a server is asked: .jsonl, or a prompt a line.")
    ] = None,
    model: Annotated[str, typer.Option(help="Name of the model on the server.")] = "",
    kind: Annotated[
        Literal["chat", "text"], typer.Option(help="Of the server's interface.")
    ] = "chat",
    system: Annotated[str, typer.Option(help="What the server's model is told first.")] = "",
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the server's key.")
    ] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "--temp")] = 0.0,
    timeout: Annotated[float, typer.Option(help="Longest silence of the server, in s.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="Attempts while the server is busy.")] = 6,
    at_once: Annotated[int, typer.Option(help="Questions under way at a time.")] = 4,
    data: o.Data = None,
    heldout: o.HeldOut = None,
    neutral: o.Neutral = None,
    base: o.ProjectBase = None,
    steps: o.Steps = None,
    batch_blocks: o.BatchBlocks = None,
    block_tokens: o.BlockTokens = None,
    neutral_share: o.NeutralShare = None,
    learning_rate: o.LearningRate = None,
    warmup_steps: o.WarmupSteps = None,
    qat_steps: o.QatSteps = None,
    accumulation: o.Accumulation = None,
    precision: o.Precision = None,
    heldout_blocks: o.HeldOutBlocks = None,
    eval_every: o.EvalEvery = None,
    patience: o.Patience = None,
    save_every: o.SaveEvery = None,
    seed: o.Seed = None,
    device: o.Device = None,
    threads: o.Threads = None,
    data_licence: o.DataLicence = "",
    as_json: Json = False,
) -> None:
    """Trains a project's pack on what a teacher says.

    A GGUF teacher tells how likely every next token of the data is; a server answers --prompts, and
    its answers are learnt like text. Answers are kept in runs/: the same command goes on where it
    was interrupted. All else is as in `train fit`.
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
        warmup_steps=warmup_steps,
        qat_steps=qat_steps,
        accumulation=accumulation,
        precision=precision,
        heldout_blocks=heldout_blocks,
        eval_every=eval_every,
        patience=patience,
        save_every=save_every,
        seed=seed,
        device=device,
        n_threads=threads,
        teacher_weight=teacher_weight,
        teacher_temperature=teacher_temperature,
    )
    need_extra()
    from modularbase.training.export import check_target

    check_target(project)
    _refuse_unused(teacher, given, prompts)
    if teacher.startswith(_ADDRESS):
        from modularbase.training.chat_endpoint import EndpointOptions

        endpoint = EndpointOptions(
            url=teacher,
            model=model,
            kind=kind,
            api_key_env=api_key_env,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed or 0,
            timeout_s=timeout,
            n_attempts=attempts,
        )
        fit_options(project, given, base)  # what is wrong is said before the teacher is asked
        given["data"] = (*given.get("data", ()), _ask(project, endpoint, prompts, at_once))
    elif teacher.endswith(".jsonl"):
        given["data"] = (*given.get("data", ()), Path(teacher))
    else:
        given["teacher"] = install.resolve(teacher, install=True)
    options = fit_options(project, given, base)
    with telling_how_to_resume(project):
        report = run_options(options)
    save_and_print(options, report, data_licence, as_json)


def _refuse_unused(teacher: str, given: dict[str, Any], prompts: Path | None) -> None:
    """Refuses options that this kind of teacher would leave unused."""
    asks = teacher.startswith(_ADDRESS)
    if asks != (prompts is not None):
        expected = "a file of prompts, for a teacher with an address"
        raise InvalidRequestError("--prompts", expected, f"{prompts} for {teacher}")
    is_file = not asks and not teacher.endswith(".jsonl")
    for name in ("teacher_weight", "teacher_temperature"):
        if name in given and not is_file:
            option = f"--{name.replace('_', '-')}"
            raise InvalidRequestError(option, "a GGUF file as the teacher", teacher)


def _ask(project: Path, endpoint: EndpointOptions, prompts: Path | None, at_once: int) -> Path:
    """Gathers the answers; gives the file to learn from."""
    from modularbase.training.answers import gather_answers, read_prompts
    from modularbase.training.chat_endpoint import ChatEndpoint
    from modularbase.training.run_folder import RUNS_FOLDER

    assert prompts is not None  # see _refuse_unused
    questions = read_prompts(prompts)
    teacher = ChatEndpoint(endpoint)
    folder = project / RUNS_FOLDER / f"answers-{_digest(endpoint)}"
    columns = (
        TextColumn("asking the teacher"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("", total=None)

        def show(step: AnswerProgress) -> None:
            failed = f"{step.n_failed} failed" if step.n_failed else ""
            n_done = step.n_answered + step.n_failed
            progress.update(task, total=step.n_all, completed=n_done, description=failed)

        try:
            taught = gather_answers(teacher, questions, folder, n_at_once=at_once, on_progress=show)
        except KeyboardInterrupt:
            err.print("stopped; the same command goes on", markup=False)
            raise
    _tell(taught)
    return taught.path


def _digest(endpoint: EndpointOptions) -> str:
    """Names the folder: what changes the answers begins anew."""
    told = asdict(endpoint)
    for name in ("api_key_env", "timeout_s", "n_attempts"):
        told.pop(name)
    return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:12]


def _tell(taught: Taught) -> None:
    err.print(f"{taught.n_rows} answers to learn from: {taught.path}", markup=False)
    for n, why in (
        (taught.n_unfinished, "were cut off at --max-tokens"),
        (taught.n_empty, "were empty"),
        (taught.n_failed, "failed; the same command asks them again"),
    ):
        if n:
            err.print(f"{n} left out: they {why}", markup=False)
