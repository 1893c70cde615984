"""Held-out pairs in training: their loss, the best weights, an early end, and the same after a kill."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from dnpo.errors import SettingsError
from dnpo.optimise.held import FOLDER, divide
from dnpo.optimise.npo import SilentModule
from dnpo.optimise.objective import logistic
from dnpo.optimise.parts import Optimisation
from dnpo.optimise.preference import fine_tune, optimise
from dnpo.optimise.training import CHECKPOINT
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.records import Pair
from dnpo.settings import part_key, settings_key
from tests.commands import SMOKE, TINY, succeed, summary, train
from tests.conftest import Report, World, torch_optimizer
from tests.test_optimise import SEED, Stop, Stopping, how, said_by, same, timeless, weights

MakePolicy = Callable[..., Policy]
COUNT = 48


def learnable(world: World) -> list[Pair]:
    """Pairs of a human response and its reverse, so that what is learned from some holds for others."""
    pairs = world.pairs(COUNT)
    return [replace(pair, rejected_ids=[*pair.chosen_ids[-2::-1], pair.chosen_ids[-1]]) for pair in pairs]


BEST: dict[str, Any] = {"keep": "best", "measure_every": 2, "holdout": 0.25}


def run(
    make_policy: MakePolicy, world: World, folder: Path, report: Report, lora: int = 0, **settings: Any
) -> tuple[Policy, list[dict[str, float]], dict[str, Any]]:
    """Train on learnable pairs."""
    folder.mkdir(exist_ok=True)
    policy, pairs, facts = make_policy(), learnable(world), dict[str, Any]()
    reference = said_by(policy, pairs)
    policy.model = Lora(rank=lora).on(policy.model, seed=0)
    history = optimise(
        policy,
        pairs,
        reference,
        how(**({"epochs": 3} | settings)),
        noise=SilentModule(),
        objective=partial(logistic, beta=1.0),
        beta=1.0,
        seed=SEED,
        folder=folder,
        report=report,
        facts=facts,
    )
    return policy, history, facts.get("held_out", {})


def loss(policy: Policy, make_policy: MakePolicy, world: World) -> float:
    """The mean loss on the held-out pairs, computed from the scores of both policies."""
    pairs = learnable(world)
    _, apart = split(pairs, how(**BEST))
    ours, theirs = said_by(policy, pairs), said_by(make_policy(), pairs)
    gaps = [(ours[i].chosen - ours[i].rejected) - (theirs[i].chosen - theirs[i].rejected) for i in apart]
    return float(np.mean([math.log1p(math.exp(-gap)) for gap in gaps]))


def split(pairs: list[Pair], settings: Optimisation) -> tuple[list[int], list[int]]:
    """The numbers of the pairs to train on, and of those held out."""
    left, apart = divide(lambda: [pair.id for pair in pairs], range(len(pairs)), settings, "trainer")
    return [*left], [*apart]


def measured(history: list[dict[str, float]]) -> dict[int, float]:
    return {int(row["step"]) + 1: row["heldout/loss"] for row in history if "heldout/loss" in row}


def test_held_out_pairs_depend_only_on_their_prompts(world: World) -> None:
    pairs = learnable(world)
    left, apart = split(pairs, how(**BEST))
    assert sorted([*left, *apart]) == list(range(COUNT))
    assert 4 < len(apart) < 24
    turned = pairs[::-1]
    ids = {turned[i].id for i in split(turned, how(**BEST))[1]}
    assert ids == {pairs[i].id for i in apart}
    assert divide(lambda: 1 / 0, [3, 5], how(), "trainer") == ([3, 5], [])  # type: ignore[arg-type,return-value]
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(SettingsError, match=r"trainer\.holdout=.*: holds out \d+ of 48 rows"):
            split(pairs, how(**(BEST | {"holdout": share})))


def test_the_best_weights_are_kept_and_their_loss_is_reported(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    report = Report()
    policy, history, facts = run(make_policy, world, tmp_path, report, **BEST)
    found = measured(history)
    assert list(found) == [*range(2, len(history) + 1, 2), *([len(history)] if len(history) % 2 else [])]
    assert facts["loss"] == min(found.values()) < math.log(2)
    assert 0 < facts["step"] < len(history), "the test needs a best step between the first and the last"
    assert facts["loss"] == found[facts["step"]]
    assert loss(policy, make_policy, world) == pytest.approx(facts["loss"], abs=1e-5)
    last, *_ = run(make_policy, world, tmp_path / "last", Report(), **(BEST | {"keep": "last", "patience": 99}))
    assert loss(last, make_policy, world) == pytest.approx(found[len(history)], abs=1e-5)
    assert not same(weights(policy), weights(last))
    (note,) = report.notes
    assert note.startswith(f"trainer.keep=best: keeps the weights after step {facts['step']} (held-out loss ")


def test_if_no_step_helps_the_weights_before_training_are_kept(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    worse = {"optimizer": torch_optimizer("SGD", lr=1e-3, maximize=True)}
    policy, _, facts = run(make_policy, world, tmp_path, Report(), **BEST, **worse, patience=2)
    assert facts["step"] == 0
    assert facts["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert facts["steps"] == 4  # two measurements, two steps apart
    assert same(weights(policy), weights(make_policy()))


def test_held_out_pairs_change_no_step(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """The training equals one on the other pairs alone, bit for bit."""
    pairs = learnable(world)
    left, _ = split(pairs, how(**BEST))
    policy, history, _ = run(make_policy, world, tmp_path, Report(), **(BEST | {"keep": "last", "patience": 99}))
    plain = make_policy()
    expected = optimise(
        plain,
        [pairs[i] for i in left],
        [said_by(plain, pairs)[i] for i in left],
        how(epochs=3),
        noise=SilentModule(),
        objective=partial(logistic, beta=1.0),
        beta=1.0,
        seed=SEED,
        folder=tmp_path / "plain",
        report=Report(),
    )
    assert same(weights(policy), weights(plain))
    without = [{name: value for name, value in row.items() if name != "heldout/loss"} for row in history]
    assert timeless(without) == timeless(expected)


def test_patience_ends_a_training_and_reports_it(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    _, whole, _ = run(make_policy, world, tmp_path / "whole", Report(), **BEST)
    found = measured(whole)
    best, misses, end = math.log(2), 0, len(whole)
    for step, value in found.items():
        best, misses = (value, 0) if value < best else (best, misses + 1)
        if misses == 2:
            end = step
            break
    assert end < len(whole), "the test needs a training that can end early"
    report = Report()
    _, history, facts = run(make_policy, world, tmp_path / "ended", report, **BEST, patience=2)
    assert len(history) == facts["steps"] == end
    assert facts["planned"] == len(whole)
    assert timeless(history) == timeless(whole[:end])
    assert any(f"trainer.patience=2: ends after {end} of {len(whole)} steps" in note for note in report.notes)


@pytest.mark.parametrize(("after", "lora", "patience"), [(1, 0, 2), (9, 0, 2), (11, 0, 0), (13, 0, 2), (7, 4, 2)])
def test_a_stopped_training_keeps_the_same_weights(
    after: int, lora: int, patience: int, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    settings = BEST | {"patience": patience, "checkpoint_every": 3}

    def go(folder: Path, report: Report) -> tuple[list[Tensor], list[dict[str, float]], dict[str, Any]]:
        policy, history, facts = run(make_policy, world, folder, report, lora, **settings)
        return weights(policy), timeless(history), facts

    undisturbed = go(tmp_path / "a", Report())
    after = min(after, len(undisturbed[1]))
    with pytest.raises(Stop):
        go(tmp_path / "b", Stopping(after))
    assert (tmp_path / "b" / CHECKPOINT).is_file() == (after > 3)
    assert 1 <= len(list((tmp_path / "b" / FOLDER).glob("*.pt"))) <= 2, "the best, and those of the checkpoint"
    continued = go(tmp_path / "b", Report())
    assert same(undisturbed[0], continued[0])
    assert undisturbed[1:] == continued[1:]


def test_an_ended_training_does_not_continue(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """A kill left only the checkpoint of the step at which patience ended the training."""
    settings = BEST | {"patience": 2, "checkpoint_every": 1}
    _, history, facts = run(make_policy, world, tmp_path, Report(), **settings)
    _, again, same_facts = run(make_policy, world, tmp_path, Report(), **settings)
    assert timeless(again) == timeless(history)
    assert same_facts == facts


# --- fine-tuning

TUNING: dict[str, Any] = {**BEST, "optimizer": torch_optimizer("AdamW", lr=5e-2), "epochs": 5, "patience": 0}


def tune(
    make_policy: MakePolicy, world: World, folder: Path, report: Report, **settings: Any
) -> tuple[Policy, list[dict[str, float]], dict[str, Any]]:
    """Fine-tune on the first human responses, with steps so large that the loss on others soon rises."""
    folder.mkdir(exist_ok=True)
    policy, facts = make_policy(), dict[str, Any]()
    history = fine_tune(
        policy, tuned(world), how(**(TUNING | settings)), seed=SEED, folder=folder, report=report, facts=facts
    )
    return policy, history, facts.get("held_out", {})


def tuned(world: World) -> list[tuple[str, list[int], list[int]]]:
    rows = zip(world.prompts, world.human, strict=True)
    return [(prompt.id, prompt.token_ids, response.token_ids) for prompt, response in rows][:COUNT]


def tuned_loss(policy: Policy, world: World) -> float:
    """The mean over the tokens of held-out responses, computed from their scores."""
    rows = tuned(world)
    _, apart = divide(lambda: [row[0] for row in rows], range(len(rows)), how(**TUNING), "sft")
    held = [rows[i] for i in apart]
    with policy.evaluating():
        return -sum(policy.score([row[1] for row in held], [row[2] for row in held])) / sum(len(r[2]) for r in held)


def test_fine_tuning_keeps_the_best_weights(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    report = Report()
    policy, history, facts = tune(make_policy, world, tmp_path / "best", report, micro_batch_size=3)
    found = measured(history)
    assert facts["loss"] == min(found.values()) == found[facts["step"]]
    assert 0 < facts["step"] < len(history), "the test needs a best step between the first and the last"
    assert 4 < facts["rows"] < COUNT // 2
    assert tuned_loss(policy, world) == pytest.approx(facts["loss"], abs=1e-5)
    (note,) = report.notes
    assert note.startswith(f"sft.keep=best: keeps the weights after step {facts['step']} (held-out loss ")
    last, whole, _ = tune(make_policy, world, tmp_path / "last", Report(), keep="last", patience=99, micro_batch_size=3)
    assert timeless(whole) == timeless(history)
    assert tuned_loss(last, world) == pytest.approx(found[len(history)], abs=1e-5)
    assert not same(weights(policy), weights(last))


def test_fine_tuning_ends_early_and_says_so(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    report = Report()
    _, history, facts = tune(make_policy, world, tmp_path, report, patience=2)
    assert len(history) == facts["steps"] < facts["planned"]
    assert any(
        f"sft.patience=2: ends after {len(history)} of {facts['planned']} steps" in note for note in report.notes
    )


def test_rows_held_out_of_fine_tuning_change_no_step(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy, _, facts = tune(make_policy, world, tmp_path / "a", Report(), keep="last", patience=99)
    rows = tuned(world)
    left, apart = divide(lambda: [row[0] for row in rows], range(len(rows)), how(**TUNING), "sft")
    assert len(apart) == facts["rows"]
    plain = make_policy()
    alone = how(**(TUNING | {"keep": "last"}))
    fine_tune(plain, [rows[i] for i in left], alone, seed=SEED, folder=tmp_path / "b", report=Report())
    assert same(weights(policy), weights(plain))


@pytest.mark.parametrize(("after", "patience"), [(1, 0), (8, 2), (20, 0)])
def test_a_stopped_fine_tuning_keeps_the_same_weights(
    after: int, patience: int, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    def go(folder: Path, report: Report) -> tuple[list[Tensor], list[dict[str, float]], dict[str, Any]]:
        policy, history, facts = tune(make_policy, world, folder, report, patience=patience, checkpoint_every=3)
        return weights(policy), timeless(history), facts

    undisturbed = go(tmp_path / "a", Report())
    with pytest.raises(Stop):
        go(tmp_path / "b", Stopping(after))
    continued = go(tmp_path / "b", Report())
    assert same(undisturbed[0], continued[0])
    assert undisturbed[1:] == continued[1:]


def test_only_two_files_of_weights_lie_between_checkpoints(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Many steps improve the loss before the next checkpoint."""
    improving = {"optimizer": torch_optimizer("AdamW", lr=1e-3), "measure_every": 1, "checkpoint_every": 10}
    _, history, _ = tune(make_policy, world, tmp_path / "whole", Report(), **improving)
    found = measured(history)
    assert sum(found[step] < min(found[s] for s in range(1, step)) for step in range(11, 19)) > 2
    with pytest.raises(Stop):
        tune(make_policy, world, tmp_path / "stopped", Stopping(18), **improving)
    assert len(list((tmp_path / "stopped" / FOLDER).glob("*.pt"))) == 2


def test_keys_have_these_settings_only_if_pairs_are_held_out() -> None:
    plain = how()
    own = {"keep", "patience", "measure_every", "holdout"}
    assert set(settings_key(plain)) - set(part_key(plain)) == own
    assert part_key(how(measure_every=7, holdout=0.5)) == part_key(plain)
    assert own < set(part_key(how(**BEST)))
    assert part_key(how(**BEST)) != part_key(how(**(BEST | {"patience": 3})))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trainer.holdout=0"], r"trainer\.holdout=0: expected more than 0"),
        (["method=online_dpo"], r"trainer\.keep=best: measures the loss on held-out pairs, but rollout=live"),
        (["objective=refined"], r"trainer\.keep=best: .*Refined"),
        (["reference=ema", "ema=on", "npo=off"], r"trainer\.keep=best: .*reference=ema"),
        (["trainer.parallel=sharded", "launch=torchrun", "launch.devices=2"], r"trainer\.keep=best: .*replicated"),
        (["trainer.measure_every=0"], r"trainer\.measure_every=0"),
        (["trainer.holdout=0.000001"], r"trainer\.holdout=1e-06: holds out 0 of"),
        (["trainer.epochs=0"], r"trainer\.keep=best: has an effect only with epochs or steps"),
        (["sft=off", "sft.steps=0", "sft.patience=2"], r"sft\.patience=2: has an effect only with epochs or steps"),
        (["sft.patience=2", "sft.holdout=1"], r"sft\.holdout=1: expected .* less than 1"),
        (
            ["sft.keep=best", "sft.parallel=sharded", "launch=torchrun", "launch.devices=2"],
            r"sft\.keep=best: .*sft\.par",
        ),
        (["augment=tiny", "+augment.optimisation.keep=best"], r"augment\.optimisation\.keep=best: no questions"),
    ],
)
@pytest.mark.long
def test_losses_that_cannot_be_measured_are_refused_by_name(tmp_path: Path, given: list[str], message: str) -> None:
    done = train(tmp_path, *SMOKE, *TINY, "trainer.keep=best", "iterations=1", "sft.steps=1", *given)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "store" / "prompts").exists()


@pytest.mark.long
def test_a_run_shows_and_records_the_best_step(tiny: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny / "store", tmp_path / "store", symlinks=True)
    settings = ("trainer.keep=best", "trainer.patience=2", "trainer.measure_every=1", "trainer.epochs=3")
    printed = succeed(tmp_path, *SMOKE, *TINY, *settings, "iterations=1")
    row = summary(tmp_path)["table"][-1]
    assert row["heldout/steps"] >= row["heldout/step"]
    assert f"trainer.keep=best: keeps the weights after step {row['heldout/step']} " in printed
    assert not list((tmp_path / "store").rglob("*.pt"))
    again = succeed(tmp_path, *SMOKE, *TINY, *settings, "iterations=1")
    assert "stages are stored already" in again
    assert summary(tmp_path)["table"][-1]["heldout/loss"] == row["heldout/loss"]


@pytest.mark.long
def test_a_run_shows_and_records_the_best_step_of_fine_tuning(tmp_path: Path) -> None:
    settings = ("sft.keep=best", "sft.measure_every=5", "sft.patience=9")
    printed = succeed(tmp_path, *SMOKE, *TINY, *settings, "iterations=1")
    first, last = summary(tmp_path)["table"]
    assert first["heldout/steps"] >= first["heldout/step"] > 0
    assert f"sft.keep=best: keeps the weights after step {first['heldout/step']} " in printed
    assert "heldout/loss" not in last
    assert not list((tmp_path / "store").rglob("*.pt"))


@pytest.mark.long
@pytest.mark.parametrize("method", ["rest_em", "raft"])
def test_methods_that_fine_tune_in_iterations_keep_the_best_weights(method: str, tmp_path: Path) -> None:
    settings = (f"method={method}", "trainer.keep=best", "trainer.measure_every=1")
    printed = succeed(tmp_path, *SMOKE, *TINY, *settings, "iterations=1")
    row = summary(tmp_path)["table"][-1]
    assert f"trainer.keep=best: keeps the weights after step {row['heldout/step']} " in printed
