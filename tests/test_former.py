"""Settings written for an earlier layout go on working, and stage keys outlive the files that classes lie in."""

from pathlib import Path
from typing import Any

import pytest

from dnpo import former
from dnpo.former import up_to_date
from dnpo.settings import stage_key
from dnpo.store import MANIFEST, Store, write_json


def test_own_parts_are_keyed_by_the_name_of_their_class() -> None:
    """Where a class of dnpo lies decides no key, in nested settings either."""
    before = {
        "_target_": "dnpo.a.Part",
        "inner": {"_target_": "dnpo.b.Inner", "x": 1},
        "many": {"one": {"_target_": "dnpo.c.C"}},
    }
    after = {
        "_target_": "dnpo.z.Part",
        "inner": {"_target_": "dnpo.y.q.Inner", "x": 1},
        "many": {"one": {"_target_": "dnpo.C"}},
    }
    assert stage_key(before) == stage_key(after)
    assert stage_key(before)["inner"] == {"_target_": "Inner", "x": 1}


def test_two_classes_of_one_name_in_two_modules_have_two_keys() -> None:
    """Of what is not dnpo's own the whole import path counts, nested too, and never equals one of dnpo's own."""
    targets = ["mine.judge.Rules", "mine.other.Rules", "dnpo.judges.rules.Rules", "dnpolike.Rules"]
    keys = [str(stage_key({"_target_": target})) for target in targets]
    nested = [str(stage_key({"_target_": "dnpo.E", "m": {"_target_": target}})) for target in targets]
    assert len({*keys}) == 4
    assert len({*nested}) == 4


def test_what_changes_no_result_is_in_no_key() -> None:
    """Settings that a part names, and how it is built."""
    assert stage_key({"_target_": "dnpo.a.P", "_partial_": True, "x": 1, "fast": 2}, ["fast"]) == {
        "_target_": "P",
        "x": 1,
    }


def test_old_targets_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old import paths are replaced wherever they stand; settings that are gone are left out, and named."""
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


def test_a_store_of_an_earlier_layout_is_told_of_once(tmp_path: Path) -> None:
    """By name, with the stages in it; a new store and one of today are not."""
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
