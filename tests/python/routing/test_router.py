"""What a router pack's heads say, against the same in torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from modularbase.errors import InvalidRequestError, PackFormatError
from modularbase.packs.router_file import LinearHead, write_router
from modularbase.routing.router import Router, normalised
from tests.python.packs.small_packs import small_gguf
from tests.python.packs.small_routers import N_EMBD, PACKS, small_router


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_shares_are_torch_s(size: float, tmp_path: Path) -> None:
    weights = small_router()
    write_router(tmp_path / "a.gguf", weights)
    router = Router.load(tmp_path / "a.gguf")
    hidden = np.random.default_rng(1).standard_normal(N_EMBD, np.float32) * np.float32(size)
    x = functional.rms_norm(torch.from_numpy(hidden), (N_EMBD,), eps=1e-6)
    for found, head in (
        (router.score(hidden), weights.heads["router"]),
        (router.mix(hidden), weights.heads["fusion"]),
    ):
        linear = functional.linear(x, torch.from_numpy(head.weight), torch.from_numpy(head.bias))
        expected = (linear / head.temperature).softmax(dim=0)
        assert list(found) == [pack.id for pack in PACKS]
        # F32 sums in another order.
        np.testing.assert_allclose(list(found.values()), expected[: len(PACKS)], rtol=1e-4)
    assert sum(router.mix(hidden).values()) == pytest.approx(1, abs=1e-6)
    assert 0 < sum(router.score(hidden).values()) < 1  # the rest is for none of them


def test_the_size_of_a_state_does_not_matter() -> None:
    states = np.random.default_rng(2).standard_normal((3, N_EMBD), np.float32) * 50
    np.testing.assert_allclose(normalised(states * 7), normalised(states), rtol=1e-5)


def test_far_logits_do_not_overflow() -> None:
    weights = small_router()
    far = LinearHead(weights.heads["router"].weight * np.float32(1e6), np.zeros(3, np.float32))
    router = Router(replace(weights, heads={"router": far}))
    shares = router.score(np.random.default_rng(3).standard_normal(N_EMBD, np.float32))
    assert all(0 <= share <= 1 for share in shares.values())


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    write_router(tmp_path / "a.gguf", small_router(heads=("router",)))
    router = Router.load(tmp_path / "a.gguf")
    with pytest.raises(InvalidRequestError, match="fusion"):
        router.mix(np.ones(N_EMBD, np.float32))
    for shape in ((N_EMBD + 1,), (1, N_EMBD)):
        with pytest.raises(InvalidRequestError, match="hidden"):
            router.score(np.ones(shape, np.float32))
    with pytest.raises(PackFormatError, match="modularbase-router"):
        Router.load(small_gguf(tmp_path / "b.gguf"))
