"""Render the page as HTML; all content of runs is escaped to text."""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dnpo import palette
from dnpo.catalogue import Metric
from dnpo.escape import for_terminal
from dnpo.wording import duration, interval

SECRET = re.compile(r"(\w+://)[^/@\s]*@")
WITHIN = re.compile(r"(?<=[\d,]) (?=[%±])|(?<=±) (?=\d)")  # spaces within a quantity


def make_visible(value: Any) -> Any:
    """Replace invisible and control characters in a text; the template passes every value through this function."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return for_terminal(value)
    return value


def strip_secrets(text: str) -> str:
    """Mask the user name and password in addresses."""
    return SECRET.sub(r"\1…@", text)


def tied(text: str) -> str:
    """Keep a number on one line with its % and its ±, as in ``95 %`` and ``19.8 ± 4.0``."""
    return WITHIN.sub("\N{NO-BREAK SPACE}", text)


def number(value: Any, form: str = ".3g", scale: float = 1.0) -> str:
    """Format a number for a table; – if there is none."""
    if value is None or isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return format(scale * value, form).replace("-", "−")


def effect(claim: Mapping[str, Any]) -> str:
    """Format the effect of a claim with its interval, as the claims' own tables do; – if it was not measured."""
    effect, low, high = (_number(claim[name]) for name in ("effect", "low", "high"))
    if effect is None:
        return "–"
    digits = claim["digits"] if isinstance(claim["digits"], int) else 0  # the file may be of another program
    return interval(effect, low, high, digits, signed=bool(claim["b"]))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def format_value(value: Any, metric: Metric, signed: bool = False) -> str:
    """Format a value of a metric for a table; – if there is none."""
    return "–" if _number(value) is None else metric.format(value, signed)


def day(milliseconds: float) -> str:
    """Format milliseconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")


def html(content: Mapping[str, Any]) -> str:
    """Render the whole page.

    Args:
        content: the result of :func:`dnpo.report.content.content`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=make_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "effect": effect, "duration": duration, "day": day, "tied": tied}
    return environment.get_template("page.html.j2").render(content, colours=Markup(palette.write_css()))
