"""A trainer publishes a pack, and an engine goes on with it: what is served, to whom, and when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modularbase import Engine, PackRequest, PackUse
from modularbase.errors import (
    ChannelError,
    InvalidRequestError,
    PackIncompatibleError,
    PackNotFoundError,
)
from modularbase.packs.manifest import ExpertType, Manifest
from modularbase.training.export import export_pack
from modularbase.training.pack_module import PackModule
from modularbase.training.publish import PackChannel, PublishedType
from tests.python.conftest import PackEngineFactory
from tests.python.training import published
from tests.tools.engine_packs import (
    BASE_ID,
    GREEDY,
    PROMPT,
    WAIT_S,
    answer,
    leased,
    pack_file,
    tokens,
)


def train(pack: PackModule, seed: int) -> None:
    """As if it had been trained: weights that make it act."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pack.named_tensors():
            if not name.endswith("norm.weight"):
                spread = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread)


@pytest.fixture
def pack() -> PackModule:
    """A new pack for the tiny base: the identity."""
    return PackModule(published.GEOMETRY)


@pytest.fixture
def channel(name: str, pack: PackModule) -> Iterator[PackChannel]:
    """Where it is published."""
    with PackChannel(name, pack) as channel:
        yield channel


@pytest.mark.parametrize(
    ("experts", "as_type"),
    [("q4_0", "f32"), ("q4_k", "f32"), ("q8_0", "f32"), ("f16", "f32"), ("f16", "f16")],
)
def test_an_attached_pack_answers_as_its_file(
    experts: ExpertType,
    as_type: PublishedType,
    pack: PackModule,
    pack_engines: PackEngineFactory,
    name: str,
    tmp_path: Path,
) -> None:
    engine = pack_engines(n_slots=20)
    train(pack, 1)
    manifest = Manifest(
        id="file", version="1.0.0", name="File", domain="d", licence="CC0-1.0", base_id=BASE_ID
    )
    export_pack(tmp_path / "file.gguf", pack, manifest, experts=experts)
    engine.packs.load(str(tmp_path / "file.gguf"))
    with (
        PackChannel(name, pack, expert_type=experts, published_as=as_type) as channel,
        engine.attach("code", channel=name) as attachment,
    ):
        assert attachment.wait(channel.publish(), WAIT_S) == 1
        assert tokens(engine, "code") == tokens(engine, "file") != tokens(engine)
        both = [engine.score(PROMPT, packs=which).logprobs for which in ("code", "file")]
        np.testing.assert_array_equal(both[0], both[1])


def test_a_pack_from_its_first_step_on(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str
) -> None:
    base = tokens(pack_engine)
    with pack_engine.attach("code", channel=name) as attachment:
        assert (attachment.generation, attachment.is_live) == (0, True)
        with pytest.raises(PackNotFoundError):
            pack_engine.generate(PROMPT, packs=PackRequest(packs=(PackUse("code"),)))
        attachment.wait(channel.publish(), WAIT_S)
        assert attachment.status().is_identity
        assert tokens(pack_engine, "code") == base
        for seed in (1, 2):
            train(pack, seed)
            attachment.wait(channel.publish(), WAIT_S)
        status = attachment.status()
        assert (status.generation, status.n_published_seen, status.n_failed) == (3, 3, 0)
        assert (status.channel, status.is_identity, status.last_error) == (channel.path, False, "")
        result = answer(pack_engine, "code")
        assert result.token_ids != base
        (used,) = result.packs
        assert (used.id, used.version, used.digest) == ("code", "0.0.3", status.digest)
        (known,) = pack_engine.packs.list()  # those before it are gone
        assert (known.id, known.path, known.digest) == ("code", channel.path, status.digest)
    assert not attachment.is_live
    channel.publish()
    assert answer(pack_engine, "code").token_ids == result.token_ids  # the name stays


def test_equal_weights_are_one_generation(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str
) -> None:
    train(pack, 1)
    with pack_engine.attach("code", channel=name) as attachment:
        attachment.wait(channel.publish(), WAIT_S)
        before = pack_engine.packs.status("code")
        attachment.wait(channel.publish(), WAIT_S)
        after = pack_engine.packs.status("code")
    assert (before.digest, before.slot) == (after.digest, after.slot)
    assert after.n_loads == 1


def test_running_requests_keep_their_generation(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str
) -> None:
    train(pack, 1)
    with pack_engine.attach("code", channel=name) as attachment:
        attachment.wait(channel.publish(), WAIT_S)
        first = pack_engine.packs.status("code").digest
        before = tokens(pack_engine, "code")
        with leased(pack_engine, "code") as running:
            train(pack, 2)
            attachment.wait(channel.publish(), WAIT_S)
            assert tokens(pack_engine, "code") != before
            states = {s.digest: (s.is_retired, s.n_leases) for s in pack_engine.packs.list()}
            assert states[first] == (True, 1)
        assert len(pack_engine.packs.list()) == 1
        with pytest.raises(Exception, match="cancelled"):
            running.result(WAIT_S)
        assert attachment.status().n_switched == 0


def test_running_requests_switch_where_that_is_wanted(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str
) -> None:
    train(pack, 1)
    with pack_engine.attach("code", channel=name, on_publish="live") as attachment:
        attachment.wait(channel.publish(), WAIT_S)
        # Longer ones, where the machine is too busy to publish while a short one runs.
        for max_tokens in (300, 3_000, 30_000):
            first = pack_engine.packs.status("code").digest
            running = pack_engine.submit(PROMPT, packs="code", max_tokens=max_tokens, **GREEDY)
            next(iter(running))
            train(pack, max_tokens)
            attachment.wait(channel.publish(), WAIT_S)
            result = running.result(WAIT_S)
            if result.pack_switches:
                break
        second = pack_engine.packs.status("code").digest
        assert attachment.status().n_switched == 1
    assert [used.digest for used in result.packs] == [first]
    (change,) = result.pack_switches
    assert (change.from_digest, change.to_digest) == (first, second)
    assert 0 < change.token_index < len(result.token_ids)
    assert answer(pack_engine, "code").pack_switches == ()


def test_who_asked_for_a_version_keeps_it(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str
) -> None:
    train(pack, 1)
    with pack_engine.attach("code", channel=name, on_publish="live") as attachment:
        attachment.wait(channel.publish(), WAIT_S)
        first = pack_engine.packs.status("code").digest
        with leased(pack_engine, "code@0.0.1"):
            train(pack, 2)
            attachment.wait(channel.publish(), WAIT_S)
            leases = {s.digest: s.n_leases for s in pack_engine.packs.list()}
            assert leases == {first: 1, pack_engine.packs.status("code").digest: 0}
        assert attachment.status().n_switched == 0


def test_a_name_that_has_a_pack_already(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str, tmp_path: Path
) -> None:
    pack_engine.packs.load(str(pack_file(tmp_path, "spare")))
    pack_engine.packs.load(str(pack_file(tmp_path, "code@1.2.0", fallback=("spare",))))
    pack_engine.packs.pin("code")
    with pack_engine.attach("code", channel=name) as attachment:
        assert pack_engine.packs.status("code").version == "1.2.0"
        attachment.wait(channel.publish(), WAIT_S)
        status = pack_engine.packs.status("code")
        assert (status.version, status.is_pinned) == ("0.0.1", True)
        known = pack_engine.packs.known("code")
        assert known is not None and known.manifest.fallback == ("spare",)


def test_somebody_else_takes_the_name(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str, tmp_path: Path
) -> None:
    with pack_engine.attach("code", channel=name) as attachment:
        attachment.wait(channel.publish(), WAIT_S)
        theirs = pack_engine.packs.swap("code", str(pack_file(tmp_path)))
        train(pack, 1)
        with pytest.raises(PackIncompatibleError) as caught:
            attachment.wait(channel.publish(), WAIT_S)
        assert (caught.value.field, caught.value.found) == ("generation", theirs.digest)
        assert attachment.last_error is caught.value
        assert not attachment.is_live
        assert pack_engine.packs.status("code").digest == theirs.digest


def test_a_generation_that_cannot_be_used(
    pack: PackModule, channel: PackChannel, pack_engine: Engine, name: str
) -> None:
    train(pack, 1)
    with pack_engine.attach("code", channel=name) as attachment:
        attachment.wait(channel.publish(), WAIT_S)
        before = tokens(pack_engine, "code")
        with torch.no_grad():
            pack.get_parameter("sites.1.expert_up")[0, 3, 5] = torch.nan
        with pytest.raises(ChannelError) as caught:
            attachment.wait(channel.publish(), WAIT_S)
        assert caught.value.field == "site.1.expert_up.weight"
        assert attachment.last_error is caught.value
        assert (attachment.generation, attachment.n_published_seen) == (1, 2)
        assert tokens(pack_engine, "code") == before
        train(pack, 2)
        assert attachment.wait(channel.publish(), WAIT_S) == 3
        assert tokens(pack_engine, "code") != before
        assert attachment.status().n_failed == 1


def test_a_pack_that_finds_no_room(
    pack: PackModule, channel: PackChannel, pack_engines: PackEngineFactory, name: str
) -> None:
    engine = pack_engines(n_slots=0.5)
    with engine.attach("code", channel=name) as attachment:
        with pytest.raises(Exception, match="budget"):
            attachment.wait(channel.publish(), WAIT_S)
        assert attachment.is_live
    assert engine.packs.list() == []


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"format": "other"}, ChannelError, "JSON, format"),
        ({"d_ff": 300}, ChannelError, "JSON, d_ff"),
        ({"n_expert_used": 3}, ChannelError, "JSON, channelinfo"),
        ({"sites": [2, 1]}, ChannelError, "JSON, channelinfo"),
        ({"more": 1}, ChannelError, "JSON, more"),
        ({"d_ff": 512}, ChannelError, "site.0.expert_gate.weight shape"),
        ({"expert_type": "q5_0"}, ChannelError, "JSON, expert_type"),
        ({"n_embd": 64}, PackIncompatibleError, "n_embd"),
        ({"sites": [1, 7]}, PackIncompatibleError, "sites"),
        ({"base_id": "other"}, PackIncompatibleError, "base_id"),
        ({"base_version": "9.0.0"}, PackIncompatibleError, "base_version"),
        ({"base_digest": "sha256:" + "0" * 64}, PackIncompatibleError, "base_digest"),
    ],
)
def test_a_channel_that_does_not_fit(
    changes: dict[str, Any],
    error: type[ChannelError | PackIncompatibleError],
    field: str,
    engine: Engine,
    name: str,
) -> None:
    with published.writer(name, published.info(**changes)), pytest.raises(error) as caught:
        engine.attach("code", channel=name)
    assert isinstance(caught.value, ChannelError | PackIncompatibleError)
    assert caught.value.field == field


def test_a_trainer_that_knows_its_base(pack: PackModule, pack_engine: Engine, name: str) -> None:
    with (
        PackChannel(name, pack, base=pack_engine.base) as channel,
        pack_engine.attach("code", channel=name) as attachment,
    ):
        attachment.wait(channel.publish(), WAIT_S)


def test_arguments_that_make_no_sense(engine: Engine, name: str) -> None:
    with pytest.raises(ChannelError, match="file"):
        engine.attach("code", channel=name)
    with published.writer(name):
        with pytest.raises(InvalidRequestError, match="on_publish"):
            engine.attach("code", channel=name, on_publish="now")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="name"):
            engine.attach("code@1", channel=name)


def test_waiting_has_an_end(channel: PackChannel, pack_engine: Engine, name: str) -> None:
    attachment = pack_engine.attach("code", channel=name)
    with pytest.raises(TimeoutError):
        attachment.wait(1, timeout_s=0.05)
    waiting = threading.Thread(target=attachment.detach)
    waiting.start()
    with pytest.raises(ChannelError, match="generation"):
        attachment.wait(1, WAIT_S)
    waiting.join()
    attachment.detach()


def test_an_engine_that_closes_detaches(
    channel: PackChannel, pack_engines: PackEngineFactory, name: str
) -> None:
    n_before = threading.active_count()
    engine = pack_engines()
    attachments = [engine.attach(f"code{i}", channel=name) for i in range(3)]
    attachments[0].wait(channel.publish(), WAIT_S)
    engine.close()
    assert not any(attachment.is_live for attachment in attachments)
    assert threading.active_count() == n_before
