"""ModularBase: a small resident base model, and packs of domain knowledge that come and go."""

from modularbase._core import __version__
from modularbase.async_engine import AsyncEngine
from modularbase.engine import Engine
from modularbase.errors import ModularBaseError
from modularbase.generation import Generation
from modularbase.types import (
    EngineOptions,
    PackRequest,
    PackStatus,
    PackUse,
    Result,
    SamplingParams,
    Score,
)

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineOptions",
    "Generation",
    "ModularBaseError",
    "PackRequest",
    "PackStatus",
    "PackUse",
    "Result",
    "SamplingParams",
    "Score",
    "__version__",
]
