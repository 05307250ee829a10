"""ModularBase: a small resident base model, and packs of domain knowledge that come and go."""

from modularbase._core import __version__
from modularbase.async_engine import AsyncEngine
from modularbase.context_types import ContextOptions, Tier
from modularbase.conversation import Conversation
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
    "ContextOptions",
    "Conversation",
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
    "Tier",
    "__version__",
]
