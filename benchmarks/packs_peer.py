"""Requests finished per minute: eight with eight packs, against eight with eight LoRA adapters."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

from benchmarks import ours
from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.pack_files import load_packs, pack_file
from benchmarks.paths import CACHE
from benchmarks.peers.llama_cpp import FLASH_ATTENTION
from benchmarks.peers.lora_file import read_base, write_lora
from benchmarks.peers.process import PeerRunError
from benchmarks.peers.server import Server, serve
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite
from modularbase import Engine

N_CLIENTS = 8
N_PROMPT = 64
N_GEN = 64
N_WAVES = 3
N_CTX = 2048
N_PROBE = 16
TARGET = 5.0
DTYPES: tuple[Literal["keep", "auto"], ...] = ("keep", "auto")

# Answers one request of a client.
Answer = Callable[[int, list[int]], object]


def requests_per_minute(answer: Answer, n_waves: int, seeds: Iterator[int]) -> float:
    """Returns the rate at which requests finish, each client sending one after the other.

    No prompt is sent twice: what a cache of prompts gives is measured elsewhere.
    """
    prompts = [
        [ours.random_tokens(N_PROMPT, next(seeds)) for _ in range(n_waves)]
        for _ in range(N_CLIENTS)
    ]

    def client(number: int) -> None:
        for prompt in prompts[number]:
            answer(number, prompt)

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        start = perf_counter()
        for _ in pool.map(client, range(N_CLIENTS)):
            pass
        seconds = perf_counter() - start
    return 60.0 * N_CLIENTS * n_waves / seconds


def check_adapters(server: Server) -> None:
    """Asks the same with every adapter and without one.

    Raises:
        PeerRunError: Two answers are equal, so an adapter was not applied.
    """
    prompt = ours.random_tokens(N_PROMPT, seed=0)
    adapters = [None, *range(N_CLIENTS)]
    answers = {tuple(server.answer(prompt, N_PROBE, adapter)) for adapter in adapters}
    if len(answers) != len(adapters):
        raise PeerRunError(
            f"llama-server: expected {len(adapters)} different answers with as many choices of "
            f"adapters, found {len(answers)}"
        )


def _peer_answer(server: Server, adapters: Sequence[int], client: int, prompt: list[int]) -> None:
    server.answer(prompt, N_GEN, adapters[client])


def our_answer(engine: Engine, packs: Sequence[str], client: int, prompt: list[int]) -> None:
    """Answers one request of a client with its pack.

    Raises:
        MeasurementError: The answer is not all that was asked for, or took less work.
    """
    result = engine.submit(
        prompt, packs=packs[client], max_tokens=N_GEN, temperature=0, ignore_eos=True
    ).result()
    found = (len(result.packs), result.usage.cached_tokens, len(result.token_ids))
    if found != (1, 0, N_GEN):
        raise ours.MeasurementError(
            f"a request: expected 1 pack, 0 cached and {N_GEN} generated tokens, found {found}"
        )


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters of all linear layers, in size as near to a pack as ranks can bring them."""

    files: Sequence[Path]
    ranks: Sequence[int]  # of each block
    pack_bytes: int

    @property
    def facts(self) -> dict[str, float | str]:
        """The sizes that are compared."""
        counts = sorted(Counter(self.ranks).items())
        return {
            "pack_bytes": self.pack_bytes,
            "adapter_bytes": self.files[0].stat().st_size,
            "adapter_ranks": ", ".join(f"{rank} in {n} blocks" for rank, n in counts),
        }


def adapters_like(pack: Path, model: Path) -> Adapters:
    """Returns an adapter for every client, made where they are missing."""
    base = read_base(model)
    n_bytes = pack.stat().st_size
    ranks = base.nearest_ranks(n_bytes)
    folder = CACHE / "lora"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{model.stem}-{sum(ranks)}"  # the sum decides the ranks
    files = [folder / f"{name}-{seed}.gguf" for seed in range(N_CLIENTS)]
    for seed, path in enumerate(files):
        if not path.exists():
            write_lora(path, base, ranks, seed)
    return Adapters(files, ranks, n_bytes)


def _start_servers(stack: ExitStack, settings: Settings, adapters: Adapters) -> dict[str, Server]:
    """Starts the peer with every option, each checked to apply the adapters."""
    shared = ["--lora", ",".join(map(str, adapters.files)), "--lora-init-without-apply"]
    shared += ["--cache-ram", "0"]  # else it keeps copies of prompts that nobody sends again
    tools, model, n_threads = settings.peer.tools, settings.models.f16, settings.n_threads
    servers = {}
    for n_slots, flash in itertools.product((N_CLIENTS, 1), FLASH_ATTENTION):
        options = [*shared, "-fa", flash]
        server = stack.enter_context(serve(tools, model, n_threads, N_CTX, options, n_slots))
        check_adapters(server)
        servers[f"{n_slots} slot{'s' if n_slots > 1 else ''}, fa {flash}"] = server
    return servers


def _load_engines(stack: ExitStack, settings: Settings) -> dict[str, Engine]:
    model, n_threads = settings.models.f16, settings.n_threads
    engines: dict[str, Engine] = {}
    for dtype in DTYPES:
        engine = Engine.load(
            model, dtype=dtype, n_threads=n_threads, n_ctx=N_CTX, pack_budget="256MB"
        )
        engines[dtype] = stack.enter_context(closing(engine))
    return engines


@dataclass(frozen=True)
class Sides:
    """Both sides, ready to answer; which pack or adapter each client uses is a case's choice."""

    servers: Mapping[str, Server]
    engines: Mapping[str, Engine]
    packs: Mapping[str, Sequence[str]]  # by engine
    n_waves: int
    seeds: Iterator[int] = field(default_factory=partial(itertools.count, 1))

    def peer(self, adapters: Sequence[int]) -> dict[str, Measure]:
        """Returns a measure for every option of the peer."""
        return {
            label: self._measure(partial(_peer_answer, server, adapters))
            for label, server in self.servers.items()
        }

    def own(self, numbers: Sequence[int], dtype: str) -> Measure:
        """Returns the measure of an engine."""
        packs = [self.packs[dtype][number] for number in numbers]
        return self._measure(partial(our_answer, self.engines[dtype], packs))

    def _measure(self, answer: Answer) -> Measure:
        return partial(requests_per_minute, answer, self.n_waves, self.seeds)


def cases(settings: Settings) -> Iterator[Case]:
    """Yields eight packs against eight adapters, and one against one."""
    different, same = list(range(N_CLIENTS)), [0] * N_CLIENTS
    with ExitStack() as stack:
        engines = _load_engines(stack, settings)
        packs = {dtype: load_packs(engine, N_CLIENTS) for dtype, engine in engines.items()}
        adapters = adapters_like(pack_file(engines["keep"], 0)[1], settings.models.f16)
        servers = _start_servers(stack, settings, adapters)
        sides = Sides(servers, engines, packs, 1 if settings.quick else N_WAVES)
        yield Case(
            name="8 clients, 8 packs S INT4 against 8 LoRA adapters",
            unit="requests/min",
            baseline=sides.peer(different),
            contenders={
                **{f"{dtype}, 8 packs": sides.own(different, dtype) for dtype in DTYPES},
                "keep, one pack": sides.own(same, "keep"),
            },
            targets={f"{dtype}, 8 packs": TARGET for dtype in DTYPES},
            facts=adapters.facts,
        )
        yield Case(
            name="8 clients, one pack S INT4 against one LoRA adapter",
            unit="requests/min",
            baseline=sides.peer(same),
            contenders={f"{dtype}, one pack": sides.own(same, dtype) for dtype in DTYPES},
            facts=adapters.facts,
        )


def tables(_: Settings, results: Sequence[CaseResult], __: Machine) -> list[Table]:
    """Adds the sizes of what is compared."""
    facts = results[0].facts
    sizes = [f"{float(facts[key]) / 1e6:.2f}" for key in ("pack_bytes", "adapter_bytes")]
    rows = [[*sizes, str(facts["adapter_ranks"])]]
    return [Table("Sizes", ["pack, MB", "LoRA adapter, MB", "its ranks"], rows)]


SUITE = Suite("packs_peer", "Eight packs at once against eight LoRA adapters", cases, tables)
