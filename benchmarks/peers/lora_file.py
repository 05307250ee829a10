"""Random LoRA adapters in llama.cpp's format, of about a given size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VALUE_BYTES = 2  # F16
# Ranks are multiples of it: llama.cpp takes longer for the products with a rank of 20 than of 32.
RANK_STEP = 16
STRENGTH = 1.0  # of what a layer adds, relative to its input: enough for another answer
LINEAR_LAYER = re.compile(
    r"blk\.(\d+)\.(?:attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.weight"
)

# n_in and n_out of the linear layers of a block, by name.
Block = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class LoraBase:
    """What an adapter has to know of its base."""

    architecture: str
    blocks: Sequence[Block]

    def n_bytes(self, ranks: Sequence[int]) -> int:
        """Returns the size of the tensors of an adapter with a rank for each block."""
        return sum(
            VALUE_BYTES * rank * (n_in + n_out)
            for rank, block in zip(ranks, self.blocks, strict=True)
            for n_in, n_out in block.values()
        )

    def nearest_ranks(self, n_bytes: int) -> list[int]:
        """Returns ranks of the blocks, equal or a step apart, that are nearest to a size.

        Raises:
            ValueError: The size is too small for a single block.
        """
        ranks = [0] * len(self.blocks)
        for i in itertools.cycle(range(len(ranks))):
            longer = [*ranks[:i], ranks[i] + RANK_STEP, *ranks[i + 1 :]]
            if abs(self.n_bytes(longer) - n_bytes) >= abs(self.n_bytes(ranks) - n_bytes):
                break
            ranks = longer
        if not any(ranks):
            raise ValueError(f"n_bytes: expected room for rank {RANK_STEP}, found {n_bytes}")
        return ranks


def read_base(model: Path) -> LoraBase:
    """Reads the linear layers of a model file, the output head not among them.

    Raises:
        ValueError: The file has none.
    """
    from gguf import GGUFReader

    reader = GGUFReader(model)
    architecture = reader.get_field("general.architecture")
    blocks: dict[int, dict[str, tuple[int, int]]] = {}
    for tensor in reader.tensors:
        found = LINEAR_LAYER.fullmatch(tensor.name)
        if found:
            n_in, n_out = (int(n) for n in tensor.shape)
            blocks.setdefault(int(found.group(1)), {})[tensor.name] = (n_in, n_out)
    if architecture is None or not blocks:
        raise ValueError(f"{model}: expected a model with linear layers, found none")
    return LoraBase(str(architecture.contents()), [blocks[number] for number in sorted(blocks)])


def write_lora(path: Path, base: LoraBase, ranks: Sequence[int], seed: int) -> None:
    """Writes an adapter with a rank for each block, complete or not at all."""
    from gguf import GGUFType, GGUFWriter, Keys

    random = np.random.default_rng(seed)
    unfinished = path.with_suffix(".part")
    writer = GGUFWriter(unfinished, base.architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(RANK_STEP))
    for rank, block in zip(ranks, base.blocks, strict=True):
        for name, (n_in, n_out) in block.items() if rank else ():
            down = random.normal(0.0, n_in**-0.5, (rank, n_in))
            up = random.normal(0.0, STRENGTH * rank**0.5 / RANK_STEP, (n_out, rank))
            writer.add_tensor(f"{name}.lora_a", down.astype(np.float16))
            writer.add_tensor(f"{name}.lora_b", up.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)
