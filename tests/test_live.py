"""Rollouts in training: draws from the buffer, settings in which it equals training on pairs made before, kills."""

import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from dnpo.errors import DataError, JudgeError
from dnpo.evaluate import Held
from dnpo.generate import Live as Responding
from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.optimise.ema import Average
from dnpo.optimise.live import Clock, LiveSteps
from dnpo.optimise.steps import Slice
from dnpo.policy.model import Policy
from dnpo.records import Pair, Prompt, Response, Rollout, Verdict
from dnpo.stages import live as live_stage
from dnpo.stages.rollouts import Chunks, Responder
from dnpo.tables import read
from tests.commands import SMOKE, TINY, Process, numbers, succeed, summary, train
from tests.conftest import Report, World
from tests.judge_server import judge_server
from tests.test_judged_runs import keys

# --- the buffer


@dataclass
class Numbers:
    """Makes ``count`` rows for every rollout, (rollout, row), and records the rollouts that were requested."""

    count: Callable[[int], int] = lambda rollout: 4
    per_pass: int = 5
    asked: list[int] = field(default_factory=list)
    words: str = ""

    def ask(self, rollout: int) -> None:
        self.asked.append(rollout)

    def check(self, rollouts: int) -> None:
        assert set(range(rollouts)) <= set(self.asked)

    def take(self, rollout: int, first: int, step: int) -> Sequence[tuple[int, int]]:
        assert rollout in self.asked
        return [(rollout, i) for i in range(self.count(rollout))]

    def measure(self, rollout: int) -> Mapping[str, float]:
        return {"rollout/reward": float(rollout)}

    def describe(self, rollout: int) -> str:
        return self.words

    def explain(self) -> str:
        return "5 prompts have candidates with equal scores"


Group = tuple[tuple[int, int], ...]


def live(source: Numbers, clock: Clock, batch_size: int = 4, steps: int = 0, epochs: int = 1) -> LiveSteps[Any, Group]:
    def collate(piece: Slice[tuple[int, int]]) -> Group:
        return piece.rows

    def order(count: int) -> list[tuple[int, ...]]:
        return [tuple(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]

    told: dict[str, Any] = {"order": order, "seed": 1, "report": Report(), "micro_batch_size": 100}
    return LiveSteps(source, clock, batch_size=batch_size, epochs=epochs, steps=steps, collate=collate, **told)


def groups(steps: LiveSteps[Any, Group]) -> list[Group]:
    return [batch for (batch,) in steps]


def test_a_buffer_of_one_batch_is_strictly_on_policy() -> None:
    """Every step trains on all rows of the latest rollout, with capacity 0 and with a capacity of one batch."""
    own = [tuple((rollout, i) for i in range(4)) for rollout in range(5)]
    assert groups(live(Numbers(), Clock(every=1, capacity=0))) == own
    assert groups(live(Numbers(), Clock(every=1, capacity=4))) == own


def test_the_oldest_rows_leave_first() -> None:
    running = live(Numbers(), Clock(every=1, capacity=6))
    seen = []
    for _ in running:
        seen.append(sorted(running.buffer.values()))
    assert seen[0] == [(0, i) for i in range(4)]
    assert seen[1] == [(0, 2), (0, 3), *((1, i) for i in range(4))]
    assert seen[4] == [(3, 2), (3, 3), *((4, i) for i in range(4))]


def test_rows_that_were_drawn_less_are_drawn_more() -> None:
    """One of two rows with d and 0 draws: the second is drawn with probability 1 / (1 + 1/(1 + d))."""
    for draws in (0, 1, 4):
        picked = 0
        for seed in range(4000):
            running = live(Numbers(lambda rollout: 2), Clock(every=1, capacity=4), batch_size=1, steps=2)
            running.seed = seed
            running.group(0)
            running.draws = [draws, 0]
            (number,) = running._draw(1)
            picked += number
        expected = 1 / (1 + 1 / (1 + draws))
        assert picked / 4000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)


def test_a_step_draws_a_row_at_most_once_and_steps_between_rollouts_share_the_buffer() -> None:
    running = live(Numbers(), Clock(every=3, capacity=8), batch_size=3)
    found = groups(running)
    assert len(found) == 15
    assert all(len(set(group)) == 3 for group in found)
    for step, group in enumerate(found):
        assert {rollout for rollout, _ in group} <= {step // 3, step // 3 - 1}
    counts = Counter(row for group in found for row in group)
    assert sum(counts.values()) == sum(running.draws)
    assert [counts[(number // 4, number % 4)] for number in range(20)] == running.draws


def test_generating_ahead_uses_every_rollout_in_turn_and_requests_only_used_ones() -> None:
    source = Numbers()
    running = live(source, Clock(every=1, capacity=0, ahead_by=2))
    asked = []
    for _ in running:
        asked.append(list(source.asked))
    assert [len(each) for each in asked] == [3, 4, 5, 5, 5]
    assert asked[-1] == [0, 1, 2, 3, 4]


def test_a_rollout_without_rows_is_skipped_and_no_more_are_made_than_announced() -> None:
    """A pass over the prompts has five rollouts; a training that keeps older rows continues with these."""
    source = Numbers(lambda rollout: 0 if rollout in (1, 2) else 4)
    running = live(source, Clock(every=1))
    assert [group[0][0] for group in groups(running)] == [0, 3, 4]
    assert source.asked == [0, 1, 2, 3, 4]
    assert isinstance(running.report, Report)
    told = "2 of 5 rollouts had nothing to train on, so training ends after 3 of 5 policy steps"
    assert running.report.notes == [f"{told}; with more samples (rollout.samples) fewer have nothing"]
    keeping = Numbers(source.count)
    seen = [{rollout for rollout, _ in group} for group in groups(live(keeping, Clock(every=1, capacity=8)))]
    assert len(seen) == 5
    assert all(each <= {3, 4} for each in seen[2:])
    assert keeping.asked == [0, 1, 2, 3, 4]
    ahead = Numbers(source.count)
    assert [group[0][0] for group in groups(live(ahead, Clock(every=1, ahead_by=2)))] == [0, 3, 4]
    assert ahead.asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("steps", [0, 2, 12])
def test_a_pass_without_rows_ends_the_run(steps: int) -> None:
    with pytest.raises(DataError, match="no pair is left to train on: 5 prompts have candidates with equal scores"):
        groups(live(Numbers(lambda rollout: 0), Clock(every=1), steps=steps))


def test_a_training_says_how_many_rows_it_never_used() -> None:
    running = live(Numbers(lambda rollout: 10), Clock(every=1))
    groups(running)
    assert isinstance(running.report, Report)
    (note,) = running.report.notes
    assert note.startswith("30 of 50 rows that were made were never trained on: a policy step takes at most 4 ")


def test_rows_know_the_step_before_which_the_policy_responded() -> None:
    """The step of generation, not the step of the first use, if generation is ahead of training."""
    made: dict[int, int] = {}

    @dataclass
    class Noting(Numbers):
        def take(self, rollout: int, first: int, step: int) -> Sequence[tuple[int, int]]:
            made[rollout] = step
            return super().take(rollout, first, step)

    running = live(Noting(), Clock(every=2, ahead_by=1))
    groups(running)
    assert made == {0: 0, 1: 0, 2: 2, 3: 4, 4: 6}
    assert [step for _, step in running.rollouts] == [0, 0, 2, 4, 6]


@pytest.mark.parametrize("clock", [Clock(), Clock(2, 9), Clock(3, 20, 1), Clock(1, 6, 3)], ids=str)
@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_a_training_continued_from_a_checkpoint_draws_the_same_rows(clock: Clock, at: int) -> None:
    whole = live(Numbers(), clock, batch_size=3, epochs=3)
    expected, states = [], {}
    for step, (group,) in enumerate(whole):
        expected.append(group)
        states[step + 1] = json.loads(json.dumps(whole.state_dict()))  # plain values
    source = Numbers(asked=list(range(100)))  # rollouts from before the kill are on the disk
    again = live(source, clock, batch_size=3, epochs=3)
    again.load_state_dict(states[at])
    assert groups(again) == expected[at:]
    assert again.draws == whole.draws


def test_the_progress_shows_the_sources_text_if_there_is_one() -> None:
    told = []
    for words in ("", "3 responses judged"):
        running = live(Numbers(words=words), Clock(every=1))
        running.group(0)
        assert isinstance(running.report, Report)
        told.append(running.report.words)
    assert told == ["rollout 1 · buffer 4 · 0 % stale", "rollout 1 · buffer 4 · 0 % stale · 3 responses judged"]


def test_each_pass_responds_to_every_prompt_once_in_a_new_order() -> None:
    chunks = Chunks(prompts=50, size=8, seed=3)
    assert chunks.per_pass == 7
    passes = [[chunks.of(7 * each + i) for i in range(7)] for each in range(2)]
    for one in passes:
        assert sorted(i for chunk in one for i in chunk) == list(range(50))
        assert all(chunk == sorted(chunk) for chunk in one)
    assert passes[0] != passes[1]
    assert Chunks(50, 0, 3).of(0) == list(range(50))


class Half:
    """A judge without a score for every second response."""

    gives_scores, max_unscored = True, 0.5

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response], *_: Any) -> list[Verdict]:
        return [make_verdict(r, None if i % 2 else 50.0, "no answer") for i, r in enumerate(responses)]


def test_responses_without_a_score_count_after_a_kill_too(
    make_policy: Callable[..., Policy], world: World, tmp_path: Path
) -> None:
    """Half of the responses of 4 rollouts may lack a score; with a quarter, the third rollout fails."""

    def make(share: float) -> Responder:
        judge = Half()
        judge.max_unscored = share
        train = Held(world.prompts[:16], world.human[:16])
        told: dict[str, Any] = {"admits_human": False, "total": 4, "source": "policy@0", "limit": 4, "seed": 1}
        told |= {"ledger": Ledger(tmp_path / "ledger.sqlite"), "folder": tmp_path, "report": Report()}
        return Responder(Responding(prompts=4), train, make_policy(), cast(Judge, judge), **told)

    first = make(0.25)
    for rollout in (0, 1):
        first.take(rollout, rollout)
    again = make(0.25)
    assert again.unscored == first.unscored == ["no answer"] * 4
    with pytest.raises(JudgeError, match="6 of 16 responses of the whole training have no score"):
        again.take(2, 2)


# --- the moving average


def shake(policy: Policy, seed: int) -> None:
    draw = random.Random(seed)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(draw.gauss(0, 0.1))


def test_an_average_follows_its_equation(make_policy: Callable[..., Policy]) -> None:
    """θ_EMA ← a θ_EMA + (1 − a) θ at every n-th step, against float64; a = 0 is the policy, a = 1 the start."""
    policy = make_policy()
    averages = {(a, n): Average(policy, a, n) for a, n in [(0.9, 1), (0.5, 3), (0.0, 1), (1.0, 1)]}
    wide = {key: [p.detach().double() for p in policy.model.parameters()] for key in averages}
    for step in range(7):
        shake(policy, step)
        for (a, n), average in averages.items():
            average.follow(step)
            if step % n == n - 1:
                new = [p.detach().double() for p in policy.model.parameters()]
                wide[a, n] = [a * old + (1 - a) * p for old, p in zip(wide[a, n], new, strict=True)]
    for key, average in averages.items():
        for found, expected in zip(average.policy.model.parameters(), wide[key], strict=True):
            torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    pairs = zip(averages[0.0, 1].policy.model.parameters(), policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    again = Average(make_policy(), 0.9, 1)
    again.load_state_dict(averages[0.9, 1].state_dict())
    pairs = zip(again.policy.model.parameters(), averages[0.9, 1].policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- whole runs


ONCE = ("rollout=live", "rollout.every=0", "rollout.prompts=0")
RUN = (*SMOKE, *TINY, "iterations=1", "store=../store")


@pytest.fixture
def store(tiny: Path, tmp_path: Path) -> Path:
    """A store with the fine-tuned policy, next to the runs' folders."""
    return shutil.copytree(tiny / "store", tmp_path / "store")


def run(root: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Run in a new folder: the summary, and the step metrics of the last training."""
    folder = Path(tempfile.mkdtemp(dir=root))
    succeed(folder, *RUN, *overrides)
    found = summary(folder)
    rows = json.loads((root / "store" / found["policies"][-1] / "steps.json").read_text())
    return found, [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize(
    "words",
    [
        ("method=spin",),
        ("method=npo", "npo.start=0"),
        ("method=dnpo", "acts_from=0", "trainer.epochs=2", "npo.cache_hidden=off"),
        ("method=spin", "model.lora.rank=4"),
        ("method=spin", "reference=initial", "objective=ipo"),
    ],
    ids=" ".join,
)
def test_one_rollout_of_all_prompts_equals_training_ahead_bit_for_bit(
    words: tuple[str, ...], store: Path, tmp_path: Path
) -> None:
    (ahead, before), (once, rows) = run(tmp_path, *words), run(tmp_path, *words, *ONCE)
    assert numbers(ahead) == numbers(once)
    assert len(before) > 1
    assert [{name: row[name] for name in before[0]} for row in rows] == before
    assert ahead["policies"] != once["policies"]


def test_an_average_with_decay_0_as_the_reference_has_margins_of_0(store: Path, tmp_path: Path) -> None:
    _, rows = run(tmp_path, "method=spin", *ONCE, "reference=ema", "ema=on", "ema.decay=0")
    assert all(abs(row["margin/clean"]) < 1e-5 for row in rows)
    assert all(row["loss/policy"] == pytest.approx(0.693147, abs=1e-5) for row in rows)


def test_an_average_that_never_moves_is_the_start_as_reference(store: Path, tmp_path: Path) -> None:
    """a = 1: the same numbers as reference=start, which are computed in other batches."""
    _, start = run(tmp_path, "method=spin", *ONCE)
    _, average = run(tmp_path, "method=spin", *ONCE, "reference=ema", "ema=on", "ema.decay=1")
    for ours, theirs in zip(average, start, strict=True):
        for name in ("loss/policy", "logps/chosen", "margin/clean"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-3)


def test_files_that_a_live_training_leaves(store: Path, tmp_path: Path) -> None:
    """Pairs with the step that made them and their number of draws, responses with scores, and no file per rollout."""
    own = ("method=online_dpo", "rollout.prompts=8", "rollout.capacity=32", "rollout.every=2", "rollout.temperature=2")
    found, rows = run(tmp_path, *own)
    folder = store / found["policies"][-1]
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "policy"]
    pairs, rollouts = read(folder / "pairs.parquet", Pair), read(folder / "rollouts.parquet", Rollout)
    assert len(rollouts) == 96
    assert {row.step for row in rollouts} == set(range(0, 12, 2))
    assert {pair.step for pair in pairs} <= set(range(0, 12, 2))
    assert len({(p.id, p.step, p.chosen_sample, p.rejected_sample) for p in pairs}) == len(pairs)
    assert sum(pair.draws for pair in pairs) == sum(row["rows"] for row in rows)
    score_of = {(row.id, row.step, row.sample): row.score for row in rollouts}
    for pair in pairs:
        assert pair.chosen_score == score_of[pair.id, pair.step, pair.chosen_sample]
        assert pair.chosen_score is not None
        assert pair.rejected_score is not None
        assert pair.chosen_score > pair.rejected_score
    table = found["table"][-1]
    assert table["pairs/pairs"] == len(pairs)
    assert table["generated/responses"] == 96
    assert table["judge/verdicts"] == 96
    for name in ("reward", "kl", "entropy", "stale", "age", "buffer", "count"):
        assert all(f"rollout/{name}" in row for row in rows), name


# --- kills, and judges that go away


class Killed(BaseException):
    """Ends a run at a chosen moment, and leaves its files as a kill would."""


@pytest.mark.parametrize("folder", ["pairs", "rollouts"])
def test_a_training_that_is_killed_while_it_removes_its_files_loses_none_of_its_results(
    folder: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("method=sapo", "rollout.prompts=12", "rollout.capacity=20")
    whole, rows = run(tmp_path, *own)
    shutil.rmtree(store / "optimise")
    remove = shutil.rmtree

    def half(path: Path, *given: Any, **named: Any) -> None:
        if Path(path).name.startswith(folder) and Path(path).is_dir():
            for each in sorted(Path(path).glob("*"))[::2]:
                each.unlink()
            raise Killed
        remove(path, *given, **named)

    monkeypatch.setattr(live_stage.shutil, "rmtree", half)
    with pytest.raises(Killed):
        run(tmp_path, *own)
    monkeypatch.undo()
    again, same = run(tmp_path, *own)
    assert numbers(again) == numbers(whole)
    assert same == rows
    files = {path.name for path in (store / again["policies"][-1]).iterdir() if path.is_dir()}
    assert files == {"policy"}


@pytest.mark.parametrize("folder", ["pairs", "rollouts", "rollouts/seen"])
def test_a_rollout_that_a_checkpoint_counts_on_is_not_made_again_by_another_policy(
    folder: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is the case after a damaged file was removed, which the message about damaged files asks for."""
    method = ("method=ppo",) if folder == "rollouts/seen" else ("method=sapo", "rollout.capacity=20")
    own = (*method, "rollout.prompts=12", "trainer.checkpoint_every=1")
    whole, _ = run(tmp_path, *own)
    shutil.rmtree(store / "optimise")
    monkeypatch.setattr(live_stage, "gather", Mock(side_effect=Killed))
    with pytest.raises(Killed):
        run(tmp_path, *own)
    monkeypatch.undo()
    (partial,) = (store / "optimise").glob("*.partial")
    if folder == "pairs":
        (partial / "pairs" / "000000.json").write_text("{")
        done = train(tmp_path, *RUN[:-1], "store=store", *own)
        assert "000000.json: is damaged" in done.stderr
        assert "Traceback" not in done.stderr
    (partial / folder / "000000.parquet").unlink()
    done = train(tmp_path, *RUN[:-1], "store=store", *own)
    assert done.returncode == 1
    assert "000000.parquet: is missing" in done.stderr
    (partial / "checkpoint.ckpt").unlink()
    assert numbers(run(tmp_path, *own)[0]) == numbers(whole)


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        ("method=online_dpo", "rollout.prompts=8", "rollout.every=2", "rollout.capacity=24", "rollout.temperature=2"),
        ("method=sapo", "rollout.prompts=12", "rollout.capacity=20", "ema.every=2", "npo=trainable", "npo.start=0"),
    ],
    ids=lambda words: words[0],
)
def test_kills_in_live_training_change_no_number(words: tuple[str, ...], store: Path, tmp_path: Path) -> None:
    """At random moments, also between rollouts and checkpoints; the step metrics are the same too."""
    own = (*words, "trainer.checkpoint_every=2")
    whole, rows = run(tmp_path, *own)
    shutil.rmtree(store / "optimise")
    shutil.copytree(tmp_path / "store", tmp_path / "other" / "store")
    draw, kills = random.Random(1), 0
    folder = tmp_path / "other" / "killed"
    folder.mkdir()
    while True:
        process = Process(folder, *RUN, *own, before="tests.delays.delay")
        try:
            out, err = process.communicate(timeout=1 + 2 * draw.random() + kills)
        except subprocess.TimeoutExpired:
            process.signal_group(signal.SIGKILL)
            process.communicate(timeout=60)
            kills += 1
            continue
        assert process.returncode == 0, out + err
        break
    assert kills
    assert numbers(summary(folder)) == numbers(whole)
    path = tmp_path / "other" / "store" / summary(folder)["policies"][-1]
    again = json.loads((path / "steps.json").read_text())
    assert [{name: row[name] for name in rows[0]} for row in again] == rows
    assert not [each.name for each in path.iterdir() if each.is_dir() and each.name != "policy"]


@pytest.mark.long
@pytest.mark.parametrize("ahead_by", [0, 1])
def test_a_judge_that_fails_in_training_ends_the_run_and_the_same_command_continues_it(
    ahead_by: int, store: Path, tmp_path: Path
) -> None:
    words = ("method=online_dpo", "rollout.prompts=8", "rollout.temperature=2", "trainer.checkpoint_every=1")
    rollout, asked = f"rollout.ahead_by={ahead_by}", ("judge=openai", "judge.model=judge", "judge.structured=off")
    with judge_server(latency=0.1) as server:
        own = (
            *words,
            rollout,
            *asked,
            f"judge.base_url={server.base_url}",
            "judge.deadline=2",
            "eval.judge=${typical.judge}",
        )
        whole, _ = run(tmp_path, *own, "ledger=whole.sqlite")
        shutil.rmtree(store / "optimise")
        folder, before = tmp_path / "left", server.stats()["attempts"]
        folder.mkdir()
        process = Process(folder, *RUN, *own)
        while server.stats()["attempts"] < before + 60:  # of about 100
            assert process.returncode is None, process.communicate(timeout=60)
            time.sleep(0.05)
        server.change(faults={"503": 1.0})
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "Traceback" not in err
        assert "run the same command again" in err
        (partial,) = (store / "optimise").glob("*.partial")
        assert (partial / "checkpoint.ckpt").is_file()
        server.change(faults="none")
        again = server.stats()["delivered"]
        succeed(folder, *RUN, *own)
        assert numbers(summary(folder)) == numbers(whole)
        assert server.stats()["delivered"] - again < 60  # only the rest


@pytest.mark.long
def test_simultaneous_live_runs_on_one_store_and_ledger_have_the_numbers_of_each_alone(
    store: Path, tmp_path: Path
) -> None:
    """Two different runs, and the first one a second time, which waits for its twin and computes nothing."""
    words = ("method=online_dpo", "rollout.prompts=8", "rollout.temperature=2", "eval.judge=${typical.judge}")
    with judge_server(latency=0.05) as server:
        asked = ("judge=openai", "judge.model=judge", "judge.structured=off", f"judge.base_url={server.base_url}")
        runs = [(*words, *asked, every) for every in ("rollout.every=1", "rollout.every=2", "rollout.every=1")]
        ledgers = [tmp_path / f"alone-{number}.sqlite" for number in range(2)]
        alone = [run(tmp_path, *own, f"ledger={path}")[0] for own, path in zip(runs[:2], ledgers, strict=True)]
        assert numbers(alone[0]) != numbers(alone[1])
        shutil.rmtree(store / "optimise")
        before = server.stats()["delivered"]
        folders = [tmp_path / f"run-{number}" for number in range(len(runs))]
        for folder in folders:
            folder.mkdir()
        ledger = f"ledger={tmp_path / 'both.sqlite'}"
        at_once = [Process(folder, *RUN, *own, ledger) for folder, own in zip(folders, runs, strict=True)]
        for process in at_once:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
        found = [summary(folder) for folder in folders]
        assert [numbers(each) for each in found] == [numbers(alone[0]), numbers(alone[1]), numbers(alone[0])]
        trainings = [stage for each in found for stage in each["stages"] if stage["stage"].endswith("optimise")]
        assert sorted(stage["reused"] for stage in trainings) == [False, False, True]
        together = len(keys(tmp_path / "both.sqlite"))
        questions = sum(len(keys(path)) for path in ledgers)
        assert together < questions, "some questions are those of both runs"
        assert server.stats()["delivered"] - before <= together + 3, "each asked once, but for the three canaries"
