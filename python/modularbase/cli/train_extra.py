"""What all commands of `modularbase train` need to be installed."""

from __future__ import annotations

import importlib.util

from modularbase.errors import TrainingError

_EXTRA = ("torch", "transformers", "safetensors", "tensorboard", "matplotlib")


def need_extra() -> None:
    """Refuses to begin without the packages of the extra.

    Raises:
        TrainingError: Naming what is missing.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise TrainingError(f"needs {names}; to install: pip install 'modularbase[train]'")
