"""A larger model as the teacher: its distributions, what it has read, and a pack that follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from modularbase.errors import CancelledError, InvalidRequestError, TeacherError
from modularbase.gguf_file import read_metadata
from modularbase.training.base_model import load_base
from modularbase.training.data import pack_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.fit import FitReport, fit, resume
from modularbase.training.losses import kl_to_teacher
from modularbase.training.options import TrainOptions
from modularbase.training.teacher import Teacher
from modularbase.training.texts import Document
from modularbase.training.twin import Twin
from tests.conftest import TinyModelFactory
from tests.python.training.test_fit import assert_same, crash, rows, stop_at
from tests.python.training.toy import make_project, text, toy_options
from tests.tools.gguf_edit import copy_gguf
from tests.tools.tiny_models import N_VOCAB, TinyModel, reference_logits

WORDS = ("fever", "of", "the", "left", "knee", "acute", "chronic", "unspecified")


@pytest.fixture
def larger(tiny_model: TinyModelFactory) -> TinyModel:
    """Another family with other weights, and wider heads."""
    return tiny_model("qwen3", seed=5)


@pytest.fixture
def options(tmp_path: Path, tiny_model: TinyModelFactory, larger: TinyModel) -> TrainOptions:
    """A short run on a fresh project, with a teacher alone."""
    model = tiny_model()
    make_project(tmp_path / "toy", model)
    told = toy_options(tmp_path / "toy", model, steps=8, n_threads=1)
    return replace(told, teacher=larger.path, teacher_weight=1.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_loss_is_the_plain_formulation_s(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((300, 6), (50, 6), (300, 9), (50, 9))  # more rows than a chunk has
    hidden, head, states, teacher_head = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes
    )
    hidden.requires_grad_()
    found = kl_to_teacher(hidden, head, states, teacher_head, temperature)
    student = (hidden @ head.T / temperature).log_softmax(dim=1)
    teacher = (states @ teacher_head.T / temperature).log_softmax(dim=1)
    plain = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    expected = temperature**2 * plain
    torch.testing.assert_close(found, expected)
    pair = [torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)]
    torch.testing.assert_close(pair[0], pair[1])


def make_teacher(model: TinyModel, base: Path, cache: Path) -> Teacher:
    return Teacher(model.path, base, cache=cache, n_ctx=40, n_threads=1)


def test_states_and_head_give_the_teacher_s_distributions(
    larger: TinyModel, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    ids = np.random.default_rng(1).integers(0, N_VOCAB, (2, 40))
    for model in (larger, tiny_model("llama", seed=3, tied=True)):
        with make_teacher(model, tiny_model().path, tmp_path) as teacher:
            found = teacher.states(ids) @ teacher.head.T
        for row, logits in zip(ids, found, strict=True):
            expected = torch.from_numpy(reference_logits(model, row.tolist())).log_softmax(dim=1)
            kl = (expected.exp() * (expected - logits.log_softmax(dim=1))).sum(dim=1)
            # The engine holds the matrices in 16 bits; other models are 0.5 nats away.
            assert kl.max() < 5e-4


def test_what_was_read_is_kept(
    larger: TinyModel, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    base = tiny_model().path
    ids = np.random.default_rng(1).integers(0, N_VOCAB, (3, 40))
    teacher = make_teacher(larger, base, tmp_path)
    first = teacher.states(ids)
    with teacher:
        pass
    assert torch.equal(teacher.states(ids[[2, 0]]), first[[2, 0]])  # though it is closed
    with pytest.raises(CancelledError):
        teacher.states(ids[:, ::-1])
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 3
    spoilt = (b"", b"\x93NUMPY nonsense", files[0].read_bytes()[:-1])
    for file, content in zip(files, spoilt, strict=True):
        file.write_bytes(content)
    with make_teacher(larger, base, tmp_path) as again:
        assert torch.equal(again.states(ids), first)
    other = tiny_model("qwen3", seed=6)  # another content has a folder of its own
    with make_teacher(other, base, tmp_path) as again:
        assert not torch.equal(again.states(ids), first)


def test_another_vocabulary_is_refused(
    larger: TinyModel, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    base = tiny_model().path
    tokens = list(read_metadata(larger.path)["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    tokens[256] = "ht"
    changed = copy_gguf(
        larger.path,
        tmp_path / "other.gguf",
        changes={"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["h t"]},
    )
    with pytest.raises(TeacherError, match=r"another vocabulary: token 256 is b'ht'.*b'th'"):
        make_teacher(replace(larger, path=changed), base, tmp_path)


@pytest.mark.parametrize(("kind", "is_fine"), [(5, True), (1, False)])
def test_unused_tokens_at_the_end_do_not_matter(
    kind: int, is_fine: bool, larger: TinyModel, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    metadata: Any = read_metadata(larger.path)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    n_more = 32

    def longer(name: str, values: Any, kept: Any) -> Any:
        is_rows = name in ("token_embd.weight", "output.weight")
        return (np.concatenate([values, values[:n_more]]) if is_rows else values), kept

    padded = copy_gguf(
        larger.path,
        tmp_path / "padded.gguf",
        changes={
            "tokenizer.ggml.tokens": [*tokens, *(f"<more{i}>" for i in range(n_more))],
            "tokenizer.ggml.token_type": [*types, *[kind] * n_more],
            "qwen3.vocab_size": N_VOCAB + n_more,
        },
        edit=longer,
    )
    model, base = replace(larger, path=padded), tiny_model().path
    if not is_fine:
        with pytest.raises(TeacherError, match=f"{N_VOCAB + n_more} tokens"):
            make_teacher(model, base, tmp_path)
        return
    ids = np.arange(40)[None]
    with (
        make_teacher(model, base, tmp_path) as teacher,
        make_teacher(larger, base, tmp_path) as plain,
    ):
        assert torch.equal(teacher.head, plain.head)
        assert torch.equal(teacher.states(ids), plain.states(ids))


def kl_of(report: FitReport, options: TrainOptions, teacher: TinyModel) -> tuple[float, float]:
    """KL(teacher || pack) and KL(teacher || base) on new text, by transformers, a token."""
    twin = Twin(load_base(options.base), report.pack)
    new = [Document(text(WORDS, 200, seed=9))]
    ids = torch.from_numpy(pack_blocks(new, Encoder(read_metadata(options.base)), 32).ids[:8])
    with torch.no_grad():
        aim = teacher.reference(ids).logits.log_softmax(dim=-1)
        hidden = twin.enter(ids)
        found = []
        for with_pack in (True, False):
            logits = twin.logits(twin.forward_from(hidden, with_pack=with_pack).final)
            each = (aim.exp() * (aim - logits.log_softmax(dim=-1))).sum(dim=-1)
            found.append(float(each[:, :-1].mean()))
    return found[0], found[1]


def test_a_pack_comes_closer_to_its_teacher(options: TrainOptions, larger: TinyModel) -> None:
    report = fit(replace(options, steps=24, batch_blocks=6, eval_every=12, save_every=24))
    assert report.figures["teacher_kl"] < 0.6 * report.base["teacher_kl"]
    pack, base = kl_of(report, options, larger)
    assert pack < 0.6 * base
    assert report.base["teacher_kl"] == pytest.approx(base, rel=0.1)  # other words, the same kind
    # The text is not what it learns, and still the best step is the last.
    assert report.best_step == 24
    found = [row for row in rows(options.project) if row["kind"] == "heldout"]
    assert found[-1]["objective"] < 0.6 * found[0]["objective"]


def test_without_weight_the_text_alone_teaches(options: TrainOptions) -> None:
    plain = fit(replace(options, teacher=None, steps=3))
    deaf = fit(replace(options, teacher_weight=0.0, steps=3))
    assert deaf.figures.pop("teacher_kl") > 0
    assert {"perplexity": deaf.figures["perplexity"]} == {"perplexity": plain.figures["perplexity"]}
    losses = [[r["loss"] for r in rows(options.project, run)] for run in ("fit-001", "fit-002")]
    assert losses[0] == losses[1]


def test_a_distillation_is_resumed_exactly(options: TrainOptions) -> None:
    told = replace(options, teacher_weight=0.5, save_every=3, eval_every=4)
    whole = fit(told)
    with pytest.raises(ConnectionError):
        fit(told, stop_at(5, crash))
    assert_same(resume(options.project), whole)
    assert rows(options.project, "fit-002") == rows(options.project)


@pytest.mark.parametrize(
    ("field", "value"),
    [("teacher_weight", 1.5), ("teacher_weight", float("nan")), ("teacher_temperature", 0.0)],
)
def test_options_that_make_no_sense(field: str, value: Any, options: TrainOptions) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        replace(options, **{field: value})
