"""Numbers, and words that depend on a number, as readers see them."""

import math
from collections.abc import Iterable, Sequence

LONG = 8  # maximum number of characters of a number that is shown unchanged


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 run`` or ``2,400 runs``; the plural adds an s."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def sentence(text: str) -> str:
    """Return words as a sentence: with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def fixed(value: float, digits: int, signed: bool = False) -> str:
    """Format a number with ``digits`` decimals and, if asked for, its sign; one that is shown as zero has no sign."""
    text = format(value, f"z,.{digits}f")  # z: no −0
    return ("+" if signed and value > 0 and text.strip("0.") else "") + text.replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    """Format a share in percent, such as ``12.5 %``."""
    return f"{fixed(100 * share, digits)} %"


def decimals(size: float, least: int = 0) -> int:
    """How many decimals show two digits of a size if they are under 36, otherwise one; at least ``least``.

    The rule of the Particle Data Group for errors (Review of Particle Physics, Introduction, section 5.3).
    """
    if not (size > 0 and math.isfinite(size)):
        return least
    power = math.floor(math.log10(size))
    return max(least, (1 if size < 3.55 * 10**power else 0) - power)


def interval(value: float, low: float | None, high: float | None, least: int = 0, signed: bool = False) -> str:
    """Format a value with the ends of its interval, if it has one, such as ``+4.1 (+3.1 to +5.1)``.

    There are as many decimals as half the width needs (:func:`decimals`), and up to two more if an end that is not 0
    would be shown as 0 otherwise.

    Args:
        least: the least number of decimals.
        signed: whether they are differences, which have a sign.
    """
    if low is None or high is None:
        return fixed(value, least, signed)
    digits = visible((low, high), decimals((high - low) / 2, least))
    return f"{fixed(value, digits, signed)} ({fixed(low, digits, signed)} to {fixed(high, digits, signed)})"


def visible(values: Iterable[float], least: int) -> int:
    """How many decimals, ``least`` or up to two more, show no number as 0 but 0 itself; ``least`` if none do."""
    some = tuple(values)
    enough = (n for n in range(least, least + 3) if not any(_vanishes(value, n) for value in some))
    return next(enough, least)


def _vanishes(value: float, digits: int) -> bool:
    """Whether a number that is not 0 is shown as 0."""
    return value != 0 and not fixed(abs(value), digits).strip("0.")


def short_number(text: str) -> str:
    """Round a number of many digits, such as one that a search has drawn, to four; leave other texts unchanged."""
    if len(text) <= LONG:
        return text
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def per_second(rate: float, unit: str = "") -> str:
    """Format a rate, such as ``1,204/s``, ``12 steps/s``, ``0.4/s``: a slow one keeps two digits, so it is not 0."""
    return (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}") + (f" {unit}/s" if unit else "/s")


def duration(seconds: float | None) -> str:
    """Format a duration, such as ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def estimate(seconds: float) -> str:
    """Format a duration that is only estimated: without decimals, and at least a second."""
    return f"{max(1, round(seconds))} s" if seconds < 10 else duration(seconds)


def ranges(places: Sequence[int]) -> str:
    """Format numbers with ranges: 1, 2, 3, 5 as ``1-3, 5``."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
