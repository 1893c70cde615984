"""Settings for an earlier layout still work, and a stage key does not depend on a class's module."""

from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from dnpo import former
from dnpo.errors import SettingsError
from dnpo.former import up_to_date
from dnpo.settings import Bound, neutral, part_key
from dnpo.store import MANIFEST, Store, write_json


def renamed(module: str, part: Any) -> Any:
    """The same part with its class in another module."""
    listed = [(each.name, each.type, field(default=each.default, metadata=each.metadata)) for each in fields(part)]
    kind = make_dataclass(type(part).__name__, listed, frozen=True, namespace={"__module__": module})
    return kind(**{each.name: getattr(part, each.name) for each in fields(part)})


@dataclass(frozen=True)
class Inner:
    """A part inside another."""

    x: int = 1


@dataclass(frozen=True)
class Outer:
    """A part with others inside, and with a setting that changes no result."""

    inner: Any
    many: Any
    fast: int = neutral(2)


def outer(module: str, inside: str) -> Outer:
    inner = renamed(inside, Inner())
    found: Outer = renamed(module, Outer(inner, {"one": inner}))
    return found


def test_parts_of_dnpo_are_keyed_by_their_class_name() -> None:
    """The module of a dnpo class is in no key, not in nested parts either."""
    before = part_key(outer("dnpo.a", "dnpo.b"))
    assert before == part_key(outer("dnpo.z", "dnpo.y.q"))
    assert before == {
        "_target_": "Outer",
        "inner": {"_target_": "Inner", "x": 1},
        "many": {"one": {"_target_": "Inner", "x": 1}},
    }


def test_equally_named_classes_of_two_modules_have_two_keys() -> None:
    """For classes outside dnpo the whole import path counts, also when nested, and never equals a dnpo class's."""
    modules = ["mine.judge", "mine.other", "dnpo.judges.rules", "dnpolike"]
    assert len({str(part_key(renamed(module, Inner()))) for module in modules}) == 4
    assert len({str(part_key(outer("dnpo.a", module))) for module in modules}) == 4
    functions = [Bound(f"{module}.hinge", {"beta": 1.0}) for module in modules]
    assert len({str(part_key(function)) for function in functions}) == 4


def test_old_targets_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old import paths are replaced at every place; settings that no longer exist are left out and named."""
    monkeypatch.setitem(former.MOVED, "dnpo.old.Part", "dnpo.new.Part")
    monkeypatch.setitem(former.REMOVED, "dnpo.new.Part", ("gone",))
    tree = {"npo": {"_target_": "dnpo.old.Part", "gone": 3, "x": 1, "deep": {"_target_": "dnpo.new.Part", "gone": 4}}}
    found, ignored = up_to_date(tree)
    assert found == {"npo": {"_target_": "dnpo.new.Part", "x": 1, "deep": {"_target_": "dnpo.new.Part"}}}
    assert ignored == ["npo.gone", "npo.deep.gone"]
    assert up_to_date({"mine": {"_target_": "mine.Part", "gone": 3}}) == (
        {"mine": {"_target_": "mine.Part", "gone": 3}},
        [],
    )


def test_a_store_of_an_earlier_layout_is_reported_once(tmp_path: Path) -> None:
    """An old store is refused by name, with its stages; a new store and a current one are not."""
    notes: list[str] = []
    Store(tmp_path / "new").open(notes.append)
    Store(tmp_path / "new").open(notes.append)
    assert notes == []
    (tmp_path / "old" / "sft" / "0123").mkdir(parents=True)
    write_json(tmp_path / "old" / "sft" / "0123" / MANIFEST, dict[str, Any]())
    Store(tmp_path / "old").open(notes.append)
    (note,) = notes
    assert str(tmp_path / "old") in note
    assert "sft" in note
    Store(tmp_path / "old").open(notes.append)
    assert notes == [note]


@pytest.mark.parametrize("value", [3, "yes", None, 0])
def test_a_partial_that_is_not_a_boolean_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"^trainer\.optimizer\._partial_="):
        up_to_date({"trainer": {"optimizer": {"_target_": "torch.optim.SGD", "_partial_": value}}})
