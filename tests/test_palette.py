"""Colours: one meaning each, and no colour outside the palette."""

import ast
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.colors import get_named_colors_mapping, to_rgb

from dnpo import palette
from dnpo.palette import METHODS, SERIES, Look, choose_looks

ROOT = Path(palette.__file__).parents[2]
HEX = re.compile(r"#(?:[0-9a-f]{3,4}|[0-9a-f]{6}|[0-9a-f]{8})\b|\brgba?\(|\bhsla?\(", re.I)
NAMES = {name for name in get_named_colors_mapping() if len(name) > 1} | {f"C{i}" for i in range(10)}
SOURCES = sorted(
    path
    for folder in ("src/dnpo", "analysis")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".css", ".j2", ".html", ".svg") and path != Path(palette.__file__)
)


def meanings() -> dict[str, str]:
    """Every colour of the palette, by its meaning."""
    found = {f"{name} as a method": method.colour for name, method in methods().items()}
    found |= {f"group {place}": look.colour for place, look in enumerate(SERIES)}
    for name, value in vars(palette).items():
        if isinstance(value, str) and value.startswith("#"):
            found[name] = value
        elif isinstance(value, Look) and value not in METHODS.values():
            found[name] = value.colour
        elif isinstance(value, dict) and name.isupper() and all(isinstance(each, str) for each in value.values()):
            found |= {f"{name} {key}": each for key, each in value.items() if each.startswith("#")}
    return found


def methods() -> dict[str, palette.Method]:
    return {method.name: method for method in METHODS.values()}


def lightness_and_hue(colour: str) -> tuple[float, float, float]:
    """CIELAB coordinates, in which distances are close to perceived differences."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in to_xyz]
    whole = [value / white for value, white in zip(xyz, (0.9505, 1.0, 1.089), strict=True)]
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in whole)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def apart(a: str, b: str) -> float:
    pairs = zip(lightness_and_hue(a), lightness_and_hue(b), strict=True)
    return sum((x - y) ** 2 for x, y in pairs) ** 0.5


def test_different_meanings_have_different_colours() -> None:
    found = meanings()
    assert len(found) > 40
    by_colour: dict[str, list[str]] = {}
    for meaning, colour in found.items():
        by_colour.setdefault(colour.upper(), []).append(meaning)
    assert {colour: shared for colour, shared in by_colour.items() if len(shared) > 1} == {}


def test_everything_that_a_figure_distinguishes_looks_different() -> None:
    sets = {
        "methods": [method.colour for method in methods().values()],
        "families": [*palette.FAMILIES.values(), *(palette.RIVALS[n].colour for n in ("spin", "dsl", "npo", "dnpo"))],
        "groups": [look.colour for look in SERIES],
        "samples": list(palette.SAMPLES.values()),
        "outcomes": list(palette.OUTCOMES.values()),
        "agreement": [palette.JUDGE, palette.PEOPLE, palette.ROUND_SCORES, palette.CHANCE],
    }
    for name, colours in sets.items():
        assert min(apart(a, b) for a, b in combinations(colours, 2)) > 20, name
    others = [colour for name, colours in sets.items() if name not in ("methods", "families") for colour in colours]
    assert min(apart(method, other) for method in sets["methods"] for other in others) > 10


def literals(path: Path) -> Iterator[str]:
    """The values in a file at places for colours."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from (match[0] for match in HEX.finditer(re.sub(r'href="[^"]*"|id="[^"]*"', "", text)))
        named = "|".join(sorted(name for name in NAMES if name.isalpha()))
        yield from (match[0] for match in re.finditer(rf"[:\s]({named})\s*[;}}]", text))
        return
    draws = "matplotlib" in text
    for node in ast.walk(ast.parse(text)):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if HEX.fullmatch(text) or (draws and text in NAMES):
            yield text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_colour_is_defined_outside_the_palette(path: Path) -> None:
    assert list(literals(path)) == []


def test_a_colour_outside_the_palette_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import matplotlib\naxis.plot(x, color='#0072b2' if y else 'black')\n")
    (tmp_path / "a.css").write_text("p { color: #fff; background: white; } a[href='#x'] { color: var(--ink); }")
    assert sorted(literals(tmp_path / "a.py")) == ["#0072b2", "black"]
    assert len(list(literals(tmp_path / "a.css"))) == 2


@pytest.mark.parametrize("path", ["report/style.css", "browse/page.css"])
def test_pages_have_every_colour_that_their_style_names(path: str) -> None:
    style = (ROOT / "src/dnpo" / path).read_text()
    used = set(re.findall(r"var\((--[\w-]+)\)", style))
    light, _, dark = palette.write_css().partition("@media")
    assert used <= set(re.findall(r"(--[\w-]+):", light + style))
    assert set(re.findall(r"(--[\w-]+):", dark)) <= set(re.findall(r"(--[\w-]+):", light))


def test_methods_keep_their_style_and_other_groups_get_one_each() -> None:
    assert choose_looks({"a": ("score", "trainable"), "b": ("off", "off")}) == {"a": palette.DNPO, "b": palette.SPIN}
    same = choose_looks({f"npo.alpha={i}": ("score", "trainable") for i in range(5)})
    assert len(set(same.values())) == 5
    assert not {look.colour for look in same.values()} & {method.colour for method in METHODS.values()}
    alike = choose_looks({"matched": ("off", "matched"), "offset": ("off", "offset")})
    assert len(set(alike.values())) == 2, "both are a constant, so their method does not tell them apart"
    assert len(choose_looks({str(i): ("", "") for i in range(30)})) == 30


def test_markers_distinguish_what_colours_distinguish() -> None:
    assert len({(look.colour, look.mark) for look in palette.RIVALS.values()}) == len(palette.RIVALS)
    for several in (list(methods().values()), list(SERIES)):
        assert len({look.mark for look in several}) == len(several)
        assert all(look.letter for look in several)
