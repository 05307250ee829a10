"""What a weight channel says of the pack in it: the JSON of its segment."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modularbase.errors import ChannelError, PackFormatError
from modularbase.packs.manifest import AdapterType, Digest, ExpertType, PackId, parse_model
from modularbase.packs.weights import PackGeometry

_SHAPE = {field.name for field in fields(PackGeometry)} | {"adapter_type", "expert_type"}
_Width = Annotated[int, Field(ge=256, le=1 << 16, multiple_of=256)]


class ChannelInfo(BaseModel):
    """The words are those of docs/pack-format.md; docs/weight-channel.md has the table."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["modularbase-pack"] = "modularbase-pack"
    format_version: Literal[1] = 1
    n_embd: int = Field(ge=1, le=1 << 16)
    d_inner: _Width
    d_ff: _Width
    n_expert: int = Field(ge=1, le=64)
    n_expert_used: int = Field(ge=1, le=64)
    sites: tuple[Annotated[int, Field(ge=0, lt=1 << 12)], ...] = Field(min_length=1)
    norm_eps: float = Field(gt=0, lt=1)
    scale: float = 1.0
    adapter_type: AdapterType = "f16"
    expert_type: ExpertType = "q4_0"
    base_id: PackId | None = None
    base_version: str | None = None
    base_digest: Digest | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> ChannelInfo:
        if self.n_expert_used > self.n_expert:
            raise ValueError(f"n_expert_used: expected at most n_expert, {self.n_expert}")
        if list(self.sites) != sorted(set(self.sites)):
            raise ValueError("sites: expected ascending layers")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """Widths, counts, sites and types: what a pool is made for."""
        return self.model_dump(include=_SHAPE)


def parse_channel_info(text: str, segment: str) -> ChannelInfo:
    """Reads what a channel says.

    Args:
        text: JSON.
        segment: Named in the error.

    Raises:
        ChannelError: Not JSON, a field missing or unknown, or a value out of its range.
    """
    try:
        return parse_model(ChannelInfo, text, segment)
    except PackFormatError as error:
        field = f"JSON, {error.field}"
        raise ChannelError(segment, field, error.expected, error.found) from error
