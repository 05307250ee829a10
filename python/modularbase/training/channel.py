"""Weights to a running engine, and its activations back, through shared memory without a copy.

The bytes are those of docs/weight-channel.md. The only module of this folder that imports the C++
extension; it imports torch never, and hands out tensors where the caller has imported it.
"""

from __future__ import annotations

import json
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from modularbase import _core
from modularbase.errors import ChannelError, InvalidRequestError

ChannelType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k"]
Array: TypeAlias = NDArray[Any]

_WAIT_MS: Final = 100  # between looks for Ctrl-C


class _Type(NamedTuple):
    number: int  # ggml's
    n_values: int  # of a block
    n_bytes: int
    dtype: str  # of the array that shows it


_TYPES: Final[Mapping[ChannelType, _Type]] = {
    "f32": _Type(0, 1, 4, "<f4"),
    "f16": _Type(1, 1, 2, "<f2"),
    "bf16": _Type(30, 1, 2, "<u2"),
    "q8_0": _Type(8, 32, 34, "u1"),
    "q4_0": _Type(2, 32, 18, "u1"),
    "q4_k": _Type(12, 256, 144, "u1"),
}
_NAMES: Final = {kind.number: name for name, kind in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a channel.

    Attributes:
        name: As in docs/pack-format.md, at most 63 bytes.
        type: Of its numbers. BF16 is shown as uint16, quantised types as the bytes of each row.
        shape: Of its numbers, in NumPy's order: the contiguous dimension last.
    """

    name: str
    type: ChannelType
    shape: tuple[int, ...]

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Of the array that shows it."""
        kind = _TYPES[self.type]
        if kind.dtype != "u1":
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // kind.n_values * kind.n_bytes)


class WeightChannelWriter:
    """Publishes generations of weights; removes its segment when it is closed, or Python ends.

    Two buffers take turns: `array` shows the idle one, `publish` shows it to readers and makes the
    other one idle. Arrays of before a `publish` are what readers copy: ask for new ones.

    Attributes:
        notice: What a killed writer had left under this name, and this one removed; else empty.
        tensors: Its tensors by name.
    """

    def __init__(
        self, name: str, tensors: Sequence[TensorSpec], info: Mapping[str, Any] | None = None
    ) -> None:
        """Makes the segment.

        Args:
            name: 1 to 64 of A-Z a-z 0-9 . _ -
            tensors: What each generation consists of.
            info: What readers should know of them, as JSON.

        Raises:
            InvalidRequestError: A name, type or shape that cannot be.
            ChannelError: No room, or the name is another's.
        """
        facts = [(spec.name, _number(spec.type), list(reversed(spec.shape))) for spec in tensors]
        self._core = _core.WeightWriter(name, facts, json.dumps(dict(info or {})))
        self._close = weakref.finalize(self, self._core.close)  # at exit, too
        self.notice: str = self._core.notice
        self.tensors: Mapping[str, TensorSpec] = {spec.name: spec for spec in tensors}

    @property
    def path(self) -> str:
        """The segment, as `shm_open` names it."""
        return self._core.path

    @property
    def generation(self) -> int:
        """The newest that was published; 0 before the first."""
        return self._core.generation

    def array(self, name: str) -> Array:
        """A tensor's place in the idle buffer; holds what was published two generations ago.

        Raises:
            InvalidRequestError: No tensor of that name.
            ChannelError: Closed, or somebody made the segment shorter.
        """
        return _shown(self._core.buffer(name), self.tensors[name])

    def torch_tensor(self, name: str) -> Any:
        """The same place as a tensor, where the caller has imported torch; BF16 as bfloat16."""
        return _torch(self.array(name), self.tensors[name])

    def publish(self) -> int:
        """Shows what the idle buffer holds to readers; returns its generation.

        Raises:
            ChannelError: As `array`.
        """
        return self._core.publish()

    def close(self) -> None:
        """Removes the segment's name; readers keep the last generation."""
        self._close()

    def __enter__(self) -> WeightChannelWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A copy of one generation.

    Attributes:
        generation: Its number, from 1.
        arrays: Its tensors by name.
    """

    generation: int
    arrays: Mapping[str, Array]


class WeightChannelReader:
    """Copies what a writer in another process publishes.

    Attributes:
        tensors: The channel's tensors by name.
        info: What the writer says of them.
    """

    def __init__(self, name: str) -> None:
        """Opens a channel.

        Raises:
            InvalidRequestError: Not a name.
            ChannelError: None of this name, another user's, or not as docs/weight-channel.md says.
        """
        self._core = _core.WeightReader(name)
        self._places = {name: (offset, n) for name, _, _, offset, n in self._core.tensors}
        self.tensors: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, _NAMES[number], tuple(reversed(shape)))
            for name, number, shape, *_ in self._core.tensors
        }
        self.info: Mapping[str, Any] = _parsed(self._core.path, self._core.json)

    @property
    def path(self) -> str:
        """The segment, as `shm_open` names it."""
        return self._core.path

    @property
    def generation(self) -> int:
        """The newest that is published; 0 before the first.

        Raises:
            ChannelError: Somebody made the segment shorter.
        """
        return self._core.generation()

    @property
    def is_live(self) -> bool:
        """Whether the writer may still publish."""
        return self._core.is_live()

    def wait(self, newer_than: int, timeout: float | None = None) -> int:
        """Waits for a newer generation, at most so many seconds; less where the writer ends.

        Returns:
            `generation`, which is not newer when there was none.
        """

        def is_over(slice_ms: int) -> bool:
            return self._core.wait(newer_than, slice_ms) > newer_than or not self._core.is_live()

        _wait(is_over, timeout)
        return self._core.generation()

    def read(self, *, verify: bool = True) -> PublishedWeights | None:
        """Copies the newest generation; None before the first.

        Args:
            verify: Compare the digest, too, which finds a writer that changed what it published.

        Raises:
            ChannelError: Another digest; shorter than it was; overwritten faster than it is copied.
        """
        payload = np.empty(self._core.payload_bytes, np.uint8)
        generation = self._core.read(payload, verify)
        if generation == 0:
            return None
        arrays = {
            name: _shown(payload[offset : offset + n], self.tensors[name])
            for name, (offset, n) in self._places.items()
        }
        return PublishedWeights(generation, arrays)


class ActivationRing:
    """Takes what an engine saw out of its ring: token ids, and the rows of its residual stream.

    Attributes:
        dtype: Of a record: `sequence`, `position`, `token`, `row`.
        n_embd: Numbers of a row.
        n_records: That the ring holds at most.
    """

    def __init__(self, name: str) -> None:
        """Opens a ring, which has one consumer at a time.

        Raises:
            InvalidRequestError: Not a name.
            ChannelError: None of this name, not as docs/weight-channel.md says, or in use.
        """
        self._core = _core.ActivationConsumer(name)
        self.n_embd: int = self._core.n_embd
        self.n_records: int = self._core.n_records
        row = (_TYPES[_NAMES[self._core.row_type]].dtype, (self.n_embd,))
        self.dtype: np.dtype[np.void] = np.dtype(
            {
                "names": ["sequence", "position", "token", "row"],
                "formats": ["<u8", "<u4", "<i4", row],
                "offsets": [0, 8, 12, 16],
                "itemsize": self._core.record_bytes,
            }
        )

    @property
    def n_dropped(self) -> int:
        """Records that found the ring full, since it was made."""
        return self._core.n_dropped

    @property
    def is_live(self) -> bool:
        """Whether the engine may still put records in."""
        return self._core.is_live()

    def wait(self, timeout: float | None = None) -> int:
        """Waits for a record, at most so many seconds; less where the engine ends.

        Returns:
            How many there are.
        """

        def is_over(slice_ms: int) -> bool:
            return self._core.wait(slice_ms) > 0 or not self._core.is_live()

        _wait(is_over, timeout)
        return self._core.n_waiting

    @contextmanager
    def batch(self, max_records: int) -> Iterator[NDArray[np.void]]:
        """The oldest records, in the ring itself: as many as lie in one piece.

        They go when the block ends; copy what must stay. After an error they come again.

        Raises:
            ChannelError: Shorter than it was, or counters that cannot be.
        """
        records = self._core.batch(max_records).view(self.dtype)
        yield records
        self._core.advance(len(records))


def _number(name: str) -> int:
    for known, kind in _TYPES.items():
        if known == name:
            return kind.number
    raise InvalidRequestError("type", ", ".join(_TYPES), name)


def _shown(raw: NDArray[np.uint8], spec: TensorSpec) -> Array:
    return raw.view(_TYPES[spec.type].dtype).reshape(spec.array_shape)


def _torch(array: Array, spec: TensorSpec) -> Any:
    torch = sys.modules.get("torch")
    if torch is None:
        raise InvalidRequestError("torch", "imported by the caller", "not imported")
    if spec.type != "bf16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _parsed(segment: str, text: str) -> Mapping[str, Any]:
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChannelError(segment, "JSON", "an object", str(error)) from error
    if not isinstance(info, dict):
        raise ChannelError(segment, "JSON", "an object", type(info).__name__)
    return info


def _wait(is_over: Callable[[int], bool], timeout: float | None) -> None:
    """Waits in slices of milliseconds, so that Ctrl-C is heard."""
    end = None if timeout is None else time.monotonic() + timeout
    slice_ms = _WAIT_MS
    while True:
        if end is not None:
            slice_ms = max(0, min(_WAIT_MS, math.ceil((end - time.monotonic()) * 1000)))
        if is_over(slice_ms) or (end is not None and time.monotonic() >= end):
            return
