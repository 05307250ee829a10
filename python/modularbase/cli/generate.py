"""`modularbase generate`: one prompt, streamed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from modularbase.cli import options as o
from modularbase.cli.console import DEFAULT_BASE, Base, Json, err, print_json, read_stdin
from modularbase.errors import InvalidRequestError


def generate(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text; - reads stdin.")
    ] = None,
    base: Base = DEFAULT_BASE,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: continue the text.")
    ] = False,
    dtype: o.DType = "auto",
    threads: o.Threads = None,
    n_ctx: o.Context = None,
    device: o.Device = "auto",
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = 0.8,
    top_k: o.TopK = 40,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.05,
    repeat_penalty: o.RepeatPenalty = 1.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
    draft: o.Draft = 0,
    pack: o.Pack = None,
    pack_budget: o.PackBudget = None,
    policy: o.Policy = "blend",
    fallback: o.Fallback = "on_failure",
    as_json: Json = False,
) -> None:
    """Answers a prompt (or continues it, with --raw)."""
    if prompt is None:
        raise InvalidRequestError("prompt", "text, or - to read stdin", "nothing")
    text = read_stdin() if prompt == "-" else prompt
    params = o.sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        stop=stop,
        n_draft=draft,
    )
    packs = o.pack_request(pack, policy, fallback)
    with o.load(base, dtype, threads, n_ctx, device, pack_budget) as engine:
        ids = (
            engine.tokenizer.encode(text)
            if raw
            else engine.chat_prompt([{"role": "user", "content": text}])
        )
        generation = engine.submit(ids, packs=packs, **params)
        try:
            if not as_json:
                for piece in generation:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                sys.stdout.write("\n")
            result = generation.result()
        except KeyboardInterrupt:
            generation.cancel()
            raise
    if as_json:
        print_json(
            {
                "text": result.text,
                "token_ids": result.token_ids,
                "finish_reason": result.finish_reason,
                "usage": {
                    "prompt_tokens": result.usage.prompt_tokens,
                    "completion_tokens": result.usage.completion_tokens,
                    "cached_tokens": result.usage.cached_tokens,
                },
                "packs": [asdict(used) for used in result.packs],
                "fallbacks": [asdict(given_up) for given_up in result.fallbacks],
                "timings": {
                    "ttft_ms": result.timings.ttft_ms,
                    "prefill_tps": result.timings.prefill_tps,
                    "decode_tps": result.timings.decode_tps,
                },
            }
        )
    else:
        err.print(
            f"[dim]{result.usage.completion_tokens} tokens, "
            f"{result.timings.decode_tps:.1f} tokens/s, "
            f"first after {result.timings.ttft_ms:.0f} ms[/]"
        )
        if about := o.describe_packs(result):
            err.print(f"[dim]{escape(about)}[/]")
