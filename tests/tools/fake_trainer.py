"""Publishes random packs as the trainer of `demo live` does, but starts at once: no PyTorch."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import fields

import numpy as np

from modularbase.gguf_file import read_metadata
from modularbase.packs.channel_info import ChannelInfo
from modularbase.packs.manifest import Manifest
from modularbase.packs.random_pack import random_weights
from modularbase.packs.scaffold import default_sites
from modularbase.packs.weights import PackGeometry
from modularbase.training.channel import TensorSpec, WeightChannelWriter
from modularbase.training.live_protocol import LiveOptions, LiveReport, end_with_stdin


def main() -> None:
    """Publishes one generation behind the other, and waits for the end of stdin."""
    end_with_stdin()
    options = LiveOptions.from_json(sys.argv[1])
    metadata = read_metadata(options.base)
    n_embd, n_layer = metadata["llama.embedding_length"], metadata["llama.block_count"]
    assert isinstance(n_embd, int) and isinstance(n_layer, int)
    geometry = PackGeometry(n_embd=n_embd, d_inner=256, d_ff=256, sites=default_sites(n_layer))
    info = ChannelInfo(**{field.name: getattr(geometry, field.name) for field in fields(geometry)})
    manifest = Manifest(
        id="fake", version="0.0.1", name="fake", domain="test", licence="CC0-1.0", base_id="tiny"
    )
    arrays = dict(random_weights(manifest, geometry, seed=options.seed).tensors)
    tensors = [TensorSpec(name, "f32", array.shape) for name, array in arrays.items()]
    with WeightChannelWriter(options.channel, tensors, info.model_dump(mode="json")) as writer:
        n_steps = options.n_publishes
        report = LiveReport(step=0, n_steps=n_steps)
        print(report.to_json(), flush=True)
        for step in range(1, n_steps + 1):
            for name, array in arrays.items():
                np.copyto(writer.array(name), array * step)
            report = LiveReport(
                step=step,
                n_steps=n_steps,
                loss=1 / step,
                tokens_per_s=100.0,
                published_at_s=time.monotonic(),
                generation=writer.publish(),
            )
            print(report.to_json(), flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
