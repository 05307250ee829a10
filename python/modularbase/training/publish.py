"""A pack in training, shown to a running engine generation by generation."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

import torch

from modularbase.packs.channel_info import ChannelInfo
from modularbase.packs.manifest import AdapterType, ExpertType, Quantisation
from modularbase.packs.weights import type_of
from modularbase.training.channel import TensorSpec, WeightChannelWriter
from modularbase.training.pack_module import PackModule

PublishedType: TypeAlias = Literal["f32", "f16", "bf16"]


class Base(Protocol):
    """The base a pack is trained for."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def version(self) -> str:
        """Its version."""


class PackChannel:
    """Publishes a pack's parameters through shared memory; `Engine.attach` follows it.

    The segment goes when the channel is closed, or Python ends. Use it as a context manager.
    """

    def __init__(
        self,
        name: str,
        pack: PackModule,
        *,
        base: Base | None = None,
        base_digest: str | None = None,
        expert_type: ExpertType = "q4_0",
        adapter_type: AdapterType = "f16",
        published_as: PublishedType = "f16",
    ) -> None:
        """Makes the segment.

        Args:
            name: Of the channel, 1 to 64 of A-Z a-z 0-9 . _ -
            pack: What is trained; its parameters are read at each `publish`.
            base: What it is trained for; None leaves the engine to compare shapes only.
            base_digest: Where it must be that very file; an engine may hold the base in other types
                than a trainer.
            expert_type: What the engine rounds the experts to.
            adapter_type: What it rounds the adapters to.
            published_as: Type of the matrices in the segment. Where it is also the engine's, bytes
                are copied as they are.

        Raises:
            InvalidRequestError: Not a name.
            ChannelError: No room, or another writer has the name.
        """
        types = Quantisation(adapters=adapter_type, experts=expert_type)
        info = _info(pack, types, base, base_digest)
        self._pack = pack
        specs = [
            TensorSpec(
                tensor,
                "f32" if type_of(tensor, types) == "f32" else published_as,
                tuple(parameter.shape),
            )
            for tensor, parameter in pack.named_tensors()
        ]
        self._writer = WeightChannelWriter(name, specs, info.model_dump(mode="json"))

    @property
    def path(self) -> str:
        """The segment."""
        return self._writer.path

    @property
    def notice(self) -> str:
        """What a killed trainer had left under this name, and this one removed; else ""."""
        return self._writer.notice

    @property
    def generation(self) -> int:
        """The newest that was published; 0 before the first."""
        return self._writer.generation

    def publish(self) -> int:
        """Copies the parameters as they are now, and shows them to engines.

        Returns:
            The generation, from 1.

        Raises:
            ChannelError: Closed, or somebody made the segment shorter.
        """
        with torch.no_grad():
            for name, parameter in self._pack.named_tensors():
                self._writer.torch_tensor(name).copy_(parameter)
        return self._writer.publish()

    def close(self) -> None:
        """Removes the segment; engines keep the last generation."""
        self._writer.close()

    def __enter__(self) -> PackChannel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _info(
    pack: PackModule, types: Quantisation, base: Base | None, base_digest: str | None
) -> ChannelInfo:
    g = pack.geometry
    said: dict[str, Any] = {}
    if base is not None:
        said = {"base_id": base.id, "base_version": base.version}
    return ChannelInfo(
        n_embd=g.n_embd,
        d_inner=g.d_inner,
        d_ff=g.d_ff,
        n_expert=g.n_expert,
        n_expert_used=g.n_expert_used,
        sites=g.sites,
        norm_eps=g.norm_eps,
        scale=pack.scale,
        adapter_type=types.adapters,
        expert_type=types.experts,
        base_digest=base_digest,
        **said,
    )
