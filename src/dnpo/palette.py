"""The colours of figures and pages, each with one meaning, and the look of each method.

Methods have Okabe and Ito's colours, which colour-blind readers can distinguish, and nothing else has these. The other
colours within one figure are distinguishable for them too, and lines also have different markers.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """The look of a line in figures.

    Attributes:
        mark: matplotlib's marker.
    """

    colour: str
    mark: str

    @property
    def letter(self) -> str:
        """A character like the marker, for pages."""
        return LETTERS[self.mark]


@dataclass(frozen=True)
class Method(Look):
    """A method's name, and its look in all figures."""

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
# Methods by their options of dsl and npo, in the order in which they are listed.
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
OTHER = Look("#8A8A8A", "P")  # for groups without a look in METHODS or SERIES

# Looks for comparisons of all methods, by the name of their option. There are too many for different colours: the
# methods of a family share one, and their markers differ.
FAMILIES = {"human": "#5E4FA2", "given": "#8C2D04", "own": "#C51B7D", "many": "#66A61E", "live": "#1F9EBA"}
RIVALS: Mapping[str, Look] = {
    "spin": SPIN,
    "dsl": DSL,
    "npo": NPO,
    "dnpo": DNPO,
    "fixed_noise": FIXED,
    **{
        name: Look(FAMILIES["human"], mark)
        for name, mark in zip(("spin_paper", "spin_official", "alpha_spin", "scip"), "osDv", strict=True)
    },
    **{name: Look(FAMILIES["given"], mark) for name, mark in zip(("dpo", "ipo", "orpo", "simpo"), "os^D", strict=True)},
    **{
        name: Look(FAMILIES["own"], mark) for name, mark in zip(("spa", "robust", "self_rewarding"), "s^D", strict=True)
    },
    **{name: Look(FAMILIES["many"], mark) for name, mark in zip(("hg_dpo", "rest_em", "raft"), "o^v", strict=True)},
    **{
        name: Look(FAMILIES["live"], mark)
        for name, mark in zip(("online_dpo", "osp", "sapo", "ppo", "reinforce"), "os^Dv", strict=True)
    },
}

# Responses of a pair, and those that the trained policy generates to the same prompt.
SAMPLES = {"chosen": "#1B2A6B", "rejected": "#B5485D", "new": "#44AA99"}
OUTCOMES = {"win": "#01665E", "tie": "#C8C8C8", "lose": "#8C510A"}
JUDGE, PEOPLE, ROUND_SCORES = "#6A4FB3", "#7A8B00", "#F2D55C"  # of a judge's agreement with people

HUMAN = "#555555"  # human responses, a horizontal line
NOISE = "#00505C"  # the noise as a player; the policy has its method's colour
START = "#7F6A55"  # the policy that all methods begin with, a horizontal line
CHANCE = "#9A9A9A"  # the level of chance
INK = "#1A1A1A"  # intervals, words and the paper's numbers over coloured bars
BREAK = "#B0B0B0"  # where an iteration, an epoch or a group of bars begins
EDGE, GRID = "#707070", "#E5E5E5"  # of the axes
FOOT = "#444444"  # the line below a figure

# Pages. Pictures keep their white background on dark pages.
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
    "chosen-line": "color-mix(in oklab, var(--chosen) 50%, var(--ink))",  # dark blue is hard to see on dark paper
}


def choose_looks(options: Mapping[str, tuple[str, str]]) -> dict[str, Look]:
    """Choose a look for each group: its method's if all methods differ, else the next one of ``SERIES``.

    Args:
        options: the options of dsl and npo, by label.
    """
    methods = {label: METHODS.get(of) for label, of in options.items()}
    known = {label: method for label, method in methods.items() if method is not None}
    if len(known) == len(options) and len(set(known.values())) == len(options):
        return dict(known)
    return {label: SERIES[place] if place < len(SERIES) else OTHER for place, label in enumerate(options)}


def write_css() -> str:
    """Write the colours of pages as CSS custom properties such as ``--ink``, for light and for dark pages."""
    light = {"paper": PAPER, "on-paper": ON_PAPER, "card": "var(--paper)", "soft": "var(--on-paper)", **LIGHT}
    light |= {name: SAMPLES[name] for name in ("chosen", "rejected")} | {"chosen-line": "var(--chosen)"}
    dark = f"@media screen and (prefers-color-scheme: dark) {{\n{_write_properties(DARK)}\n}}"
    return f"{_write_properties(light)}\n{dark}"


def _write_properties(colours: Mapping[str, str]) -> str:
    return f":root {{ {' '.join(f'--{name}: {colour};' for name, colour in colours.items())} }}"
