"""The answer's process: find the code in a response, run it, and evaluate the requests of the tests."""

import builtins
import io
import operator
import re
import sys
import types
from contextlib import redirect_stdout
from typing import Any

from dnpo.judges.exact.apart.wire import BrokenWire, Wire, decode, encode

# A closed thought; the prompt's template may have opened it.
_THOUGHT = re.compile(r"\A\s*<(think|thinking)>.*?</\1>|\A(?:(?!<think|```).)*?</think>", re.DOTALL)
_FENCE = re.compile(
    r"(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)(?:(?:(?<=\n)|\n)[ \t]*(?P=fence)|\Z)", re.DOTALL
)
_ONE_LINE = re.compile(r"```(?:python3?|py3?)?[ \t]+([^\n`]+?)[ \t]*```", re.IGNORECASE)
_PYTHON = re.compile(r"\W*(?:python|py|ipython|sage)[\d. ]*\b", re.IGNORECASE)
# A line that begins a statement, not a sentence.
_BEGINS = re.compile(
    r"(?:def|class|import|from|async def|if|for|while|try|with)\b.*\S|@\w|[A-Za-z_][\w.\[\], ]*\s*(?::[^=]+)?=[^=]"
)


def find_code(text: str) -> list[str]:
    """The Python programs in a response, in order.

    The programs are the fenced blocks that can be parsed and are marked as Python or not marked. Without any fence, the
    program is the whole response, or its lines of code. A thought before the reply, closed by ``</think>``, is left
    out.
    """
    text = _THOUGHT.sub("", text.replace("\r\n", "\n"), count=1)
    fenced = list(_FENCE.finditer(text))
    if fenced:
        marked = [match for match in fenced if not match["info"].strip() or _PYTHON.match(match["info"])]
        blocks = [_dedent(match["body"]) for match in marked]
    else:
        blocks = _ONE_LINE.findall(text) or [_without_words("\n".join(_unfenced(text.split("\n"))))]
    blocks = [block for block in blocks if block.strip()]
    return [block for block in blocks if _error(block) is None] or blocks[-1:]


def _dedent(code: str) -> str:
    import textwrap  # imported here, because most answers do not need it and every import takes time

    return textwrap.dedent(code) if code.startswith((" ", "\t")) else code


def _unfenced(lines: list[str]) -> list[str]:
    """The lines of code in a text without fences; all lines if no code begins in any of them."""
    if _error("\n".join(lines)) is None:
        return lines
    found: list[str] = []
    start = 0
    while start < len(lines):
        end = _code_end(lines, start) if _BEGINS.match(lines[start]) else start
        found += lines[start:end]
        start = max(end, start + 1)
    return found or lines


def _without_words(code: str) -> str:
    """The code without its statements that have no effect, such as a line of one word."""
    if _error(code) is not None:
        return code
    import ast

    tree = ast.parse(code)
    does = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.Expr) or any(isinstance(each, does) for each in ast.walk(node))
    ]
    return code if len(kept) == len(tree.body) else ast.unparse(ast.Module(kept, []))


def _code_end(lines: list[str], start: int) -> int:
    """The line after the longest piece of code that begins at a line."""
    end = len(lines)
    while end > start:
        error = _error("\n".join(lines[start:end]))
        if error is None:
            return end
        end = start + max(0, min(error - 1, end - start - 1))
    return start


def _error(code: str) -> int | None:
    """The line of the first error of a program, from 1; None if it can be parsed."""
    try:
        compile(code, "response", "exec")
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None


def load(text: str) -> dict[str, Any]:
    """Run a response's programs one after another, and return the names that they define.

    If there are several, programs that fail are skipped: they may show how to use the code, or its output.

    Raises:
        BaseException: all programs fail; this is the exception of the first one.
        ValueError: there is no program.
    """
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    module = types.ModuleType("response")
    sys.modules["response"] = module
    space: dict[str, Any] = vars(module)
    errors: list[BaseException] = []
    programs = find_code(text)
    if not programs:
        raise ValueError("no code in the response")
    for program in programs:
        try:
            exec(compile(program, "response", "exec"), space)
        except BaseException as error:
            errors.append(error)
    if len(errors) == len(programs):
        raise errors[0]
    return space


class Callback:
    """A function of the tests, in the answer's process; calling it runs it in the tests' process."""

    def __init__(self, server: "Doorkeeper", number: int) -> None:
        self._server, self._number = server, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it with plain values or references."""
        return self._server.call_back(self._number, args, kwargs)


class Doorkeeper:
    """Evaluates the requests of the tests, until the tests end."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._space: dict[str, Any] = {}
        self._objects: list[Any] = []  # the objects sent as references, by number
        self._numbers: dict[int, int] = {}  # their numbers, by id()
        self._callbacks: dict[int, Callback] = {}

    def serve(self) -> None:
        """Reply to every question."""
        while True:
            self._reply(self._wire.receive())

    def call_back(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask the tests to call one of their functions, and answer their questions meanwhile."""
        self._wire.send(["ask", number, self._encode(list(args)), self._encode(kwargs)])
        while True:
            message = self._wire.receive()
            if message[0] == "done":
                return self._decode(message[1])
            if message[0] == "failed":
                raise getattr(builtins, message[1], RuntimeError)(message[2])
            self._reply(message)

    def _reply(self, question: list[Any]) -> None:
        printed = io.StringIO()
        changes: dict[str, Any] = {}
        try:
            with redirect_stdout(printed):
                value, changes = self._do(*question)
            reply = ["value", self._encode(value), changes]
        except BrokenWire:
            raise
        except BaseException as error:
            reply = ["error", *self._describe(error)]
        self._wire.send([*reply, printed.getvalue()[:1_000_000]])

    def _do(self, verb: str, *inner: Any) -> tuple[Any, dict[str, Any]]:
        if verb == "load":
            self._space = load(inner[0])
            return None, {}
        if verb == "name":
            return self._name(inner[0]), {}
        args, kwargs = self._decode(inner[0]), self._decode(inner[1])
        value = _function(verb)(*args, **kwargs)
        return value, self._changes(inner, args, kwargs) if verb == "call" and value is None else {}

    def _name(self, name: str) -> Any:
        """["value", …], ["exception", names of classes] or ["none"]."""
        if name not in self._space or isinstance(self._space[name], types.ModuleType):
            return ["none", name in self._space]
        value = self._space[name]
        if isinstance(value, type) and issubclass(value, Exception):
            return ["exception", _ancestors(value)]
        return ["value", value]

    def _changes(self, inner: tuple[Any, ...], args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that a call has changed, with their new values."""
        before = {str(place): each for place, each in enumerate(inner[0])} | dict(inner[1].get("builtins.dict", []))
        after = {str(place): each for place, each in enumerate(args)} | kwargs
        kinds = (list, dict, set, bytearray)
        now = {name: self._encode(value) for name, value in after.items() if isinstance(value, kinds)}
        return {name: value for name, value in now.items() if value != before[name]}

    def _describe(self, error: BaseException) -> list[Any]:
        """The names of an exception's classes, up to the first built-in one, and its arguments or its text."""
        try:
            args = self._encode(list(error.args), plain=True)
        except BaseException:
            args = [str(error)[:1000]]
        return [_ancestors(type(error)), args]

    def _encode(self, value: Any, plain: bool = False) -> Any:
        return encode(value, _refuse if plain else self._refer)

    def _decode(self, written: Any) -> Any:
        return decode(written, self._resolve)

    def _refer(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Callback):
            return {"callback": value._number}
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return {"object": [self._numbers[id(value)], type(value).__name__]}

    def _resolve(self, kind: str, inner: Any) -> Any:
        if kind == "object":
            return self._objects[inner]
        if kind == "builtin":
            return getattr(builtins, inner)
        if kind == "iterator":
            return iter(self._decode(inner))
        return self._callbacks.setdefault(inner, Callback(self, inner))


def _refuse(value: Any) -> dict[str, Any]:
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def _function(verb: str) -> Any:
    """The function for a verb, from :mod:`operator` or Python's built-in ones."""
    own = {"call": lambda function, *args, **kwargs: function(*args, **kwargs), "get": getattr, "set": setattr}
    return own.get(verb) or getattr(operator, verb, None) or getattr(builtins, verb)


def _ancestors(kind: type) -> list[str]:
    """The names of an exception's class and its base classes, up to the first built-in one."""
    names = []
    for each in kind.__mro__:
        names.append(each.__name__)
        if each.__module__ == "builtins":
            break
    return names
