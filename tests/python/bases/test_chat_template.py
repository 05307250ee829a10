"""Chat templates: known renderings, hostile templates, malformed messages."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.template_meter import Meter
from modularbase.errors import ChatTemplateError, InvalidRequestError

# The template in the GGUF file of SmolLM2-135M-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi <b> & 'x'"},
    {"role": "assistant", "content": "Hello\n"},
    {"role": "user", "content": " Why? é"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}


def test_smollm2() -> None:
    template = ChatTemplate(SMOLLM2)
    assert template.render(HI) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render_history(CONVERSATION) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <b> & 'x'<|im_end|>\n"
        "<|im_start|>assistant\nHello\n<|im_end|>\n<|im_start|>user\n Why? é<|im_end|>\n"
    )


def plain_jinja(source: str) -> jinja2.Template:
    """The template as jinja2 itself understands it, set up as transformers does."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda value, ensure_ascii=False, **kw: json.dumps(
        value, ensure_ascii=ensure_ascii, **kw
    )
    env.filters["safe"] = str  # jinja2 would escape what is added to a safe string
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = time.strftime
    return env.from_string(source)


def test_published_templates_render_as_in_plain_jinja(llama_cpp_models_dir: Path) -> None:
    paths = sorted((llama_cpp_models_dir / "templates").glob("*.jinja"))
    n_rendered = 0
    for path in paths:
        source = path.read_text(encoding="utf-8")
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
        if "{% generation" in source or "{%- generation" in source:
            continue  # plain jinja2 does not know the tag
        oracle = plain_jinja(source)
        for messages in (CONVERSATION, CONVERSATION[1:]):
            for tools in (None, [TOOL]):
                given = {"messages": messages, "tools": tools, "add_generation_prompt": True}
                try:
                    expected = oracle.render(bos_token="<s>", eos_token="</s>", **given)
                except Exception:  # it needs variables we do not give, or refuses the messages
                    continue
                assert template.render(messages, tools=tools) == expected, path.name
                n_rendered += 1
    assert len(paths) > 50 and n_rendered > 4 * 50


def test_what_templates_expect() -> None:
    source = (
        "{{ bos_token }}{% generation %}{{ strftime_now('%Y')|length }}{% endgeneration %}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m.content|trim|tojson }}{% endfor %}{% set ns = namespace(n=0) %}{% set ns.n = 2 %}"
        "{{ ns.n ~ '%s'.format('x') ~ ('%d' % 3) ~ '{:.1f}'.format(2) }}{{ thinking }}{{ tools }}"
    )
    template = ChatTemplate(source, bos_token="<s>")
    text = template.render([{"role": "user", "content": " <é> "}], variables={"thinking": "on"})
    assert text == '<s>4"<é>"2%s32.0onNone'


def test_default_and_missing_templates() -> None:
    chatml = ["a", "<|im_start|>", "<|im_end|>"]
    template = ChatTemplate.from_metadata({"tokenizer.ggml.tokens": chatml})
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(HI) == expected
    with pytest.raises(ChatTemplateError, match="none"):
        ChatTemplate.from_metadata({"tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(ChatTemplateError, match="UTF-8"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": b"\xff"})


def test_token_names_come_from_the_file() -> None:
    meta = {
        "tokenizer.ggml.tokens": ["<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    assert ChatTemplate.from_metadata(meta).render(HI) == "<s>Hi</s>"


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("a\n{{ raise_exception('no system ' ~ 'role') }}")
    with pytest.raises(ChatTemplateError) as caught:
        template.render(HI)
    assert caught.value.reason == "no system role" and caught.value.line == 2


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ 1 +", "{% endif %}", "{{ x|no_such_filter }}", "{% frobnicate %}"],
)
def test_malformed_templates(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate("\n\n" + source)
    assert caught.value.line == 3


@pytest.mark.parametrize(
    "source", ["(" * 5000, "{{" + "(" * 5000, "{% if x %}" * 3000, "x" * 10**7]
)
def test_absurd_sources(source: str) -> None:
    try:
        ChatTemplate(source)
    except ChatTemplateError:
        return
    assert source.startswith("((")  # mere text


LOOPS = {
    "nested loops": "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(200) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1, 2]) }}{{ loop([1]) }}{% endfor %}",
    "select": "{% set l = range(99999)|list %}{{ l|select('in', l)|list|length }}" * 50,
    "map": "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
}
GROWTH = {
    "range": "{{ range(10**9)|list }}",
    "add": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "concat": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "list add": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = 2 * ns.x %}"
    "{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested dicts": "{% set ns = namespace(x=1) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "cycle": "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns]|string }}",
    "multiply": "{{ 'a' * 10**11 }}",
    "multiply left": "{{ 10**11 * 'a' }}",
    "multiply list": "{{ ([messages] * 10**8)|length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "large product": "{% set ns = namespace(x=2**4000) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "center filter": "{{ 'a'|center(10**10) }}",
    "indent filter": "{{ 'a'|indent(10**10, true) }}",
    "indent by text": "{{ ('\n' * 10**6)|indent('a' * 10**6) }}",
    "tojson indent": "{{ [1]|tojson(indent=10**10) }}",
    "wide %": "{{ '%10000000000d' % 1 }}",
    "starred %": "{{ '%*d' % (10**10, 1) }}",
    "many %": "{{ ('%s' * 10**6) % ('a' * 10**6) }}",
    "wide format": "{{ '{:10000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10**10) }}",
    "many fields": "{{ ('{0}' * 10**6).format('a' * 10**6) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "replace empty": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "replace filter": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "join": "{{ ('a' * 10**6).join(range(99999)|map('string')) }}",
    "join filter": "{{ range(99999)|join('a' * 10**6) }}",
    "mapped replace": "{{ range(99999)|map('replace', '1', 'b' * 10**6)|list|length }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "block filter": "{% set x | replace('a', 'b' * 10**6) %}" + "a" * 10**5 + "{% endset %}",
}


@pytest.mark.parametrize("source", [*LOOPS.values(), *GROWTH.values()], ids=[*LOOPS, *GROWTH])
def test_hostile_templates_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modularbase.bases.chat_template.Meter", lambda: Meter(cpu_s=0.5))
    started = time.thread_time()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(HI)
    # Half a second of template time plus what its longest single operation takes.
    assert time.thread_time() - started < 2.0


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
    ],
)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    try:
        text = ChatTemplate(source).render(HI)
    except ChatTemplateError:
        return
    assert text == ""  # jinja2 shows an unsafe attribute as undefined


def test_renders_in_several_threads() -> None:
    template = ChatTemplate(SMOLLM2)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(template.render(HI))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8 and len(set(texts)) == 1


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("Hi", "messages"),
        (None, "messages"),
        ([], "messages"),
        ({"role": "user", "content": "Hi"}, "messages"),
        (["Hi"], "messages[0]"),
        ([*HI, {"content": "Hi"}], "messages[1].role"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0].role"),
        ([{"role": ["user"], "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": b"Hi"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
    ],
)
def test_malformed_messages(messages: list[dict[str, object]], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(SMOLLM2).render(messages)
    assert caught.value.field == field


def test_a_message_that_calls_tools_needs_no_content() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].name }}")
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert template.render([message]) == "f"
