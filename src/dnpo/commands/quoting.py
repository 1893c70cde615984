"""Arguments that Hydra cannot read without quotes, such as paths with ``=``, and how to write them."""

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException


def explain_unreadable(error: Exception, arguments: Sequence[str]) -> str | None:
    """Name the argument that an error is about, and show it in quotes; None for any other error.

    Args:
        arguments: all arguments, in case the shell has split one at its spaces.
    """
    unclear = re.match(r"Ambiguous value for argument '(.*)'\n", str(error).strip())
    if not (unclear or isinstance(error, OverrideParseException)):
        return None
    argument = unclear.group(1) if unclear else str(getattr(error, "override", ""))
    whole = _join_split(argument, arguments)
    if whole is not None:
        return f"{argument}: the shell has split this value at its spaces; quote it: {shlex.quote(whole)}"
    advice = quote(argument)
    if advice is None:
        return f"{argument}: cannot be read; expected setting=value ({str(error).strip().splitlines()[0]})"
    several = "; a list is written as [A,B]; several runs are a sweep: dnpo sweep" if unclear else ""
    return f"{argument}: the value has a character that means something to Hydra; quote it: {advice}{several}"


def quote(argument: str) -> str | None:
    """Quote ``setting=value`` for a shell, so that Hydra reads the value as text; None if no quotes can do that."""
    setting, equals, value = argument.partition("=")
    quoted = '{}="{}"'.format(setting, value.replace('"', '\\"'))
    try:
        read = OverridesParser.create().parse_override(quoted).value()
    except HydraException:
        return None
    return shlex.quote(quoted) if setting and equals and str(read) == value else None


def _join_split(argument: str, arguments: Sequence[str]) -> str | None:
    """The mapping or list that an argument begins and the following ones go on with; None if it is not such a part."""
    if argument not in arguments or argument.partition("=")[2][:1] not in ("{", "["):
        return None
    first = arguments.index(argument)
    for last in range(first + 2, len(arguments) + 1):
        whole = " ".join(arguments[first:last])
        try:
            OverridesParser.create().parse_override(whole)
        except HydraException:
            continue
        return whole
    return None
