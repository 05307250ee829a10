"""A pack as PyTorch modules: what docs/pack-format.md says a site computes, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from modularbase.packs.weights import PackGeometry
from modularbase.types import FloatArray

TENSOR_NAMES = {
    "w_in": "in.weight",
    "norm": "norm.weight",
    "router": "router.weight",
    "expert_gate": "expert_gate.weight",
    "expert_up": "expert_up.weight",
    "expert_down": "expert_down.weight",
    "w_out": "out.weight",
    "gate_weight": "token_gate.weight",
    "gate_bias": "token_gate.bias",
}
"""Parameters of a site, and what the pack file calls them."""

# Logits of the router at the start have about this spread: no expert is favoured for long.
_ROUTER_SPREAD = 0.3


@dataclass(frozen=True, slots=True)
class SiteOutput:
    """What a site adds, and how evenly it used its experts.

    Attributes:
        delta: D, in the shape of the input [..., n_embd].
        balance: n_expert * sum over experts of (share of choices) * (mean r); 1 where all are used
            alike, n_expert where one takes all (the load-balance loss of arXiv:2101.03961).
        z_loss: Mean square of the router's log partition (arXiv:2202.08906).
    """

    delta: torch.Tensor
    balance: torch.Tensor
    z_loss: torch.Tensor


class PackSite(nn.Module):
    """One site. W_down and W_out start at zero, so a new site adds nothing."""

    def __init__(
        self, geometry: PackGeometry, *, scale: float, token_gate: bool, draw: torch.Generator
    ) -> None:
        """Draws the weights that do not start at zero.

        Args:
            geometry: Widths and numbers of experts.
            scale: s_p.
            token_gate: Whether it weighs tokens one by one; the gate starts at factor 1.
            draw: Where random weights come from.
        """
        super().__init__()
        g = geometry
        self.scale, self.norm_eps, self.n_used = scale, g.norm_eps, g.n_expert_used

        def normal(*shape: int, spread: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=draw) * spread * shape[-1] ** -0.5)

        self.w_in = normal(g.d_inner, g.n_embd)
        self.norm = nn.Parameter(torch.ones(g.d_inner))
        self.router = normal(g.n_expert, g.d_inner, spread=_ROUTER_SPREAD)
        self.expert_gate = normal(g.n_expert, g.d_ff, g.d_inner)
        self.expert_up = normal(g.n_expert, g.d_ff, g.d_inner)
        self.expert_down = nn.Parameter(torch.zeros(g.n_expert, g.d_inner, g.d_ff))
        self.w_out = nn.Parameter(torch.zeros(g.n_embd, g.d_inner))
        self.gate_weight = nn.Parameter(torch.zeros(g.n_embd)) if token_gate else None
        self.gate_bias = nn.Parameter(torch.zeros(1)) if token_gate else None

    def forward(self, x: torch.Tensor) -> SiteOutput:
        """Computes the site; under autocast all but the router, the norm and the gate are narrow.

        Args:
            x: Inputs of the layer's feed-forward block [..., n_embd].
        """
        rows = x.reshape(-1, x.shape[-1])  # [n_rows, n_embd]
        z_raw = functional.linear(rows, self.w_in)
        with torch.autocast(x.device.type, enabled=False):
            width = (self.norm.shape[0],)
            z = functional.rms_norm(z_raw.to(self.norm.dtype), width, self.norm, self.norm_eps)
            logits = functional.linear(z, self.router)  # [n_rows, n_expert]
            r = logits.softmax(dim=-1)
            top = r.topk(self.n_used, dim=-1)
            shares = top.values / top.values.sum(dim=-1, keepdim=True)
            factor = self._token_factor(rows)  # [n_rows, 1], or a number
        y = z + self._experts(z, top.indices, shares)
        delta = functional.linear(y, self.w_out) * factor
        used = functional.one_hot(top.indices, r.shape[-1]).sum(dim=1).to(r.dtype).mean(dim=0)
        balance = r.shape[-1] * (used / self.n_used * r.mean(dim=0)).sum()
        z_loss = logits.logsumexp(dim=-1).square().mean()
        return SiteOutput(delta.reshape(x.shape), balance, z_loss)

    def _token_factor(self, rows: torch.Tensor) -> torch.Tensor | float:
        if self.gate_weight is None:
            return self.scale
        opening = rows.to(self.gate_weight.dtype) @ self.gate_weight + self.gate_bias
        return (2 * self.scale * opening.sigmoid())[:, None]

    def _experts(self, z: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The chosen experts' sum: rows are sorted by expert, so that each is one product.

        Gathers go through permutations, whose gradients have no colliding sums: equal runs give
        equal bits on every device.

        Args:
            z: Rows [n_rows, d_inner].
            chosen: Experts of each row [n_rows, n_used].
            shares: Their weights g [n_rows, n_used].
        """
        n_rows, n_used = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # of (row, rank) pairs
        counts = chosen.flatten().bincount(minlength=self.expert_gate.shape[0]).tolist()
        pairs = z[:, None].expand(-1, n_used, -1).reshape(n_rows * n_used, -1)[order]
        matrices = (self.expert_gate.unbind(), self.expert_up.unbind(), self.expert_down.unbind())
        found = torch.cat(
            [
                functional.linear(
                    functional.silu(functional.linear(part, gate)) * functional.linear(part, up),
                    down,
                )
                for part, gate, up, down in zip(pairs.split(counts), *matrices, strict=True)
            ]
        )
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return (shares[..., None] * found[back].reshape(n_rows, n_used, -1)).sum(dim=1)


class PackModule(nn.Module):
    """A whole pack: a site for each of the geometry's layers."""

    def __init__(
        self,
        geometry: PackGeometry,
        *,
        seed: int = 0,
        scale: float = 1.0,
        token_gates: bool = True,
    ) -> None:
        """Makes a new pack, which is the identity.

        Args:
            geometry: Its shape.
            seed: Equal seeds give equal packs.
            scale: s_p.
            token_gates: Whether its sites weigh tokens one by one.
        """
        super().__init__()
        self.geometry, self.scale, self.token_gates = geometry, scale, token_gates
        draw = torch.Generator().manual_seed(seed)
        self.sites = nn.ModuleList(
            PackSite(geometry, scale=scale, token_gate=token_gates, draw=draw)
            for _ in geometry.sites
        )

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by their names in the pack file."""
        for i, site in enumerate(self.sites):
            for name, parameter in site.named_parameters():
                yield f"site.{i}.{TENSOR_NAMES[name]}", parameter

    def to_arrays(self) -> dict[str, FloatArray]:
        """Copies of all weights in F32, by their names in the pack file."""
        return {
            name: parameter.detach().float().cpu().numpy().copy()
            for name, parameter in self.named_tensors()
        }

    def load_arrays(self, tensors: Mapping[str, FloatArray]) -> None:
        """Takes weights by their names in the pack file; shapes and names have been checked.

        Token gates that are not among them stay as they are.
        """
        with torch.no_grad():
            for name, parameter in self.named_tensors():
                if name in tensors or "token_gate" not in name:
                    parameter.copy_(torch.from_numpy(tensors[name]))
