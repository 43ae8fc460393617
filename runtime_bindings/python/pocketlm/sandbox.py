"""The jinja2 environment for chat templates: transformers' dialect, no way into Python, and a bound on its work.

A template comes with a model and is code of a stranger. jinja2's sandbox keeps it from Python's internals, but not from
nested loops, doubling strings or lists that hold a list twice. Here every step and every value that a template makes is
paid from the budget of its rendering, before it is made wherever it could be large.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_environment
from jinja2.visitor import NodeTransformer

from pocketlm.template_budget import (
    ELEMENT,
    LARGEST_NUMBER_BITS,
    LARGEST_VALUE,
    formatted_size,
    joined_size,
    magnitude,
    pay,
    text_size,
    weigh,
)

__all__ = ["TemplateEnvironment"]

_STEP = 64
_LARGEST_INDENT = 16
_PRETTY_COST = 64


class TemplateNamespace(Namespace):
    """A namespace without underscored names, that no container and no namespace holds (it could grow afterwards)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self = args[0]
        Namespace.__init__(self)
        for name, value in dict(*args[1:], **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace can't hold the underscored name {name!r}")
        weigh(value)
        super().__setitem__(name, value)


class _TemplateDict:
    """``dict`` as a template may call it, without the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: object = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Generation(Extension):
    """transformers' ``{% generation %}``, which marks the assistant's text for training: its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside does not leave it.
        return nodes.Scope(body, lineno=line)


class _Metered(NodeTransformer):
    """Adds a payment to every loop round and macro call, and weighs what literals and ``~`` make."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (named by jinja2)
        return self._pay_per_run(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._pay_per_run(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._pay_per_run(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802
        return self._pay_per_run(node)

    def _pay_per_run(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        text = sum(len(data.data) for part in node.body for data in _with_descendants(part))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_payment(_STEP + text)))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return _filtered(self.generic_visit(node), "weighed value")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return _filtered(self.generic_visit(node), "weighed value")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "weighed value") if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "weighed text")


def _with_descendants(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    # The space in the name keeps templates from calling it.
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _payment(amount: int) -> nodes.Filter:
    return nodes.Filter(nodes.Const(amount), "paid step", [], [], None, None)


@pass_context  # keeps jinja2 from calling it once, when it compiles
def _paid_step(_: Context, amount: int) -> bool:
    pay(amount)
    return True


@pass_context
def _weighed_value(_: Context, value: object) -> object:
    return _paid(value)


@pass_context
def _weighed_text(_: Context, parts: list[object]) -> str:
    weigh(parts)
    return str(_paid("".join(map(str, parts))))


def _paid(value: object) -> object:
    """The value, paid for by what was newly made, and refused if it would be too large when written out."""
    if not isinstance(value, TemplateNamespace):
        weigh(value)
        elements = len(value) if isinstance(value, list | tuple | dict | set) else 0
        pay(len(value) if isinstance(value, str) else 1 + ELEMENT * elements)
    return value


def _finalize(value: object) -> str:
    """The text of an output, paid for."""
    weigh(value)
    text = str(value)
    pay(len(text))
    return text


def _join_arguments(
    environment: Environment, value: Iterable[Any], d: object = "", attribute: str | int | None = None
) -> tuple[list[Any], tuple[object]]:
    if attribute is None:
        return [*value], (d,)
    read = make_attrgetter(environment, attribute)
    return [read(item) for item in value], (d,)


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, paid for; what it could blow up is estimated first."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        before, value, rest = args[:leading], args[leading], args[leading + 1 :]
        if name == "join":
            value, rest = _join_arguments(before[0].environment, value, *rest, **kwargs)
            kwargs = {}
            pay(joined_size(str(rest[0]), value))
        elif name == "format" and isinstance(value, str):
            pay(formatted_size(value, "%", (*rest, kwargs)))
        elif name == "pprint":
            pay(_PRETTY_COST * weigh(value))
        else:
            pay(_STEP + text_size(name, value if isinstance(value, str) else "", rest, kwargs))
        return _paid(function(*before, value, *rest, **kwargs))

    return metered


@pass_environment
def _sum(environment: Environment, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """jinja2's filter, paid for step by step: a sum of lists copies again and again."""
    total = start
    if isinstance(total, str):
        raise TemplateRuntimeError("sum can't add texts: use join")
    read = make_attrgetter(environment, attribute) if attribute is not None else None
    for value in values:
        total = total + (read(value) if read else value)
        pay(ELEMENT * (len(total) if isinstance(total, list | tuple) else 1))
    return total


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: plain JSON, no HTML escapes."""
    if indent is not None and magnitude([indent]) > _LARGEST_INDENT:
        raise TemplateRuntimeError(f"tojson: an indent of {indent} is too large")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):
        pay(len(piece))
        pieces.append(piece)
    return "".join(pieces)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders within the current budget (:func:`spending`); any exception may come out of a template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_finalize
        )
        del self.globals["lipsum"]
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = TemplateNamespace
        self.filters |= {"tojson": _tojson, "sum": _sum}
        self.filters = {name: _metered_filter(name, function) for name, function in self.filters.items()}
        self.filters["paid step"] = _paid_step
        self.filters["weighed value"] = _weighed_value
        self.filters["weighed text"] = _weighed_text

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        metered = _Metered().visit(source)
        return super()._generate(metered, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute or a key, as jinja2 has it, but no name of Python's own, there or not."""
        return self.unsafe_undefined(obj, attribute) if attribute.startswith("__") else super().getattr(obj, attribute)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse at once: jinja2's own value of an unsafe attribute prints as nothing."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make much out of little."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "+":
            if weigh(left) + weigh(right) > LARGEST_VALUE:
                raise TemplateRuntimeError("the sum of two values is too large")
        elif operator == "%" and isinstance(left, str):
            pay(formatted_size(left, "%", right))
        elif operator == "**" and numbers:
            if left.bit_length() * abs(right) > LARGEST_NUMBER_BITS:
                raise TemplateRuntimeError("a number is too large")
        elif operator == "*" and numbers:
            if left.bit_length() + right.bit_length() > LARGEST_NUMBER_BITS:
                raise TemplateRuntimeError("a number is too large")
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            pay(weigh(value) * max(count, 0))
        return _paid(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call in a template; methods of text are estimated first."""
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str) and not isinstance(__obj, Macro):
            name = method.__name__
            if name == "join" and len(args) == 1:
                args = ([*args[0]],)
                pay(joined_size(owner, args[0]))
            else:
                pay(text_size(name, owner, args, kwargs))
        elif isinstance(owner, int):
            raise SecurityError(f"{method.__name__} of a number is not allowed")
        pay(_STEP)
        return _paid(super().call(__context, __obj, *args, **kwargs))
