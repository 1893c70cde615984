"""Settings by iteration: a list in place of a value or of a part."""

from typing import Any

import pytest

from dnpo.commands.iterations import join, settings_at, value_at
from dnpo.errors import SettingsError

LOGISTIC = {"_target_": "dnpo.optimise.parts.Logistic", "beta": 0.1}
TRAINER = {
    "_target_": "dnpo.optimise.parts.PairOptimisation",
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.99]},
    "epochs": 1,
}


@pytest.mark.parametrize("k", range(5))
def test_the_last_value_is_repeated(k: int) -> None:
    values = [0.1, 0.1, 5.0]
    found = settings_at("objective", {**LOGISTIC, "beta": values}, k, 5)
    assert found == {**LOGISTIC, "beta": values[min(k, 2)]}


def test_a_single_value_is_used_in_all_iterations() -> None:
    assert settings_at("objective", LOGISTIC, 3, 4) == LOGISTIC


def test_a_list_of_parts_gives_each_iteration_a_part_with_its_own_lists() -> None:
    parts = [LOGISTIC, {**LOGISTIC, "beta": [1.0, 2.0, 3.0]}]
    assert [settings_at("objective", parts, k, 3)["beta"] for k in range(3)] == [0.1, 2.0, 3.0]


def test_nested_numbers_change_and_settings_that_are_lists_stay() -> None:
    optimizer = {"_target_": "torch.optim.AdamW", "lr": [1e-3, 1e-4], "betas": [0.9, 0.99]}
    trainer = {**TRAINER, "optimizer": optimizer, "epochs": [3, 1]}
    found = [settings_at("trainer", trainer, k, 2) for k in range(2)]
    assert [each["epochs"] for each in found] == [3, 1]
    assert [each["optimizer"]["lr"] for each in found] == [1e-3, 1e-4]
    assert all(each["optimizer"]["betas"] == [0.9, 0.99] for each in found)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("objective", {**LOGISTIC, "beta": [1.0, 2.0, 3.0]}, r"^objective\.beta: has 3 values.*iterations=2"),
        ("objective", [LOGISTIC] * 3, r"^objective: has 3 values.*iterations=2"),
        ("trainer", {**TRAINER, "epochs": [1, 1, 1]}, r"^trainer\.epochs: has 3 values"),
        ("objective", {**LOGISTIC, "beta": []}, r"^objective\.beta=\[\]: expected one value an iteration"),
    ],
)
def test_lists_longer_than_the_run_are_refused_by_name(name: str, value: Any, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings_at(name, value, 0, 2)


def test_lists_by_iteration_in_words() -> None:
    assert [value_at("start", ["initial", "previous"], k, 4) for k in range(4)] == ["initial", *["previous"] * 3]


def test_the_settings_of_all_iterations_are_joined_where_they_differ() -> None:
    both = [{**LOGISTIC, "beta": 0.1}, {**LOGISTIC, "beta": 5.0}]
    assert join(both) == {**LOGISTIC, "beta": [0.1, 5.0]}
    assert join([LOGISTIC, LOGISTIC]) == LOGISTIC
    assert join([LOGISTIC, {"_target_": "dnpo.dsl.GivenPairs"}]) == [LOGISTIC, {"_target_": "dnpo.dsl.GivenPairs"}]
