"""The cost of calls, from a table that users edit."""

from pathlib import Path

import pytest
import yaml

from dnpo.errors import SettingsError
from dnpo.judges.asked.ledger import Question
from dnpo.judges.asked.prices import SHIPPED, Price, price_of, tokens_about


def table(folder: Path, text: str) -> str:
    path = folder / "prices.yaml"
    path.write_text(text)
    return str(path)


def test_a_cost_by_hand(tmp_path: Path) -> None:
    """1,000 tokens in at $0.40 and 10 out at $1.60 a million: $0.000416, and half of that in a batch."""
    price = price_of("m", table(tmp_path, "m: {input: 0.4, output: 1.6, batch: 0.5}"))
    assert price is not None
    assert price.of(1000, 10, batch=False) == pytest.approx(0.000416, rel=1e-12)
    assert price.of(1000, 10, batch=True) == pytest.approx(0.000208, rel=1e-12)
    assert price.of(0, 0, batch=False) == 0.0


def test_a_batch_costs_the_same_without_a_batch_price(tmp_path: Path) -> None:
    price = price_of("m", table(tmp_path, "m: {input: 1, output: 2}"))
    assert price == Price(1e-6, 2e-6, 1.0)


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("small", "small"),
        ("small-2024-07-18", "small"),
        ("small-20240718", "small"),
        ("small-mini", "small-mini"),
        ("small-mini-2025-01-31", "small-mini"),
        ("small-2023-01-01", "small-2023-01-01"),  # has its own price
        ("small-1924-07-18", None),
        ("small-2024", None),
        ("small-2024-07-18-x", None),
        ("small-large", None),
        ("2024-07-18", None),
        ("Small", None),
        ("", None),
    ],
)
def test_dated_versions(model: str, known: str | None, tmp_path: Path) -> None:
    names = ["small", "small-mini", "small-2023-01-01"]
    path = table(tmp_path, "\n".join(f"{name}: {{input: {n}, output: {n}}}" for n, name in enumerate(names, 1)))
    price = price_of(model, path)
    assert (None if price is None else names[round(price.input * 1e6) - 1]) == known


@pytest.mark.parametrize(
    ("model", "tokens_in", "tokens_out", "batch"),
    [
        ("gpt-5-mini-2025-08-07", 0.25, 2.0, 1.0),
        ("gpt-5.6-luna", 0.2, 1.2, 1.0),
        ("claude-opus-5-5", 4.0, 20.0, 1.0),
        ("claude-sonnet-4-20250514", 3.0, 15.0, 0.5),
        ("gpt-4o-mini-2024-07-18", 0.15, 0.6, 0.5),
    ],
)
def test_shipped_prices(model: str, tokens_in: float, tokens_out: float, batch: float) -> None:
    """As on the vendors' pages, whose addresses are in the file."""
    price = price_of(model, None)
    assert price is not None
    assert (price.input * 1e6, price.output * 1e6, price.batch) == pytest.approx((tokens_in, tokens_out, batch))


def test_a_free_model_has_a_price_of_0(tmp_path: Path) -> None:
    assert price_of("m", table(tmp_path, "m: {input: 0, output: 0}")) == Price(0.0, 0.0, 1.0)


def test_the_shipped_table() -> None:
    names = yaml.safe_load(SHIPPED.read_text())
    assert len(names) > 3
    for name in names:
        price = price_of(name, None)
        assert price is not None
        assert 0 < price.input <= price.output < 1e-3
        assert 0 < price.batch <= 1
    assert price_of("gpt-4o-mini-2024-07-18", None) == price_of("gpt-4o-mini", None)
    assert price_of("no-such-model", None) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file"),
        ("- m", "the file"),
        ("m: 3", "m: "),
        ("m: {input: 1}", "m.output: "),
        ("m: {input: 1, output: cheap}", "m.output: "),
        ("m: {input: -1, output: 1}", "m.input: "),
        ("m: {input: .inf, output: 1}", "m.input: "),
        ("m: {input: .nan, output: 1}", "m.input: "),
        ("m: {input: 1, output: 1, batch: 2}", "m.batch: "),
        ("m: {input: 1, output: 1, batched: 0.5}", "m.batched: "),
        ("m: {input: 2024-99-99, output: 1}", "month"),
        ("3: {input: 1, output: 1}", "3"),
        ("m: {", "prices.yaml"),
        ("ok: {input: 1, output: 1}\nm: {output: 1}", "m.input: "),
    ],
)
def test_a_broken_table_is_named_with_advice(text: str, problem: str, tmp_path: Path) -> None:
    path = table(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        price_of("m", path)
    said = str(caught.value)
    assert said.startswith(f"judge.prices={path}: ")
    assert problem in said
    assert (
        "expected lines such as `model: {input: 0.4, output: 1.6, batch: 0.5}`, in US dollars for a million tokens"
        in said
    )


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(SettingsError, match=r"^judge\.prices=.*expected lines"):
            price_of("m", str(path))


def test_tokens_are_overestimated() -> None:
    """The estimate is a third of the bytes plus eight tokens per turn; English has four or more bytes per token."""

    def about(*texts: str) -> int:
        return tokens_about(Question.make("j", "m", "t", "", [{"role": "user", "content": text} for text in texts]))

    assert about("a" * 300) == 108
    assert about("a" * 300, "b" * 30) == 108 + 18
    assert about("数" * 100) == 108
    assert about() == 0
    assert about("") == 8
