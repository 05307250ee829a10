"""A jinja2 sandbox in which a hostile template can neither run on nor grow without bound.

A chat template comes from a downloaded file. jinja2's sandbox keeps it from Python's internals, but
nested loops, recursive macros or `x + x` in a loop would still hang or exhaust the process. So
every expression that can repeat or make a value passes through the meter of the rendering.
"""

# ruff: noqa: N802, N815 - node visitors are named after jinja2's node classes
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

from modularbase.bases.template_filters import BOUNDED, HARMLESS
from modularbase.bases.template_meter import METER

# Left out are those that make large values out of small ones, such as "".center and (1).to_bytes.
_SAFE_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            *("capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum"),
            *("isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace"),
            *("istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix"),
            *("removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip"),
            *("split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
        )
    ),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    int: frozenset(),
    float: frozenset(),
}


# The filters below take the context so that jinja2 does not apply them while compiling.
@pass_context
def _checked(_context: Context, value: Any) -> Any:
    """Around every expression that can make a value: the value is bounded or refused."""
    meter = METER.get()
    meter.tick()
    if isinstance(value, Iterator):
        return meter.kept(value)
    meter.weigh(value)
    return value


@pass_context
def _metered(_context: Context, value: Iterable[Any]) -> Iterator[Any]:
    """Around what a loop runs over: each round is one operation."""
    meter = METER.get()
    for item in value:
        meter.tick()
        yield item


@pass_context
def _joined(_context: Context, parts: list[object]) -> str:
    """In place of the operator `~`."""
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    METER.get().check_size(sum(map(len, texts)))
    return "".join(texts)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


class _Instrument(NodeTransformer):
    """Puts the meter around loops and around everything that makes values."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_checked") if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_checked") if isinstance(node.arg, nodes.Slice) else node

    def _wrap(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_checked")

    visit_List = visit_Dict = visit_Filter = visit_Compare = _wrap


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; for rendering it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled and run in; a Meter must be in METER."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants would be computed while compiling, unmetered
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        known = self.filters
        self.filters = {name: known[name] for name in HARMLESS} | dict(BOUNDED)
        self.filters.update(_checked=_checked, _metered=_metered, _joined=_joined)
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Lets templates reach only the harmless methods of plain values."""
        for kind, names in _SAFE_METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right` if the result cannot be too large."""
        METER.get().check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls what a template calls, if the result cannot be too large."""
        meter = METER.get()
        meter.tick()
        owner = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            meter.check_replace(owner, str(args[0]), str(args[1]))
        elif isinstance(owner, str) and name == "join" and args:
            args = (meter.kept(args[0]),)
            meter.check_size(meter.weigh(args) + len(owner) * len(args[0]))
        return _checked(__context, super().call(__context, __obj, *args, **kwargs))

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        """Applies a test by name, as `select` does to each element."""
        METER.get().tick()
        return super().call_test(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Guards `str.format` against widths that make text out of nothing."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def guarded(*args: Any, **kwargs: Any) -> str:
            METER.get().check_format(value.__self__, [args, kwargs])
            return wrapped(*args, **kwargs)

        return guarded
