"""Packs in plain PyTorch, as docs/pack-format.md defines them: what the engine is compared with.

Written for reading: every expert is computed for every row, and only then are the chosen ones kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tests.tools.pack_values import PackValues, SiteValues

Policy = Literal["blend", "best", "priority", "ties"]


@dataclass(frozen=True, slots=True)
class SiteTrace:
    """Every intermediate of one pack at one site; rows first."""

    z_raw: torch.Tensor  # [n_rows, d_inner]
    z: torch.Tensor  # [n_rows, d_inner]
    router: torch.Tensor  # r [n_rows, n_expert]
    chosen: torch.Tensor  # T, the likeliest first [n_rows, n_expert_used]
    shares: torch.Tensor  # g, of the chosen [n_rows, n_expert_used]
    hidden: torch.Tensor  # of the chosen [n_rows, n_expert_used, d_ff]
    down: torch.Tensor  # of the chosen [n_rows, n_expert_used, d_inner]
    y: torch.Tensor  # [n_rows, d_inner]
    token_gate: torch.Tensor  # 2 sigmoid(v . x + b) [n_rows]
    delta: torch.Tensor  # D [n_rows, n_embd]

    def choice_gap(self) -> torch.Tensor:
        """r of the last expert chosen minus r of the next [n_rows].

        Where it is within rounding of 0, another implementation may rightly choose otherwise.
        """
        ordered = self.router.sort(dim=-1, descending=True).values
        n_used = self.chosen.shape[-1]
        if n_used == ordered.shape[-1]:
            return torch.ones_like(ordered[:, 0])
        return ordered[:, n_used - 1] - ordered[:, n_used]


@dataclass(frozen=True, slots=True)
class MixTrace:
    """What the packs with a site on one layer did there together."""

    packs: tuple[SiteTrace, ...]
    weights: torch.Tensor  # w [n_rows, n_packs]
    total: torch.Tensor  # what is added to the residual stream [n_rows, n_embd]
    h: torch.Tensor | None = None  # h' [n_rows, n_embd], in a forward of a whole model


@dataclass(frozen=True, slots=True)
class PackUse:
    """A pack in a request: its weight in force, and the first position it acts on."""

    pack: PackValues
    weight: float = 1.0
    from_position: int = 0


@dataclass(frozen=True, slots=True)
class PackedForward:
    """A whole forward with packs."""

    logits: torch.Tensor  # [n_tokens, n_vocab]
    layers: Mapping[int, MixTrace]  # by layer, where a pack has a site

    def choice_gap(self) -> float:
        """The closest choice of experts that a row with a pack in force had."""
        gaps = [
            trace.choice_gap()[mix.weights[:, i] > 0]
            for mix in self.layers.values()
            for i, trace in enumerate(mix.packs)
        ]
        return min((float(gap.min()) for gap in gaps if gap.numel()), default=1.0)


def run_site(pack: PackValues, site: SiteValues, x: torch.Tensor) -> SiteTrace:
    """Computes one site in x's type.

    Args:
        pack: For its scale, its epsilon and the number of experts used.
        site: One of its sites.
        x: Inputs of the layer's feed-forward block [n_rows, n_embd].
    """

    def weight(values: Any) -> torch.Tensor:
        return torch.as_tensor(values).to(x.dtype)  # of a tensor it is the tensor, with gradients

    z_raw = x @ weight(site.w_in).T
    mean_square = z_raw.pow(2).mean(dim=-1, keepdim=True)
    z = z_raw / torch.sqrt(mean_square + pack.norm_eps) * weight(site.norm)
    router = torch.softmax(z @ weight(site.router).T, dim=-1)
    top = router.topk(pack.n_expert_used, dim=-1)
    shares = top.values / top.values.sum(dim=-1, keepdim=True)
    gate = torch.einsum("efd,rd->ref", weight(site.expert_gate), z)  # [n_rows, n_expert, d_ff]
    up = torch.einsum("efd,rd->ref", weight(site.expert_up), z)
    hidden = functional.silu(gate) * up
    down = torch.einsum("edf,ref->red", weight(site.expert_down), hidden)
    rows = torch.arange(len(x))[:, None]
    y = z + (shares[:, :, None] * down[rows, top.indices]).sum(dim=1)
    token_gate = torch.ones(len(x), dtype=x.dtype)
    if site.token_gate is not None:
        token_gate = 2 * torch.sigmoid(x @ weight(site.token_gate) + site.token_bias)
    delta = pack.scale * token_gate[:, None] * (y @ weight(site.w_out).T)
    return SiteTrace(
        z_raw=z_raw,
        z=z,
        router=router,
        chosen=top.indices,
        shares=shares,
        hidden=hidden[rows, top.indices],
        down=down[rows, top.indices],
        y=y,
        token_gate=token_gate,
        delta=delta,
    )


def mix(traces: Sequence[SiteTrace], weights: torch.Tensor, policy: Policy) -> torch.Tensor:
    """What packs add to the residual stream together, [n_rows, n_embd].

    "blend" adds w_p D_p. "best" keeps the pack with the largest w_p * token gate, "priority" the
    first whose token gate is open (1 or more), and where none is the one that is open widest.
    "ties" takes per element the sign of sum w_p D_p and adds the w_p D_p that agree with it (the
    election of arXiv:2306.01708, without trimming and without the mean).

    Args:
        traces: Of the packs with a site on this layer.
        weights: w in force [n_rows, n_packs]; 0 where a pack does not act.
        policy: How the packs go together.
    """
    deltas = torch.stack([trace.delta for trace in traces])  # [n_packs, n_rows, n_embd]
    w = weights.T[:, :, None]  # [n_packs, n_rows, 1]
    parts = w * deltas
    if policy == "blend":
        return parts.sum(dim=0)
    if policy in ("best", "priority"):
        gates = torch.stack([trace.token_gate for trace in traces], dim=1)  # [n_rows, n_packs]
        ranks = weights * gates if policy == "best" else torch.where(gates >= 1, 1e9, gates)
        chosen = ranks.argmax(dim=1)  # [n_rows]: the first of equal ones
        return parts[chosen, torch.arange(deltas.shape[1])]
    elected = parts.sum(dim=0).sign()
    return (parts * (parts.sign() == elected)).sum(dim=0)


def conflict(traces: Sequence[SiteTrace], weights: torch.Tensor) -> torch.Tensor:
    """Mean cosine of w_i D_i and w_j D_j over the rows on which both act, [n_packs, n_packs].

    -1: the packs undo each other; 1: they agree; 0 also where no row has both.
    """
    n = len(traces)
    scores = torch.eye(n, dtype=weights.dtype)
    for i in range(n):
        for j in range(i):
            a, b = (weights[:, k, None] * traces[k].delta for k in (i, j))
            both = (a != 0).any(dim=1) & (b != 0).any(dim=1)
            cosines = functional.cosine_similarity(a[both], b[both], dim=1)
            scores[i, j] = scores[j, i] = cosines.mean() if both.any() else 0.0
    return scores


def run_model(
    reference: PreTrainedModel,
    ids: Sequence[int],
    uses: Sequence[PackUse],
    policy: Policy = "blend",
    dtype: torch.dtype = torch.float32,
) -> PackedForward:
    """Runs a model of transformers over one sequence with packs.

    Args:
        reference: The base, such as `make_tiny_model` returns.
        ids: Token ids.
        uses: The packs.
        policy: How packs on one layer go together.
        dtype: Arithmetic: F32, or F64 to see what rounding does.
    """
    model = copy.deepcopy(reference).to(dtype)
    layers: dict[int, MixTrace] = {}
    sites = sorted({layer for use in uses for layer in use.pack.layers})
    for number in sites:
        layer = model.model.layers[number]
        layer.mlp.register_forward_hook(_site_hook(number, uses, policy, layers))
        layer.register_forward_hook(_residual_hook(number, layers))
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return PackedForward(logits, layers)


def _site_hook(
    number: int, uses: Sequence[PackUse], policy: Policy, layers: dict[int, MixTrace]
) -> Callable[..., torch.Tensor]:
    present = [(use, site) for use in uses if (site := use.pack.site_at(number))]

    def hook(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        (x,) = inputs  # [1, n_rows, n_embd]
        traces = tuple(run_site(use.pack, site, x[0]) for use, site in present)
        positions = torch.arange(x.shape[1])
        columns = [use.weight * (positions >= use.from_position) for use, _ in present]
        weights = torch.stack(columns, dim=1).to(x.dtype)
        layers[number] = MixTrace(traces, weights, mix(traces, weights, policy))
        return output + layers[number].total

    return hook


def _residual_hook(number: int, layers: dict[int, MixTrace]) -> Callable[..., None]:
    def hook(_: Any, inputs: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        layers[number] = replace(layers[number], h=h[0])

    return hook
