"""Limits on the chat template of a model: its time, its output, and the size of its values.

A template is a program that comes with a model. The sandbox of Jinja keeps it from files and
code, but not from looping for years or from `'x' * 10**12`. Here transformers compiles a template
for an environment with limits, in which operators and functions that can make a large value check
its size first. Everything else that takes long is Python code, which an alarm can interrupt.
"""

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

# Limits: seconds of one conversation, characters or elements of a value, and numbers that say how
# much a function shall write.
MOST_SECONDS, MOST_SIZE, MOST_WIDTH = 5.0, 200_000_000, 100_000
# What a template can raise, besides its own exceptions.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
# Filters, and methods of strings with the same names, that write as much as a number says.
_WIDE = "batch center expandtabs format format_map indent ljust rjust slice tojson wordwrap zfill"
_WIDTH = re.compile(r"[0-9]{6,}|\*")
_compile = chat_template_utils._compile_jinja_template


class TemplateLimitError(TemplateError):
    """A template exceeds a limit."""


class _CodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write the code of `a ~ b`, which no method of an environment can change."""
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Template(Template):
    def render(self, *args: Any, **options: Any) -> str:
        """Render within the time limit."""
        with _deadline():
            return super().render(*args, **options)

    def generate(self, *args: Any, **options: Any) -> Iterator[str]:
        """The pieces of `render`, one by one: the mask of answers needs those before a piece."""
        with _deadline():
            yield from _counted(super().generate(*args, **options))


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers, whose class is replaced by this one."""

    code_generator_class = _CodeGenerator
    template_class = _Template
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of an output."""
        return "".join(_counted(pieces))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator after a check of the size of its result."""
        if operator == "+":
            size = _size(left) + _size(right)
        elif operator == "*":
            numbers = [abs(v) for v in (left, right) if isinstance(v, int)]
            size = max(_size(left), _size(right)) * max(numbers, default=1)
            size = max(size, sum(n.bit_length() for n in numbers) * 1000)
        elif operator == "**":
            both = isinstance(left, int) and isinstance(right, int)
            size = abs(left).bit_length() * abs(right) * 1000 if both else 0
        else:
            size = MOST_SIZE + 1 if isinstance(left, str) and _WIDTH.search(left) else 0
        _check(size)
        return super().call_binop(context, operator, left, right)

    def call(self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:
        """Call a function after a check of the size of what a method of a string returns."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _check_call(method.__name__, (text, *args), options)
        return super().call(__context, __obj, *args, **options)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _check(size: int) -> None:
    if size > MOST_SIZE:
        raise TemplateLimitError(f"it makes a value of more than {MOST_SIZE} characters")


def _counted(pieces: Iterable[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        _check(size)
        yield piece


def _check_call(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Check a filter or method of a string; the first argument is what it is applied to."""
    text, rest = args[0] if args else "", [*args[1:], *options.values()]
    if name == "replace" and len(rest) > 1 and all(isinstance(v, str) for v in (text, *rest[:2])):
        _check(len(text) + text.count(rest[0]) * len(rest[1]))
    elif name == "join" and rest:
        # The filter is applied to the list, the method to what is put between its elements.
        _check(_size(text) * max(map(_size, rest)))
    elif name in _WIDE.split():
        widths = [v for v in rest if isinstance(v, int | float) and not isinstance(v, bool)]
        digits = [v for v in (text, *rest) if name.startswith("format") and isinstance(v, str)]
        if max(widths, default=0) > MOST_WIDTH or any(map(_WIDTH.search, digits)):
            raise TemplateLimitError(f"it calls {name} with a number above {MOST_WIDTH}")
        if name in ("indent", "expandtabs") and isinstance(text, str):
            _check((text.count("\n") + text.count("\t")) * round(max(widths, default=8)))


def _bounded(name: str, function: Callable) -> Callable:
    # Filters that are passed the environment or a context have it before their arguments.
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # with the mark of what is passed
    def apply(*args: Any, **options: Any) -> Any:
        _check_call(name, args[passed:], options)
        result = function(*args, **options)
        _check(_size(result))
        return result

    return apply


@contextmanager
def limited_templates() -> Iterator[None]:
    """Compile and render the templates of transformers with limits.

    Raises:
        TemplateLimitError: a template takes more than 5 seconds for a conversation, or makes a
            value of more than 200 million characters.
    """
    chat_template_utils._compile_jinja_template = _compiled
    try:
        yield
    finally:
        chat_template_utils._compile_jinja_template = _compile


_known: dict[str, Template] = {}


def _compiled(text: str) -> Template:
    """Compile a template; one is kept, because all rows of a run use it."""
    if text not in _known:
        with _deadline():
            environment = _compile("").environment  # with the functions of transformers
            environment.__class__ = _Environment
            filters = environment.filters.items()
            environment.filters = {name: _bounded(name, function) for name, function in filters}
            environment.globals.pop("lipsum", None)
            template = environment.from_string(text)
        _known.clear()
        _known[text] = template
    return _known[text]


@contextmanager
def _deadline() -> Iterator[None]:
    """Raise an error in what runs for too long."""

    def stop(*_: Any) -> None:
        raise TemplateLimitError(f"it runs for more than {MOST_SECONDS:g} seconds")

    if threading.current_thread() is not threading.main_thread():
        with _traced_deadline(stop):
            yield
        return
    handler = signal.signal(signal.SIGALRM, stop)
    # Repeated, because a template may be in code that catches every exception.
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def _traced_deadline(stop: Callable[[], None]) -> Iterator[None]:
    """The same in a thread, where there are no signals: look at the time at every line."""
    end = time.monotonic() + MOST_SECONDS

    def look(frame: FrameType, event: str, argument: object) -> Callable:
        if time.monotonic() > end:
            stop()
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
