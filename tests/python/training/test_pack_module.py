"""The pack's modules against the plain formulation in tests/tools/torch_pack.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modularbase.packs.pack_file import read_pack
from modularbase.packs.weights import PackGeometry, tensor_shapes
from modularbase.training.pack_module import PackModule
from tests.tools.pack_values import PackValues
from tests.tools.tiny_packs import write_tiny_pack
from tests.tools.torch_pack import run_site

N_EMBD = 64
GEOMETRY = PackGeometry(n_embd=N_EMBD, d_inner=256, d_ff=256, n_expert=8, sites=(1, 2))
# F64 sums of at most 256 terms in another order.
EXACT = {"rtol": 1e-9, "atol": 1e-11}

_NAMES = {"gate_weight": "token_gate", "gate_bias": "token_bias"}  # as the plain formulation has it


def random_pack(path: Path) -> tuple[PackValues, PackModule]:
    """A file's pack, as plain numbers and as a module."""
    values = write_tiny_pack(path, n_embd=N_EMBD, sites=(1, 2), token_gates=True, scale=0.7)
    geometry = replace(GEOMETRY, norm_eps=values.norm_eps)  # both rounded to F32 in the file
    pack = PackModule(geometry, scale=values.scale)
    pack.load_arrays(read_pack(path).tensors)
    return values, pack


def test_outputs_and_gradients_are_those_of_the_plain_formulation(tmp_path: Path) -> None:
    values, pack = random_pack(tmp_path / "a.gguf")
    pack = pack.double()
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 25, N_EMBD, generator=draw, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 25, N_EMBD, generator=draw, dtype=torch.float64)
    for site, module in zip(values.sites, pack.sites, strict=True):
        delta = module(x).delta
        parameters = [x, *module.parameters()]
        found = torch.autograd.grad((delta * direction).sum(), parameters)
        named = {_NAMES.get(name, name): value for name, value in module.named_parameters()}
        rows = x.reshape(-1, N_EMBD)
        plain = run_site(values, replace(site, **named), rows).delta.reshape(x.shape)
        torch.testing.assert_close(delta, plain, **EXACT)
        expected = torch.autograd.grad((plain * direction).sum(), parameters)
        for mine, other in zip(found, expected, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(mine, other, **EXACT)


def test_an_expert_that_no_row_chooses_gets_no_gradient(tmp_path: Path) -> None:
    _, pack = random_pack(tmp_path / "a.gguf")
    site = pack.sites[0]
    with torch.no_grad():
        site.router.zero_()
        site.router[2], site.router[5] = 1.0, -1.0
    # z has both signs, so rows choose 2 or 5 first; of the equal rest the first one follows.
    site(torch.randn(30, N_EMBD, generator=torch.Generator().manual_seed(0))).delta.sum().backward()
    used = site.expert_up.grad.abs().amax(dim=(1, 2)) > 0
    assert used[2] and used[5] and not used.all()


def test_a_new_pack_is_the_identity_and_can_learn() -> None:
    pack = PackModule(GEOMETRY)
    x = torch.randn(20, N_EMBD, generator=torch.Generator().manual_seed(1))
    output = pack.sites[0](x)
    assert not output.delta.any()
    (output.delta * torch.randn(20, N_EMBD)).sum().backward()
    assert pack.sites[0].w_out.grad.abs().max() > 0


def test_equal_seeds_give_equal_packs() -> None:
    first, again, other = (PackModule(GEOMETRY, seed=seed).to_arrays() for seed in (4, 4, 5))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["site.0.in.weight"], other["site.0.in.weight"])
    assert not np.array_equal(first["site.0.in.weight"], first["site.1.in.weight"])


@pytest.mark.parametrize("token_gates", [False, True])
def test_names_and_shapes_are_those_of_the_file(token_gates: bool) -> None:
    arrays = PackModule(GEOMETRY, token_gates=token_gates).to_arrays()
    gates = {name for name in arrays if "token_gate" in name}
    assert len(gates) == (4 if token_gates else 0)
    found = {name: array.shape for name, array in arrays.items() if name not in gates}
    assert found == tensor_shapes(GEOMETRY)


def test_balance_counts_how_evenly_experts_are_used() -> None:
    site = PackModule(GEOMETRY).sites[0]
    x = torch.randn(4000, N_EMBD, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert float(site(x).balance) == pytest.approx(1, abs=0.1)  # nearly uniform at the start
        site.router.zero_()
        even = site(x)  # r is uniform, whatever is chosen
        assert float(even.balance) == pytest.approx(1, abs=1e-5)
        assert float(even.z_loss) == pytest.approx(np.log(8) ** 2, abs=1e-4)
        site.norm.fill_(1)
        site.router[0], site.w_in[:] = 1.0, 0.1
        alone = site(x.abs())  # z > 0: expert 0 takes all of r, and half of the choices
    assert float(alone.balance) == pytest.approx(8 / 2, abs=0.01)


def test_autocast_narrows_products_only() -> None:
    pack = PackModule(GEOMETRY)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in pack.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    x = torch.randn(50, N_EMBD, generator=torch.Generator().manual_seed(6))
    exact = pack.sites[0](x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = pack.sites[0](x)
    assert narrow.z_loss.dtype == torch.float32
    difference = (narrow.delta.float() - exact.delta).norm() / exact.delta.norm()
    assert 0 < difference.item() < 0.03  # 8 bits of mantissa through three products
