"""The table's parts, each computed once and kept in .cache/packs_quality.

- lora_DOMAIN_KIND_RATE: a LoRA adapter, plain or with replay, trained and measured in PyTorch
- twin: base and packs, before rounding, in PyTorch, where LoRA adapters are measured
- packs: base, packs, and packs before rounding in the engine
- mixing: two packs in one request in the engine, beside each alone
- agreement: one domain's in PyTorch on the engine's blocks
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.digest import sha256_of
from benchmarks.ours import installed_base
from benchmarks.paths import CACHE, ROOT
from benchmarks.quality.corpora import (
    DOMAINS,
    ENGINE_BLOCKS,
    NEUTRAL,
    measured_blocks,
    text_file,
)
from modularbase.packs.project import CONFIG_FILE
from modularbase.types import MergePolicy
from packs.train import EVAL_EVERY, EXACT, train

if TYPE_CHECKING:
    from modularbase import Engine

FOLDER = CACHE / "packs_quality"
KINDS = ("plain", "replay")
RATES = (1e-3, 2e-3)
POLICIES: tuple[MergePolicy, ...] = ("blend", "best", "ties")
WEIGHTS = (1.0, 0.75, 0.5)  # of both packs, in a blend
COMPARED = "medical"

Stage = Callable[[str], Mapping[str, Any]]


def stage_names() -> list[str]:
    """All stages."""
    loras = [_lora_name(*case) for case in product(DOMAINS, KINDS, RATES)]
    return [*loras, "twin", "agreement", "packs", "mixing"]


def result(name: str, device: str) -> Mapping[str, Any]:
    """What a stage gave, or gives now.

    Args:
        name: Of the stage.
        device: Where PyTorch computes what is missing.
    """
    path = FOLDER / f"{name}.json"
    inputs = _inputs(name)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["inputs"] == inputs:
            return found
    found = {"inputs": inputs, **_stages()[name](device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def lora_results(domain: str, kind: str, device: str) -> list[Mapping[str, Any]]:
    """The runs of one domain and kind, the one with the lowest held-out loss first."""
    runs = [result(_lora_name(domain, kind, rate), device) for rate in RATES]
    return sorted(runs, key=lambda run: float(run["heldout_loss"]))


def pair_name(pair: tuple[str, str], policy: MergePolicy, weight: float = 1.0) -> str:
    """How the results of two packs in one request, at one weight, are called."""
    return f"{pair[0]} + {pair[1]}, {policy}, {weight:g}"


def ensure_packs(device: str) -> None:
    """Trains packs whose unrounded weights are not here: rounding is measured on the same ones."""
    for domain in DOMAINS:
        if not exact_file(domain).exists():
            train(domain, device)


def exact_file(domain: str) -> Path:
    """A domain's pack with F16 experts."""
    return ROOT / EXACT / f"{domain}.f16.gguf"


def _inputs(name: str) -> Mapping[str, str]:
    """Digests of what a stage's result depends on, beside the code."""
    if name.startswith("lora_"):
        files = [ROOT / "packs" / domain / CONFIG_FILE for domain in DOMAINS if domain in name]
        texts = [text_file(text, "train") for text in (NEUTRAL, files[0].parent.name)]
        return {str(path.relative_to(ROOT)): sha256_of(path) for path in (*files, *texts)}
    return {domain: sha256_of(_archive(domain)) for domain in DOMAINS}


def _archive(domain: str) -> Path:
    found = sorted((ROOT / "packs").glob(f"{domain}-*.mbpack"))
    if len(found) != 1:
        raise FileNotFoundError(f"packs/{domain}-*.mbpack: expected one, found {len(found)}")
    return found[0]


def _lora_name(domain: str, kind: str, rate: float) -> str:
    return f"lora_{domain}_{kind}_{rate:g}"


def _stages() -> Mapping[str, Stage]:
    stages: dict[str, Stage] = {
        "twin": _measure_twin,
        "agreement": _compare,
        "packs": _measure_packs,
        "mixing": _measure_mixing,
    }
    for domain, kind, rate in product(DOMAINS, KINDS, RATES):
        stages[_lora_name(domain, kind, rate)] = partial(_train_lora, domain, kind, rate)
    return stages


def _train_lora(domain: str, kind: str, rate: float, device: str) -> Mapping[str, Any]:
    from benchmarks.quality.lora import LoraRun, LoraSettings
    from modularbase.training.options import configured

    given = {
        "device": device,
        "neutral": (text_file(NEUTRAL, "train"),),
        "eval_every": EVAL_EVERY,
    }
    options = configured(ROOT / "packs" / domain, installed_base(), given)
    settings = LoraSettings(domain, kind == "replay", rate, _n_parameters(domain), options)
    return LoraRun(settings).train()


def _n_parameters(domain: str) -> int:
    from benchmarks.quality.twin_side import new_pack

    pack = new_pack(ROOT / "packs" / domain)
    return sum(parameter.numel() for parameter in pack.parameters())


def _measure_twin(device: str) -> Mapping[str, Any]:
    from benchmarks.quality.twin_side import twin_perplexities

    ensure_packs(device)
    return {"perplexity": twin_perplexities({d: exact_file(d) for d in DOMAINS}, device)}


def _compare(device: str) -> Mapping[str, Any]:
    from benchmarks.quality.twin_side import twin_perplexities

    ensure_packs(device)
    blocks = {COMPARED: measured_blocks()[COMPARED][:ENGINE_BLOCKS]}
    found = twin_perplexities({"F16": exact_file(COMPARED)}, device, blocks)
    return {"perplexity": {name: values[COMPARED] for name, values in found.items()}}


def _measure_packs(device: str) -> Mapping[str, Any]:
    from benchmarks.quality.engine_side import perplexity

    ensure_packs(device)
    found: dict[str, dict[str, float]] = {domain: {} for domain in DOMAINS}
    with _engine_with_packs() as engine:
        for domain in DOMAINS:
            engine.packs.swap(f"{domain}_exact", str(exact_file(domain)))
            found[domain]["base"] = perplexity(engine, domain)
            found[domain]["INT4"] = perplexity(engine, domain, domain)
            found[domain]["F16"] = perplexity(engine, domain, f"{domain}_exact")
    return {"perplexity": found}


def _measure_mixing(_: str) -> Mapping[str, Any]:
    from benchmarks.quality.engine_side import perplexity
    from modularbase import PackRequest, PackUse

    ways: list[tuple[MergePolicy, float]] = [(policy, 1.0) for policy in POLICIES]
    ways += [("blend", weight) for weight in WEIGHTS[1:]]
    found: dict[str, dict[str, float]] = {}
    with _engine_with_packs() as engine:
        for domain in DOMAINS:
            found[domain] = {"alone": perplexity(engine, domain, domain)}
        for pair, (policy, weight) in product(combinations(DOMAINS, 2), ways):
            uses = tuple(PackUse(domain, weight) for domain in pair)
            request = PackRequest(packs=uses, policy=policy, fallback="never")
            for domain in pair:
                found[domain][pair_name(pair, policy, weight)] = perplexity(engine, domain, request)
    return {"perplexity": found}


def _engine_with_packs() -> Engine:
    """An engine with the packs as they are shipped."""
    from modularbase import Engine
    from modularbase.packs.archive import GGUF, unpack

    engine = Engine.load(str(installed_base()), n_ctx=512, pack_budget="256MB")
    for domain in DOMAINS:
        with tempfile.TemporaryDirectory() as folder:
            unpack(_archive(domain), Path(folder), lambda _: None)
            engine.packs.swap(domain, str(Path(folder) / GGUF))
    return engine
