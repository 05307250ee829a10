"""The adapters that packs are compared with, and the clients that use either."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from benchmarks import ours, packs_peer
from benchmarks.peers.lora_file import LoraBase, read_base, write_lora
from benchmarks.peers.process import PeerRunError
from benchmarks.peers.server import Server, read_answer

# Two blocks of 2 * (64 + 32 + 96 + 64) = 512 bytes a rank; n_in and n_out.
BASE = LoraBase(
    "llama",
    [{f"blk.{i}.attn_q.weight": (64, 32), f"blk.{i}.ffn_down.weight": (96, 64)} for i in range(2)],
)
SHAPES = {name: shape for block in BASE.blocks for name, shape in block.items()}


def write_model(path: Path, names: dict[str, tuple[int, int]]) -> Path:
    writer = GGUFWriter(path, "llama")
    for name, (n_in, n_out) in names.items():
        writer.add_tensor(name, np.zeros((n_out, n_in), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_base_is_its_linear_layers_without_head_embedding_and_norms(tmp_path: Path) -> None:
    others = ("token_embd.weight", "blk.0.ffn_norm.weight", "v.blk.0.attn_q.weight")
    path = write_model(tmp_path / "m.gguf", {**dict.fromkeys(others, (64, 9)), **SHAPES})
    assert read_base(path) == BASE


def test_a_file_without_linear_layers_is_an_error(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", {"token_embd.weight": (64, 9)})
    with pytest.raises(ValueError, match="expected a model with linear layers"):
        read_base(path)


@pytest.mark.parametrize(
    ("n_bytes", "ranks"),
    [
        (16 * 512, [16, 0]),
        (32 * 512, [16, 16]),
        (40 * 512 - 1, [16, 16]),
        (40 * 512 + 1, [32, 16]),  # nearer to 48 than to 32
        (112 * 512, [64, 48]),
    ],
)
def test_ranks_are_multiples_of_16_and_nearest_in_size(n_bytes: int, ranks: list[int]) -> None:
    assert BASE.nearest_ranks(n_bytes) == ranks
    assert BASE.n_bytes(ranks) == 512 * sum(ranks)


def test_a_size_below_any_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="room for rank 16, found 512"):
        BASE.nearest_ranks(512)


def test_an_adapter_is_read_back_as_llama_cpp_wants_it(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_lora(path, BASE, [32, 16], seed=1)
    reader = GGUFReader(path)
    fields = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    for key, expected in fields.items():
        field = reader.get_field(key)
        assert field is not None
        assert field.contents() == expected
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tensor.shape.tolist() for name, tensor in tensors.items()} == {
        "blk.0.attn_q.weight.lora_a": [64, 32],  # n_in, rank
        "blk.0.attn_q.weight.lora_b": [32, 32],  # rank, n_out
        "blk.0.ffn_down.weight.lora_a": [96, 32],
        "blk.0.ffn_down.weight.lora_b": [32, 64],
        "blk.1.attn_q.weight.lora_a": [64, 16],
        "blk.1.attn_q.weight.lora_b": [16, 32],
        "blk.1.ffn_down.weight.lora_a": [96, 16],
        "blk.1.ffn_down.weight.lora_b": [16, 64],
    }
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F16"}
    assert sum(int(tensor.n_bytes) for tensor in tensors.values()) == BASE.n_bytes([32, 16])
    for tensor in tensors.values():
        assert np.isfinite(tensor.data).all()
        assert np.count_nonzero(tensor.data) > 0.9 * tensor.data.size


def test_adapters_of_different_seeds_differ(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.gguf" for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write_lora(path, BASE, [16, 0], seed=seed)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()


def test_adapters_are_as_large_as_the_pack_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs_peer, "CACHE", tmp_path)
    model = write_model(tmp_path / "m.gguf", SHAPES)
    pack = tmp_path / "pack.gguf"
    pack.write_bytes(bytes(80 * 512))
    adapters = packs_peer.adapters_like(pack, model)
    assert adapters.ranks == [48, 32]
    assert len(adapters.files) == packs_peer.N_CLIENTS
    assert adapters.facts["pack_bytes"] == 40_960
    assert adapters.facts["adapter_bytes"] == pytest.approx(40_960, rel=0.05)  # and a header
    assert adapters.facts["adapter_ranks"] == "32 in 1 blocks, 48 in 1 blocks"
    before = [path.stat().st_mtime_ns for path in adapters.files]
    assert packs_peer.adapters_like(pack, model) == adapters
    assert [path.stat().st_mtime_ns for path in adapters.files] == before


def test_an_answer_is_its_tokens() -> None:
    answer = {"tokens": [5, 6], "timings": {"prompt_n": 3}}
    assert read_answer(answer, 3, 2) == [5, 6]


@pytest.mark.parametrize(
    "answer",
    [
        {"tokens": [5], "timings": {"prompt_n": 3}},
        {"tokens": [5, 6], "timings": {"prompt_n": 1}},  # the rest came from a cache
        {"timings": {"prompt_n": 3}},
        {"tokens": [5, 6]},
    ],
    ids=["short", "cached", "no-tokens", "no-timings"],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(answer: dict[str, object]) -> None:
    with pytest.raises(PeerRunError, match="expected 3 tokens computed and 2 generated"):
        read_answer(answer, 3, 2)


def adapted(monkeypatch: pytest.MonkeyPatch, *, n_different: int) -> Server:
    def answer(_: Server, prompt: list[int], n_gen: int, adapter: int | None) -> list[int]:
        number = -1 if adapter is None else adapter
        return [min(number, n_different - 2)] * n_gen

    monkeypatch.setattr(Server, "answer", answer)
    return Server(port=1)


def test_adapters_that_change_nothing_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    packs_peer.check_adapters(adapted(monkeypatch, n_different=9))
    with pytest.raises(PeerRunError, match=r"expected 9 different answers .* found 8"):
        packs_peer.check_adapters(adapted(monkeypatch, n_different=8))


@pytest.mark.parametrize(
    ("n_packs", "n_cached", "n_generated"), [(0, 0, 64), (1, 32, 64), (1, 0, 63)]
)
def test_an_answer_of_ours_without_its_pack_cached_or_short_is_an_error(
    n_packs: int, n_cached: int, n_generated: int
) -> None:
    def engine(n_packs: int, n_cached: int, n_generated: int) -> Any:
        result = SimpleNamespace(
            packs=["p"] * n_packs,
            usage=SimpleNamespace(cached_tokens=n_cached),
            token_ids=[7] * n_generated,
        )
        return SimpleNamespace(submit=lambda _, **__: SimpleNamespace(result=lambda: result))

    assert packs_peer.N_GEN == 64
    packs_peer.our_answer(engine(1, 0, 64), ["p"], 0, [1, 2])
    with pytest.raises(ours.MeasurementError, match="expected 1 pack, 0 cached and 64 generated"):
        packs_peer.our_answer(engine(n_packs, n_cached, n_generated), ["p"], 0, [1, 2])


def test_clients_ask_at_once_and_each_one_after_the_other() -> None:
    lock = threading.Lock()
    seen: list[tuple[int, ...]] = []
    running, most = [0] * packs_peer.N_CLIENTS, 0

    def answer(client: int, prompt: list[int]) -> None:
        nonlocal most
        with lock:
            seen.append(tuple(prompt))
            running[client] += 1
            assert running[client] == 1
            most = max(most, sum(running))
        time.sleep(0.05)
        with lock:
            running[client] -= 1

    rate = packs_peer.requests_per_minute(answer, 3, itertools.count())
    n_requests = 3 * packs_peer.N_CLIENTS
    assert len(set(seen)) == n_requests  # no prompt twice
    assert {len(prompt) for prompt in seen} == {packs_peer.N_PROMPT}
    assert most == packs_peer.N_CLIENTS
    assert rate <= n_requests * 60 / 0.15  # three of 50 ms, or more on a busy machine
    assert rate > n_requests * 60 / (n_requests * 0.05)  # the time of one client for all


def test_a_client_that_fails_is_an_error() -> None:
    def answer(client: int, _: list[int]) -> None:
        if client == 3:
            raise ours.MeasurementError("no pack")

    with pytest.raises(ours.MeasurementError, match="no pack"):
        packs_peer.requests_per_minute(answer, 1, itertools.count())
