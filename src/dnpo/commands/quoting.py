"""Arguments that Hydra cannot read without quotes, such as paths with ``=``, and how to write them."""

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException


def explain_unreadable(error: Exception) -> str | None:
    """Name the argument that an error is about, and show it in quotes; None for any other error."""
    unclear = re.match(r"Ambiguous value for argument '(.*)'\n", str(error).strip())
    if not (unclear or isinstance(error, OverrideParseException)):
        return None
    argument = unclear.group(1) if unclear else str(getattr(error, "override", ""))
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
