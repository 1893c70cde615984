"""Benchmarks still fit the code that they measure."""

import importlib
import json
from pathlib import Path

import benchmarks
import pytest
from benchmarks import live

from tests.commands import run_command

MODULES = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name: str) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.long
def test_live_and_ahead_are_compared_on_the_same_work(tmp_path: Path) -> None:
    arguments = ("--rounds", "1", "--out", str(tmp_path / "live.json"), "--", "scale=smoke", "data.train=48")
    done = run_command(tmp_path, "benchmarks.live", *arguments, "sft.steps=20")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "live.json").read_text())
    parts = found["seconds"]["live"][0]
    assert set(parts) == {*live.PARTS, live.REST, live.ALL}
    assert all(seconds > 0 for seconds in parts.values())
    assert found["amounts"]["live"]["tokens generated"] == found["amounts"]["ahead"]["tokens generated"] > 0
