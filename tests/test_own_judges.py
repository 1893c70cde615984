"""Judges by policies or by ratings of the data: by hand, against plain forward passes, at their limits."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnpo.data.files import JsonLines
from dnpo.errors import DataError, JudgeError, ModelError, SettingsError
from dnpo.judges import Judge, judge_responses
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.augment import Augmentation, augment, given_pairs, score_pairs
from dnpo.judges.ensemble import Ensemble
from dnpo.judges.exact.rules import Correct, Rules
from dnpo.judges.given import GivenScores
from dnpo.judges.implicit import Implicit, implicit_reward, preference
from dnpo.judges.lessons import weighted_nll
from dnpo.judges.longer import Longer
from dnpo.judges.off import NoJudge
from dnpo.judges.self_judge import AskedPolicy, SelfJudge, average_orders
from dnpo.optimise.parts import Optimisation
from dnpo.policy.base import Scratch
from dnpo.policy.choices import Choices
from dnpo.policy.loading import load
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.policy.packing import pack, pack_shared
from dnpo.policy.question import TINY, ask, check_template, frame
from dnpo.policy.tokenizer import encode, train_tokenizer
from dnpo.records import GIVEN, HUMAN, Pair, Prompt, Response, Verdict
from dnpo.tables import read, read_all
from tests.commands import SMOKE, succeed, train
from tests.conftest import Report, World, torch_optimizer, verdicts

NEW = "policy@1"
MakePolicy = Callable[..., Policy]


def sampled(world: World, count: int, samples: int = 2) -> list[Response]:
    """Responses to the first prompts: human responses to other prompts."""
    return [
        replace(world.human[(i + 5 * s + 1) % len(world.human)], id=world.prompts[i].id, source=NEW, sample=s)
        for i in range(count)
        for s in range(samples)
    ]


def plain_logp(policy: Policy, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) by the model's own forward pass and a full softmax, in float64."""
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(response))


# --- rules for all judges


TWO = {"a": Longer(), "b": Rules()}


@pytest.mark.parametrize(
    "judge", [NoJudge(), Longer(), Rules(), Correct(), Ensemble(TWO, "mean"), Ensemble(TWO, "majority")]
)
def test_verdicts_name_the_sample(judge: Judge, world: World) -> None:
    """Two samples of one source to a prompt have two verdicts, each with the score of its text."""
    responses = [*world.human[:4], *sampled(world, 4)]
    found = verdicts(judge, world.prompts, responses)
    assert [(v.id, v.source, v.sample) for v in found] == [(r.id, r.source, r.sample) for r in responses]
    assert len({(v.id, v.source, v.sample) for v in found}) == len(responses)
    for response, verdict in zip(responses, found, strict=True):
        alone = verdicts(judge, world.prompts, [*world.human[:4], response])[-1]
        assert alone == verdict


def test_a_majority_finds_human_responses_that_were_not_passed(world: World) -> None:
    judge = Ensemble(TWO, "majority")
    new = sampled(world, 6)
    assert verdicts(judge, world.prompts, new) == verdicts(judge, world.prompts, [*world.human[:6], *new])[6:]


class Mixed(Judge):
    """Drops the sample numbers, and returns verdicts in a given order."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, prompts, responses, ledger, report):  # type: ignore[no-untyped-def]
        return [Verdict(r.id, r.source, float(r.sample)) for r in responses[:: self.step]]


def test_verdicts_are_numbered_like_their_responses(world: World, tmp_path: Path, report: Report) -> None:
    new = sampled(world, 3)
    found = judge_responses(Mixed(1), world.prompts, new, Ledger(tmp_path / "l.sqlite"), report)
    assert [v.sample for v in found] == [0, 1] * 3 == [v.score for v in found]
    with pytest.raises(JudgeError, match="order"):
        judge_responses(Mixed(-1), world.prompts, new, Ledger(tmp_path / "l.sqlite"), report)


def test_a_right_answer_is_100_and_any_other_0(world: World) -> None:
    """ReST-EM needs a reward of two values for each sample."""
    prompt = next(p for p in world.prompts if p.family == "arithmetic")
    texts = [f"It is {prompt.answer}.", "It is 12345.", ""]
    responses = [Response(prompt.id, NEW, t, [5, 2], 2, "eos", sample=n) for n, t in enumerate(texts)]
    assert [(v.sample, v.score) for v in verdicts(Correct(), [prompt], responses)] == [(0, 100.0), (1, 0.0), (2, 0.0)]


# --- the implicit reward


def test_the_implicit_reward_by_hand() -> None:
    assert implicit_reward(-4.0, -10.0, 20, beta=0.1, length_penalty=0.01) == pytest.approx(0.4, abs=1e-15)
    assert implicit_reward(-7.5, -7.5, 9, beta=2.0) == 0.0
    assert preference(0.4, 0.1) == pytest.approx(math.exp(0.4) / (math.exp(0.4) + math.exp(0.1)), abs=1e-15)
    assert preference(1.25, 1.25) == 0.5
    assert [preference(800.0, -800.0), preference(-800.0, 800.0)] == [1.0, 0.0]


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_the_implicit_reward_against_plain_forward_passes(
    penalty: float, world: World, make_policy: MakePolicy, report: Report
) -> None:
    policy, initial = make_policy(1), make_policy(0)
    responses = [*world.human[:5], *sampled(world, 5)]
    judge = Implicit(beta=0.3, length_penalty=penalty).with_policies({"policy": policy, "initial": initial})
    found = judge(world.prompts, responses, Ledger(Path("none")), report)
    ids = {p.id: p.token_ids for p in world.prompts}
    for response, verdict in zip(responses, found, strict=True):
        logps = [plain_logp(side, ids[response.id], response.token_ids) for side in (policy, initial)]
        expected = 0.3 * (logps[0] - logps[1]) - penalty * len(response.token_ids)
        assert verdict.score == pytest.approx(expected, abs=1e-4)
        assert (verdict.id, verdict.source, verdict.sample) == (response.id, response.source, response.sample)
    assert report.done == report.total == 2 * len(responses)


def test_the_initial_model_has_no_implicit_reward(world: World, make_policy: MakePolicy) -> None:
    """It is refused by its weights, and before that by the iteration."""
    judge = Implicit()
    same = judge.with_policies({"policy": make_policy(3), "initial": make_policy(3)})
    with pytest.raises(JudgeError, match="every preference ½"):
        verdicts(same, world.prompts, sampled(world, 2))
    assert "iteration 0" in (judge.accepts_policy(0, True) or "")
    assert judge.accepts_policy(0, False) is None
    assert judge.reads_policies == {"policy", "initial"}
    assert not judge.measures_texts


def test_responses_that_the_implicit_reward_cannot_judge(world: World, make_policy: MakePolicy) -> None:
    judge = Implicit().with_policies({"policy": make_policy(1), "initial": make_policy(0)})
    text = Response(world.prompts[0].id, HUMAN, "It is 5.", [], 0, "eos")
    first, second = verdicts(judge, world.prompts, [text, sampled(world, 1)[0]])
    assert first.score is None
    assert "token ids" in first.reason
    assert second.score is not None
    with pytest.raises(JudgeError, match="judge=implicit"):
        verdicts(Implicit(), world.prompts, sampled(world, 1))
    with pytest.raises(SettingsError, match=r"members\.b"):
        Ensemble({"a": Longer(), "b": Implicit()})


def test_equal_responses_have_equal_scores(
    asking: World, ask_policy: Callable[..., "AskedPolicy"], make_policy: MakePolicy
) -> None:
    """Equal bit for bit, at every position, so that a tie remains a tie."""
    new = sampled(asking, 20, samples=1)
    again = [*new, *asking.human[:9], *(replace(r, sample=1) for r in reversed(new))]
    implicit = Implicit().with_policies({"policy": make_policy(1), "initial": make_policy(0)})
    for judge in (implicit, ask_policy(3)):
        found = verdicts(judge, asking.prompts, again)
        assert [v.score for v in found[:20]] == [v.score for v in found[29:]][::-1]


def test_the_longer_response_loses_by_the_length_penalty(world: World, make_policy: MakePolicy) -> None:
    """With a penalty far above all log-ratios, scores are in the order of length."""
    judge = Implicit(beta=0.01, length_penalty=100.0).with_policies(
        {"policy": make_policy(1), "initial": make_policy(0)}
    )
    responses = sampled(world, 12)
    scores = [v.score or 0.0 for v in verdicts(judge, world.prompts, responses)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert [responses[i].tokens for i in order] == sorted(r.tokens for r in responses)


# --- a policy as judge


@pytest.fixture(scope="module")
def asking(world: World) -> World:
    """The same world with a tokenizer that has tokens for the letters."""
    tokenizer = train_tokenizer(world.prompts, 300, [frame(TINY)] * len(world.prompts))
    return world._replace(tokenizer=tokenizer)


@pytest.fixture
def ask_policy(asking: World, make_policy: MakePolicy) -> Callable[..., AskedPolicy]:
    """``judge=self`` with a random policy that has tokens for the letters."""

    def make(seed: int = 0, template: str = TINY, **config: int) -> AskedPolicy:
        policy = make_policy(seed, vocab_size=len(asking.tokenizer), **config)
        policy.tokenizer = asking.tokenizer
        bound = SelfJudge(template=template).with_policies({"taught": policy})
        assert isinstance(bound, AskedPolicy)
        return bound

    return make


def plain_choice(policy: Policy, messages: list[dict[str, str]], first: str, second: str) -> float:
    """P(A) against B by the model's own forward pass over all of the vocabulary, in float64."""
    text = f"{messages[0]['content']} A: {first} B: {second} Better:"
    ids, reply = encode(policy.tokenizer, [{"role": "user", "content": text}], "A")
    (_, other) = encode(policy.tokenizer, [{"role": "user", "content": text}], "B")
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
    full = logits.softmax(-1)
    return float(full[reply[0]] / (full[reply[0]] + full[other[0]]))


def test_both_orders_by_hand() -> None:
    assert average_orders(0.9, 0.6) == pytest.approx(0.65, abs=1e-15)
    assert average_orders(1.0, 1.0) == 0.5  # always answers A
    assert average_orders(1.0, 0.0) == 1.0
    assert average_orders(0.3, 0.3) == 0.5
    assert average_orders(0.7, 0.2) + average_orders(0.2, 0.7) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("bias", [False, True])
def test_the_choice_equals_a_plain_forward_pass(
    bias: bool, asking: World, ask_policy: Callable[..., AskedPolicy], report: Report
) -> None:
    judge = ask_policy(4)
    policy = judge.choices.policy
    if bias:
        policy.causal_lm.lm_head.bias = torch.nn.Parameter(torch.randn(len(asking.tokenizer)))
    responses = [*asking.human[:3], *sampled(asking, 6, samples=3)]
    by_id = {p.id: p for p in asking.prompts}
    found = judge(asking.prompts, responses, Ledger(Path("none")), report)
    for response, verdict in zip(responses, found, strict=True):
        messages = by_id[response.id].messages
        first = plain_choice(policy, messages, response.text, "")
        second = plain_choice(policy, messages, "", response.text)
        assert verdict.score == pytest.approx(100 * average_orders(first, second), abs=1e-3)
        assert verdict.disagreement == pytest.approx(100 * abs(first - (1 - second)), abs=1e-3)
        assert (verdict.id, verdict.source, verdict.sample) == (response.id, response.source, response.sample)
    assert report.done == report.total == 2 * len(responses)


def test_two_responses_are_compared_in_both_orders(asking: World, ask_policy: Callable[..., AskedPolicy]) -> None:
    judge = ask_policy(5)
    pairs = asking.pairs(9)
    found = judge.compare_pairs(asking.prompts[:9], pairs)
    for p, prompt, pair in zip(found, asking.prompts, pairs, strict=False):
        first = plain_choice(judge.choices.policy, prompt.messages, pair.chosen, pair.rejected)
        second = plain_choice(judge.choices.policy, prompt.messages, pair.rejected, pair.chosen)
        assert p == pytest.approx(average_orders(first, second), abs=1e-5)
        sides = [Response(prompt.id, NEW, text, [], 0, "eos") for text in (pair.chosen, pair.rejected)]
        assert judge.compare(prompt, *sides) == pytest.approx(p, abs=1e-5)
        assert judge.compare(prompt, *sides[::-1]) == pytest.approx(1 - p, abs=1e-5)
        assert judge.compare(prompt, sides[0], sides[0]) == 0.5  # a response against itself


def test_questions_share_their_common_beginning(asking: World, ask_policy: Callable[..., AskedPolicy]) -> None:
    """The same choices with about half the tokens: all questions about one prompt share their beginning."""
    judge = ask_policy(6)
    texts = [r.text for r in asking.human[:7]]
    prompt = asking.prompts[0]
    group = [judge.choices.encode(prompt.messages, *order) for text in texts for order in ((text, ""), ("", text))]
    together = judge.choices.probabilities([group])[0]
    alone = [p for (p,) in judge.choices.probabilities([[ids] for ids in group])]
    assert together == pytest.approx(alone, abs=1e-5)
    shared = len(prompt.token_ids)
    packed = pack_shared([ids[:shared] for ids in group], [ids[shared:] for ids in group], [0] * len(group))
    assert len(packed.ids_T) == sum(map(len, group)) - 13 * shared


class Shapes(TorchDispatchMode):
    """Records the shapes of all computed tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            tuple(each.shape) for each in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(each)
        }
        return out


def test_no_tensor_has_the_vocabulary(asking: World, ask_policy: Callable[..., AskedPolicy]) -> None:
    """Only two logits are computed for each question."""
    judge = ask_policy(2)
    questions = [
        judge.choices.encode(p.messages, r.text, "") for p, r in zip(asking.prompts, asking.human, strict=True)
    ]
    with Shapes() as shapes:
        judge.choices.probabilities([[ids] for ids in questions[:30]])
    assert not [shape for shape in shapes.seen if len(asking.tokenizer) in shape]
    assert (30, 2) in shapes.seen


def test_a_shared_prompt_has_the_gradient_of_separate_ones(world: World, make_policy: MakePolicy) -> None:
    """Three sequences share one prompt: their gradients are added, in place of the copies."""
    prompts = [world.prompts[0].token_ids] * 3 + [world.prompts[1].token_ids]
    completions = [r.token_ids for r in world.human[:4]]
    grads = []
    for batch in (pack(prompts, completions), pack_shared(prompts, completions, [0, 0, 0, 3])):
        policy = make_policy(2)
        policy.model.double()
        policy.logps(batch).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)  # norms are float32 in any case


def test_letters_without_tokens_are_refused_by_name(world: World, make_policy: MakePolicy) -> None:
    policy = make_policy(0)
    with pytest.raises(ModelError, match=r"'A'.*model\.question"):
        SelfJudge().with_policies({"taught": policy})
    assert "'A'" in (SelfJudge().accepts_model(policy) or "")


LACKING = [
    "{question} {y1}",
    "{question} {y1} {y2} {y3}",
    "{question} {y1} {y2} {y2}",
    "{question!r} {y1} {y2}",
    "{question} {y1} {y2:>9}",
    "{question} {y1} {}",
    "{",
]


@pytest.mark.parametrize("template", LACKING)
def test_templates_that_lack_something_are_refused(template: str) -> None:
    with pytest.raises(SettingsError, match="template"):
        SelfJudge(template=template)
    with pytest.raises(SettingsError, match=r"model\.question"):
        check_template(template, "model.question")


def test_a_question_shows_all_turns() -> None:
    turns = [{"role": "user", "content": "Hi {y1}"}, {"role": "assistant", "content": "Yes?"}]
    (asked,) = ask(TINY, [*turns, {"role": "user", "content": "Go"}], "a{", "b}")
    assert asked["content"] == "user: Hi {y1}\n\nassistant: Yes?\n\nuser: Go A: a{ B: b} Better:"
    assert ask(TINY, turns[:1], "a", "b")[0]["content"] == "Hi {y1} A: a B: b Better:"


def test_questions_longer_than_the_context_have_no_answer(
    asking: World, ask_policy: Callable[..., AskedPolicy]
) -> None:
    judge = ask_policy(0, max_position_embeddings=64)
    short = asking.human[0]
    long = replace(short, text=" ".join([short.text] * 20), sample=1)
    first, second = verdicts(judge, asking.prompts, [short, long])
    assert first.score is not None
    assert second.score is None
    assert "more than the 64" in second.reason
    pair = replace(asking.pairs(1)[0], rejected=long.text)
    with pytest.raises(JudgeError, match=pair.id):
        judge.compare_pairs(asking.prompts[:1], [pair])


def test_the_judge_asks_the_right_policy(asking: World, make_policy: MakePolicy) -> None:
    assert SelfJudge().reads_policies == {"taught"}  # the initial policy, after its lessons
    assert SelfJudge(asks="policy").reads_policies == {"policy"}
    assert SelfJudge().accepts_policy(0, True) is None
    with pytest.raises(JudgeError, match="judge=self"):
        verdicts(SelfJudge(), asking.prompts, asking.human[:1])
    with pytest.raises(JudgeError, match="judge=self"):
        SelfJudge().compare_pairs(asking.prompts[:1], asking.pairs(1))


def test_a_tokenizer_from_the_data_has_the_letters_if_asked(world: World, tmp_path: Path) -> None:
    """Without the setting neither key nor tokenizer change."""
    shape = {"lora": Lora(), "width": 32, "heads": 2, "mlp": 48, "vocabulary": 300}
    plain, asks = Scratch(**shape), Scratch(**shape, question=TINY)
    assert "question" not in plain.identity()
    assert asks.identity() == {**plain.identity(), "question": TINY}
    for name, part in (("plain", plain), ("asks", asks)):
        part.base(tmp_path / name, world.prompts)
    policy = asks.load(tmp_path / "asks")
    first, second = Choices(policy, TINY).letters
    assert first != second
    assert len(Choices(policy, TINY).encode(world.prompts[0].messages, world.human[0].text, "")) <= 50
    with pytest.raises(ModelError):
        Choices(plain.load(tmp_path / "plain"), TINY)


@pytest.mark.long
def test_a_run_ranks_by_the_taught_policy_and_asks_it_about_its_pairs(tmp_path: Path) -> None:
    """OSP on pairs that exist before training: four samples, two pairs, and the confidence of the taught policy."""
    words = ["method=spin", "iterations=1", "rollout.samples=4", "dsl=ranked", "judge=self", "strength=asked"]
    taught = ["augment=tiny", "augment.rows=64", "augment.optimisation.epochs=2"]
    succeed(tmp_path, *SMOKE, *words, "model.question=${judge.template}", *taught)

    def find(stage: str, name: str) -> Path:
        (found,) = (tmp_path / "store" / stage).glob(f"*/{name}")
        return found

    prompts = {p.id: p for p in read(find("prompts", "train.parquet"), Prompt)}
    responses = read_all(find("generate", "shard-00000.parquet").parent.glob("shard-*.parquet"), Response)
    given = read(find("judge", "verdicts.parquet"), Verdict)
    pairs = read(find("pairs", "pairs.parquet"), Pair)
    policy = load(str(find("prompts", "model")), find("augment", "policy"))
    assert policy.fingerprint() != load(str(find("prompts", "model")), find("sft", "policy")).fingerprint()
    judge = SelfJudge().with_policies({"taught": policy})
    assert isinstance(judge, AskedPolicy)
    again = {(v.id, v.source, v.sample): v.score for v in verdicts(judge, list(prompts.values()), responses)}
    assert [v.score for v in given] == pytest.approx([again[v.id, v.source, v.sample] for v in given], abs=1e-3)
    strengths = judge.compare_pairs([prompts[p.id] for p in pairs], pairs)
    assert [p.strength for p in pairs] == pytest.approx(strengths, abs=1e-5)
    assert min(strengths) >= 0.5 - 1e-5
    assert pairs[0].chosen_score == pytest.approx(again[pairs[0].id, "policy@0", pairs[0].chosen_sample], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["judge=self"], ["'A'", "model.question"]),
        (["judge=given"], ["GivenScores", "rollout=given"]),
        (["judge=implicit"], ["judge=implicit", "iteration 0"]),
        (["judge=rules", "judge@second_judge=implicit"], ["Implicit", "second_judge"]),
    ],
)
def test_runs_that_cannot_judge_do_not_begin(words: list[str], named: list[str], tmp_path: Path) -> None:
    done = train(tmp_path, *SMOKE, "method=spin", "iterations=1", "rollout.samples=2", "dsl=best_worst", *words)
    assert done.returncode == 1
    assert all(name in done.stdout + done.stderr for name in named)
    assert not list(tmp_path.glob("store/*/*/manifest.json"))


# --- teaching it


def twin(prompt: Prompt, human: str, rejected: str | None = None, name: str = "") -> Prompt:
    return replace(prompt, human=human, rejected=rejected, id=name or prompt.id)


def test_gold_pairs_are_all_pairs_that_differ_in_points(world: World) -> None:
    """Three responses with 2, 2 and 1 characters and a rejected one with 3: five different pairs, none twice."""
    prompt, other = world.prompts[0], next(p for p in world.prompts if p.messages != world.prompts[0].messages)
    rows = [
        twin(prompt, "aa"),
        twin(prompt, "bb", "ccc", "second"),
        twin(prompt, "d"),
        twin(prompt, "aa"),
        twin(other, "x"),
    ]
    found = score_pairs(rows, lambda _, text: float(len(text)))
    assert {(g.better, g.worse) for g in found} == {
        ("ccc", "aa"),
        ("ccc", "bb"),
        ("ccc", "d"),
        ("aa", "d"),
        ("bb", "d"),
    }
    assert len(found) == len({g.id for g in found}) == 5
    assert [(g.better, g.worse) for g in given_pairs(rows)] == [("bb", "ccc")]


def lessons(**settings: object) -> Augmentation:
    how = Optimisation(torch_optimizer("AdamW", lr=4e-3), epochs=8, batch_size=16)
    return Augmentation(how, **settings)  # type: ignore[arg-type]


def test_questions_come_in_both_orders_with_their_weights(
    asking: World, ask_policy: Callable[..., AskedPolicy]
) -> None:
    policy = ask_policy(0).choices.policy
    rows = [twin(p, "It is 1.", "It is 22.") for p in asking.prompts[:6]]
    how = lessons(rows=8, labels="given", weight=3.0)
    pairs = how.make_pairs(rows, 5)
    assert len(pairs) == 4
    assert pairs == how.make_pairs(rows, 5)
    made = how.make_rows(policy, pairs)
    assert len(made) == 8
    letters = Choices(policy, TINY).letters
    for pair, one, other in zip(pairs, made[::2], made[1::2], strict=True):
        assert [one.ids[0], other.ids[0]] == list(letters)
        assert one.weights == other.weights == [3.0, 1.0]
        assert one.ids[1] == asking.tokenizer.eos_token_id
        assert one.prompt_ids == Choices(policy, TINY).encode(pair.messages, pair.better, pair.worse)
        assert other.prompt_ids == Choices(policy, TINY).encode(pair.messages, pair.worse, pair.better)
    with pytest.raises(DataError, match=r"augment\.labels=given"):
        how.make_pairs(asking.prompts, 0)


def test_the_weighted_loss_by_hand() -> None:
    logp_N = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    assert float(weighted_nll(logp_N, torch.tensor([3.0, 1.0]))) == pytest.approx(1.5, abs=1e-15)
    assert float(weighted_nll(logp_N, torch.ones(2))) == pytest.approx(2.0, abs=1e-15)


def test_teaching_is_learnt_and_micro_batches_change_nothing(
    asking: World, ask_policy: Callable[..., AskedPolicy], tmp_path: Path, report: Report
) -> None:
    """A policy learns that short responses are better, and applies this to responses it has not seen."""
    texts = ["Yes.", "It is the number of all the letters in it."]
    rows = [twin(p, *texts) for p in asking.prompts[:40]]
    weights = []
    for size in (0, 5):
        judge = ask_policy(1)
        policy = judge.choices.policy
        how = lessons(rows=80, labels="given", weight=2.0)
        made = how.make_rows(policy, how.make_pairs(rows, 0))
        optimisation = replace(how.optimisation, micro_batch_size=size)
        (tmp_path / str(size)).mkdir()
        history = augment(policy, made, optimisation, seed=0, folder=tmp_path / str(size), report=report)
        assert "data.gold_pairs" in report.notes[-1]  # so few that the policy would memorise them
        assert history[-1]["loss/policy"] < 0.1 < history[0]["loss/policy"]
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
        unseen = [replace(pair, chosen=texts[0], rejected=texts[1]) for pair in asking.pairs(80)[60:]]
        assert min(judge.compare_pairs(asking.prompts[60:80], unseen)) > 0.9
    assert float((weights[0] - weights[1]).abs().max()) < 1e-2


class Killed(Report):
    """Ends the training in the middle of a step."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, amount: int = 1) -> None:
        super().advance(amount)
        if self.done == self.after:
            raise InterruptedError


def test_killed_lessons_continue_bit_for_bit(
    asking: World, ask_policy: Callable[..., AskedPolicy], tmp_path: Path
) -> None:
    rows = [twin(p, "It is 1.", "It is 22.") for p in asking.prompts[:12]]
    how = lessons(rows=24, labels="given")
    optimisation = replace(how.optimisation, epochs=5, batch_size=8, checkpoint_every=4)
    found = []
    for killed in (False, True):
        policy, folder = ask_policy(1).choices.policy, tmp_path / str(killed)
        folder.mkdir()
        made = how.make_rows(policy, how.make_pairs(rows, 0))
        if killed:
            with pytest.raises(InterruptedError):
                augment(policy, made, optimisation, seed=0, folder=folder, report=Killed(after=10))
            policy = ask_policy(1).choices.policy
        history = augment(policy, made, optimisation, seed=0, folder=folder, report=Report())
        assert [row["step"] for row in history] == list(range(15))
        found.append((policy.fingerprint(), [row["loss/policy"] for row in history]))
    assert found[0] == found[1]


# --- ratings of the data


def test_ratings_of_the_data_are_read(world: World) -> None:
    rated = replace(world.prompts[0], human_score=8.5, rejected="No.", rejected_score=3.0)
    partly = replace(world.prompts[1], human_score=4.0, rejected="No.")
    sides = [Response(p.id, source, "No.", [], 0, "eos") for p in (rated, partly) for source in (HUMAN, GIVEN)]
    new = Response(rated.id, NEW, "No.", [], 0, "eos")
    found = verdicts(GivenScores(column="overall"), [rated, partly], [*sides, new])
    assert [v.score for v in found] == [8.5, 3.0, 4.0, None, None]
    assert "overall" in found[3].reason
    assert "generated" in found[4].reason
    judge = GivenScores(column="overall")
    assert judge.accepts([rated] * 50) is None
    assert judge.accepts([*[rated] * 98, partly]) is None  # within judge.max_unscored
    refusal = judge.accepts([rated, partly]) or ""
    assert all(part in refusal for part in ("judge.column=overall", "1 of 2", partly.id, "rejected", "data.columns"))
    assert "human (or chosen)" in (judge.accepts(world.prompts) or "")
    assert not judge.measures_texts


def test_ratings_from_a_file(tmp_path: Path) -> None:
    """In UltraFeedback's form, and under the user's names; without them the message says how to name them."""
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}.", "best": 9.0, "worst": i / 10}
        for i in range(20)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    judge = GivenScores(column="best")
    common = {"path": str(path), "near_duplicates": 0.0, "max_prompt_tokens": 99, "max_response_tokens": 99}
    named = JsonLines(**common, columns={"chosen_score": "best", "rejected_score": "worst"}).read()[0]["train"]
    assert judge.accepts(named) is None
    sides = [
        Response(p.id, source, text or "", [], 0, "eos")
        for p in named
        for source, text in ((HUMAN, p.human), (GIVEN, p.rejected))
    ]
    found = verdicts(judge, named, sides)
    numbers = [float(p.human.removeprefix("Yes, ").removesuffix(".")) for p in named]
    assert [v.score for v in found[::2]] == [9.0] * len(named)
    assert [v.score for v in found[1::2]] == [number / 10 for number in numbers]
    unnamed = JsonLines(**common).read()[0]["train"]
    assert "judge.column=best" in (judge.accepts(unnamed) or "")
