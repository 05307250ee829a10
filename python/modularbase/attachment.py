"""A name that follows what a trainer publishes through a weight channel."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, get_args

from modularbase.engine_packs import EnginePacks
from modularbase.errors import (
    CancelledError,
    ChannelError,
    InvalidRequestError,
    ModularBaseError,
    PackIncompatibleError,
)
from modularbase.packs.channel_info import ChannelInfo, parse_channel_info
from modularbase.packs.finder import FoundPack
from modularbase.packs.manifest import Manifest, Quantisation, Training
from modularbase.packs.residency import Generation
from modularbase.packs.spec import parse_spec
from modularbase.types import AttachmentStatus, OnPublish

_log = logging.getLogger(__name__)

_WAIT_MS = 100  # between looks for the end


class Channel(Protocol):
    """The reading side of a weight channel in the C++ runtime."""

    @property
    def path(self) -> str:
        """The segment."""

    @property
    def json(self) -> str:
        """What its writer says of it."""

    def wait(self, newer_than: int, timeout_ms: int) -> int:
        """The newest generation, as soon as it is newer than that, or the time is over."""

    def is_live(self) -> bool:
        """Whether the writer may still publish."""

    def is_closed(self) -> bool:
        """Whether the writer has said that it will not."""


class Published(Protocol):
    """A generation that was read."""

    @property
    def number(self) -> int:
        """In the channel; 0: nothing is published."""

    @property
    def id(self) -> int:
        """In the runtime."""


OpenReader = Callable[[ChannelInfo], Callable[[], Published]]
"""Gives what reads a channel's newest generation into the runtime, each time it is called."""

Switch = Callable[[str, int], int]
"""Moves running requests that asked for a name to a generation; returns how many."""


class Attachment:
    """Points a name to each generation that a trainer publishes, beside requests that run.

    A generation that cannot be used leaves the name where it is. It ends when the writer ends, when
    somebody else points the name elsewhere, and by `detach`; the name keeps its last generation.
    Use it as a context manager where it shall end with a block. Safe to use from any thread.
    """

    def __init__(
        self,
        name: str,
        channel: Channel,
        packs: EnginePacks,
        open_reader: OpenReader,
        switch: Switch,
        on_publish: OnPublish,
    ) -> None:
        """Use `Engine.attach`."""
        if on_publish not in get_args(OnPublish):
            expected = " or ".join(map(repr, get_args(OnPublish)))
            raise InvalidRequestError("on_publish", expected, repr(on_publish))
        if parse_spec(name).id != name:
            raise InvalidRequestError("name", "a pack's id", repr(name))
        info = parse_channel_info(channel.json, channel.path)
        _check_base(name, info, packs)
        self.name: str = name
        self.on_publish: OnPublish = on_publish
        self._channel, self._packs, self._switch = channel, packs, switch
        self._read = open_reader(info)
        self._manifest = _manifest(name, info, packs)
        self._changed = threading.Condition()  # guards all below
        self._served: Generation | None = None
        self._is_identity = False
        self._n_served = self._n_seen = self._n_failed = self._n_switched = 0
        self._ready_ms = 0.0
        self._failed_number = 0  # of the last generation that could not be used
        self._last_error: Exception | None = None
        self._is_ended = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"attach-{name}", daemon=True)
        atexit.register(self.detach)  # a thread must not be inside the runtime when Python ends
        self._thread.start()

    @property
    def path(self) -> str:
        """The segment."""
        return self._channel.path

    @property
    def generation(self) -> int:
        """Number, in the channel, of the generation that the name means; 0 before the first."""
        with self._changed:
            return self._n_served

    @property
    def n_published_seen(self) -> int:
        """The newest number that was seen in the channel."""
        with self._changed:
            return self._n_seen

    @property
    def last_error(self) -> Exception | None:
        """What made the last generation that failed fail, or ended the attachment."""
        with self._changed:
            return self._last_error

    @property
    def is_live(self) -> bool:
        """Whether more generations may come."""
        with self._changed:
            return not self._is_ended

    def status(self) -> AttachmentStatus:
        """All that is known, of one moment."""
        with self._changed:
            return AttachmentStatus(
                name=self.name,
                channel=self.path,
                on_publish=self.on_publish,
                is_live=not self._is_ended,
                generation=self._n_served,
                digest=self._served.digest if self._served else "",
                is_identity=self._is_identity,
                n_published_seen=self._n_seen,
                n_failed=self._n_failed,
                n_switched=self._n_switched,
                ready_ms=self._ready_ms,
                last_error=str(self._last_error or ""),
            )

    def wait(self, generation: int, timeout_s: float | None = None) -> int:
        """Waits until the name means this generation or a newer one.

        Args:
            generation: Its number in the channel, as the trainer's `publish` returned it.
            timeout_s: How long.

        Returns:
            The number that the name means.

        Raises:
            TimeoutError: Not within timeout_s.
            ModularBaseError: That generation could not be used, or the attachment has ended.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._n_served < generation:
                if self._last_error and (self._is_ended or self._failed_number >= generation):
                    raise self._last_error
                if self._is_ended:
                    expected, found = str(generation), f"{self._n_served} when it ended"
                    raise ChannelError(self.path, "generation", expected, found)
                if end is not None and time.monotonic() >= end:
                    raise TimeoutError(f"generation {generation} is not there after {timeout_s} s")
                self._changed.wait(_WAIT_MS / 1e3)  # in pieces, so that Ctrl-C is heard
            return self._n_served

    def detach(self) -> None:
        """Stops following the channel; twice is fine."""
        atexit.unregister(self.detach)
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._follow()
        except Exception as caught:
            error = caught
            _log.error("pack %s no longer follows %s: %s", self.name, self.path, error)
        with self._changed:
            self._last_error = error or self._last_error
            self._is_ended = True
            self._changed.notify_all()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            was_live = self._channel.is_live()  # asked first: its last words are heard below
            newest = self._channel.wait(self._n_seen, _WAIT_MS)
            if newest > self._n_seen:
                self._serve(newest)
            elif not was_live:
                if self._channel.is_closed():
                    return
                raise ChannelError(self.path, "owner", "a writer that closes it", "one that ended")

    def _serve(self, newest: int) -> None:
        start = time.monotonic()
        with self._changed:
            self._n_seen = newest
        number = newest

        def read() -> tuple[int, FoundPack]:
            nonlocal number
            published = self._read()
            number = published.number
            manifest = self._manifest.model_copy(update={"version": f"0.0.{number}"})
            return published.id, FoundPack(Path(self.path), "", manifest, None)

        try:
            made = self._packs.publish(self.name, read, previous=self._served)
        except CancelledError:
            raise
        except ModularBaseError as error:
            if isinstance(error, PackIncompatibleError) and error.field == "generation":
                raise  # the name is somebody else's now
            _log.warning("generation %d of %s cannot be used: %s", number, self.path, error)
            with self._changed:
                self._n_failed += 1
                self._failed_number = self._n_seen = max(number, newest)
                self._last_error = error
                self._changed.notify_all()
            return
        n_switched = 0
        if self.on_publish == "live":
            n_switched = self._switch(self.name, made.generation.core_id)
        with self._changed:
            self._served, self._is_identity = made.generation, made.is_identity
            self._n_served = self._n_seen = number
            self._n_switched += n_switched
            self._ready_ms = 1e3 * (time.monotonic() - start)
            self._changed.notify_all()


def _check_base(name: str, info: ChannelInfo, packs: EnginePacks) -> None:
    said = {"base_id": info.base_id, "base_version": info.base_version}
    for field, required in said.items():
        found = getattr(packs.base, field.removeprefix("base_"))
        if required is not None and required != found:
            raise PackIncompatibleError(name, field, required, found)
    if info.base_digest is not None and info.base_digest != packs.base.digest:
        raise PackIncompatibleError(name, "base_digest", info.base_digest, packs.base.digest)


def _manifest(name: str, info: ChannelInfo, packs: EnginePacks) -> Manifest:
    """Of all generations: what the name's pack says, where it is known, but for its figures."""
    known = packs.manifest(name)
    if known is None:
        known = Manifest(
            id=name,
            version="0.0.0",
            name=name,
            domain=name,
            licence="unknown",
            base_id=packs.base.id,
        )
    types = Quantisation(adapters=info.adapter_type, experts=info.expert_type)
    changes = {"id": name, "quantisation": types, "training": Training(), "evaluation": {}}
    return known.model_copy(update=changes)
