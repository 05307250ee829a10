"""A trainer in a process of its own: publishes a pack each time it is told to.

``python -m benchmarks.channel_publisher NAME EXPERTS N_EMBD SITE...`` reads a line for each
publish, and answers with the time at which it began (of the monotonic clock, which all processes
share) and the generation.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from benchmarks.pack_files import WIDTHS
from modularbase.packs.weights import PackGeometry
from modularbase.training.pack_module import PackModule
from modularbase.training.publish import PackChannel


def trained(geometry: PackGeometry) -> PackModule:
    """Returns a pack that acts, as one does after some steps."""
    pack = PackModule(geometry)
    with torch.no_grad():
        for name, parameter in pack.named_tensors():
            if name.endswith(("expert_down.weight", "out.weight")):
                parameter.normal_(0.0, 0.1 * parameter.shape[-1] ** -0.5)
    return pack


def main(arguments: list[str]) -> None:
    """Serves until its input ends."""
    os.nice(10)  # as a trainer beside a server should be
    torch.set_num_threads(1)
    name, experts, n_embd, *sites = arguments
    geometry = PackGeometry(
        n_embd=int(n_embd), d_inner=WIDTHS["S"], d_ff=WIDTHS["S"], sites=tuple(map(int, sites))
    )
    pack = trained(geometry)
    bias = pack.get_parameter("sites.0.gate_bias")
    with PackChannel(name, pack, expert_type=experts) as channel:  # type: ignore[arg-type]
        print("ready", flush=True)
        for _ in sys.stdin:
            with torch.no_grad():
                bias.add_(1e-4)  # another pack than the one before
            begin = time.monotonic()
            generation = channel.publish()
            print(begin, generation, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
