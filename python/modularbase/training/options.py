"""What a training run is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from modularbase.errors import InvalidRequestError

Precision = Literal["auto", "f32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRates:
    """Learning rates of the parts of a pack, as multiples of `TrainOptions.learning_rate`.

    A part whose rate is 0 is frozen: its values stay as they are, bit for bit.
    """

    w_in: float = 1.0
    norm: float = 1.0
    router: float = 1.0
    experts: float = 1.0
    w_out: float = 1.0
    token_gate: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        rates = asdict(self)
        for name, rate in rates.items():
            if not 0 <= rate < float("inf"):
                raise InvalidRequestError(f"rates.{name}", "0 or more", str(rate))
        if not any(rates.values()):
            raise InvalidRequestError("rates", "a part that is trained", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """One run: which parts of the pack `rates` trains, and what it begins with, make the stage.

    Attributes:
        project: The pack's project folder; geometry and manifest come from there.
        parent: Pack file whose weights the run begins with; None: a new pack.
        base: GGUF file of the base.
        data: Files or folders of the domain; none: the project's data/train.jsonl.
        heldout: Files or folders that are only measured on; none: drawn from `data`.
        neutral: Files or folders of any other text, on which the pack is held to the base.
        teacher: GGUF file of a larger model with the base's vocabulary, which says how likely every
            next token of the domain is; None: the text alone teaches.
        teacher_weight: Of the teacher, 0 to 1; the text has the rest.
        teacher_temperature: What softens both distributions; above 1, unlikely tokens count more.
        steps: Steps of the optimiser.
        block_tokens: Tokens of a sequence.
        batch_blocks: Sequences of a step, neutral ones included.
        neutral_share: Share of neutral sequences in a step.
        kl_weight: Weight of KL(base || pack) on neutral text.
        balance_weight: Weight of the load-balance loss.
        z_weight: Weight of the router z-loss.
        accumulation: Forwards a step is cut into, to save memory.
        learning_rate: Highest rate of AdamW, before `rates`.
        rates: Of the parts of a pack.
        warmup_steps: Steps in which the rate rises, at most a fifth of all; then it falls to 0
            along a cosine.
        qat_steps: The last steps, in which the pack computes with weights rounded to the types of
            its file, and is measured so.
        weight_decay: Of the matrices.
        clip_norm: Longest gradient.
        precision: "bf16" multiplies in BF16 under autocast; "auto" does where the device has it.
        heldout_share: Share of the blocks that is held out where `heldout` names nothing.
        heldout_blocks: Most blocks measured on, of each kind.
        eval_every: Steps between measurements.
        patience: Measurements without a better one after which the run ends; 0: never.
        save_every: Steps between checkpoints.
        seed: Of the weights and of the order of the data.
        device: Where to compute, as PyTorch names it.
        n_threads: Threads of PyTorch; 0: as it is set.
        from_engine: Whether the base's states that do not depend on the pack come from an engine
            in another process, and are kept on the disk.
        state_cache_bytes: Most that those may take there, of all runs together.
    """

    project: Path
    base: Path
    parent: Path | None = None
    data: tuple[Path, ...] = ()
    heldout: tuple[Path, ...] = ()
    neutral: tuple[Path, ...] = ()
    teacher: Path | None = None
    teacher_weight: float = 0.5
    teacher_temperature: float = 2.0
    steps: int = 1000
    block_tokens: int = 256
    batch_blocks: int = 16
    neutral_share: float = 0.25
    kl_weight: float = 1.0
    balance_weight: float = 1e-2
    z_weight: float = 1e-3
    accumulation: int = 1
    learning_rate: float = 2e-3
    rates: PartRates = field(default_factory=PartRates)
    warmup_steps: int = 50
    qat_steps: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    precision: Precision = "auto"
    heldout_share: float = 0.05
    heldout_blocks: int = 32
    eval_every: int = 50
    patience: int = 0
    save_every: int = 50
    seed: int = 0
    device: str = "cpu"
    n_threads: int = 0
    from_engine: bool = False
    state_cache_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        least = {
            **dict.fromkeys(("steps", "accumulation", "heldout_blocks"), 1),
            **dict.fromkeys(("eval_every", "save_every", "batch_blocks"), 1),
            **dict.fromkeys(("warmup_steps", "patience", "seed", "n_threads"), 0),
            "qat_steps": 0,
            "block_tokens": 2,
            "state_cache_bytes": 1,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidRequestError(name, f"{low} or more", str(getattr(self, name)))
        for name in ("kl_weight", "balance_weight", "z_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequestError(name, "0 or more", str(getattr(self, name)))
        if not 0 <= self.teacher_weight <= 1:
            raise InvalidRequestError("teacher_weight", "0 to 1", str(self.teacher_weight))
        for name in ("learning_rate", "clip_norm", "teacher_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidRequestError(name, "more than 0", str(getattr(self, name)))
        for name in ("neutral_share", "heldout_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidRequestError(name, "0 or more, below 1", str(getattr(self, name)))
        if self.qat_steps > self.steps:
            raise InvalidRequestError("qat_steps", f"at most {self.steps}", str(self.qat_steps))
        if self.accumulation > self.n_domain:
            raise InvalidRequestError(
                "accumulation",
                f"at most {self.n_domain}, a step's domain sequences",
                str(self.accumulation),
            )

    @property
    def qat_start(self) -> int:
        """The step behind which weights are rounded; the last where they never are."""
        return self.steps - self.qat_steps

    @property
    def n_neutral(self) -> int:
        """Neutral sequences of a step; at least one domain sequence is left."""
        wanted = round(self.batch_blocks * self.neutral_share) if self.neutral else 0
        return min(wanted, self.batch_blocks - 1)

    @property
    def n_domain(self) -> int:
        """Domain sequences of a step."""
        return self.batch_blocks - self.n_neutral

    def moved_to(self, project: Path) -> TrainOptions:
        """The same for a project that lies elsewhere now; what lies in it has moved along."""

        def moved(path: Path) -> Path:
            inside = path.is_relative_to(self.project)
            return project / path.relative_to(self.project) if inside else path

        return replace(
            self,
            project=project,
            parent=self.parent and moved(self.parent),
            teacher=self.teacher and moved(self.teacher),
            data=tuple(map(moved, self.data)),
            heldout=tuple(map(moved, self.heldout)),
            neutral=tuple(map(moved, self.neutral)),
        )

    def to_json(self) -> str:
        """The options as a run folder keeps them; paths hold in every working directory."""
        return json.dumps(asdict(self), indent=2, default=_absolute) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainOptions:
        """Reads what `to_json` wrote.

        Raises:
            InvalidRequestError: It is something else.
        """
        try:
            given: dict[str, Any] = json.loads(text)
            unknown = given.keys() - {known.name for known in fields(cls)}
            if unknown:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            for name, kind in get_type_hints(cls).items():
                if kind in (Path, Path | None) and given.get(name) is not None:
                    given[name] = Path(given[name])
                elif name in given and kind == tuple[Path, ...]:
                    given[name] = tuple(map(Path, given[name]))
            given["rates"] = PartRates(**given.get("rates", {}))
            return cls(**given)
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidRequestError("options", "those of a run", str(error)) from error


def _absolute(path: Path) -> str:
    return str(path.absolute())
