"""Chat templates are programs by strangers: rendered here within limits of size and time.

jinja2's sandbox keeps a template from Python's internals, but not from looping for years or from
filling the memory. So the template's syntax tree is changed before it is compiled: every loop and
macro counts its rounds and looks at the clock, and whatever is written, joined or put into a list
is weighed; operators, calls and filters are weighed before they run, as one call of `center` is
enough for a gigabyte. What is left unbounded is only what the conversation itself holds.

The language is that of transformers' `apply_chat_template`: its filters, functions and whitespace.
`{% generation %}` blocks are written between two marks on demand.
"""

import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from halfbyte.errors import DataError

# Noncharacters: Unicode keeps them for internal use, so they are in no text.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
MAX_SECONDS = 10.0
MAX_ROUNDS = 1_000_000
# Characters of a value, and of all that is written while one conversation is rendered.
MAX_SIZE = 1 << 23
_ITEM_SIZE = 8  # a place in a list, in characters
_MAX_SOURCE = 1 << 20
_MAX_BITS = 1 << 12
_WIDTHS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap"})
_GROWING = _WIDTHS | {"replace", "join", "translate", "format"}
_WIDE_FORMAT = re.compile(r"\d{5,}|%[^a-zA-Z%]*\*|:[^}]*\{")


# What a template may raise: its own refusals, and Python's for operands of the wrong kind.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class TemplateLimitError(jinja2.TemplateError):
    """A template took more time, or made more text, than any conversation needs."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.rounds = MAX_ROUNDS
        self.size = MAX_SIZE
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        self.rounds -= 1
        if self.rounds < 0:
            raise TemplateLimitError(f"it loops more than {MAX_ROUNDS:,} times")
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"it takes longer than {MAX_SECONDS:g} s")

    def spend(self, size: int) -> None:
        self.size -= size
        if self.size < 0:
            raise TemplateLimitError(f"it writes more than {MAX_SIZE:,} characters")


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("halfbyte_template_budget")


def weigh(value: Any) -> int:
    """Return the size of a value, what is in it several times counted as often.

    Raises:
        TemplateLimitError: there are more than `MAX_SIZE`.
    """
    if isinstance(value, str):
        total, waiting = len(value), []
    else:
        total, waiting = 1, [value]
    while waiting and total <= MAX_SIZE:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list | tuple | set | frozenset | dict):
            waiting += item
            waiting += item.values() if isinstance(item, dict) else ()
            total += _ITEM_SIZE * len(item)
    if total > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} characters")
    return total


class _Namespace(Namespace):
    """jinja2's, that prints as nothing more than its name: what it holds may be without end."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, if the result is of a size that a template needs."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > _MAX_BITS:
                raise TemplateLimitError("it computes numbers of thousands of digits")
        elif operator == "*":
            _check_product(left, right)
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise TemplateLimitError("it formats text of any width")
        elif operator == "+" and weigh(left) + weigh(right) > MAX_SIZE:
            raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} characters")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method that the sandbox holds for safe, weighing what comes out."""
        owner = getattr(obj, "__self__", None)
        if owner is self:  # what `_Limits` put there
            return obj(*args)
        _BUDGET.get().tick()
        _check_arguments(getattr(obj, "__name__", ""), (owner, *args, *kwargs.values()))
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, str | list | tuple | dict):
            weigh(result)
        return result

    def wrap_str_format(self, value: Any) -> Any:
        """Return jinja2's safe `str.format`, for texts that ask for no great width."""
        if getattr(value, "__name__", "") in ("format", "format_map"):
            _check_arguments("format", (getattr(value, "__self__", None),))
        return super().wrap_str_format(value)

    def tick(self) -> str:
        """Count one round of a loop or macro."""
        _BUDGET.get().tick()
        return ""

    def written(self, value: Any) -> Any:
        """Return a value that goes to the output."""
        _BUDGET.get().spend(weigh(value))
        return value

    def made(self, value: Any) -> Any:
        """Return a list or dictionary that the template builds."""
        weigh(value)
        return value

    def joined(self, *values: Any) -> str:
        """Return `a ~ b ~ c`."""
        if sum(map(weigh, values)) > MAX_SIZE:
            raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} characters")
        return "".join(map(str, values))

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
        return str(super()._generate(_Limits(self).visit(source), *args, **kwargs))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_BITS:
            raise TemplateLimitError("it computes numbers of thousands of digits")
        return
    for sequence, count in ((left, right), (right, left)):
        is_repeat = isinstance(count, int) and not isinstance(sequence, int | float)
        if is_repeat and weigh(sequence) * count > MAX_SIZE:
            raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} characters")


def _check_arguments(name: str, values: Sequence[Any]) -> None:
    """Refuse what one call would make too large, before it does.

    Args:
        name: Of the filter, function or method.
        values: Its arguments; a method's first is what it belongs to.
    """
    if name not in _GROWING:
        return
    sizes = [weigh(v) for v in values if isinstance(v, str | list | tuple | dict)]
    texts = [v for v in values if isinstance(v, str)]
    size = 0
    if name in _WIDTHS and texts:
        width = max((v for v in values if isinstance(v, int)), default=0)
        size = width * (1 + texts[0].count("\n") + texts[0].count("\t"))
    elif name == "replace" and len(texts) > 2:
        size = texts[0].count(texts[1]) * len(texts[2])
    elif name in ("join", "translate") and len(sizes) > 1:
        size = sizes[0] * sizes[1]
    elif name == "format" and texts and _WIDE_FORMAT.search(texts[0]):
        raise TemplateLimitError("it formats text of any width")
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} characters")


_KEEPING = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)


class _Limits(NodeTransformer):
    """Puts the counting and weighing into a template's syntax tree."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment
        self._blocks = 0  # around the node, those that keep what is written in them

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """Visit what is in a node."""
        self._blocks += isinstance(node, _KEEPING)
        super().generic_visit(node, *args, **kwargs)
        self._blocks -= isinstance(node, _KEEPING)
        return node

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._bind(nodes.ExprStmt(self._call("tick"))))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        """Weigh what is written; `render` does it for the template's own text, outside blocks."""
        self.generic_visit(node)
        plain = () if self._blocks else nodes.TemplateData
        node.nodes = [
            part if isinstance(part, plain) else self._call("written", part) for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Weigh what `~` joins."""
        self.generic_visit(node)
        return self._call("joined", *node.nodes)

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_value = getattr(node, "ctx", "load") == "load"
        return self._call("made", node) if is_value and getattr(node, "items", None) else node

    visit_List = visit_Tuple = visit_Dict = _made

    def _call(self, name: str, *args: nodes.Expr) -> nodes.Call:
        attribute = nodes.EnvironmentAttribute(name)
        return self._bind(nodes.Call(attribute, list(args), [], None, None))

    def _bind(self, node: Any) -> Any:
        return node.set_environment(self.environment).set_lineno(1)


class _Generation(Extension):
    """`{% generation %}`: what the assistant writes, between marks where they are asked for."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        """Make it a call of its body, as transformers does: a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, context: Any, caller: Callable[[], str]) -> str:
        """Return the body, marked if the rendering asks for it."""
        return f"{MARK_START}{caller()}{MARK_END}" if context.get(_WITH_MARKS) else caller()


_WITH_MARKS = "halfbyte_marks"


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is weighed before and after it runs."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(name, [v for v in (*args, *kwargs.values()) if not _is_internal(v)])
        result = function(*args, **kwargs)
        if isinstance(result, str | list | dict):
            weigh(result)
        return result

    return guarded


def _is_internal(value: Any) -> bool:
    return isinstance(value, jinja2.Environment | jinja2.runtime.Context | nodes.EvalContext)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Return a template, compiled with its limits.

    Raises:
        jinja2.TemplateError: it is no Jinja, or longer than a megabyte.
    """
    if len(source) > _MAX_SOURCE:
        raise TemplateLimitError(f"it is {len(source):,} characters long")
    try:
        return _environment().from_string(source)
    except RecursionError as error:
        raise TemplateLimitError("it is nested too deeply") from error


def parse(source: str) -> nodes.Template:
    """Return a template's syntax tree, as it was written."""
    return _environment().parse(source)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {
        name: _guarded(name, function) for name, function in environment.filters.items()
    }
    del environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace
    )
    return environment


def render(source: str, variables: Mapping[str, Any], *, marks: bool = False) -> str:
    """Return what a template writes.

    Args:
        source: Jinja text.
        variables: What the template sees.
        marks: Write `MARK_START` and `MARK_END` around what `{% generation %}` encloses.

    Raises:
        jinja2.TemplateError: the template refuses, is broken, or breaks a limit.
    """
    budget = _Budget()
    token = _BUDGET.set(budget)
    written: list[str] = []
    try:
        for part in compile_template(source).generate({**variables, _WITH_MARKS: marks}):
            budget.spend(len(part))
            written.append(part)
    except (RecursionError, MemoryError, OverflowError) as error:
        raise TemplateLimitError(f"it needs too much of the machine: {error}") from error
    finally:
        _BUDGET.reset(token)
    return "".join(written)


def render_conversation(source: str, variables: Mapping[str, Any], *, marks: bool = False) -> str:
    """Return what `render` does, for a conversation that its template may refuse.

    Raises:
        DataError: the template raised an error, or broke a limit of time or size.
    """
    try:
        return render(source, variables, marks=marks)
    except TemplateLimitError as error:
        raise DataError(
            f"the chat template was stopped: {error}", hint="choose another chat_template"
        ) from error
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"the chat template refuses this conversation: {error}",
            hint="mend the conversation, or choose another chat_template",
        ) from error
