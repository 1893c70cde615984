"""The script for a GPU, run on the CPU at a tiny size: its figures, its checks, and early ends."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_checks
from benchmarks.flops import formula
from benchmarks.problem import SHAPES, batches

from dnpo.policy.logprobs import Head
from tests.commands import Done

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STEPS = [(part, variant) for part, variants in gpu.STEPS.items() for variant in variants if "online" not in variant]


def run_script(*arguments: str, bare: bool = False) -> Done:
    """Run the script; ``bare``: as if dnpo's other dependencies were not installed."""
    command = [sys.executable, "-m", "benchmarks.bare", "benchmarks.gpu"] if bare else [str(SCRIPT)]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)


# --- figures


@pytest.mark.parametrize(("part", "variant"), STEPS)
def test_a_step_is_measured(part: str, variant: str) -> None:
    """The first loss is ln 2, since the policy equals the reference; with noise it differs."""
    runs = list(gpu.measure_step(True, part, variant))
    assert len(runs) == gpu.ROUNDS + 1
    assert all(run["seconds"] > 0 and run["tokens"] > 0 and run["flops"] > 0 for run in runs)
    if "npo" not in variant:
        assert runs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert runs[-1]["loss"] != runs[0]["loss"]


def test_needed_products_follow_the_formula_without_recomputed_products() -> None:
    shape = SHAPES["tiny"]
    (pairs,) = batches(shape, 1)
    for variant in ("ours-dpo-cached", "ours-npo-cached"):
        whole = formula(variant, shape, pairs, torch.device("cpu"))
        needed = gpu.count_needed(shape, pairs, "npo" in variant, adapted=False)
        assert needed == whole["body"] + whole["head"]
    frozen = gpu.count_needed(shape, pairs, False, adapted=True)
    assert frozen == gpu.count_needed(shape, pairs, False, adapted=False) * 2 / 3


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("sampler", ["ours", "generate"])
def test_generation_is_measured(sampler: str, samples: int) -> None:
    (run,) = gpu.measure_generation(True, sampler, str(samples))
    assert run["rows"] == 16
    assert 16 <= run["tokens"] <= 16 * 6


# --- checks


@pytest.mark.parametrize("check", [check for check in gpu_checks.CHECKS if check is not gpu_checks.check_two_processes])
def test_a_check_passes(check: Any) -> None:
    found = list(check(True))
    assert found
    assert [each for each in found if not each["ok"]] == []


@pytest.mark.long
def test_two_processes_have_the_same_gradient_as_one() -> None:
    (found,) = gpu_checks.check_two_processes(True)
    assert found["ok"]


def test_a_check_fails_where_logits_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Head.tile
    monkeypatch.setattr(Head, "tile", lambda self, *given: tile(self, *given) * 1.01)
    assert not all(each["ok"] for each in gpu_checks.check_logprobs(True))
    assert not all(each["ok"] for each in gpu_checks.check_noise(True))
    assert not all(each["ok"] for each in gpu_checks.check_model(True))


def test_a_check_that_does_not_run_fails_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_broken(tiny: bool) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_checks, "CHECKS", (check_broken, gpu_checks.check_logprobs))
    first, *others = gpu.check_all(True)
    assert not first["ok"]
    assert "no such kernel" in first["error"]
    assert len(others) == 6


def test_a_figure_that_is_nan_is_a_failure() -> None:
    assert not gpu_checks._result("x", float("nan"), 1.0)["ok"]
    assert not gpu_checks._result("x", 1.1, 1.0)["ok"]
    assert gpu_checks._result("x", 1.0, 1.0)["ok"]


# --- parts


def test_a_part_keeps_its_results_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.SECONDS, "lora", 600)
    part = gpu.Part("lora", tmp_path, tiny=True)
    assert len(part.measure("matmul", "matmul")) == 1
    part.end = 0.0
    assert part.measure("later", "step", "lora", "ours-dpo-cached") == []
    kept = json.loads((tmp_path / "gpu-lora.json").read_text())
    assert [result["name"] for result in kept["results"]] == ["matmul"]
    assert kept["skipped"] == {"later": "no time left"}
    assert not kept["done"]


def test_a_measurement_is_ended_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.SECONDS, "lora", 0.3)  # less than importing torch takes
    part = gpu.Part("lora", tmp_path, tiny=True)
    assert part.measure("matmul", "matmul") == []
    assert json.loads((tmp_path / "gpu-lora.json").read_text())["skipped"] == {"matmul": "no time left"}


def test_all_parts_together_take_25_minutes_and_each_at_most_8() -> None:
    assert sum(gpu.SECONDS.values()) <= 25 * 60
    assert max(gpu.SECONDS.values()) <= 8 * 60


def test_the_script_names_its_parts() -> None:
    done = run_script()
    assert done.returncode == 2
    assert "give a part: correctness, lora, full, qlora, generation or all" in done.stderr


@pytest.mark.long
def test_a_part_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """Only torch, transformers, peft and Lightning are installed; missing packages are named and not fatal."""
    done = run_script("full", "--out", str(tmp_path), bare=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a rehearsal" in done.stdout
    kept = json.loads((tmp_path / "gpu-full.json").read_text())
    assert kept["done"]
    assert kept["good"]
    assert [each["variant"] for each in kept["summary"]] == ["ours-dpo-cached", "ours-npo-cached"]
    assert all(each["rounds"] == gpu.ROUNDS and each["tokens_per_second"] > 0 for each in kept["summary"])
    assert "TRL is not installed" in kept["skipped"]["trl-dpo-cached"]
