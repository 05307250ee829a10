"""The engine that computes states for a training run, as a process of its own.

    python -m modularbase.training.engine_process BASE CHANNEL LAYER BLOCK_TOKENS N_THREADS

What enters LAYER goes into the activation ring CHANNEL. Each line on stdin is a block of token ids
as JSON; each is answered by an object when all of its states are in the ring. The first object says
that the engine is ready; one with an `error` is the last. The process ends with its stdin, so that
it never outlives who started it.
"""

from __future__ import annotations

import json
import signal
import sys
from types import FrameType

from modularbase.engine import Engine
from modularbase.errors import ModularBaseError
from modularbase.types import EngineOptions

RING_BLOCKS = 4
"""Blocks that the ring holds, so that none is dropped while two are on their way."""


def main(arguments: list[str]) -> int:
    """Serves blocks until stdin ends; returns the exit code."""
    base, channel, *numbers = arguments
    layer, block_tokens, n_threads = map(int, numbers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us
    signal.signal(signal.SIGTERM, _end)
    # Without packs and with the whole head nothing is made that hidden states do not need.
    options = EngineOptions(pack_budget_bytes=0, head="full", prefix_cache="off")
    try:
        with Engine.load(
            base, n_threads=n_threads or None, n_ctx=block_tokens, options=options
        ) as engine:
            n_records = RING_BLOCKS * block_tokens
            with engine.tap(channel, layer=layer, n_records=n_records) as tap:
                _answer({"notice": tap.notice})
                for line in sys.stdin:
                    # Hidden states compute every position: no prefix that is known is skipped.
                    engine.hidden(json.loads(line), layer)
                    if tap.last_error is not None:
                        _answer({"error": tap.last_error})
                        return 1
                    _answer({})
    except ModularBaseError as error:
        _answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _answer(facts: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
