"""Write plain values as JSON, and connect an answer with its tests.

Any other value is sent as a reference: a mapping that only the sender can resolve. Received messages are never executed
or unpickled.
"""

import json
import os
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable
from importlib import import_module
from typing import Any

LIMIT = 16 << 20  # bytes of one message
REFERENCES = ("object", "callback", "builtin", "iterator")
if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits(0)  # a right answer may have any number of digits; the time is limited elsewhere


def _items(mapping: dict[Any, Any]) -> list[list[Any]]:
    return [list(item) for item in mapping.items()]


def _isoformat(value: Any) -> Any:
    return value.isoformat()


# How each type is written and read; inner values are written by the same rules. Types are given by name, so that a
# module is imported only if a value needs it.
_WRITE: dict[str, Callable[[Any], Any]] = {
    "builtins.tuple": list,
    "builtins.set": list,
    "builtins.frozenset": list,
    "builtins.dict": _items,
    "builtins.bytes": bytes.hex,
    "builtins.bytearray": bytearray.hex,
    "builtins.complex": lambda value: [value.real, value.imag],
    "builtins.range": lambda value: [value.start, value.stop, value.step],
    "builtins.slice": lambda value: [value.start, value.stop, value.step],
    "builtins.ellipsis": lambda value: None,
    "collections.deque": list,
    "collections.defaultdict": _items,
    "collections.OrderedDict": _items,
    "collections.Counter": _items,
    "decimal.Decimal": str,
    "fractions.Fraction": str,
    "datetime.date": _isoformat,
    "datetime.datetime": _isoformat,
    "datetime.time": _isoformat,
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
}
_READ: dict[str, Callable[[Any], Any]] = {
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.dict": dict,
    "builtins.bytes": bytes.fromhex,
    "builtins.bytearray": bytearray.fromhex,
    "builtins.complex": lambda parts: complex(*parts),
    "builtins.range": lambda parts: range(*parts),
    "builtins.slice": lambda parts: slice(*parts),
    "builtins.ellipsis": lambda nothing: ...,
    "collections.deque": deque,
    "collections.defaultdict": dict,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": lambda items: Counter(dict(items)),
    "decimal.Decimal": lambda text: import_module("decimal").Decimal(text),
    "fractions.Fraction": lambda text: import_module("fractions").Fraction(text),
    "datetime.date": lambda text: import_module("datetime").date.fromisoformat(text),
    "datetime.datetime": lambda text: import_module("datetime").datetime.fromisoformat(text),
    "datetime.time": lambda text: import_module("datetime").time.fromisoformat(text),
    "datetime.timedelta": lambda parts: import_module("datetime").timedelta(*parts),
    "namedtuple": lambda parts: namedtuple(parts[0], parts[1])(*parts[2]),
}


class BrokenWire(Exception):
    """The other side ended or sent no message; the text is a predicate of "the answer's process"."""


def encode(value: Any, refer: Callable[[Any], dict[str, Any]]) -> Any:
    """Convert a value to values that JSON can represent.

    Args:
        refer: called with a value that is not plain; returns a mapping from one of ``REFERENCES``.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(each, refer) for each in value]
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in _WRITE:
        written = _WRITE[name](value)
        return {name: encode(written, refer) if type(written) is list else written}
    if issubclass(kind, tuple) and kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
        return {"namedtuple": [kind.__name__, list(kind._fields), [encode(each, refer) for each in value]]}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item(), refer)
    return refer(value)


def decode(written: Any, resolve: Callable[[str, Any], Any]) -> Any:
    """Convert the result of :func:`encode` back to a value.

    Args:
        resolve: called with the kind of a reference and its content.

    Raises:
        BrokenWire: ``encode`` does not write such a value.
    """
    if isinstance(written, list):
        return [decode(each, resolve) for each in written]
    if not isinstance(written, dict):
        return written
    if len(written) != 1:
        raise BrokenWire("sent a value that cannot be read")
    ((name, inner),) = written.items()
    if name in REFERENCES:
        return resolve(name, inner)
    try:
        return _READ[name](decode(inner, resolve))
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise BrokenWire(f"sent a {name} that cannot be read") from error


class Wire:
    """One end of the connection, which sends a line of JSON for each message."""

    def __init__(self, reads: int, writes: int) -> None:
        self._in, self._out = os.fdopen(reads, "rb"), os.fdopen(writes, "wb")

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            BrokenWire: the other side has ended.
        """
        try:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()
        except OSError as error:
            raise BrokenWire("ended") from error

    def receive(self) -> list[Any]:
        """Wait for a message.

        Raises:
            BrokenWire: the other side has ended, or the message is longer than ``LIMIT`` or not a list.
        """
        try:
            line = self._in.readline(LIMIT + 1)
        except OSError:
            line = b""
        if not line:
            raise BrokenWire("ended")
        if not line.endswith(b"\n"):
            raise BrokenWire(f"sent more than {LIMIT >> 20} MB at once")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BrokenWire("sent something that is not a message") from error
        if not isinstance(message, list) or not message:
            raise BrokenWire("sent something that is not a message")
        return message
