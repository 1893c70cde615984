"""The options of a method: contradictory ones are refused by name, and equivalent ones give equal results."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from dnpo.commands.train import build
from dnpo.data.curriculum import Context
from dnpo.data.curriculum.robust import Robust
from dnpo.dsl import HardLabels, with_strengths
from dnpo.errors import StepZeroError
from dnpo.loop import chain
from dnpo.optimise.npo import SilentModule
from dnpo.optimise.objective import log_ratio_gap
from dnpo.optimise.parts import Logistic, PairOptimisation, Refined
from dnpo.optimise.preference import optimise, score_first
from dnpo.optimise.reference import read_scores, score
from dnpo.policy.model import Policy
from dnpo.records import Pair
from tests.commands import SMOKE, numbers, succeed, summary, train
from tests.conftest import Report, World, torch_optimizer
from tests.test_conf import METHODS, composed


def computed(folder: Path) -> list[str]:
    """The stages computed by the runs in a folder."""
    return sorted(found.parent.parent.name for found in folder.glob("store/*/*/manifest.json"))


# --- bad input


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("method=dpo data.gold_pairs=0", r"given pairs.*none of its 192 rows has a rejected response"),
        ("method=spin judge=implicit dsl=two rollout.samples=2", r"judge=implicit in iteration 0: .*seed pairs"),
        ("method=spin judge=rules dsl=ranked", r"rollout\.samples=1: Ranked \(dsl\).*needs 2 or more"),
        ("method=hg_dpo rollout.temperature=0", r"rollout\.samples=4: with temperature=0 .*all samples .* equal"),
        ("method=spin judge=rules dsl=best_worst", r"rollout\.samples=1: BestWorst"),
        ("method=spin judge=rules dsl=random", r"rollout\.samples=1: RandomPairs"),
        ("method=hg_dpo rollout.samples=1", r"rollout\.samples=1: BestWorst"),
        ("method=spin prompts=fresh iterations=5", r"prompts\.shares=.*iterations=5 needs 5"),
        ("method=spa prompts.1.shares=[8,20]", r"prompts\.shares=.*iterations=4 needs 3"),
        ("method=spin prompts=fresh data.train=1", r"prompts\.shares=.*leave none for iteration"),
        ("method=spin objective.beta=[1,1,2]", r"objective\.beta: has 3 values.*iterations=2"),
        ("method=npo npo.alpha=[0.1,0.01,0.1]", r"npo\.alpha: has 3 values.*iterations=2"),
        ("method=spin reference=[start,initial,start]", r"reference: has 3 values.*iterations=2"),
        ("method=spa iterations=2", r"objective: has 4 values.*iterations=2"),
        ("method=spin reference=none", r"reference=none: Logistic \(objective\) reads the reference"),
        ("method=ipo reference=none", r"reference=none: Squared \(objective\) reads the reference"),
        ("method=npo reference=none", r"reference=none: "),
        ("method=orpo npo=trainable npo.start=0", r"npo: TrainableNoise .*does not read; take npo=off"),
        ("method=orpo npo=trainable", r"npo: TrainableNoise .*does not read; take npo=off"),
        ("method=simpo npo=trainable npo.start=0", r"npo: TrainableNoise .*does not read; take npo=off"),
        ("method=rest_em npo=fixed npo.start=0", r"npo: FixedNoise .*does not read; take npo=off"),
        ("method=spin start=base", r"start=base: a model made from scratch .*take start=initial"),
        ("method=spin start=[previous,base]", r"start=base: .*iteration 1 of 2"),
        (
            "method=alpha_spin curriculum.shares=[-1,2]",
            r"curriculum\.shares=\[-1, 2\]: expected a list of numbers of at least 0",
        ),
        ("method=alpha_spin curriculum.shares=[0,0]", r"curriculum\.shares.*sum to 0"),
        ("method=alpha_spin curriculum.shares=[0,1]", r"curriculum\.shares=.*in iteration 0 .*sum to 0"),
        ("method=alpha_spin curriculum.shares=[1,1,1]", r"curriculum\.shares=.*iterations=2"),
        (
            "method=spin prompts=fresh prompts.shares=[0,1]",
            r"prompts\.shares=\[0, 1\]: expected a list of numbers above 0",
        ),
        ("method=spin judge=self strength=asked dsl=ranked rollout.samples=1", r"rollout\.samples=1"),
        ("method=spin judge=rules dsl=ranked rollout.samples=2 strength=asked", r"strength=asked: needs a judge"),
        ("method=spin strength=implicit", r"strength: RewardStrength .*HumanChosen \(dsl\) makes pairs without scores"),
        (
            "method=spin strength=implicit judge=rules dsl=two rollout.samples=2",
            r"strength: .*Rules \(judge\) are points",
        ),
        ("method=spin curriculum=robust", r"curriculum: Robust .*HumanChosen \(dsl\) makes pairs without scores"),
        ("method=dnpo curriculum=robust dsl.start=0", r"curriculum: Robust .*points; take judge=implicit"),
        ("method=spin dsl=correct judge=correct", r"dsl: Right gives chosen responses alone.*objective=nll"),
        ("method=spin dsl=given", r"dsl=given: .*take rollout=given"),
        ("method=spin rollout=given dsl=ranked judge=rules", r"rollout=given: Ranked"),
        ("method=spin start=nobody", r"start='nobody': .*'previous', 'initial' or 'base'"),
        ("method=spa dsl=score", r"dsl=score: method=spa gives dsl as a list, one for each iteration"),
        ("method=robust curriculum=off", r"curriculum=off: method=robust gives curriculum as a list"),
        ("method=spin rollout=live dsl=ranked judge=rules", r"rollout\.samples=1: Ranked"),
        ("method=spin rollout=live dsl=given", r"dsl=given: .*rollout=live generates"),
        ("method=spin rollout=live rollout.capacity=8", r"rollout\.capacity=8: .*trainer\.batch_size=32"),
        ("method=spin rollout=live rollout.every=0", r"every=0: .*prompts="),
        (
            "method=spin rollout=live rollout.every=0 rollout.prompts=0 rollout.ahead_by=1",
            r"ahead_by=1: has no meaning with a single rollout",
        ),
        ("method=spin rollout=live rollout.segment=2 rollout.samples=2", r"samples=2: a segment is generated once"),
        (
            "method=spin rollout=live rollout.segment=2 dsl=best judge=rules objective=nll reference=none",
            r"rollout\.segment=2: .*but Best does not do so",
        ),
        ("method=spin rollout=live rollout.by=ema", r"rollout\.by=ema: there is no moving average.*ema=on"),
        ("method=spin reference=ema", r"reference=ema: there is no moving average.*ema=on"),
        ("method=spin ema=on", r"ema=on: nothing reads the moving average"),
        ("method=orpo ema=on", r"ema=on: nothing reads the moving average \(reference=none"),
        ("method=alpha_spin rollout=live", r"curriculum: Mix chooses among all pairs.*rollout=live"),
        ("method=hg_dpo rollout=live", r"objective: Statistics measures the reference on all pairs.*rollout=ahead"),
        ("method=spin rollout=live npo=matched npo.start=0", r"npo=matched: .*different pairs"),
        ("method=spin rollout=live judge=implicit dsl=two rollout.samples=2", r"judge=implicit in iteration 0"),
        ("method=osp rollout.ahead_by=1", r"rollout\.ahead_by=1: SelfJudge \(judge\) asks policies of this run"),
        (
            "method=online_dpo judge=openai judge.model=gpt-4o-mini eval.judge=${typical.judge}",
            r"judge\.max_cost=null: with rollout=live a paid judge",
        ),
        ("method=online_dpo judge=given", r"judge: GivenScores .*rollout=live generates others"),
        ("method=ppo rollout.append_eos=true", r"rollout\.append_eos=true: .*take rollout\.append_eos=false"),
        ("method=ppo reference=ema ema=on", r"ema: ClippedRatio \(objective\) reads no moving average"),
    ],
    ids=lambda text: text.replace(" ", "_") if "method" in text else "",
)
def test_options_that_do_not_fit_together_are_refused_by_name(overrides: str, named: str, tmp_path: Path) -> None:
    done = train(tmp_path, *SMOKE, *overrides.split())
    assert done.returncode == 1, done.stdout
    assert re.search(named, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not computed(tmp_path)


def test_the_judge_of_evaluations_has_to_accept_the_rows_before_anything_is_computed(tmp_path: Path) -> None:
    """Methods whose judge cannot score texts measure by another judge, which needs verifiable answers."""
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"It is {i + 1}."} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = (
        "method=spa",
        "data=jsonl",
        "data.path=rows.jsonl",
        "data.max_response_tokens=24",
        "data.max_prompt_tokens=48",
    )
    done = train(tmp_path, *SMOKE, *own)
    assert done.returncode == 1
    assert re.search(r"as judge of evaluations: .*verifiable answer.*Change eval\.judge", done.stderr), done.stderr
    assert not computed(tmp_path)
    assert train(tmp_path, *SMOKE, *own, "eval.judge=null", "check=true").returncode == 0


def test_noise_that_never_starts_is_reported(tmp_path: Path) -> None:
    """``method=ipo npo=trainable`` has one iteration, and noise starts at iteration 1 unless a setting changes this."""
    done = train(tmp_path, *SMOKE, "method=ipo", "npo=trainable", "plan=true")
    assert done.returncode == 0
    assert done.stderr == (
        "warning: npo.start=1: the run has iterations=1, numbered from 0, so it never begins; give at most 0\n"
    )
    assert train(tmp_path, *SMOKE, "method=ipo", "npo=trainable", "npo.start=0", "plan=true").stderr == ""
    both = train(tmp_path, *SMOKE, "acts_from=9", "plan=true").stderr
    assert "so they never begin; give at most 1 (acts_from=… sets both)" in both


# --- sharing


def test_methods_of_one_seed_share_fine_tuning_and_common_responses() -> None:
    """Keys alone: nothing is computed. The tiny world and its tokenizer have to be the same for all of them."""
    same = ("data.gold_pairs=0.0333", "model.question='{question} A: {y1} B: {y2} Better:'")
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for method in METHODS:
        run, _, _ = build(composed("scale=smoke", "tracking=off", f"method={method}", *same))
        for iteration in chain(run):
            for stage in iteration.stages:
                found[stage.title][stage.key].add(method)
    for title in ("prompts", "supervised fine-tuning", "evaluate"):
        assert list(found[title].values()) == [set(METHODS)], title
    responses, labels = found["iteration 0 · generate"].values(), found["iteration 0 · label"].values()
    one_sample = {"alpha_spin", "dnpo", "dsl", "fixed_noise", "npo", "scip", "spin", "spin_paper"}
    assert one_sample in responses
    assert one_sample in labels
    assert {"hg_dpo", "raft"} in responses, "as many samples of the same prompts"
    assert {"dpo", "ipo", "orpo", "simpo"} in labels, "the data's own pairs"
    assert {"robust", "spa"} in found["iteration 0 · optimise"].values(), "the seed pairs"
    assert {"dnpo", "dsl", "fixed_noise", "npo", "spin"} in found["iteration 0 · optimise"].values()


def test_the_initial_policy_as_reference_changes_no_key_of_the_first_iteration() -> None:
    """In the iteration that starts from it, ``reference=initial`` equals ``reference=start``; later it does not."""

    def keys(*overrides: str) -> list[dict[str, str]]:
        run, _, _ = build(composed("scale=smoke", "tracking=off", "method=spin", *overrides))
        return [{stage.title: stage.key for stage in iteration.stages} for iteration in chain(run)]

    started, initial = keys(), keys("reference=initial")
    assert started[:2] == initial[:2]
    differing = {title for title, key in started[2].items() if initial[2][title] != key}
    assert differing == {f"iteration 1 · {name}" for name in ("reference", "optimise", "evaluate", "drift")}
    assert keys("reference=initial", "start=initial")[:2] == started[:2]


def test_a_moving_average_is_kept_in_the_iterations_that_read_it() -> None:
    """``reference=[start,ema] ema=on``: iteration 0 equals that of a run without an average."""

    def keys(*overrides: str) -> list[str]:
        run, _, _ = build(composed("scale=smoke", "tracking=off", "method=spin", *overrides))
        return [iteration.policy.key for iteration in chain(run)]

    plain, own = keys(), keys("reference=[start,ema]", "ema=on")
    assert own[:2] == plain[:2]
    assert own[2] != keys("reference=[start,ema]", "ema=on", "ema.decay=0.5")[2]


# --- identities


def trained(policy: Policy, pairs: Sequence[Pair], objective: Any, folder: Path) -> tuple[Any, list[Tensor]]:
    """The metrics of a short training against its starting policy, without its speed, and its weights."""
    folder.mkdir()
    score(policy, pairs, autocast=False, folder=folder, report=Report())
    how = PairOptimisation(optimizer=torch_optimizer("RMSprop", lr=1e-3), batch_size=4, epochs=2, clip=0.0)
    reference = read_scores(folder, len(pairs))
    told = {"noise": SilentModule(), "objective": objective, "beta": objective.beta, "seed": 3}
    rows = optimise(policy, pairs, reference, how, **told, folder=folder, report=Report())
    kept = [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
    return kept, [weight.detach().clone() for weight in policy.model.parameters()]


def assert_same(one: tuple[Any, list[Tensor]], other: tuple[Any, list[Tensor]]) -> None:
    """Bit for bit."""
    assert one[0] == other[0]
    assert len(one[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


class Plain:
    """softplus(−β · gap), without strengths."""

    beta = 0.5

    def __call__(self, policy: Any, reference: Any, facts: Any) -> Tensor:
        return softplus(-self.beta * log_ratio_gap(policy, reference))


def test_hard_labels_equal_strengths_of_1_bit_for_bit(
    world: World, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    pairs = world.pairs(8)
    certain = with_strengths(pairs, [1.0] * len(pairs))
    assert certain == with_strengths(pairs, HardLabels()({}, pairs, None)) == pairs
    soft = trained(make_policy(), certain, Logistic(beta=0.5), tmp_path / "soft")
    assert_same(soft, trained(make_policy(), pairs, Plain(), tmp_path / "hard"))


def test_refined_without_alpha_equals_logistic_bit_for_bit(
    world: World, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    pairs = world.pairs(8)
    refined = trained(make_policy(), pairs, Refined(beta=0.5, alpha=0.0), tmp_path / "refined")
    assert_same(refined, trained(make_policy(), pairs, Logistic(beta=0.5), tmp_path / "logistic"))


def test_a_ball_of_radius_0_does_not_change_pairs(world: World) -> None:
    pairs = [replace(pair, chosen_score=0.3 * i, rejected_score=0.5) for i, pair in enumerate(world.pairs(8))]
    rows, counts = Robust(epsilon=0)(pairs, [], Context(seed=0, iteration=1, embed=lambda _: pytest.fail("not read")))
    assert rows == pairs
    assert counts["moved"] == counts["split"] == 0


def test_a_training_that_starts_from_another_policy_is_stopped(
    world: World, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """If the reference is the initial policy or there is none, plain forward passes of the right start give the
    values."""
    pairs = world.pairs(8)
    how = PairOptimisation(optimizer=torch_optimizer("RMSprop", lr=1e-3), batch_size=4)
    initial, start, other = make_policy(1), make_policy(2), make_policy(3)
    score(initial, pairs, autocast=False, folder=tmp_path, report=Report())
    expected = score_first(start, pairs, how, Logistic(beta=0.5), seed=3, folder=tmp_path)
    told = {"noise": SilentModule(), "objective": Logistic(beta=0.5), "beta": 0.5, "seed": 3, "expected": expected}
    for reference in (read_scores(tmp_path, len(pairs)), None):
        with pytest.raises(StepZeroError, match="the policy is not the one that training starts from"):
            optimise(other, pairs, reference, how, **told, folder=tmp_path / "wrong", report=Report())
    optimise(start, pairs, read_scores(tmp_path, len(pairs)), how, **told, folder=tmp_path / "right", report=Report())


# --- a method that no paper has

DOUBTS = """
# @package _global_
# conf/method/doubts.yaml
defaults:
  - override /dsl: null
  - override /prompts: null
  - override /rollout: null
  - override /strength: null
  - override /judge: implicit
  - override /curriculum: accumulate
  - override /objective: ipo
  - override /npo: trainable
iterations: 3
reference: [start, initial]
prompts:
  - {_target_: dnpo.data.prompts.Seed}
  - {_target_: dnpo.data.prompts.Fresh, seed_share: 0.2, shares: [1, 1]}
rollout:
  - {_target_: dnpo.generate.Given}
  - {_target_: dnpo.generate.Ahead, samples: 4, temperature: 1.2}
dsl:
  - {_target_: dnpo.dsl.GivenPairs}
  - {_target_: dnpo.dsl.Ranked}
strength:
  - {_target_: dnpo.dsl.HardLabels}
  - {_target_: dnpo.dsl.RewardStrength}
objective:
  beta: [0.1, 0.05]
npo:
  start: 0
typical:
  gold_pairs: 0.2
eval:
  judge: ${typical.judge}
"""


@pytest.mark.long
def test_a_method_from_no_paper_is_one_file_of_options(tmp_path: Path) -> None:
    """Seed pairs, then ranked pairs with soft labels, each with earlier pairs, under a squared loss with noise."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "doubts.yaml").write_text(DOUBTS.lstrip())
    given = ("--config-dir=conf", "method=doubts", *SMOKE, "data.train=64")
    printed = succeed(tmp_path, *given)
    _, seed, *others = numbers(summary(tmp_path))
    assert seed["npo/variance"] > 0
    for row in others:
        assert 0.5 <= row["pairs/strength"] < 1
        assert row["curriculum/earlier"] > 0
        assert row["curriculum/trained"] == row["curriculum/earlier"] + row["pairs/pairs"]
    assert "training learns from another judge" in printed
    again = succeed(tmp_path, *given)
    assert f"all {len(computed(tmp_path))} stages are stored already" in again


@pytest.mark.long
def test_the_screen_names_the_labeller(finished: Path) -> None:
    """DNPO's judge also gives the scores; SPIN has no judge; others have another judge."""
    printed = succeed(finished, *SMOKE, "method=spin", "iterations=1")
    assert "(0-100); no judge labels the pairs." in printed
    printed = succeed(
        finished, *SMOKE, "method=dsl", "dsl.start=0", "iterations=1", "judge=longer", "eval.judge=${typical.judge}"
    )
    assert "(0-100); training learns from another judge." in printed


# --- errors found only in the run


@pytest.mark.long
def test_equal_samples_or_only_wrong_answers_stop_the_run_with_counts(finished: Path) -> None:
    greedy = ("method=spin", "judge=rules", "dsl=best_worst", "rollout.samples=2", "rollout.top_p=1e-6")
    done = train(finished, *SMOKE, *greedy, "iterations=1")
    assert done.returncode == 1
    assert re.search(r"no pair is left to train on: \d+ responses are identical", done.stderr), done.stderr
    done = train(finished, *SMOKE, "method=rest_em", "rollout.samples=2", "rollout.temperature=50", "iterations=1")
    assert done.returncode == 1
    assert re.search(
        r"192 prompts have no right answer; pass@1 is 0 in this iteration; pass@2 is 0 in this iteration", done.stderr
    )
