"""The tests' process: run the tests, in which the answer's names are references to objects in the answer's process.

``form`` describes what tests can do. Messages of an answer are read only as plain values, and values are compared here.
"""

import builtins
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

from dnpo.judges.exact.apart.wire import BrokenWire, Wire, decode, encode

_OPERATORS = [
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("lshift", "rshift", "and", "or", "xor"),
]
_UNARY = ["neg", "pos", "abs", "invert", "index"]
_FUNCTIONS = ["len", "str", "repr", "bool", "int", "float", "iter", "next", "reversed", "round"]
_ITEMS = ["getitem", "setitem", "delitem"]
_COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge", "contains"]
_ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed)


OWN_OBJECTS = (
    "the tests compare ({}) a {} of the answer with a {} of it, so that the answer would decide; compare their "
    "attributes, or str() or repr() of them"
)


class NotPlain(BaseException):
    """Raised if tests compare or pass anything but plain values; ``except Exception`` does not catch it."""


class AnswerEnded(BaseException):
    """Raised if the answer's process has ended or sends an invalid message."""


class Remote:
    """A reference to an object in the answer's process, such as a function, a class or an instance."""

    def __init__(self, client: "Client", number: int, kind: str) -> None:
        vars(self).update(_client=client, _number=number, _kind=kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object there."""
        return self._client.do("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Ask for an attribute."""
        return self._client.do("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute."""
        self._client.do("set", self, name, value)

    def __instancecheck__(self, value: Any) -> bool:
        """Whether an object is an instance of the answer's class; plain values are not."""
        return isinstance(value, Remote) and bool(self._client.do("isinstance", value, self))

    def __enter__(self) -> Any:
        """Enter the context there."""
        return self._client.do("call", self.__getattr__("__enter__"))

    def __exit__(self, *error: object) -> None:
        """Leave the context there, without the error, so that the answer cannot suppress it."""
        self._client.do("call", self.__getattr__("__exit__"), None, None, None)

    def __hash__(self) -> int:
        """Hash by identity, since each object there has one reference here."""
        return id(self)


def _forward(verb: str) -> Callable[..., Any]:
    return lambda self, *args: self._client.do(verb, self, *args)


def _forward_pair(verb: str) -> Callable[..., Any]:
    def compute(self: Remote, other: object) -> Any:
        if not isinstance(other, Remote):  # "f(1) - 3" would show the answer what is expected, and let it decide
            raise NotPlain(f"the tests compute ({verb}) with a {self._kind} of the answer and a plain value of theirs")
        return self._client.do(verb, self, other)

    return compute


def _refuse(name: str) -> Callable[..., Any]:
    def compare(self: Remote, other: object) -> bool:
        if self is other and name in ("eq", "ne"):
            return name == "eq"
        if isinstance(other, Remote):
            raise NotPlain(OWN_OBJECTS.format(name, self._kind, other._kind))
        raise NotPlain(f"the tests compare ({name}) a {self._kind} of the answer, but only plain values are compared")

    return compare


for _name in _OPERATORS:
    _verb = f"{_name}_" if _name in ("and", "or") else _name
    setattr(Remote, f"__{_name}__", _forward_pair(_verb))
    setattr(Remote, f"__r{_name}__", _forward_pair(_verb))
for _name in _UNARY + _FUNCTIONS + _ITEMS:
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in _COMPARISONS:
    setattr(Remote, f"__{_name}__", _refuse(_name))


class Client:
    """Asks the answer's process, and reads its replies as values."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._remotes: dict[int, Remote] = {}
        self._callbacks: list[Any] = []
        self._errors: dict[str, type[Exception]] = {}

    def load(self, text: str) -> None:
        """Run the response there.

        Raises:
            Exception: the response raises it there.
        """
        self._ask(["load", text], {}, "load")

    def names(self, names: list[str]) -> dict[str, Any]:
        """The values of the names that tests need from the answer, as far as the answer has them."""
        found: dict[str, Any] = {}
        for name in names:
            try:
                found[name] = self.name(name)
            except LookupError:
                if hasattr(builtins, name):
                    raise NameError(f"name {name!r} is not defined") from None
        return found

    def name(self, name: str) -> Any:
        """The value of a name of the answer.

        Raises:
            LookupError: it has none.
        """
        kind, value = self._ask(["name", name], {}, "name")
        if kind == "value":
            return value
        if kind == "exception":
            return self._error(value)
        if value:
            raise NotPlain(f"{name} is a module in the answer; the tests have to import it")
        raise LookupError(name)

    def do(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a verb there, and return its value."""
        written = [encode(list(args), self._refer), encode(kwargs, self._refer)]
        given = {**{str(place): each for place, each in enumerate(args)}, **kwargs}
        return self._ask([verb, *written], given, verb)

    def _ask(self, question: list[Any], given: dict[str, Any], verb: str) -> Any:
        try:
            self._wire.send(question)
            reply = self._wire.receive()
            while reply[0] == "ask":
                self._call(*reply[1:])
                reply = self._wire.receive()
            return self._read(reply, given, verb)
        except BrokenWire as error:
            raise AnswerEnded(str(error)) from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise AnswerEnded("sent something that is not a message") from error
        except _Raised as raised:
            raise raised.error from None

    def _read(self, reply: list[Any], given: dict[str, Any], verb: str) -> Any:
        """The value of a reply; output that was printed there is printed here, and arguments are changed as there."""
        kind, value, more, printed = reply
        if not isinstance(printed, str):
            raise BrokenWire("sent something that is not a message")
        sys.stdout.write(printed)
        if kind == "error":
            raise _Raised(self._exception(value, decode(more, _no_reference), verb))
        for key, written in more.items() if value is None and verb == "call" else ():
            _take_over(given[key], decode(written, self._resolve))
        return decode(value, self._resolve)

    def _call(self, number: int, args: Any, kwargs: Any) -> None:
        """Call a function of the tests for the answer. A failed assertion in it fails the tests."""
        given = decode(args, self._resolve), decode(kwargs, self._resolve)
        function = self._callbacks[number]
        try:
            done = encode(function(*given[0], **given[1]), self._refer)
        except AssertionError as error:
            raise _Raised(error) from None
        except Exception as error:
            self._wire.send(["failed", type(error).__name__, str(error)[:1000]])
        else:
            self._wire.send(["done", done])

    def _exception(self, names: list[str], args: list[Any], verb: str) -> Exception:
        """An exception of the answer, from the names of its classes."""
        kind = self._error(names)
        ends_loops = issubclass(kind, StopIteration | StopAsyncIteration)
        if ends_loops and verb != "next":
            return RuntimeError(f"the answer raised {names[0]}")
        try:
            return kind(*args)
        except Exception:
            return RuntimeError(f"the answer raised {names[0]}: {args}"[:200])

    def _error(self, names: list[str]) -> type[Exception]:
        """The class of an exception; for a class that the answer defines, a class of the same name is made."""
        *own, last = names
        kind = getattr(builtins, last, RuntimeError)
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            kind = type(f"the answer raised {last}", (RuntimeError,), {})
        for name in reversed(own):
            kind = self._errors.setdefault(name, type(name, (kind,), {}))
        return kind

    def _refer(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"object": value._number}
        if isinstance(value, _ITERATORS):
            return {"iterator": encode(list(value), self._refer)}
        if callable(value):
            name = getattr(value, "__name__", "")
            if getattr(builtins, str(name), None) is value:
                return {"builtin": name}
            self._callbacks.append(value)
            return {"callback": len(self._callbacks) - 1}
        raise NotPlain(
            f"the tests pass a {type(value).__name__} to the answer, but only plain values and functions pass"
        )

    def _resolve(self, kind: str, inner: Any) -> Any:
        if kind == "callback":
            return self._callbacks[inner]
        if kind != "object":
            raise BrokenWire(f"sent a {kind}")
        number, name = inner
        if type(number) is not int or type(name) is not str:
            raise BrokenWire("sent an object that cannot be read")
        return self._remotes.setdefault(number, Remote(self, number, name))


class _Raised(Exception):
    """Carries an exception that the answer raised, to distinguish it from an error in reading the reply."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _no_reference(kind: str, inner: Any) -> Any:
    raise BrokenWire(f"sent a {kind}")


def _take_over(old: Any, new: Any) -> None:
    """Change a list, set or mapping as the answer changed its copy."""
    if type(old) is not type(new):
        raise BrokenWire("sent another type of argument than it was given")
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


def answer_module(name: str, client: Client) -> types.ModuleType:
    """A module whose names refer to objects in the answer's process."""
    module = types.ModuleType(name)

    def find(wanted: str) -> Any:
        try:
            if not wanted.startswith("__"):
                return client.name(wanted)
        except LookupError:
            pass
        raise AttributeError(f"module {name!r} has no attribute {wanted!r}")

    vars(module)["__getattr__"] = find
    return module


def run(tests: str, names: list[str], modules: list[str], answers: list[str], client: Client) -> None:
    """Run tests to their end.

    Args:
        names: names that the tests need from the answer.
        modules: modules that they use without an import.
        answers: the names by which they import the answer as a module.

    Raises:
        BaseException: a test raised it and has failed.
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.modules.update({name: answer_module(name, client) for name in answers})
    space: dict[str, Any] = vars(module)
    space.update({name: importlib.import_module(name) for name in modules}, **client.names(names))
    try:
        exec(compile(tests, "tests", "exec"), space)
    except SystemExit as end:  # unittest.main() raises it; an answer's SystemExit never arrives here
        if end.code:
            raise AssertionError(f"the tests end with status {end.code}") from None
        return
    for name, value in list(space.items()):
        if isinstance(value, types.FunctionType) and name.startswith("test") and not value.__code__.co_argcount:
            value()
        elif isinstance(value, type) and "unittest" in sys.modules:
            _run_test_case(value)


def _run_test_case(kind: type) -> None:
    import unittest

    if issubclass(kind, unittest.TestCase):
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
        for _, trace in [*result.failures, *result.errors]:
            raise AssertionError(trace.strip().splitlines()[-1])
