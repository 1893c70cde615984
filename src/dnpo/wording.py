"""Words of messages that depend on a number."""


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 run`` or ``2,400 runs``; the plural adds an s."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
