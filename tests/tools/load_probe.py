"""Loads GGUF files and uses them, for tests of broken ones: run as a program, since it may abort.

Reads lines "dtype path" from stdin and answers each with one line of JSON: the class of what was
raised and its fields, or what the file gave.
"""

from __future__ import annotations

import json
import sys

from modularbase import Engine, ModularBaseError


def outcome(dtype: str, path: str) -> dict[str, str]:
    """What comes of loading a file and generating from ids and from text."""
    try:
        with Engine.load(path, dtype=dtype, n_threads=1) as engine:  # type: ignore[arg-type]
            ids = engine.generate([1, 2, 3], max_tokens=3, temperature=0, ignore_eos=True)
            engine.generate("the", max_tokens=2)
            engine.score([1, 2, 3])
            return {"error": "", "field": "", "message": str(ids.token_ids)}
    except ModularBaseError as error:
        field = str(getattr(error, "field", ""))
        return {"error": type(error).__name__, "field": field, "message": str(error)}
    except Exception as error:
        return {"error": f"bug: {type(error).__name__}", "field": "", "message": str(error)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(outcome(*line.rstrip("\n").split(" ", 1))), flush=True)
