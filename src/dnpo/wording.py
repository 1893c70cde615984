"""Words that depend on a number."""

LONG = 8  # maximum number of characters of a number that is shown unchanged


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 run`` or ``2,400 runs``; the plural adds an s."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


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
