"""Senseless requests, options, paths and templates: each a named error, and the engine goes on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine, EngineOptions
from modularbase.bases import chat_template
from modularbase.bases.template_meter import Meter
from modularbase.errors import (
    BaseLoadError,
    BaseNotFoundError,
    ChatTemplateError,
    DeviceError,
    InvalidRequestError,
    ModularBaseError,
)
from tests.tools.gguf_edit import copy_gguf
from tests.tools.tiny_models import N_LAYER, N_VOCAB
from tests.tools.tiny_requests import ids, load

NAN, INF = math.nan, math.inf
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def the_engine_goes_on(engine: Engine) -> Iterator[None]:
    yield
    result = engine.generate(ids(5), max_tokens=3, temperature=0, ignore_eos=True)
    assert len(result.token_ids) == 3


PROMPTS = [
    "",
    [],
    [-1],
    [N_VOCAB],
    [2**40],
    [1.5],
    ["the"],
    [None],
    None,
    7,
    b"the cat",
    bytearray(b"the cat"),
    "a lone surrogate: \ud800",
    [[1, 2], [3]],
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_prompts(prompt: Any, engine: Engine) -> None:
    for call in (engine.generate, engine.submit, engine.score, engine.embed):
        with pytest.raises(InvalidRequestError) as caught:
            call(prompt)
        assert caught.value.field in ("prompt", "text")
    with pytest.raises(InvalidRequestError):
        next(engine.stream(prompt))


def test_a_score_needs_two_tokens(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="at least 2"):
        engine.score([1])


PARAMETERS: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 2**31, 1.0, "8", True],
    "temperature": [-0.1, NAN, INF, 101, "hot", None],
    "top_k": [-2, 2**40, 1.5, None],
    "top_p": [-0.1, 1.1, NAN, None],
    "min_p": [-0.1, 1.1, NAN],
    "typical_p": [-0.1, 1.1, NAN],
    "repeat_penalty": [0, -1, NAN, INF],
    "repeat_last_n": [-1, 2**40],
    "frequency_penalty": [NAN, INF, 1e9],
    "presence_penalty": [NAN, -INF, -1e9],
    "logit_bias": ["x", None, {N_VOCAB: 1}, {-1: 1}, {1: NAN}, {1: INF}, {"1": 1}],
    "seed": [-1, 2**64, 0.5, "x"],
    "stop": ["", [""], [3], 5, None, b"x", ["a", None]],
    "logprobs": [-1, N_VOCAB + 1, 2**40, "all"],
    "n_draft": [-1, 65, 2**40, None],
    "timeout_s": [0, -1, NAN, INF, "soon"],
    "bogus": [1],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sampling_parameters(name: str, engine: Engine) -> None:
    for value in PARAMETERS[name]:
        with pytest.raises(InvalidRequestError) as caught:
            engine.generate(ids(5), **{"max_tokens": 2, name: value})
        assert name in str(caught.value), value
        assert caught.value.expected
        assert caught.value.found


def test_a_bias_that_rules_out_every_token(engine: Engine) -> None:
    with pytest.raises(ModularBaseError, match="ruled out"):
        engine.generate(ids(5), logit_bias=dict.fromkeys(range(N_VOCAB), -INF))


@pytest.mark.parametrize("layer", [-1, N_LAYER + 2, 2**40, 0.5, "x", None])
def test_layers(layer: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine.hidden(ids(5), layer)
    assert caught.value.field == "layer"


def test_pooling(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="pooling"):
        engine.embed(ids(5), pooling="max")  # type: ignore[arg-type]


ARGUMENTS: dict[str, list[Any]] = {
    "dtype": ["q4", "", 5, None],
    "n_threads": [0, -1, 1.5, "2", True, 10**6, 2**31],
    "n_ctx": [0, -1, 513, 2**31, "x"],
    "pack_budget": ["lots", "-1", -1, "5XB", True, "1e400GB"],
}
OPTIONS: dict[str, list[Any]] = {
    "kv": ["q5_0", None],
    "kv_window_tokens": [-1, 127, "all"],
    "kv_budget_bytes": [-1, 100, 2**45, 2**62, 2**63, "1GB"],  # nor may it try to allocate those
    "pack_budget_bytes": [-1, 2**63, "1GB"],
    "first_site": [-2, 3, 2**31, "middle"],
    "n_batch": [0, -1, 10**6, 2**40, "x"],
    "n_sequences": [0, -1, 10**6],
    "attention": ["flash"],
    "linear": ["blas"],
    "head": ["none"],
    "prefix_cache": [True, "maybe"],
}


@pytest.mark.parametrize("name", [*ARGUMENTS, *OPTIONS])
def test_load_arguments(name: str, chat_model: Path) -> None:
    for value in [*ARGUMENTS.get(name, []), *OPTIONS.get(name, [])]:
        arguments: dict[str, Any] = (
            {name: value} if name in ARGUMENTS else {"options": EngineOptions(**{name: value})}
        )
        with pytest.raises(InvalidRequestError) as caught:
            Engine.load(chat_model, **{"n_threads": 1, **arguments})
        assert caught.value.field == name, value


def test_more_threads_than_cores(chat_model: Path) -> None:
    n_cores = len(os.sched_getaffinity(0))
    with pytest.raises(InvalidRequestError, match=f"1..{n_cores}, found {n_cores + 1}"):
        Engine.load(chat_model, n_threads=n_cores + 1)


def test_devices(chat_model: Path) -> None:
    for device in ("tpu", ""):
        with pytest.raises(DeviceError, match="'cpu' or 'cuda'"):
            Engine.load(chat_model, device=device)  # type: ignore[arg-type]


def test_paths(tmp_path: Path, chat_model: Path) -> None:
    for missing in (tmp_path / "none.gguf", tmp_path, "no\0where.gguf", "/dev/null", ""):
        with pytest.raises(BaseLoadError):
            Engine.load(missing)
    with pytest.raises(BaseNotFoundError) as caught:
        Engine.load("smollm3")
    assert "smollm2-135m" in caught.value.known
    with Engine.load(os.fsencode(chat_model), n_threads=1) as engine:  # type: ignore[arg-type]
        assert engine.info["path"] == str(chat_model)


def test_a_path_with_any_characters(tmp_path: Path, chat_model: Path) -> None:
    strange = tmp_path / "ein Übel 模型 \n.gguf"
    strange.symlink_to(chat_model)
    with load(strange) as engine:
        assert engine.info["path"] == str(strange)
    not_utf8 = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    not_utf8.symlink_to(chat_model)
    with pytest.raises(BaseLoadError, match="UTF-8"):
        Engine.load(not_utf8)


def test_an_unreadable_file(tmp_path: Path) -> None:
    # /proc/self/mem is a file that even root cannot read from its begin.
    with pytest.raises(BaseLoadError):
        Engine.load("/proc/self/mem")


TEMPLATES = {
    "{% for i in range(10**9) %}{{ i }}{% endfor %}": "too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "ran for",
    "{{ raise_exception('only pairs') }}": "only pairs",
    "{{ messages[7].content.nothing }}": "undefined|no element",
    "{% for %}": "line 1",
    "{{ 1 // 0 }}": "zero",
    "{{ ''.__class__.__mro__ }}": "unsafe",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(
    template: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "Meter", partial(Meter, cpu_s=0.2))
    changes = {"tokenizer.chat_template": template}
    path = copy_gguf(chat_model, tmp_path / "template.gguf", changes=changes)
    with load(path) as engine:
        with pytest.raises(ChatTemplateError, match=TEMPLATES[template]):
            engine.chat(MESSAGES)
        assert engine.stats["n_steps"] == 0
        assert engine.generate(ids(5), max_tokens=2, ignore_eos=True).token_ids  # works otherwise


def test_a_base_without_a_template(tiny_model: Any) -> None:
    with load(tiny_model().path) as engine, pytest.raises(ChatTemplateError, match="none"):
        engine.chat(MESSAGES)


@pytest.mark.parametrize(
    "messages",
    [[], None, "hi", [7], [{"role": "king", "content": "x"}], [{"role": "user"}]],
    ids=str,
)
def test_messages(messages: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        engine.chat(messages)


def test_too_little_memory_for_the_cache(chat_model: Path) -> None:
    # In a process of its own, since it limits its memory.
    code = """
import resource, sys
from modularbase import Engine, EngineOptions
from modularbase.errors import DeviceError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    Engine.load(sys.argv[1], n_threads=1, options=EngineOptions(kv_budget_bytes=16 << 30))
except DeviceError as error:
    print(error)
with Engine.load(sys.argv[1], n_threads=1) as engine:
    print(len(engine.generate([1, 2], max_tokens=2, ignore_eos=True).token_ids))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(chat_model)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    message, n_tokens = done.stdout.splitlines()
    assert "KV cache" in message
    assert n_tokens == "2"
