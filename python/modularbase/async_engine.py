"""The same engine for asyncio programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from modularbase.engine import Engine
from modularbase.errors import CancelledError
from modularbase.generation import Generation
from modularbase.types import FloatArray, Message, Prompt, Result, SamplingParams, Score

_T = TypeVar("_T")
_MAX_WAITING = 256  # awaits that may wait at once; their threads sleep in the C++ core


class AsyncEngine:
    """Awaitable calls on an `Engine`; cancelling a task cancels its request.

    Use it as an async context manager, or call `close`.
    """

    def __init__(self, engine: Engine) -> None:
        """Wraps a loaded engine, which stays usable directly."""
        self.engine = engine
        self._waiters = ThreadPoolExecutor(_MAX_WAITING, thread_name_prefix="modularbase-wait")

    @classmethod
    async def load(cls, base: str | os.PathLike[str], **arguments: Any) -> AsyncEngine:
        """Loads a base; arguments as in `Engine.load`."""
        return cls(await asyncio.to_thread(Engine.load, base, **arguments))

    async def __aenter__(self) -> AsyncEngine:
        """Returns itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the engine."""
        await self.close()

    async def close(self) -> None:
        """Cancels what runs and frees the base."""
        await asyncio.to_thread(self.engine.close)
        self._waiters.shutdown(wait=False)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any
    ) -> Result:
        """As `Engine.generate`."""
        return await self._result(await self._submit(prompt, params, overrides))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any
    ) -> AsyncIterator[str]:
        """As `Engine.stream`."""
        generation = await self._submit(prompt, params, overrides)
        pieces = iter(generation)
        try:
            while (piece := await self._wait(lambda: next(pieces, None))) is not None:
                if piece.text:
                    yield piece.text
            await self._wait(generation.result)
        finally:
            generation.cancel()

    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **overrides: Any
    ) -> Result:
        """As `Engine.chat`."""
        return await self._result(
            await self._submit_beside(
                lambda: self.engine.submit_chat(messages, params, **overrides)
            )
        )

    async def score(self, prompt: Prompt) -> Score:
        """As `Engine.score`."""
        return await self._wait(lambda: self.engine.score(prompt))

    async def embed(self, prompt: Prompt) -> FloatArray:
        """As `Engine.embed`."""
        return await self._wait(lambda: self.engine.embed(prompt))

    async def _submit(
        self, prompt: Prompt, params: SamplingParams | None, overrides: dict[str, Any]
    ) -> Generation:
        def submit() -> Generation:
            return self.engine.submit(prompt, params, **overrides)

        if not overrides.get("packs") and overrides.get("context") is None:
            return submit()
        return await self._submit_beside(submit)

    async def _submit_beside(self, submit: Callable[[], Generation]) -> Generation:
        """A pack's first use, or grading a text, takes a while: other tasks do not wait for it."""
        submitting = asyncio.ensure_future(self._wait(submit))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel)
            raise

    async def _result(self, generation: Generation) -> Result:
        try:
            return await self._wait(generation.result)
        except asyncio.CancelledError:
            generation.cancel()
            raise

    async def _wait(self, call: Callable[[], _T]) -> _T:
        try:
            waiting = asyncio.get_running_loop().run_in_executor(self._waiters, call)
        except RuntimeError as error:  # the threads went with close
            raise CancelledError("the engine is closed") from error
        return await waiting


def _cancel(submitting: asyncio.Future[Generation]) -> None:
    """Cancels what was submitted for a task that has gone."""
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
