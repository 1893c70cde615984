"""Numbers as readers see them."""

import itertools
import re
from pathlib import Path

import pytest

import dnpo
from dnpo.wording import decimals, estimate, fixed, interval, percent


def test_a_number_that_is_shown_as_zero_has_no_sign() -> None:
    for value, signed in itertools.product((0.0, -0.0, 0.04, -0.04, 1e-17), (True, False)):
        assert fixed(value, 1, signed) == "0.0"
        assert fixed(value, 0, signed) == "0"
    assert [fixed(value, 2, signed=True) for value in (-0.005001, 0.005001)] == ["−0.01", "+0.01"]
    assert fixed(-1.25, 2) == "−1.25"
    assert fixed(12345.6, 1, signed=True) == "+12,345.6"
    assert (fixed(20.0, 0, signed=True), fixed(20.0, 0)) == ("+20", "20")


def test_a_percentage_has_a_space_before_its_sign_in_every_message() -> None:
    assert (percent(0.935), percent(0.004, 0)) == ("93.5 %", "0 %")
    python_style = re.compile(r":[^{}\n]*%\}")  # writes 93.5%
    root = Path(__file__).resolve().parent.parent
    folders = (Path(dnpo.__file__).parent, root / "analysis", root / "benchmarks")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert [file.name for file in files if python_style.search(file.read_text(encoding="utf-8"))] == []


def test_an_estimated_time_has_whole_seconds() -> None:
    shown = [estimate(seconds) for seconds in (0.0, 0.4, 1.0, 9.9, 12.4, 200.0)]
    assert shown == ["1 s", "1 s", "1 s", "10 s", "12 s", "3 min 20 s"]


@pytest.mark.parametrize(
    ("size", "digits"),
    [
        (0.244, 2),
        (0.0354, 3),
        (0.0356, 2),
        (0.52, 1),
        (0.95, 1),
        (1.04, 1),
        (3.6, 0),
        (12.0, 0),
        (400.0, 0),
        (0.001, 4),
    ],
)
def test_a_size_has_two_digits_if_they_are_under_36_and_otherwise_one(size: float, digits: int) -> None:
    assert decimals(size) == digits
    assert decimals(size, 3) == max(digits, 3)
    shown = float(f"{size:.{digits}f}")
    assert shown == pytest.approx(size, rel=0.15 if digits else 0.5)


def test_sizes_that_are_no_size_have_the_least_decimals() -> None:
    assert [decimals(size, 1) for size in (0.0, -1.0, float("nan"), float("inf"))] == [1] * 4


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (4.1, 3.08, 5.13, "+4.1 (+3.1 to +5.1)"),
        (-0.281, -0.525, -0.0367, "−0.28 (−0.53 to −0.04)"),
        (0.1, 0.0031, 0.197, "+0.100 (+0.003 to +0.197)"),
        (0.25, 0.0002, 0.5, "+0.2500 (+0.0002 to +0.5000)"),
        (0.25, 1e-9, 0.5, "+0.25 (0.00 to +0.50)"),
        (0.0, 0.0, 0.117, "0.00 (0.00 to +0.12)"),
        (0.03, -1.0, 1.1, "0.0 (−1.0 to +1.1)"),
        (7.0, 7.0, 7.0, "+7.0 (+7.0 to +7.0)"),
        (1.26, None, None, "+1.3"),
    ],
)
def test_both_ends_of_an_interval_can_be_read(value: float, low: float | None, high: float | None, shown: str) -> None:
    assert interval(value, low, high, 1, signed=True) == shown
    assert interval(value, low, high, 1) == shown.replace("+", "")
    for text, end in zip(
        shown.replace("(", " ").replace(")", " ").replace("−", "-").split()[1::2], (low, high), strict=False
    ):
        assert end is None or float(text) == pytest.approx(end, abs=0.08 * ((high or 0) - (low or 0)))
