"""The gate: each of its lines is triggered by some test here."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dnpo.commands.train import build, pass_gate
from dnpo.data.curriculum.prune import Prune
from dnpo.data.prompts import All, Fresh
from dnpo.data.seen import hash_conversation
from dnpo.errors import DataError, JudgeError, ModelError, SettingsError
from dnpo.generate import Sampling
from dnpo.judges import Canary, Judge
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.asked.openai import OpenAI
from dnpo.judges.augment import Augmentation
from dnpo.judges.exact.code import UnitTests
from dnpo.judges.exact.rules import Rules
from dnpo.judges.off import NoJudge
from dnpo.loop import chain
from dnpo.optimise.npo import SilentModule, TrainableModule
from dnpo.optimise.parts import Optimisation, PairOptimisation
from dnpo.policy.base import Scratch
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.policy.packing import pack
from dnpo.policy.template import PLAIN_TEMPLATE
from dnpo.policy.tokenizer import TEMPLATE, train_tokenizer
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.running.console import Console
from dnpo.running.gate import chain as chain_check
from dnpo.running.gate import gate, judge, machine, needs, rows, show, text
from dnpo.running.gate.finding import OWN_ERROR, Finding, refuse
from dnpo.settings import Bound, conf_folder
from dnpo.stages.plan import Iteration, Run
from dnpo.store import Store
from dnpo.store.manifests import seal

from .commands import train
from .conftest import World, torch_optimizer
from .judge_server import judge_server


def row(name: str, question: str = "What is 1 plus 2?", human: str = "It is 3.", **more: Any) -> Prompt:
    return Prompt(name, [{"role": "user", "content": question}], human, **more)


QUESTIONS = [
    *("What is 1 plus 2?", "Sort the numbers 3 1 2.", "Reverse the words red fox sun.", "Name the capital of Bovia."),
    *(
        "How many cm are in 4 m?",
        "How many times is t in butter?",
        "What is the river of Dastan?",
        "Backwards: cup dog.",
    ),
]
ANSWERED = [{"role": "assistant", "content": "It is 3."}, {"role": "user", "content": "And 2 plus 2?"}]
PLAIN = [row(str(i), question, f"It is {i}.") for i, question in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(PLAIN * 3, 400)


@pytest.fixture
def with_template(tokenizer: Any) -> Callable[[str], Any]:
    """The same tokenizer with another template."""

    def make(template: str) -> Any:
        import copy

        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return make


def encoded(tokenizer: Any, some: Sequence[Prompt] = PLAIN, stop_ids: Sequence[int] = ()) -> list[text.EncodedRow]:
    return text.encode_rows(tokenizer, some, stop_ids)


def fires(finding: Finding, level: str, *said: str) -> None:
    """A failed check has a number or an example, and names the setting to change."""
    assert finding.level == level, finding
    for words in said:
        assert words in f"{finding.name}: {finding.text} → {finding.setting}", finding
    assert level == "pass" or finding.setting or finding.text.endswith(OWN_ERROR)


# --- template and tokens


def test_the_generation_text_is_a_prefix_of_the_training_text(tokenizer: Any) -> None:
    fires(text.template(tokenizer, PLAIN), "pass", "8 rows")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            TEMPLATE.replace("'<|assistant|>' }}{% endif", "'<|assistant|>Answer: ' }}{% endif"),
            "They differ from character",
        ),
        (TEMPLATE.replace("{{ bos_token }}", "{{ bos_token if add_generation_prompt else '' }}"), "character 1"),
        ("{{ messages[-1]['content'] }}{{ '' if add_generation_prompt else eos_token }}", "8 of 8 rows"),
        ("{{ raise_exception('no system turns') }}", "no system turns"),
    ],
)
def test_template_that_differs_stops(with_template: Callable[[str], Any], template: str, said: str) -> None:
    broken = with_template(template)
    fires(text.template(broken, PLAIN), "stop", said, "model.chat_template")


def test_the_first_row_that_a_template_fails_for_is_named(with_template: Callable[[str], Any]) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    some = [*PLAIN, replace(PLAIN[0], id="with-system", messages=[{"role": "system", "content": "Be brief."}])]
    fires(text.template(with_template(refuses), some), "stop", "1 of 9 rows", "with-system", "no system turns")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "turn 1 of 2 (user)"),
        (TEMPLATE.replace("['content']", "['content'][:12]"), "'What is 1 plus 2?' with its 17 characters"),
        (TEMPLATE.replace("in messages", "in messages[-2:]"), "turn 1 of"),
        (TEMPLATE.replace("['content']", "['content']|upper"), "leaves out or changes"),
        (TEMPLATE.replace("['content'] }}", "['content'] if message['role'] != 'system' }}"), "turn 1 of 3 (system)"),
        ("{{ range(9)|random }}" + TEMPLATE, "of 10 rows"),
        ("{{ strftime_now('%d %b %Y') }}" + TEMPLATE, "set model.template_date"),
        ("{% if strftime_now('%H')|int > 12 %}Good evening.{% endif %}" + TEMPLATE, "reads the clock"),
    ],
)
def test_template_that_loses_data_or_depends_on_the_day_stops(
    with_template: Callable[[str], Any], template: str, said: str
) -> None:
    system = [{"role": "system", "content": "Be brief."}, *PLAIN[0].messages]
    some = [*PLAIN, replace(PLAIN[0], id="system", messages=system)]
    some.append(replace(PLAIN[0], id="long", messages=[*PLAIN[0].messages, *ANSWERED]))
    fires(text.template(with_template(template), some), "stop", said, "model.chat_template")


@pytest.mark.parametrize("core", ["a", "s", "assistant", "user", "<"])
def test_an_omitted_turn_is_not_found_in_the_templates_own_text(with_template: Callable[[str], Any], core: str) -> None:
    """Each of these texts is part of the template's own text."""
    some = [row("short", core)]
    fires(text.template(with_template(TEMPLATE), some), "pass")
    empty = with_template(
        TEMPLATE.replace("+ message['content']", "+ (message['content'] if message.role != 'user' else '')")
    )
    fires(text.template(empty, some), "stop", "turn 1 of 2 (user)")


def test_training_text_is_prompt_response_and_end(with_template: Callable[[str], Any]) -> None:
    fires(text.training_text(with_template(TEMPLATE), [2], PLAIN), "pass", "nothing else, in 8 rows")
    more = with_template(TEMPLATE.replace("eos_token if", "(' (end)' + eos_token) if"))
    fires(text.training_text(more, [2], PLAIN), "stop", "8 of 8 rows", "' (end)'", "model.chat_template")
    thinks = TEMPLATE.replace(
        "+ message['content']", "+ ('<t></t>' if loop.last and THINKS else '') + message['content']"
    )
    always = with_template(thinks.replace("THINKS", "message.role == 'assistant'"))
    fires(text.training_text(always, [2], PLAIN), "pass", "'<t></t>'", "8 of the responses", "part of the prompt")
    some = [*PLAIN, row("thought", human="<t>so</t>It is 3.")]
    unless = with_template(thinks.replace("THINKS", "message.role == 'assistant' and '<t>' not in message.content"))
    fires(text.training_text(unless, [2], some), "warn", "8 of the responses", "different ways")


def test_rows_that_spell_control_tokens_are_counted(tokenizer: Any) -> None:
    fires(text.control_tokens(tokenizer, [2], PLAIN), "pass", "none of 8 rows")
    some = [*PLAIN, row("html", human="Close it with </s> then."), row("turn", "Hi<|assistant|>")]
    fires(text.control_tokens(tokenizer, [2], some), "warn", "2 of 10 rows", "html with </s>", "as ordinary text")
    own = encoded(tokenizer, some)
    fires(text.one_bos(tokenizer, own), "pass")
    fires(text.one_eos(tokenizer, [2], own), "pass")


def test_the_border_of_prompt_and_response_without_a_difference(tokenizer: Any) -> None:
    fires(text.seam(tokenizer, PLAIN), "pass", "together and apart, in 8 rows")


def test_the_border_under_a_tokenizer_that_starts_texts_with_a_space() -> None:
    """As in SentencePiece, a response after its prompt has other tokens than alone; those after the prompt are used."""
    spaced = Tokenizer(models.BPE(unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    spaced.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    spaced.train_from_iterator([t for p in PLAIN for t in (p.messages[0]["content"], p.human, "### user")], trainer)
    make: Any = PreTrainedTokenizerFast
    wrapped = make(tokenizer_object=spaced, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = PLAIN_TEMPLATE
    fires(text.seam(wrapped, PLAIN), "pass", "8 of 8 rows", "after its prompt")


def test_a_moved_border_is_reported(with_template: Callable[[str], Any]) -> None:
    """The prompt ends with a space, and tokens include the space before a word, so one token would span the border."""
    broken = with_template(
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    some = [replace(p, human=f"is {p.id}.") for p in PLAIN]
    fires(text.seam(broken, some), "warn", "8 of 8 rows", "tokenised by itself", "model.chat_template")


def test_one_bos(tokenizer: Any) -> None:
    fires(text.one_bos(tokenizer, encoded(tokenizer)), "pass", "8 of 8 prompts begin with <s>")


def test_no_bos_where_the_tokenizer_has_none(with_template: Callable[[str], Any]) -> None:
    without = with_template(TEMPLATE.replace("{{ bos_token }}", ""))
    without.bos_token = None
    fires(text.one_bos(without, encoded(without)), "pass", "has no beginning-of-sequence token")


def test_bos_that_the_template_puts_twice_stops(with_template: Callable[[str], Any]) -> None:
    twice = with_template("{{ bos_token }}" + TEMPLATE)
    fires(text.one_bos(twice, encoded(twice)), "stop", "8 of 8 prompts begin with <s> twice", "model.chat_template")


def test_bos_inside_a_text_is_reported(with_template: Callable[[str], Any]) -> None:
    every = with_template(TEMPLATE.replace("'<|", "bos_token + '<|").replace("{{ bos_token }}", ""))
    some = [*PLAIN, replace(PLAIN[0], id="long", messages=[*PLAIN[0].messages, *ANSWERED])]
    fires(text.one_bos(every, encoded(every, some)), "warn", "9 of 9 rows", "model.chat_template")


def test_one_eos(tokenizer: Any) -> None:
    fires(text.one_eos(tokenizer, [2], encoded(tokenizer)), "pass", "each of 8 responses ends with one </s>")


def test_an_ordinary_token_that_ends_responses_is_reported(tokenizer: Any) -> None:
    """For example, a model stops at a full stop: responses can contain this token, and are then cut."""
    (stop,) = tokenizer(".", add_special_tokens=False)["input_ids"]
    some = [*PLAIN, row("more", human="It is 3. Or 4")]
    fires(text.one_eos(tokenizer, [stop], encoded(tokenizer, some, [stop])), "warn", "9 of 9 responses", "cut")


@pytest.mark.parametrize("change", [lambda ids: ids[:-1], lambda ids: [*ids, 2], lambda ids: [2, *ids], lambda _: []])
def test_response_without_one_eos_stops(tokenizer: Any, change: Callable[[list[int]], list[int]]) -> None:
    good = encoded(tokenizer)
    wrong = [*good[1:], good[0]._replace(ids=change(good[0].ids))]
    fires(text.one_eos(tokenizer, [2], wrong), "stop", "1 of 8 responses", good[0].prompt.id)


@pytest.mark.parametrize("limit", [3, 24])
def test_no_eos_is_appended_where_a_response_is_cut(tokenizer: Any, limit: int) -> None:
    fires(text.no_eos_where_cut(tokenizer, [2], encoded(tokenizer), limit), "pass", "8 responses, cut on purpose")


@pytest.mark.parametrize("limit", [3, 24])
def test_eos_that_is_appended_to_a_cut_response_stops(tokenizer: Any, limit: int) -> None:
    """As in SPIN's published code."""

    def appended(tokenizer: Any, prompt: Prompt, ids: list[int], limit: int) -> Response:
        kept = [*ids[: limit - 1], 2]
        return Response(prompt.id, HUMAN, prompt.human, kept, len(kept), "eos")

    found = text.no_eos_where_cut(tokenizer, [2], encoded(tokenizer), limit, cut=appended)
    fires(found, "stop", "8 of 8 human responses", OWN_ERROR)


def test_response_that_is_cut_to_too_many_tokens_stops(tokenizer: Any) -> None:
    def uncut(tokenizer: Any, prompt: Prompt, ids: list[int], limit: int) -> Response:
        return Response(prompt.id, HUMAN, prompt.human, ids, len(ids), "eos")

    fires(text.no_eos_where_cut(tokenizer, [2], encoded(tokenizer), 24, cut=uncut), "stop")


def test_the_eos_of_tokenizer_and_model_agree(tokenizer: Any) -> None:
    fires(text.ends_of_model(tokenizer, [2], encoded(tokenizer)), "pass", "</s> (2)")
    fires(text.ends_of_model(tokenizer, [5, 2], encoded(tokenizer)), "pass", "<|assistant|> (5)")


def test_a_model_without_an_eos_is_reported(tokenizer: Any) -> None:
    fires(text.ends_of_model(tokenizer, [], encoded(tokenizer)), "warn", "names no end-of-sequence token")


def test_a_template_that_ends_with_the_models_eos_is_reported(with_template: Callable[[str], Any]) -> None:
    other = with_template(TEMPLATE.replace("eos_token if", "'<|user|>' if"))
    found = text.ends_of_model(other, [4], encoded(other, stop_ids=[2, 4]))
    fires(found, "warn", "</s> (2)", "<|user|> (4)", "generation_config.json")


def test_an_eos_that_is_not_the_models_stops(tokenizer: Any) -> None:
    found = text.ends_of_model(tokenizer, [5], encoded(tokenizer))
    fires(found, "stop", "</s> (2)", "<|assistant|> (5)", "gives away who wrote them", "generation_config.json")


# --- rows


def split(train: Sequence[Prompt], validation: Sequence[Prompt] = (), test: Sequence[Prompt] = ()) -> rows.Rows:
    return {"train": train, "validation": validation, "test": test}


def test_ids() -> None:
    fires(rows.ids(split(PLAIN)), "pass", "8 rows")
    fires(rows.ids(split(PLAIN, [], [row("a"), row("b"), row("a", "Other?")])), "stop", "1 id in", "test", "'a'")


def test_duplicates() -> None:
    fires(rows.duplicates(PLAIN, False, {}), "pass", "no two of 8")
    said = rows.duplicates(PLAIN, False, {"equal_to_earlier": 3, "repeated": 0})
    fires(said, "pass", "left out before: 3 equal to earlier")
    twice = [*PLAIN, replace(PLAIN[0], id="again"), replace(PLAIN[1], id="other answer", human="It is 9.")]
    fires(rows.duplicates(twice, False, {}), "warn", "1 of 10", "10.0 %", "data")
    fires(rows.duplicates(twice, True, {}), "pass", "1 of 10", "draws with replacement")


def test_unusable_rows_are_reported() -> None:
    fires(rows.unusable({}, 9), "pass", "each of 9 rows")
    facts = {"no prompt": {"rows": 1, "first": "a:3"}, "response is empty": {"rows": 2, "first": "a:7"}}
    fires(rows.unusable(facts, 9), "warn", "3 of 12 rows", "2: response is empty (the first is a:7); 1: no prompt")


def test_pairs_and_ratings_are_counted() -> None:
    assert rows.pairs(PLAIN) == []
    some = [replace(each, rejected="No.") for each in PLAIN[:3]]
    (pairs,) = rows.pairs([*some, *PLAIN[3:]])
    fires(pairs, "pass", "3 of 8 training rows have a pair", "0 a rating")
    rated = [replace(each, human_score=4.0, rejected_score=2.0 * i) for i, each in enumerate(some)]
    fires(rows.pairs(rated)[1], "pass", "of 3 pairs with two ratings 1 have equal ones, and in 0 (0.0 %) the rejected")
    pairs, ratings = rows.pairs([*rated, replace(some[0], id="odd", human_score=-1.0, rejected_score=0.0), *PLAIN])
    fires(pairs, "pass", "4 of 12 training rows have a pair, 4 a rating")
    fires(ratings, "warn", "in 1 (25.0 %) the rejected response has the higher one; the first is odd", "data.columns")
    (alone,) = rows.pairs([replace(each, human_score=1.0) for each in PLAIN])
    fires(alone, "pass", "0 of 8 training rows have a pair, 8 a rating")


def plans(*parts: Any, generates: bool = True) -> Any:
    """Plans that use these parts' prompts, in policy steps of three."""
    rest = {"rollout": SimpleNamespace(generates=generates), "trainer": SimpleNamespace(batch_size=3)}
    return [SimpleNamespace(k=k, prompts=part, **rest) for k, part in enumerate(parts)]


def test_prompts_of_the_iterations_are_counted() -> None:
    some = [row(str(i), f"What is {i} plus 2?") for i in range(40)]
    assert rows.used(plans(All(), All()), some) == []
    fresh = Fresh(shares=[1, 3])
    (found,) = rows.used(plans(fresh, fresh), some)
    fires(found, "pass", "of 40 training prompts, iterations 0 and 1 use 10 and 30")
    paired = [replace(each, rejected="No.") if i < 36 else each for i, each in enumerate(some)]
    seeded = Fresh(shares=[1, 1], seed_share=0.1)
    (found,) = rows.used(plans(seeded, seeded, All()), paired)
    fires(found, "warn", "use 36, 2 and 40; in iteration 1 the prompts do not fill one policy step", "seed_pairs=share")
    (found,) = rows.used(plans(All(), Fresh(shares=[1])), some)
    fires(found, "stop", "prompts.shares=[1]: has 1 part, but iterations=2 needs 2", "prompts=…")


def test_rows_for_fine_tuning_leave_some_for_the_iterations() -> None:
    some = [row(str(i), f"What is {i} plus 2?") for i in range(8)]
    assert rows.apart(some, 0) == ({"sft": some, "train": some}, [])
    parts, found = rows.apart(some, 3)
    assert (len(parts["sft"]), len(parts["train"]), found) == (3, 5, [])
    (found,) = rows.apart(some, 8)[1]
    fires(found, "stop", "sft_rows=8: expected fewer than the 8 training rows", "sft_rows, or the data")


def test_a_share_held_out_of_a_training_has_rows_and_leaves_some() -> None:
    some = [row(str(i), f"What is {i} plus 2?") for i in range(40)]

    def held(prompts: Any, **settings: Any) -> list[Finding]:
        return rows.held_out(
            [("trainer", PairOptimisation(optimizer=Bound("torch.optim.SGD", {}), **settings), prompts)]
        )

    assert held(some, holdout=1e-6) == []
    (found,) = held(some, keep="best", holdout=0.2)
    fires(found, "pass", "trainer.holdout: holds out", "of 40 prompts")
    (found,) = held(some, keep="best", holdout=1e-6)
    fires(found, "stop", "trainer.holdout=1e-06: holds out 0 of 40 rows", "trainer.holdout, or the data")
    assert found.refusal.startswith("trainer.holdout=1e-06: holds out 0")
    (found,) = held(some[:2], patience=2, holdout=0.999999)
    fires(found, "stop", "trainer.holdout=0.999999: holds out 2 of 2 rows")


def test_a_curriculum_has_pairs_for_its_clusters() -> None:
    plan: Any = SimpleNamespace(curriculum=Prune(clusters=9), rollout=SimpleNamespace(samples=1))
    assert rows.clusters(plan, 5) == []
    (found,) = rows.clusters(plan, 4)
    fires(found, "stop", "curriculum.clusters=9: there are only 8 different pairs", "curriculum.clusters, or the data")


def test_data_that_cannot_teach_a_judge_are_refused() -> None:
    some = [row(str(i), f"What is {i} plus 2?") for i in range(4)]
    lesson = Augmentation(optimisation=Optimisation(optimizer=Bound("torch.optim.SGD", {})), rows=4, labels="given")
    fires(rows.lessons(lesson, some), "stop", "augment.labels=given: no row has a rejected response", "the data")
    fires(rows.lessons(lesson, [*some[1:], replace(some[0], rejected="No.")]), "pass", "augment.labels=given needs")
    wordless = [replace(each, answer=None) for each in some]
    fires(rows.lessons(replace(lesson, labels="rules"), wordless), "stop", "augment.labels=rules", "4 of 4 have none")


def test_iterations_on_given_pairs_need_some() -> None:
    own = plans(All(), generates=False)
    assert rows.used(own, [replace(PLAIN[0], rejected="No."), *PLAIN[1:]]) == []
    (found,) = rows.used(own, PLAIN)
    fires(found, "stop", "none of its 8 rows has a rejected response", "data.columns")
    fires(rows.used(own, [])[0], "stop", "iteration 0 has none of 0 training prompts")


def test_many_removed_rows_are_reported_with_examples() -> None:
    fires(rows.removed({"repeated": 0, "near_earlier": 0}, [], 9), "pass", "0 of 9 rows")
    fires(rows.removed({"repeated": 0, "near_earlier": 9}, ["b is like a"], 91), "pass", "9 of 100 rows")
    counts = {"near_earlier": 4, "equal_to_earlier": 6}
    fires(rows.removed(counts, ["b is like a", "d is like c"], 90), "warn", "10.0 %", "b is like a; d is like c")


def test_unread_columns_are_reported() -> None:
    fires(rows.unread([]), "pass", "no column")
    fires(rows.unread(["input", "system"]), "warn", "input, system: unread text", "data.columns")


def test_near_duplicates() -> None:
    long = "Explain in a few plain words why the sky over the sea looks blue in the morning and red in the evening"
    near = [row("one", long), row("two", f"Please {long}")]
    fires(rows.near_duplicates(PLAIN, False), "pass", "none of 8")
    fires(rows.near_duplicates([*PLAIN, *near], False), "warn", "1 of 10", "two and one", "data.near_duplicates")
    fires(rows.near_duplicates([*PLAIN, *near], True), "pass", "1 of 10")
    many = [row(str(i), f"Question {i} {i * 7} {i * 13} about {i * 31}?") for i in range(200)]
    fires(rows.near_duplicates([*many, *near], False), "pass", "1 of 202")
    fires(rows.near_duplicates([*PLAIN, replace(PLAIN[0], id="again")], False), "pass", "none of 8 distinct")


def test_near_duplicates_are_looked_for_in_some_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "COMPARED", 4)
    fires(rows.near_duplicates(PLAIN, False), "pass", "4 of 8")


def test_overlap() -> None:
    long = "Explain in a few plain words why the sky over the sea looks blue in the morning and red in the evening"
    system = {"role": "system", "content": "You are an assistant who answers in one short sentence and nothing more."}
    train = [replace(p, messages=[system, *p.messages]) for p in (*PLAIN[:4], row("sky", long))]
    held = [replace(p, id=f"held-{p.id}", messages=[system, *p.messages]) for p in PLAIN[4:]]
    clean = rows.overlap(split(train, held[:2], held[2:]))
    assert [(f.name, f.level) for f in clean] == [
        ("overlap with validation", "pass"),
        ("overlap with test", "pass"),
        ("validation and test", "pass"),
    ]
    same = rows.overlap(split(train, held[:2], [*held[2:], replace(train[0], id="leak", human="Other.")]))
    fires(same[1], "stop", "1 of 3 test prompts", "data")
    near = rows.overlap(split(train, held[:2], [*held[2:], row("near", f"Please {long}")]))
    fires(near[1], "warn", "1 of 3 test prompts", "near and sky", "data.near_duplicates")
    both = rows.overlap(split(train, held[:2], held[1:]))
    fires(both[2], "warn", "1 prompt in")


@pytest.mark.parametrize(("context", "said"), [(64, "context of 64 tokens leaves none"), (40, "context of 40 tokens")])
def test_context_without_room_for_prompts_stops(context: int, said: str) -> None:
    fires(rows.room(48, context, 64), "stop", said, f"data.max_response_tokens=64 to less than {context}, or the model")
    scratch = rows.room(48, context, 64, chosen=True)
    fires(scratch, "stop", said, f"or model.context={context} to 112")


def test_context_with_room() -> None:
    fires(rows.room(48, 100, 64), "pass", "prompts of up to 36 and responses of up to 64", "the model's context of 100")
    assert rows.room(48, None, 64).level == "pass"


def test_the_limit_on_prompts_names_its_source(local: Path, tmp_path: Path) -> None:
    """The setting or the model's context may be too small."""
    found = of_model(local, tmp_path, "data.max_response_tokens=95")
    fires(
        found["lengths of train"], "stop", "into 1 token (the model's context of 96 less data.max_response_tokens=95)"
    )
    found = of_model(local, tmp_path, "data.max_prompt_tokens=2")
    fires(found["lengths of train"], "stop", "fits into 2 tokens (data.max_prompt_tokens=2)")
    found = of_model(local, tmp_path, "data.max_response_tokens=96")
    fires(found["context"], "stop", "the model's context of 96 tokens leaves none for prompts")
    assert "lengths of train" not in found


@pytest.mark.parametrize(
    ("finding", "said"),
    [
        (Finding("model", "stop", "model.path=x: is no model.", "y"), "model.path=x: is no model. Change y"),
        (refuse("model", ModelError("model: x is no model"), "y"), "model: x is no model. Change y"),
        (refuse("judge", JudgeError("judge.path=x: is no model"), "y"), "judge.path=x: is no model. Change y"),
        (refuse("judge", JudgeError("x is no model"), "y"), "judge: x is no model. Change y"),
        (refuse("model", ModelError("modelling fails"), "y"), "model: modelling fails. Change y"),
        (Finding("model", "stop", f"it fails; {OWN_ERROR}"), f"model: it fails; {OWN_ERROR}"),
    ],
)
def test_refusal_names_the_check_once(finding: Finding, said: str) -> None:
    assert finding.refusal == said


def test_a_judge_of_evaluations_is_named_by_its_place() -> None:
    found = judge.measuring(UnitTests(), [row("a", "What is 1 plus 2?")], "test")
    fires(found, "stop", "Set eval.judge.i_know_this_runs_code=true", "eval.judge=…")


def test_parts_used_after_training_are_checked_before(local: Path, tmp_path: Path) -> None:
    """Without the check, a wrong encoder or a benchmark folder without rows would fail after hours."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("sacrebleu")
    encoder = shutil.copytree(local, tmp_path / "encoder")
    (tmp_path / "rows").mkdir()
    measured = ("eval=leaderboard", f"eval.leaderboard.source={tmp_path / 'rows'}")
    found = of_model(local, tmp_path, *measured)
    fires(found["leaderboard"], "stop", "has no arc_easy_test.jsonl", "eval.leaderboard.…, as the message says")
    assert of_model(local, tmp_path, "eval=texts", f"eval.texts.encoder={encoder}")["texts"].level == "pass"
    (encoder / "model.safetensors").unlink()
    found = of_model(local, tmp_path, "eval=texts", f"eval.texts.encoder={encoder}")
    fires(found["texts"], "stop", f"eval.texts.encoder={encoder}: there are no weights", "eval.texts.encoder")


def test_lengths() -> None:
    fires(rows.lengths("train", 9, [(5, 7), (8, 8)], 8, 8, False), "pass", "2 of 9 train rows", "8 tokens of 8")
    said = rows.lengths("train", 4, [(5, 7), (9, 8), (5, 9), (3, 3)], 8, 8, False)
    fires(
        said,
        "warn",
        "1 of 4 train rows have too long a prompt",
        "25.0 %",
        "1 have too long a response and are cut",
        "max_prompt",
    )
    said = rows.lengths("train", 4, [(5, 7), (9, 9), (5, 9), (3, 3)], 8, 8, True)
    fires(said, "warn", "1 of 4 train rows have too long a prompt", "1 have too long a response and are dropped")
    fires(rows.lengths("test", 2, [(9, 1), (12, 1)], 8, 8, False), "stop", "none of the 2 test prompts fits into 8")
    said = rows.lengths("test", 2, [(9, 1), (2, 9)], 8, 8, True)
    fires(said, "stop", "all would be dropped", "data.long_responses=cut")
    fires(rows.lengths("test", 0, [], 8, 8, False), "stop", "no test prompts")


# --- the judge


class Asked(Judge):
    """Answers the canary as the test sets it."""

    max_unscored = 0.0

    def __init__(self, answer: Canary | Exception) -> None:
        self.answer, self.asked = answer, 0
        self.seen: set[str] = set()

    @property
    def prompts_seen(self) -> set[str]:
        return self.seen

    def canary(self, ledger: Ledger) -> Canary:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Any
    ) -> list[Verdict]:
        raise AssertionError("the gate asks for no verdicts")


@pytest.mark.parametrize(("method", "refused"), [("dnpo", True), ("npo", False)])
def test_a_plan_says_that_labels_have_no_judge(tmp_path: Path, method: str, refused: bool) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}", "response": "a {i}"}}\n' for i in range(40)))
    done = train(tmp_path, "data=jsonl", "data.path=rows.jsonl", f"method={method}", "plan=true", "tracking=off")
    assert "Plan" in done.stdout
    assert ("The run would be refused: labels: dsl labels by score" in done.stdout) is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data.max_response_tokens=128", "context: the model's context of 128 tokens leaves none for prompts"),
        ("data.max_response_tokens=100", ""),
        ("model=local model.path=model data.max_response_tokens=64", "context: the model's context of 64 tokens"),
        ("model=local model.path=model data.max_response_tokens=63", ""),
        ("generate=server \"generate.engine.launch='no-such-program {policy} {port}'\"", "engine: .*no-such-program"),
        ("generate=server generate.engine.base_url=http://localhost:1/v1", "engine: .*has one policy, but 3 respond"),
        (
            "generate=server generate.engine.base_url=http://localhost:1/v1 data.max_response_tokens=128",
            "engine: .*; context: ",
        ),
    ],
)
def test_a_plan_says_what_the_gate_will_refuse(tmp_path: Path, given: str, said: str) -> None:
    """In its last line, without reading rows or weights, and without asking a server."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 64}')
    done = train(tmp_path, "scale=smoke", "iterations=2", "method=spin", *shlex.split(given), "plan=true")
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert bool(re.match(f"The run would be refused: {said}", last)) is bool(said), last


LEDGER = Ledger(Path("there-is-no-such-folder/ledger.sqlite"))


def test_labels() -> None:
    fires(judge.labels(None, NoJudge(), split(PLAIN)), "pass", "no labels need scores")
    fires(judge.labels(2, NoJudge(), split(PLAIN)), "stop", "from iteration 2 on", "judge=off gives none")
    fires(judge.labels(None, Rules(), split(PLAIN)), "stop", "8 of 8 have none", "judge=")
    answered = [replace(p, answer="3") for p in PLAIN]
    fires(judge.labels(1, Rules(), split(answered, answered, answered)), "pass", "24 rows")


def test_canary() -> None:
    fires(judge.canary(Rules(), LEDGER), "pass", "without a call")
    fires(judge.canary(Asked(Canary(True, "says 100 ($0.00002 a question)")), LEDGER), "pass", "$0.00002")
    fires(judge.canary(Asked(Canary(False, "answers, but: no number")), LEDGER), "stop", "no number", "its model")
    unreachable = Asked(JudgeError("judge.base_url=http://x: does not answer"))
    fires(judge.canary(unreachable, LEDGER), "stop", "judge.base_url=http://x: does not answer")


def test_canary_of_a_judge_by_api(tmp_path: Path) -> None:
    """One call and its price if the server answers; an error if it does not."""
    with judge_server() as server, Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        by_api = OpenAI(model="gpt-4.1-mini", base_url=server.base_url, timeout=5.0)
        fires(judge.canary(by_api, ledger), "pass", "gpt-4.1-mini", "$0.000", "a question")
        assert server.stats()["attempts"] == 1
    with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        gone = OpenAI(model="gpt-4.1-mini", base_url="http://127.0.0.1:9/v1", timeout=1.0, deadline=1.0)
        fires(judge.canary(gone, ledger), "stop", "127.0.0.1:9")


def test_prompts_that_the_judge_was_trained_on() -> None:
    fires(judge.judge_prompts((), PLAIN, "test"), "pass", "not fitted on any")
    other = {hash_conversation(row("x", "Something else?").messages)}
    fires(judge.judge_prompts(other, PLAIN, "test"), "pass", "none of the 1 prompts")
    seen = {hash_conversation(row("x", "what is  1 PLUS 2?").messages)}
    fires(judge.judge_prompts(seen, PLAIN, "test"), "warn", "1 of the 8 test prompts", "the first is 0", "eval.split")


# --- disk and memory


def test_disk(tmp_path: Path) -> None:
    below = tmp_path / "not" / "there" / "yet"
    fires(machine.disk(1000, 500, 0, below), "pass", "about 2 kB (an estimate)", "free")
    fires(machine.disk(1000, 500, 0, tmp_path, free=3000), "pass")
    fires(machine.disk(1000, 500, 0, tmp_path, free=2999), "warn", "3 kB free", "store=", "model.lora.rank")
    fires(machine.disk(1000, 500, 0, tmp_path, free=1500), "warn")
    fires(machine.disk(1000, 500, 0, tmp_path, free=1499), "stop", "1 kB free", "store=")
    roomy = 2**30 + 10**6
    fires(machine.disk(1000, 500, 10**5, tmp_path, free=roomy), "pass", "100 kB of hidden states")
    fires(machine.disk(1000, 500, 10**7, tmp_path, free=roomy), "warn", "if there is room", "npo.cache_hidden")


def test_memory() -> None:
    what = partial(machine.memory, "training", 600.0, 300.0, "cpu", "trainer.micro_batch_size")
    fires(what(), "pass", "an estimate", "free on cpu")
    fires(what(free=1000.0), "pass", "900 bytes")
    fires(what(free=999.0), "warn", "300 bytes of the longest batch", "trainer.micro_batch_size")
    fires(what(free=600.0), "warn")
    fires(what(free=599.0), "stop", "600 bytes of weights", "trainer.micro_batch_size")


def test_free_memory_is_the_devices_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.free_memory("cpu") <= physical
    monkeypatch.setattr(Path, "read_text", lambda *_: "")  # a system without /proc
    assert machine.free_memory("cpu") == physical
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert machine.free_memory("cuda:0") == 7


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (torch_optimizer("RMSprop", lr=0.1), 1),
        (torch_optimizer("RMSprop", lr=0.1, momentum=0.9), 2),
        (torch_optimizer("AdamW", lr=0.1), 2),
        (torch_optimizer("SGD", lr=0.1), 0),
    ],
)
def test_memory_that_an_optimizer_keeps(optimizer: Any, copies: int) -> None:
    assert machine.state_copies(optimizer) == copies


def test_an_optimizer_that_cannot_be_tried_counts_as_adam() -> None:
    assert machine.state_copies(torch_optimizer("LBFGS")) == 2  # its step needs a closure


def trained_by(**settings: Any) -> PairOptimisation:
    return PairOptimisation(optimizer=torch_optimizer("RMSprop", lr=1e-4), **settings)


@pytest.fixture
def sized(world: World) -> Callable[..., tuple[Policy, machine.ModelShape]]:
    def make(lora: Lora | None = None, **config: Any) -> tuple[Policy, machine.ModelShape]:
        shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(world.tokenizer), **(shape | config)))
        policy = Policy(model, world.tokenizer)
        return policy, machine.shape(policy, lora or Lora())

    return make


@pytest.mark.parametrize("autocast", [False, True])
def test_the_estimate_of_activations_is_near_their_real_size(sized: Any, autocast: bool) -> None:
    """Within a tenth of the memory that autograd really keeps for the body's forward pass."""
    policy, of = sized()
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = pack([[7] * 40] * 16, [[8] * 40] * 16, share_prompt=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = policy.hidden(batch)
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert hidden.requires_grad
    estimate = machine.activations(of, trained_by(autocast=autocast), len(batch.ids_T))
    estimate += of.weights / 2 if autocast else 0
    assert estimate == pytest.approx(measured, rel=0.1)
    spared = machine.activations(of, trained_by(autocast=autocast, checkpointing=True), len(batch.ids_T))
    assert spared < 0.5 * estimate


COUNTS = machine.Counts(
    train=100, held=10, all=120, prompt=8, response=6, longest_prompt=16, longest_response=12, limit=24
)


def test_memory_that_training_needs(sized: Any) -> None:
    policy, of = sized()
    weights = sum(p.numel() for p in policy.model.parameters()) * 4
    assert of.weights == of.trained == weights
    optimisation = trained_by(batch_size=8)

    def fixed(of: machine.ModelShape, noise: Any = None, copy: bool = False, **more: Any) -> float:
        return machine.training_bytes(of, trained_by(batch_size=8, **more), COUNTS, noise, copy, "cpu")[0]

    assert fixed(of) == 3 * weights  # with gradients and the mean square of each
    assert fixed(of, autocast=True) == 3.5 * weights
    assert fixed(replace(of, value=2), autocast=True) == 3 * weights
    assert fixed(of, SilentModule(), copy=True) == 4 * weights
    noise = TrainableModule(of.width, of.vocabulary)
    assert fixed(of, noise) == 3 * weights + 16 * (of.width + 1) * of.vocabulary
    _, adapted = sized(Lora(rank=2))
    assert adapted.adapted
    assert adapted.weights == weights
    assert 0 < adapted.trained < 0.2 * weights
    assert fixed(adapted, copy=True) == weights + 3 * adapted.trained

    def moving(noise: Any, **more: Any) -> float:
        return machine.training_bytes(of, trained_by(batch_size=8, **more), COUNTS, noise, False, "cpu")[1]

    assert moving(None) < moving(SilentModule()) < moving(noise)
    assert moving(noise, micro_batch_size=2) < moving(noise) / 3
    assert moving(noise, share_prompt=False) > moving(noise) > moving(noise, checkpointing=True)
    small, large = (machine.generating_bytes(of, Sampling(batch_size=n), COUNTS)[1] for n in (8, 16))
    assert large == 2 * small
    assert machine.checkpoint_bytes(of, optimisation, 10) == 2 * (2 * weights + 120)
    assert machine.checkpoint_bytes(of, trained_by(keep="best"), 0) == 2 * 2 * weights + 3 * weights
    assert machine.policy_bytes(of, 3) == weights
    assert machine.policy_bytes(adapted, 3) == 3 * adapted.trained


# --- the chain, and the gate as a whole


def composed(*overrides: str) -> Run:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        run, _, _ = build(compose("train", overrides=["scale=smoke", "tracking=off", *overrides]))
    return run


def laid_out(*overrides: str) -> tuple[Run, list[Iteration]]:
    run = composed(*overrides)
    return run, list(chain(run))


def test_reference_is_the_policy_it_starts_from() -> None:
    run, iterations = laid_out("npo.cache_hidden=on")
    said = "the reference of every iteration is the policy it starts from"
    fires(chain_check.reference(iterations, run.plans), "pass", said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["reference=initial"], "the initial policy"),
        (["reference=[start,initial]"], "the policy it starts from; from iteration 1 on it is the initial policy"),
        (["start=initial"], "the policy it starts from"),
        (["method=dpo", "objective=orpo", "reference=none"], "none"),
    ],
)
def test_references_follow_the_plan(overrides: list[str], said: str) -> None:
    run, iterations = laid_out(*overrides)
    fires(chain_check.reference(iterations, run.plans), "pass", said)
    wrong = [replace(plan, start="initial" if plan.start == "previous" else "previous") for plan in run.plans]
    if len(iterations) > 2:
        fires(chain_check.reference(iterations, wrong), "stop", "iteration 1: the training should start from")


@pytest.mark.parametrize("which", ["responses", "reference", "hidden", "policy", "unread"])
def test_a_stage_with_the_wrong_input_stops(which: str) -> None:
    """As with stacked adapters, iteration 1 is compared with the fine-tuned model."""
    run, iterations = laid_out("npo.cache_hidden=on")
    iteration, sft = iterations[2], iterations[0].policy
    assert iteration.responses is not None
    assert iteration.reference is not None
    hidden = iteration.policy.caches["hidden"]
    wrong = {
        "responses": lambda: replace(iteration, responses=_from(iteration.responses, sft)),
        "reference": lambda: replace(iteration, reference=_from(iteration.reference, sft)),
        "hidden": lambda: replace(iteration, policy=replace(iteration.policy, caches={"hidden": _from(hidden, sft)})),
        "policy": lambda: replace(iteration, policy=_from(iteration.policy, sft)),
        "unread": lambda: replace(iteration, policy=replace(iteration.policy, inputs={"policy": iterations[1].policy})),
    }[which]()
    said = "does not read" if which == "unread" else "should start from iteration 0 · optimise"
    found = chain_check.reference([*iterations[:2], wrong], run.plans)
    fires(found, "stop", "iteration 1", said)
    assert found.refusal.endswith(OWN_ERROR), "no setting helps, so none is named"


def _from(stage: Any, policy: Any) -> Any:
    return replace(stage, inputs={**stage.inputs, "policy": policy})


NAMES = [
    *("reference", "labels", "prompts of the judge", "ids", "duplicates", "near duplicates"),
    *("overlap with validation", "overlap with test", "validation and test", "weights", "template", "training text"),
    *("control tokens", "seam", "one BOS", "one EOS", "no EOS where cut", "EOS of the model", "context"),
    *("lengths of train", "lengths of validation", "lengths of test", "disk"),
    *("memory, fine-tuning", "memory, training", "memory, generating", "judge"),
]


def test_gate_of_a_plain_run_passes_with_every_line(tmp_path: Path) -> None:
    run, iterations = laid_out()
    found = gate(run, iterations, Store(tmp_path))
    assert [f.name for f in found] == NAMES
    assert not [f for f in found if f.level == "stop"]
    assert {f.name for f in found if f.level == "warn"} <= {"duplicates", "near duplicates"}
    assert list(tmp_path.iterdir()) == []


def test_gate_finds_errors_in_data_and_judge(tmp_path: Path) -> None:
    """Through the run's own parts: each check gets the objects that the run would use."""
    run, iterations = laid_out()
    data = run.data.read()[0]
    leak = {**data, "test": [replace(data["train"][0], id="leak"), *data["test"]]}
    own = Asked(Canary(True, "says 100"))
    own.seen = {hash_conversation(data["test"][1].messages)}
    source = type("Source", (), {**_limits(run), "read": lambda self: (leak, {})})()
    run = replace(run, data=source, judge=own)
    levels = {f.name: f.level for f in gate(run, iterations, Store(tmp_path))}
    assert levels["overlap with test"] == "stop"
    assert levels["prompts of the judge"] == "warn"
    assert "judge" not in levels  # a run that does not begin pays for no call
    assert own.asked == 0


@pytest.mark.parametrize(
    ("of", "name", "setting"),
    [
        ("judge", "prompts of the judge", "judge.path"),
        ("second_judge", "prompts of the second judge", "second_judge.path"),
        ("eval", "prompts of the judge of evaluations", "eval.judge"),
    ],
)
def test_a_judge_that_measures_may_not_know_the_prompts(tmp_path: Path, of: str, name: str, setting: str) -> None:
    """Whichever judge's scores are reported, and only that one is named."""
    run, iterations = laid_out()
    fitted = Asked(Canary(True, "says 100"))
    fitted.seen = {hash_conversation(run.data.read()[0]["test"][1].messages)}
    if of == "eval":
        run = replace(run, judge=fitted, eval=replace(run.eval, judge=fitted))
    else:
        run = replace(run, **{of: fitted})  # type: ignore[arg-type]
    found = {f.name: f for f in gate(run, iterations, Store(tmp_path)) if f.name.startswith("prompts of")}
    assert [each for each, f in found.items() if f.level == "warn"] == [name]
    fires(found[name], "warn", f"the {name.removeprefix('prompts of the ')} was fitted on 1 of the", setting)


def _limits(run: Run) -> dict[str, Any]:
    return {name: getattr(run.data, name) for name in ("max_prompt_tokens", "max_response_tokens")} | {
        "long_responses": "cut",
        "drawn_with_replacement": False,
    }


def test_the_canary_is_asked_once_and_only_for_missing_stages(tmp_path: Path) -> None:
    run, iterations = laid_out()
    own = Asked(Canary(True, "says 100"))
    run, store = replace(run, judge=own), Store(tmp_path)
    assert gate(run, iterations, store)[-1] == Finding("judge", "pass", "says 100")
    assert own.asked == 1
    for iteration in iterations:
        for stage in iteration.stages:
            if stage.name in ("judge", "evaluate"):
                _pretend(store, stage)
    assert "judge" not in {f.name for f in gate(run, iterations, store)}
    assert own.asked == 1


def test_the_gate_spends_nothing_if_all_stages_exist(tmp_path: Path) -> None:
    run, iterations = laid_out()
    store = Store(tmp_path)
    for iteration in iterations:
        for stage in iteration.stages:
            _pretend(store, stage)
    run = replace(run, data=None)  # type: ignore[arg-type]  # any check that read it would fail
    assert [f.name for f in gate(run, iterations, store)] == ["reference", "stages"]


def _pretend(store: Store, stage: Any) -> None:
    folder = store.folder(stage)
    folder.mkdir(parents=True)
    seal(folder, {"stage": stage.name, "key": stage.key})


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A small model as transformers keeps it."""
    folder = tmp_path / "model"
    model = Scratch(width=32, layers=1, heads=2, mlp=48, context=96, lora=Lora())
    model.base(folder, composed().data.read()[0]["train"])
    return folder


def of_model(folder: Path, tmp_path: Path, *overrides: str) -> dict[str, Finding]:
    run, iterations = laid_out("model=local", f"model.path={folder}", "npo=off", *overrides)
    return {f.name: f for f in gate(run, iterations, Store(tmp_path / "store"))}


def test_gate_of_a_pretrained_model(local: Path, tmp_path: Path) -> None:
    found = of_model(local, tmp_path)
    assert set(NAMES) == set(found)
    assert not [f for f in found.values() if f.level == "stop"]


def test_gate_of_a_template_with_arguments(local: Path, tmp_path: Path) -> None:
    """The arguments are given as on the command line; unused names are reported."""
    reads = AutoTokenizer.from_pretrained(local)
    reads.chat_template = "{{ greeting }}" + TEMPLATE
    reads.save_pretrained(local)
    given = "model.template_arguments={greeting: 'Hi', NAME: [1, null]}"
    found = of_model(local, tmp_path, given.replace("NAME", "nothing"))
    fires(found["model"], "stop", "model.template_arguments.nothing: the chat template reads no variable")
    found = of_model(local, tmp_path, given.replace(", NAME: [1, null]", ""))
    fires(found["template"], "pass")
    fires(of_model(local, tmp_path, "model.template_date=2026-01-31")["model"], "stop", "does not read the clock")


def test_gate_finds_errors_in_a_model(local: Path, tmp_path: Path) -> None:
    settings = json.loads((local / "generation_config.json").read_text())
    (local / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 5}))
    fires(of_model(local, tmp_path)["EOS of the model"], "stop", "<|assistant|> (5)")
    twice = AutoTokenizer.from_pretrained(local)
    twice.chat_template = "{{ bos_token }}" + TEMPLATE
    twice.save_pretrained(local)
    fires(of_model(local, tmp_path)["one BOS"], "stop")
    twice.chat_template = TEMPLATE.replace("'<|assistant|>' }}{% endif", "'<|assistant|>A: ' }}{% endif")
    twice.save_pretrained(local)
    found = of_model(local, tmp_path)
    fires(found["template"], "stop")
    assert "one BOS" not in found  # text that cannot be rendered cannot be encoded


def test_model_that_cannot_be_read_stops(local: Path, tmp_path: Path) -> None:
    fires(
        of_model(local, tmp_path, "model.lora.rank=2", "model.lora.target_modules=nowhere")["model"], "stop", "nowhere"
    )
    for file in local.glob("tokenizer*"):
        file.unlink()
    fires(of_model(local, tmp_path)["model"], "stop", "it has no tokenizer")


def test_needs_shrink_with_existing_stages(tmp_path: Path) -> None:
    run, iterations = laid_out("npo.cache_hidden=on")
    store = Store(tmp_path)
    model = run.model
    model.base(tmp_path / "model", run.data.read()[0]["train"])

    def wanted() -> dict[str, str]:
        found = needs.findings(
            run,
            iterations,
            store,
            [stage for iteration in iterations for stage in iteration.stages if not store.has(stage)],
            COUNTS,
            model.outline(tmp_path / "model"),
            tmp_path / "model",
        )
        return {f.name: f.text for f in found}

    assert set(wanted()) == {"disk", "memory, fine-tuning", "memory, training", "memory, generating"}
    _pretend(store, iterations[0].policy)
    assert set(wanted()) == {"disk", "memory, training", "memory, generating"}
    for iteration in iterations[1:]:
        _pretend(store, iteration.policy)
    assert "0 bytes only temporarily" in wanted()["disk"]
    for iteration in iterations:
        for stage in (iteration.responses, iteration.evaluation):
            if stage is not None:
                _pretend(store, stage)
    assert set(wanted()) == {"disk"}


def test_disk_counts_weights_for_a_server_and_what_a_live_training_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = composed("model.lora.rank=2")
    base.model.base(tmp_path, base.data.read()[0]["train"])
    checks = machine.disk

    def needed(*overrides: str) -> tuple[int, int]:
        run, iterations = laid_out("model.lora.rank=2", "npo=off", *overrides)
        todo = [stage for iteration in iterations for stage in iteration.stages]
        found = []
        monkeypatch.setattr(machine, "disk", lambda *given: found.append(given[:2]) or checks(*given))
        needs.findings(run, iterations, Store(tmp_path), todo, COUNTS, run.model.outline(tmp_path), tmp_path)
        return found[0]

    files = sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file())
    assert needed()[1] < 0.5 * files
    served = needed("generate=server", "generate.engine.launch='serve {policy} {port}'")[1]
    assert served == pytest.approx(files, rel=0.02), "the folder that the server reads"
    live = ("method=online_dpo", "rollout.prompts=4", "rollout.samples=2")
    (few, some), (many, more) = (needed(*live, f"trainer.steps={steps}") for steps in (1000, 3000))
    rows = 2000 * 4 * 2
    assert rows * 500 < more - some < rows * 10_000
    assert many - few >= more - some


def test_passed_checks_are_shown_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        Finding("one", "pass", "good"),
        Finding("two", "warn", "so [1] so", "a.b"),
        Finding("three", "pass", "fine"),
    ]
    show(Console(), lines, everything=False)
    out = capsys.readouterr().out
    assert "good" not in out
    assert "so [1] so → a.b" in out
    assert "2 checks passed, 1 warning" in out
    show(Console(), [*lines, Finding("four", "stop", "bad", "c.d")], everything=True)
    out = capsys.readouterr().out
    *lines_shown, count = out.splitlines()
    assert [line.split()[:2] for line in lines_shown] == [["pass", "one"], ["warn", "two"], ["pass", "three"]]
    assert count == "2 checks passed, 1 warning, 1 problem"


# --- by the command


def computed(cwd: Path) -> list[Path]:
    return list((cwd / "store").glob("[!.]*/*"))


@pytest.mark.long
def test_check_alone_prints_every_line_and_runs_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, "scale=smoke", "check=true")
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert f" {name} " in done.stdout
    assert "checks passed" in done.stdout
    assert computed(tmp_path) == []
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.long
def test_check_makes_every_check_even_if_all_stages_exist(finished: Path) -> None:
    done = train(finished, "scale=smoke", "tracking=off", "check=true")
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert f" {name} " in done.stdout
    assert "nothing more to check" not in done.stdout


@pytest.mark.long
def test_a_stop_ends_a_run_before_any_stage(tmp_path: Path) -> None:
    done = train(tmp_path, "scale=smoke", "judge=off")
    assert done.returncode == 1
    assert "labels: dsl" in done.stderr
    assert "1 problem" in done.stdout
    assert computed(tmp_path) == []
    assert not (tmp_path / "mlflow.db").exists()


def test_rows_that_cannot_be_read_are_refused_before_libraries_are_imported(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{broken\n')
    run, iterations = laid_out("data=jsonl", f"data.path={tmp_path}/rows.jsonl")

    def prepare() -> None:
        raise AssertionError("the libraries are not needed")

    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        gate(run, iterations, Store(tmp_path / "store"), prepare=prepare)
    run, iterations = laid_out()
    with pytest.raises(AssertionError, match="the libraries are not needed"):
        gate(run, iterations, Store(tmp_path / "store"), prepare=prepare)


@pytest.mark.parametrize("everything", [False, True])
def test_a_stop_is_an_error_that_lists_all_failed_checks(
    everything: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with status 1, also with check=true; what stops a run is said once, in the error."""
    run, iterations = laid_out("judge=off", "data.max_prompt_tokens=2")
    with pytest.raises(SettingsError) as caught:
        pass_gate(run, iterations, Store(tmp_path), Console(), everything, 1)
    said = str(caught.value)
    assert "labels: dsl labels by score" in said
    assert "Change judge=…, or dsl=off" in said
    for split in ("train", "validation", "test"):
        assert f"lengths of {split}: none of the" in said
    assert "none of the" not in capsys.readouterr().out
