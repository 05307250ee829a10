"""Channels: what goes in comes out, the bytes are those documented, torch sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modularbase import _core
from modularbase.errors import ChannelError, InvalidRequestError
from modularbase.training import channel
from modularbase.training.channel import (
    ActivationRing,
    ChannelType,
    TensorSpec,
    WeightChannelReader,
    WeightChannelWriter,
)
from tests.python.training.segment_bytes import RING, Entry, Segment, shm_file, start_of, xxh64

SPECS = [
    TensorSpec("site.0.in.weight", "f16", (3, 64)),
    TensorSpec("site.0.norm.weight", "f32", (5,)),
    TensorSpec("site.0.out.weight", "bf16", (2, 7)),
    TensorSpec("site.0.expert_gate.weight", "q4_k", (2, 3, 256)),
]


def publish(writer: WeightChannelWriter, value: int) -> int:
    for name in writer.tensors:
        writer.array(name)[...] = value
    return writer.publish()


def test_what_is_published_is_read(name: str) -> None:
    with WeightChannelWriter(name, SPECS, {"pack": "python_code"}) as writer:
        reader = WeightChannelReader(name)
        assert reader.info == {"pack": "python_code"}
        assert list(reader.tensors.values()) == SPECS
        assert reader.read() is None
        for value in (1, 2, 3):
            assert publish(writer, value) == value == writer.generation == reader.generation
            weights = reader.read()
            assert weights is not None and weights.generation == value
            shown = {name: (str(a.dtype), a.shape) for name, a in weights.arrays.items()}
            assert shown == {
                "site.0.in.weight": ("float16", (3, 64)),
                "site.0.norm.weight": ("float32", (5,)),
                "site.0.out.weight": ("uint16", (2, 7)),
                "site.0.expert_gate.weight": ("uint8", (2, 3, 144)),
            }
            assert all((array == value).all() for array in weights.arrays.values())


def test_arrays_are_the_segment_itself_and_outlive_the_writer(name: str) -> None:
    writer = WeightChannelWriter(name, SPECS)
    array = writer.array("site.0.norm.weight")
    array[:] = 42.5
    assert np.float32(42.5).tobytes() * 5 in shm_file(name).read_bytes()
    writer.close()
    assert not shm_file(name).exists()
    array[:] = 1
    with pytest.raises(ChannelError, match="closed"):
        writer.array("site.0.norm.weight")


def test_torch_sees_the_same_memory(name: str) -> None:
    torch = pytest.importorskip("torch")
    with WeightChannelWriter(name, SPECS) as writer:
        writer.torch_tensor("site.0.in.weight").fill_(1.5)
        writer.torch_tensor("site.0.norm.weight").fill_(2.5)
        out = writer.torch_tensor("site.0.out.weight")
        assert out.dtype == torch.bfloat16
        out.copy_(torch.full((2, 7), 3.5))
        assert writer.torch_tensor("site.0.expert_gate.weight").dtype == torch.uint8
        writer.publish()
        weights = WeightChannelReader(name).read()
        assert weights is not None
        assert (weights.arrays["site.0.in.weight"] == 1.5).all()
        assert (weights.arrays["site.0.norm.weight"] == 2.5).all()
        as_float = weights.arrays["site.0.out.weight"].astype(np.uint32) << 16
        assert (as_float.view(np.float32) == 3.5).all()


def test_torch_is_the_callers_choice() -> None:
    program = (
        "import sys\n"
        "from modularbase.training import channel\n"
        "assert 'torch' not in sys.modules\n"
        "spec = channel.TensorSpec('a', 'f32', (1,))\n"
        "with channel.WeightChannelWriter('no-torch', [spec]) as writer:\n"
        "    try: writer.torch_tensor('a')\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stdout == b"torch: expected imported by the caller, found not imported\n"


def test_sizes_are_those_of_ggml() -> None:
    for kind, facts in channel._TYPES.items():
        number = GGMLQuantizationType[kind.upper()]
        assert (facts.number, (facts.n_values, facts.n_bytes)) == (number, GGML_QUANT_SIZES[number])


def test_digests_are_those_that_xxhash_gives() -> None:
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"abc") == 0x44BC2CF5AD770999
    assert xxh64(b"Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1


# --- the bytes, in both directions ---


def test_bytes_written_by_cpp_are_as_documented(name: str) -> None:
    with WeightChannelWriter(name, SPECS, {"n": 1}) as writer:
        for value in (1, 2):
            publish(writer, value)
        writer.array("site.0.norm.weight")[:] = 9  # a third generation has begun
        segment = Segment.parse(shm_file(name).read_bytes())
    assert (segment.generation, segment.writing, segment.owner_pid) == (2, 3, os.getpid())
    assert json.loads(segment.json) == {"n": 1}
    assert segment.entries == [
        Entry("site.0.in.weight", 1, (64, 3), 0, 384),
        Entry("site.0.norm.weight", 0, (5,), 384, 20),
        Entry("site.0.out.weight", 30, (7, 2), 448, 28),
        Entry("site.0.expert_gate.weight", 12, (256, 3, 2), 512, 864),
    ]
    published, begun = segment.payloads
    assert len(published) == 1408
    assert published[384:404] == np.full(5, 2, "<f4").tobytes()
    assert published[448:476] == np.full(14, 2, "<u2").tobytes()
    assert published[512 : 512 + 864] == bytes([2]) * 864
    assert segment.digests[0] == xxh64(published)
    assert begun[384:404] == np.full(5, 9, "<f4").tobytes()


def written(**changes: Any) -> Segment:
    """A segment with one F32 and one Q8_0 tensor, of which two generations are published."""
    payloads = tuple(
        np.full(3, value, "<f4").tobytes() + bytes(52) + bytes([value]) * 68 + bytes(60)
        for value in (20, 10)
    )
    values: dict[str, Any] = {
        "generation": 2,
        "writing": 2,
        "digests": tuple(xxh64(payload) for payload in payloads),
        "json": '{"from": "struct"}',
        "entries": [Entry("a", 0, (3,), 0, 12), Entry("b", 8, (32, 1, 2), 64, 68)],
        "payloads": payloads,
    }
    return Segment(**(values | changes))


def place(name: str, raw: bytes) -> None:
    handle = os.open(shm_file(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(raw)


def test_bytes_written_by_python_are_read_by_cpp(name: str) -> None:
    place(name, written().pack())
    reader = WeightChannelReader(name)
    assert reader.info == {"from": "struct"}
    assert list(reader.tensors.values()) == [
        TensorSpec("a", "f32", (3,)),
        TensorSpec("b", "q8_0", (2, 1, 32)),
    ]
    assert (reader.generation, reader.is_live) == (2, True)
    weights = reader.read(verify=True)
    assert weights is not None and weights.generation == 2
    assert (weights.arrays["a"] == 20).all()
    assert weights.arrays["b"].shape == (2, 1, 34) and (weights.arrays["b"] == 20).all()

    with shm_file(name).open("r+b") as file:  # goes on: generation 3 is begun and published
        third = written().payloads[0]
        file.seek(72)
        file.write((3).to_bytes(8, "little"))
        file.seek(len(written().pack()) - len(third))
        file.write(third)
        file.seek(88)
        file.write(xxh64(third).to_bytes(8, "little"))
        file.seek(64)
        file.write((3).to_bytes(8, "little"))
    assert reader.wait(2, timeout=10) == 3
    weights = reader.read(verify=True)
    assert weights is not None and (weights.generation, weights.arrays["a"][0]) == (3, 20)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100000])
def test_json_that_is_no_object_is_an_error(text: str, name: str) -> None:
    place(name, written(json=text).pack())
    with pytest.raises(ChannelError, match="JSON: expected an object"):
        WeightChannelReader(name)


def test_ring_bytes_are_as_documented(name: str) -> None:
    ring = _core.ActivationProducer(name, n_embd=3, row_type=1, n_records=2)
    rows = np.arange(9, dtype="<f2").reshape(3, 3)
    pushed = [ring.push(2**40, i, -i, row.view(np.uint8)) for i, row in enumerate(rows)]
    assert (pushed, ring.n_dropped) == ([True, True, False], 1)
    raw = shm_file(name).read_bytes()
    assert raw[:8] == b"MBACTRNG" and len(raw) == 256 + 2 * 64
    assert int.from_bytes(raw[32:40], "little") == start_of(os.getpid())
    assert RING.unpack_from(raw, 64) == (2, 1, 0, 256, 64, 2, 3, 1)
    head = (2**40).to_bytes(8, "little") + (1).to_bytes(4, "little") + b"\xff\xff\xff\xff"
    assert raw[320:342] == head + rows[1].tobytes()
    ring.close()


@st.composite
def spec_lists(draw: st.DrawFn) -> list[TensorSpec]:
    """Tensors of every type, with one to four small dimensions."""
    names = draw(st.lists(st.text("aé._0", min_size=1, max_size=20), max_size=5, unique=True))
    specs = []
    for name in [*names, "last"]:
        kind: ChannelType = draw(st.sampled_from(tuple(channel._TYPES)))
        outer = draw(st.lists(st.integers(1, 4), max_size=3))
        inner = draw(st.integers(1, 5)) * channel._TYPES[kind].n_values
        specs.append(TensorSpec(name, kind, (*outer, inner)))
    return specs


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(specs=spec_lists(), seed=st.integers(0, 2**32 - 1))
def test_any_tensors_come_out_as_they_went_in(
    specs: list[TensorSpec], seed: int, name: str
) -> None:
    random = np.random.default_rng(seed)
    with WeightChannelWriter(name, specs) as writer:
        wanted = {}
        for spec in specs:
            array = writer.array(spec.name)
            assert array.shape == spec.array_shape
            assert array.__array_interface__["data"][0] % 64 == 0
            array.reshape(-1).view(np.uint8)[:] = random.integers(0, 256, array.nbytes, np.uint8)
            wanted[spec.name] = array.tobytes()
        writer.publish()
        reader = WeightChannelReader(name)
        weights = reader.read()
        assert weights is not None and list(reader.tensors.values()) == specs
        assert {name: array.tobytes() for name, array in weights.arrays.items()} == wanted


# --- waiting, and the ring ---


def test_waiting(name: str) -> None:
    with WeightChannelWriter(name, SPECS) as writer:
        reader = WeightChannelReader(name)
        assert reader.wait(0, timeout=0) == 0
        begin = time.monotonic()
        assert reader.wait(0, timeout=0.15) == 0
        assert time.monotonic() - begin >= 0.15
        timer = threading.Timer(0.05, writer.publish)
        timer.start()
        assert reader.wait(0) == 1
        timer.join()
        timer = threading.Timer(0.05, writer.close)
        timer.start()
        assert reader.wait(1) == 1
        timer.join()
        assert not reader.is_live
        assert reader.read() is not None


def test_ring_of_records(name: str) -> None:
    producer = _core.ActivationProducer(name, n_embd=4, row_type=0, n_records=3)
    ring = ActivationRing(name)
    assert (ring.n_embd, ring.n_records, ring.wait(timeout=0.01)) == (4, 3, 0)
    for i in range(4):
        producer.push(9, i, 100 + i, np.full(4, i, np.float32).view(np.uint8))
    assert (ring.wait(), ring.n_dropped) == (3, 1)
    with pytest.raises(RuntimeError), ring.batch(2) as records:
        raise RuntimeError
    with ring.batch(2) as records:
        assert records["sequence"].tolist() == [9, 9]
        assert records["position"].tolist() == [0, 1]
        assert records["token"].tolist() == [100, 101]
        assert records["row"].tolist() == [[0.0] * 4, [1.0] * 4]
    producer.push(9, 7, 0, np.full(4, 7, np.float32).view(np.uint8))
    with ring.batch(9) as records:
        assert records["position"].tolist() == [2]
    with ring.batch(9) as records:
        assert records["position"].tolist() == [7]
    producer.close()
    assert (ring.wait(), ring.is_live) == (0, False)


def test_requests_that_make_no_sense(name: str) -> None:
    for bad in ("", "a/b", "x" * 65, "\x00"):
        with pytest.raises(InvalidRequestError, match="channel name"):
            WeightChannelWriter(bad, SPECS)
        with pytest.raises(InvalidRequestError, match="channel name"):
            WeightChannelReader(bad)
    with pytest.raises(InvalidRequestError, match="type"):
        WeightChannelWriter(name, [TensorSpec("a", "q6_k", (256,))])  # type: ignore[arg-type]
    with WeightChannelWriter(name, SPECS) as writer, pytest.raises(InvalidRequestError):
        writer.array("other")
