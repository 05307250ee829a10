"""llama.cpp through llama-cpp-python's C API: one file, one sequence, on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from modularbase import SamplingParams

Floats = NDArray[np.float32]


class LlamaCpp:
    """A loaded file. KV in F16 and no flash attention, which is the arithmetic closest to ours."""

    def __init__(
        self, path: Path, *, n_ctx: int = 512, n_batch: int = 512, n_threads: int = 1
    ) -> None:
        _be_quiet()
        model_params = llama_cpp.llama_model_default_params()
        # Its AMX kernels crash when GCC 12 builds them: the tile configuration is optimised away.
        model_params.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = self._n_batch = n_batch
        params.n_outputs_max = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot use {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        self._n_past = 0

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        """Ids as the server makes them of a prompt: special tokens count, BOS as the file says."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), True, True)
        assert n >= 0
        return list(ids[:n])

    def reset(self) -> None:
        """Forgets the sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._n_past = 0

    def chunks(self, ids: Sequence[int]) -> Iterator[Floats]:
        """Continues the sequence in chunks of n_batch; yields their logits [n, n_vocab]."""
        for first in range(0, len(ids), self._n_batch):
            yield self._decode(ids[first : first + self._n_batch])

    def logits(self, ids: Sequence[int]) -> Floats:
        """Logits at every position of a new sequence, [n_tokens, n_vocab]."""
        self.reset()
        return np.concatenate(list(self.chunks(ids)))

    def logprobs(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """ln p of each token of a new sequence given those before it, [n_tokens - 1]."""
        self.reset()
        targets = np.array([*ids[1:], 0])
        parts = []
        for i, rows in enumerate(self.chunks(ids)):
            at = i * self._n_batch
            chosen = targets[at : at + len(rows)]
            parts.append(log_softmax(rows)[np.arange(len(rows)), chosen])
        return np.concatenate(parts)[:-1]

    def greedy(self, ids: Sequence[int], n_tokens: int) -> list[tuple[int, float]]:
        """The n likeliest tokens one after the other, each with its lead over the second."""
        self.reset()
        *_, rows = self.chunks(ids)
        steps = []
        for _ in range(n_tokens):
            row = rows[-1]
            second, first = np.partition(row, -2)[-2:]
            token = int(row.argmax())
            steps.append((token, float(first - second)))
            rows = self._decode([token])
        return steps

    def _decode(self, ids: Sequence[int]) -> Floats:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = self._n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode gave {status}"
        self._n_past += len(ids)
        pointer = llama_cpp.llama_get_logits(self._context)
        rows: Floats = np.ctypeslib.as_array(pointer, (len(ids), self.n_vocab)).copy()
        return rows


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """ln p of every entry of every row."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def sampling_chain(
    logits: Floats, params: SamplingParams, seen: Sequence[int]
) -> Mapping[int, float]:
    """What llama.cpp's default chain leaves of a row: token ids and their probabilities.

    Args:
        logits: One row.
        params: Of the chain.
        seen: Tokens before this one, for the penalties.
    """
    n = len(logits)
    data = (llama_cpp.llama_token_data * n)(
        *((i, float(value), 0.0) for i, value in enumerate(logits))
    )
    row = llama_cpp.llama_token_data_array(data, n, -1, False)
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in _samplers(n, params):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    for token in seen:
        llama_cpp.llama_sampler_accept(chain, token)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(row))
    llama_cpp.llama_sampler_free(chain)
    return {row.data[i].id: row.data[i].p for i in range(row.size)}


def _samplers(n_vocab: int, params: SamplingParams) -> list[Any]:
    biases = (llama_cpp.llama_logit_bias * max(1, len(params.logit_bias)))(
        *params.logit_bias.items()
    )
    min_keep = 0
    return [
        llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(params.logit_bias), biases),
        llama_cpp.llama_sampler_init_penalties(
            n_vocab,
            params.repeat_last_n,
            params.repeat_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        ),
        llama_cpp.llama_sampler_init_top_k(params.top_k),
        llama_cpp.llama_sampler_init_typical(params.typical_p, min_keep),
        llama_cpp.llama_sampler_init_top_p(params.top_p, min_keep),
        llama_cpp.llama_sampler_init_min_p(params.min_p, min_keep),
        llama_cpp.llama_sampler_init_temp(params.temperature),
        llama_cpp.llama_sampler_init_dist(0),  # only for the probabilities
    ]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _drop_line(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Takes one line of llama.cpp's log."""


def _be_quiet() -> None:
    with contextlib.suppress(AttributeError):
        llama_cpp.llama_log_set(_drop_line, ctypes.c_void_p(0))
