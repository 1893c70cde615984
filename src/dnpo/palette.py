"""Every colour of figures and pages, each with one meaning, and how each method looks.

Methods have Okabe and Ito's colours, which colour-blind readers can tell apart, and nothing else has them. Whatever is
told apart within one picture stays apart for colour-blind readers too; where it is a line it also has a mark.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a line of a figure looks.

    Attributes:
        mark: of matplotlib.
    """

    colour: str
    mark: str

    @property
    def letter(self) -> str:
        """The mark as a letter, for pages."""
        return LETTERS[self.mark]


@dataclass(frozen=True)
class Method(Look):
    """A method as it looks in every figure."""

    name: str


LETTERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}

SPIN = Method("#0072B2", "o", "SPIN")
DSL = Method("#009E73", "s", "+DSL")
NPO = Method("#E69F00", "^", "+NPO")
DNPO = Method("#D55E00", "D", "DNPO")
FIXED = Method("#CC79A7", "v", "fixed noise")
CONSTANT = Method("#000000", "X", "constant")
DSL_FIXED = Method("#56B4E9", "P", "+DSL, fixed noise")
DSL_CONSTANT = Method("#777777", "*", "+DSL, constant")
# By the options of dsl and npo, in the order in which methods are listed.
METHODS: Mapping[tuple[str, str], Method] = {
    ("off", "off"): SPIN,
    ("score", "off"): DSL,
    ("off", "trainable"): NPO,
    ("score", "trainable"): DNPO,
    ("off", "fixed"): FIXED,
    ("score", "fixed"): DSL_FIXED,
    ("off", "matched"): CONSTANT,
    ("score", "matched"): DSL_CONSTANT,
    ("off", "offset"): CONSTANT,
    ("score", "offset"): DSL_CONSTANT,
}

# Colours for groups of runs of the same method, in order.
SERIES = (
    Look("#332288", "o"),
    Look("#CC6677", "s"),
    Look("#117733", "^"),
    Look("#88CCEE", "D"),
    Look("#882255", "v"),
    Look("#DDCC77", "X"),
    Look("#AA4499", "P"),
    Look("#999933", "*"),
)
OTHER = Look("#8A8A8A", "P")  # whatever METHODS and SERIES do not have

# Responses of a pair, and those that the trained policy generates to the same prompt.
SAMPLES = {"chosen": "#1B2A6B", "rejected": "#B5485D", "new": "#44AA99"}
OUTCOMES = {"win": "#01665E", "tie": "#C8C8C8", "lose": "#8C510A"}
JUDGE, PEOPLE, ROUND_SCORES = "#6A4FB3", "#7A8B00", "#F2D55C"  # of a judge's agreement with people

HUMAN = "#555555"  # human responses, as a line across
NOISE = "#00505C"  # the noise as a player; the policy has its method's colour
CHANCE = "#9A9A9A"  # what chance gives
INK = "#1A1A1A"  # intervals, words and the paper's numbers over coloured bars
BREAK = "#B0B0B0"  # where an iteration, an epoch or a group of bars begins
EDGE, GRID = "#707070", "#E5E5E5"  # of the axes
FOOT = "#444444"  # the line below a figure

# Pages. Pictures are drawn on white paper, and so they look on a dark page too.
PAPER, ON_PAPER = "#FFFFFF", "#5B6470"
LIGHT = {
    "page": "#FBFBFA",
    "ink": "#1C1F23",
    "line": "#DCDFE3",
    "tint": "#F1F3F5",
    "accent": "#005B8F",
    "good": "#00694C",
    "good-tint": "#E2F3EC",
    "bad": "#A33F00",
    "bad-tint": "#FBEADF",
    "open-tint": "#ECEEF1",
}
DARK = {
    "page": "#15181C",
    "card": "#1D2126",
    "ink": "#E6E8EA",
    "soft": "#A3ACB6",
    "line": "#363C44",
    "tint": "#262B31",
    "accent": "#74BDEC",
    "good": "#5FD3A6",
    "good-tint": "#17372C",
    "bad": "#F3A070",
    "bad-tint": "#42281A",
    "open-tint": "#30363D",
}


def choose_looks(options: Mapping[str, tuple[str, str]]) -> dict[str, Look]:
    """A look a group: its method's where methods tell the groups apart, else one after the other.

    Args:
        options: by label, those of dsl and npo.
    """
    methods = {label: METHODS.get(of) for label, of in options.items()}
    known = {label: method for label, method in methods.items() if method is not None}
    if len(known) == len(options) and len(set(known.values())) == len(options):
        return dict(known)
    return {label: SERIES[place] if place < len(SERIES) else OTHER for place, label in enumerate(options)}


def write_css() -> str:
    """The colours of pages as custom properties, ``--ink`` and so on, for light pages and for dark ones."""
    light = {"paper": PAPER, "on-paper": ON_PAPER, "card": "var(--paper)", "soft": "var(--on-paper)", **LIGHT}
    light |= {name: SAMPLES[name] for name in ("chosen", "rejected")}
    dark = f"@media (prefers-color-scheme: dark) {{\n{_write_properties(DARK)}\n}}"
    return f"{_write_properties(light)}\n{dark}"


def _write_properties(colours: Mapping[str, str]) -> str:
    return f":root {{ {' '.join(f'--{name}: {colour};' for name, colour in colours.items())} }}"
