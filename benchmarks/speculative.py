"""Prompt-lookup speculation, off and on, against the peer's n-gram drafts on the same prompts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import ours
from benchmarks.harness import Case, Measure
from benchmarks.peers.server import serve
from benchmarks.suite import Settings, Suite

N_GEN = 128
N_CTX = 2048
N_DRAFT = 8
PEER_TYPES = ("none", "ngram-simple", "ngram-map-k", "ngram-mod", "ngram-cache")

LISTING = '''def read_rows(path):
    """Read a CSV file and return its rows as dictionaries."""
    rows = []
    with open(path, newline="") as handle:
        reader = csv.DictReader(handle)
        for row in reader:
            rows.append(row)
    return rows


def count_by(rows, field):
    """Count the rows by the value of one field."""
    counts = {}
    for row in rows:
        value = row[field]
        counts[value] = counts.get(value, 0) + 1
    return counts
'''

QUESTIONS = {
    "copying": f"Repeat this code exactly, with `rows` renamed to `records`:\n\n{LISTING}",
    "explaining": f"Explain in plain words what this code does:\n\n{LISTING}",
    "free text": "Write a short story about a lighthouse keeper who finds a letter.",
}


def chat_prompt(question: str) -> str:
    """Returns a question in the chat form of the default base."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def _peer(settings: Settings, model: Path, kind: str, prompt: list[int]) -> float:
    # A fresh server each time: some drafts would else come from the same answer, given before.
    options = ["--spec-type", kind] if kind != "none" else []
    with serve(settings.peer.tools, model, settings.n_threads, N_CTX, options) as server:
        server.complete(ours.random_tokens(16, seed=1), 8)
        return server.complete(prompt, N_GEN).decode_tps


def _ours(session: ours.Session, prompt: list[int], n_draft: int) -> float:
    return session.generate(prompt, N_GEN, n_draft=n_draft).decode_tps


def cases(settings: Settings) -> Iterator[Case]:
    """Yields one case a prompt, from one that copies to one that does not."""
    model = settings.models.f16
    with serve(settings.peer.tools, model, settings.n_threads, N_CTX) as server:
        prompts = {name: server.tokenize(chat_prompt(q)) for name, q in QUESTIONS.items()}
    with ours.session(model, "keep", settings.n_threads, N_CTX) as session:
        for name, prompt in prompts.items():
            baseline: dict[str, Measure] = {
                kind: partial(_peer, settings, model, kind, prompt) for kind in PEER_TYPES
            }
            contenders: dict[str, Measure] = {
                "off": partial(_ours, session, prompt, 0),
                "on": partial(_ours, session, prompt, N_DRAFT),
            }
            yield Case(f"speculation, {name}", "tokens/s", baseline, contenders)


SUITE = Suite("speculative", "prompt-lookup speculation", cases)
