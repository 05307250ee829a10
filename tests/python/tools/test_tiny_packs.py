"""The random packs that other tests load: what lies in the file is what is returned."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.tools.tiny_packs import write_tiny_pack

EXPERT_TYPES = ["q4_k", "q4_0", "q8_0", "f16"]


@pytest.mark.parametrize("expert_type", EXPERT_TYPES)
@pytest.mark.parametrize("adapter_type", ["f16", "bf16", "f32"])
def test_types_and_shapes_in_the_file(adapter_type: str, expert_type: str, tmp_path: Path) -> None:
    pack = write_tiny_pack(
        tmp_path / "pack.gguf",
        n_embd=96,
        sites=(1, 2),
        d_ff=512,
        adapter_type=adapter_type,
        expert_type=expert_type,
        token_gates=True,
    )
    found = {t.name: t for t in gguf.GGUFReader(pack.path).tensors}
    assert len(found) == 2 * 9
    expected = {
        "in.weight": ([96, 256], adapter_type),
        "norm.weight": ([256], "f32"),
        "router.weight": ([256, 8], "f32"),
        "expert_gate.weight": ([256, 512, 8], expert_type),
        "expert_up.weight": ([256, 512, 8], expert_type),
        "expert_down.weight": ([512, 256, 8], expert_type),
        "out.weight": ([256, 96], adapter_type),
        "token_gate.weight": ([96], "f32"),
        "token_gate.bias": ([1], "f32"),
    }
    for name, (shape, kind) in expected.items():
        tensor = found[f"site.1.{name}"]
        assert (list(tensor.shape), tensor.tensor_type.name.lower()) == (shape, kind), name


@pytest.mark.parametrize("expert_type", EXPERT_TYPES)
def test_experts_have_the_spread_asked_for(expert_type: str, tmp_path: Path) -> None:
    pack = write_tiny_pack(tmp_path / "pack.gguf", n_embd=96, sites=(1,), expert_type=expert_type)
    for name, spread in {"expert_gate": 1 / 16, "expert_up": 1 / 16, "expert_down": 0.15}.items():
        values = getattr(pack.sites[0], name)
        assert values.dtype == np.float32
        assert values.std() == pytest.approx(spread, rel=0.1)
        assert abs(values.mean()) < 0.05 * spread
    assert not np.array_equal(pack.sites[0].expert_gate, pack.sites[0].expert_up)


def test_q4_k_values_are_those_of_the_format(tmp_path: Path) -> None:
    """A block decoded by hand, byte by byte: gguf's own decoding is not the only witness."""
    pack = write_tiny_pack(tmp_path / "pack.gguf", n_embd=96, sites=(1,), expert_type="q4_k")
    (tensor,) = (
        t for t in gguf.GGUFReader(pack.path).tensors if t.name == "site.0.expert_up.weight"
    )
    block = bytes(tensor.data[3, 5])
    d, d_min = (float(v) for v in np.frombuffer(block[:4], np.float16))
    packed, nibbles = block[4:16], block[16:]
    for i in range(256):
        run = i // 32
        if run < 4:
            scale, minimum = packed[run] & 63, packed[run + 4] & 63
        else:
            scale = packed[run + 4] & 15 | packed[run - 4] >> 6 << 4
            minimum = packed[run + 4] >> 4 | packed[run] >> 6 << 4
        byte = nibbles[run // 2 * 32 + i % 32]
        nibble = byte >> 4 if run % 2 else byte & 15
        expected = d * scale * nibble - d_min * minimum
        assert pack.sites[0].expert_up[3, 5, i] == pytest.approx(expected, abs=1e-6)
    assert max(packed[:8]) >= 64  # the scales' upper bits are used


def test_manifest_fields_can_be_chosen(tmp_path: Path) -> None:
    fields = {"id": "医疗问答包", "version": "2.0.0", "fallback": ["reasoning"]}
    pack = write_tiny_pack(
        tmp_path / "pack.gguf",
        n_embd=96,
        sites=(1,),
        expert_type="q8_0",
        adapter_type="bf16",
        scale=0.5,
        n_expert_used=3,
        manifest=fields,
    )
    assert pack.manifest.id == "医疗问答包"
    assert pack.manifest.version == "2.0.0"
    assert pack.manifest.fallback == ("reasoning",)
    assert pack.manifest.quantisation.experts == "q8_0"
    assert pack.manifest.quantisation.adapters == "bf16"
    assert (pack.scale, pack.n_expert_used, pack.layers) == (0.5, 3, (1,))
    assert pack.site_at(0) is None
    assert pack.sites[0].token_gate is None


@pytest.mark.parametrize("expert_type", ["q4_k", "q4_0"])
def test_the_seed_decides_the_weights(expert_type: str, tmp_path: Path) -> None:
    images = []
    for seed in (0, 0, 1):
        path = tmp_path / "pack.gguf"
        write_tiny_pack(path, n_embd=96, sites=(1,), expert_type=expert_type, seed=seed)
        images.append(path.read_bytes())
    assert images[0] == images[1]
    assert images[0] != images[2]
