"""A Jinja sandbox whose templates end: their steps, their time and the size of what they compute are limited.

Steps are counted by the compiled template itself, at every block of statements, call, filter and operator, so that it
works in any thread. What would be large is refused before it is computed.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST = 2**24
"""Of one value: characters, with NODE for every item of a list."""
NODE = 64
BUDGET = 2**26
"""Of one rendering: characters made, NODE / 8 for every item made, and STEP for every step."""
STEP = 32
SECONDS = 5.0
LARGEST_NUMBER = 10_000
"""Of an argument that says how large a text becomes."""
LARGEST_BITS = 2**15
_SIZED = {"batch", "center", "indent", "round", "slice", "tojson", "wordwrap"}
_SIZED_METHODS = {"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"}
_WIDE = re.compile(r"%[^a-zA-Z%]{0,4}?\d{5,}|\{[^{}]*:[^{}]{0,4}?\d{5,}")
_WIDTH_IS_AN_ARGUMENT = re.compile(r"\{[^{}]*\{|%[^a-zA-Z%]*\*")


class _Work(threading.local):
    """What the current rendering of this thread has used."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.used, self.steps, self.deadline = 0, 0, time.monotonic() + SECONDS

    def spend(self, cost: int) -> None:
        self.used += cost
        self.steps += 1
        if self.used > BUDGET or (self.steps % 16 == 0 and time.monotonic() > self.deadline):
            raise SecurityError("the template does not come to an end")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Call `start` before each rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)  # nothing is computed while a template is compiled
        self._work = _Work()
        del self.globals["lipsum"]  # random words
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def start(self) -> None:
        """A rendering begins in this thread."""
        self._work.start()

    def tick(self) -> None:
        """A step: compiled templates call it. Raises SecurityError when there were too many."""
        self._work.spend(STEP)

    def checked(self, value: Any) -> Any:
        """A value that was computed. Raises SecurityError if it is too large."""
        if isinstance(value, str | bytes):
            _expect(len(value))
            self._work.spend(len(value))
        elif isinstance(value, list | tuple | dict | set):
            self._work.spend(_weight(value)[1] * NODE // 8)
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, a step each."""
        for item in items:
            self.tick()
            yield item

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of pieces."""
        text, size = [], 0
        for piece in pieces:
            text.append(piece)
            size += len(piece)
            _expect(size)
        self._work.spend(STEP + size)
        return "".join(text)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        subject, name = _method(function)
        if name == "join" and args:
            args = (_sized(args[0]), *args[1:])
        if isinstance(subject, str | bytes | int):
            _expect_growth(name, subject, [*args, *kwargs.values()], _SIZED_METHODS)
        return self.checked(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, str | bytes):
            _expect_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}.get(operator, 0)
            _expect(LARGEST + 1 if bits > LARGEST_BITS else 0)
        elif operator == "*":
            values, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(count, int):
                _expect(_weight(values)[0] * count)
        return self.checked(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        grows = isinstance(obj, str) and attr == "translate"  # by whatever its table says
        return not grows and super().is_safe_attribute(obj, attr, value)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter within the limits."""
        self.filters[name] = self._limited(name, function)

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after the context

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if len(args) > first:
                if name == "join":
                    args = (*args[:first], _sized(args[first]), *args[first + 1 :])
                _expect_growth(name, args[first], [*args[first + 1 :], *kwargs.values()], _SIZED)
            return self.checked(function(*args, **kwargs))

        return limited


class _CountingGenerator(CodeGenerator):
    """Compiles what the environment's limits need into a template."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test:  # items that it leaves out get no block of statements
            counted = nodes.EnvironmentAttribute("counted")
            node.iter = nodes.Call(counted, [node.iter], [], None, None).set_environment(self.environment)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._checked(super().visit_Concat, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._checked(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _checked(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.checked(")
        visit(node, frame)
        self.write(")")


LimitedEnvironment.code_generator_class = _CountingGenerator


def _expect(size: int) -> None:
    if size > LARGEST:
        raise SecurityError("the template computes something too large")


def _weight(value: Any) -> tuple[int, int]:
    """The size of a value with all that is in it, however often the same is in it, and how many items that are. Raises
    SecurityError if it is too large."""
    size, count, left = 0, 0, [value]
    while left:
        item = left.pop()
        count += 1
        size += NODE
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, dict):
            _expect(size + NODE * len(item))
            left.extend(item.keys())
            left.extend(item.values())
        elif isinstance(item, list | tuple | set):
            _expect(size + NODE * len(item))
            left.extend(item)
        _expect(size)
    return size, count


def _method(function: Any) -> tuple[Any, str]:
    """What a bound method belongs to, and its name; the sandbox wraps `format`."""
    bound = getattr(function, "__wrapped__", function)
    return getattr(bound, "__self__", None), str(getattr(bound, "__name__", ""))


def _expect_growth(name: str, subject: Any, rest: Sequence[Any], sized: set[str]) -> None:
    """Refuse a filter or method whose result would be too large. subject: what it is applied to; rest: its other
    arguments."""
    numbers = [number for number in rest if isinstance(number, int)]
    if name in sized and any(abs(number) > LARGEST_NUMBER for number in numbers):
        _expect(LARGEST + 1)
    if not isinstance(subject, str | bytes):
        if name == "join":
            _expect_joined(subject, rest[0] if rest else "")
        return
    longest = max([*numbers, *(len(text) for text in rest if isinstance(text, str | bytes))], default=4)
    if name == "replace" and len(rest) >= 2 and isinstance(rest[0], type(subject)):
        _expect(len(subject) + subject.count(rest[0]) * longest)  # type: ignore[arg-type]
    elif name == "join" and rest:
        _expect_joined(*((subject, rest[0]) if sized is _SIZED else (rest[0], subject)))  # a filter's, a method's
    elif name in ("indent", "expandtabs"):
        lines = sum(subject.count(end) for end in ("\n", "\t")) if isinstance(subject, str) else len(subject)
        _expect(len(subject) + lines * longest)
    elif name in ("format", "format_map"):
        _expect_format(subject, rest)


def _sized(items: Any) -> Any:
    """Items whose number is known."""
    return items if hasattr(items, "__len__") or not hasattr(items, "__iter__") else list(items)


def _expect_joined(items: Any, separator: Any) -> None:
    count = len(items) if hasattr(items, "__len__") else 0
    _expect(_weight(items)[0] + count * (len(separator) if isinstance(separator, str | bytes) else 0))


def _expect_format(form: str | bytes, values: Sequence[Any]) -> None:
    text = form if isinstance(form, str) else form.decode("latin-1")
    fields = text.count("{") + text.count("%")
    numbers = any(isinstance(value, int) and value > LARGEST_NUMBER for value in values)
    if _WIDE.search(text) or (numbers and _WIDTH_IS_AN_ARGUMENT.search(text)):
        _expect(LARGEST + 1)
    _expect(len(text) + fields * max((_weight(value)[0] for value in values), default=0))
