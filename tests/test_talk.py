"""``dnpo sample`` and ``dnpo chat``: policies of a finished run respond to given prompts."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dnpo.errors import DataError
from dnpo.records import Item, Prompt, Response
from dnpo.running.card import SavedPolicy
from dnpo.running.talk import open_judge, open_speaker, opinions, read_conversations, user
from dnpo.tables import read
from tests.commands import Done, run_command


def run_of(folder: Path) -> Path:
    return next(folder.glob("outputs/*/*/summary.json")).parent


def sample(folder: Path, *arguments: str) -> Done:
    return run_command(folder, "dnpo.commands.sample", str(run_of(folder)), *arguments)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    def talk(folder: Path, typed: list[str], *arguments: str, columns: int = 120) -> Done:
        lines = iter(typed)

        def read_line(prompt: str = "") -> str:
            for line in lines:
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read_line)
        monkeypatch.setenv("COLUMNS", str(columns))
        return run_command(folder, "dnpo.commands.chat", str(run_of(folder)), *arguments)

    return talk


def stored(folder: Path, policy: int) -> tuple[list[Prompt], list[str]]:
    """The held-out prompts of a run, and a policy's greedy responses to them, from the run's own stages."""
    summary = json.loads((run_of(folder) / "summary.json").read_text())
    stages = [each for each in summary["stages"] if each["stage"] == "evaluate"]
    store = folder / "store"
    prompts = read(store / "prompts" / stages[0]["inputs"]["prompts"] / "test.parquet", Prompt)
    evaluation = store / "evaluate" / stages[policy]["key"]
    items = [each for each in read(evaluation / "items.parquet", Item) if each.kind == "greedy"]
    responses = read(evaluation / "samples.parquet", Response)
    greedy = {
        each.id: response.text
        for each in items
        for response in responses
        if response.id == each.id and response.logprob == each.logprob and response.tokens == each.tokens
    }
    return prompts, [greedy[prompt.id] for prompt in prompts]


@pytest.mark.parametrize("iteration", ["sft", "0", "1"])
def test_greedy_responses_are_those_that_the_run_evaluated(smoke: Path, tmp_path: Path, iteration: str) -> None:
    prompts, greedy = stored(smoke, ["sft", "0", "1"].index(iteration))
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"messages": prompt.messages}) + "\n" for prompt in prompts[:10]))
    out = tmp_path / "out.jsonl"
    done = sample(smoke, f"iteration={iteration}", f"prompts={file}", "temperature=0", f"out={out}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["response"] for row in rows] == greedy[:10]
    assert "10 responses" in done.stdout
    again = sample(smoke, f"prompts={file}", f"out={out}")
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_adapters_are_applied(adapted: Path) -> None:
    summary = json.loads((run_of(adapted) / "summary.json").read_text())
    assert summary["settings"]["model"]["lora"]["rank"] == 4
    prompts, greedy = stored(adapted, len(summary["table"]) - 1)
    speaker = open_speaker(run_of(adapted), None, adapted / "store", temperature=0.0)
    found = speaker.respond([prompt.messages for prompt in prompts[:10]], 0)
    assert [several[0].text for several in found] == greedy[:10]


def test_samples_depend_only_on_the_seed_and_differ_from_each_other(smoke: Path) -> None:
    given = ("prompt=What is 2 + 3?", "samples=4", "seed=5")
    first, again = sample(smoke, *given), sample(smoke, *given)
    assert first.stdout == again.stdout
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2, 3]
    assert len({row["response"] for row in rows}) > 1
    other = sample(smoke, "prompt=What is 2 + 3?", "samples=4", "seed=6")
    assert other.stdout != first.stdout
    cut = sample(smoke, "prompt=What is 2 + 3?", "max_tokens=1")
    assert json.loads(cut.stdout)["tokens"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "give either prompt"),
        (("prompt=a", "prompts=b"), "give either prompt"),
        (("prompts=absent.txt",), "absent.txt: cannot be read"),
        (("prompt=a", "iteration=9"), "no such iteration; expected one of sft, 0, 1"),
        (("prompt=a", "samples=0"), "error: samples=0"),
        (("prompt=a", "temperature=-1"), "error: temperature=-1"),
        (("prompt=a", "temperature=0", "samples=2"), "error: samples=2"),
        (("prompt=a", "max_tokens=-1"), "max_tokens=-1"),
        (("prompt=a", "max_tokens=100000"), "max_tokens=100000: the model has a context of"),
        (("prompt=a", "store=elsewhere"), "store"),
        (("prompt=" + "many words " * 500,), "prompt 1 has"),
        (("promt=a",), "Did you mean prompt"),
    ],
)
def test_wrong_arguments_are_named(smoke: Path, given: tuple[str, ...], message: str) -> None:
    done = sample(smoke, *given)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_second_policy_is_named_by_its_setting(smoke: Path, chat: Callable[..., Done]) -> None:
    assert "against=9: this run has no such iteration; expected one of sft, 0, 1" in chat(smoke, [], "against=9").stderr


@pytest.mark.parametrize(("command", "further"), [("sample", "prompt=a"), ("chat", "against=sft")])
def test_a_folder_without_a_run_is_named_before_torch_is_imported(tmp_path: Path, command: str, further: str) -> None:
    code = f"""
import sys
from dnpo.commands.{command} import main
try:
    main([{str(tmp_path)!r}, {further!r}])
finally:
    assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no finished run there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"prompt": "a"}\n\n{"prompt": [{"role": "user", "content": "b"}]}', [[user("a")], [user("b")]]),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            [[user("a")]],
        ),
        ('"a"', [[user("a")]]),
    ],
)
def test_prompts_of_several_forms_are_read(tmp_path: Path, content: str, found: list[Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert read_conversations(path) == found
    text = tmp_path / "rows.txt"
    text.write_text("a\n\n b \n")
    assert read_conversations(text) == [[user("a")], [user(" b ")]]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"text": "a"}',
        '{"prompt": ""}',
        '{"prompt": []}',
        '{"messages": [{"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        "3",
    ],
)
def test_a_line_without_a_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        read_conversations(path)


def test_a_conversation_continues_and_can_be_started_anew(smoke: Path, chat: Callable[..., Done]) -> None:
    done = chat(smoke, ["What is 2 + 3?", "", "/again", "/new", "What is 2 + 3?", "/what", "/quit", "never read"])
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[iteration-1")]
    assert len(lines) == 3
    assert "(a new conversation)" in done.stdout
    assert "(/what is not known" in done.stdout
    assert "never read" not in done.stdout


def test_two_policies_are_shown_side_by_side_or_one_below_the_other(smoke: Path, chat: Callable[..., Done]) -> None:
    wide = chat(smoke, ["What is 2 + 3?"], "against=sft")
    (line,) = (line for line in wide.stdout.splitlines() if line.startswith("[iteration-1"))
    assert "[sft: " in line
    narrow = chat(smoke, ["What is 2 + 3?"], "against=sft", columns=60)
    assert sum(line.startswith("[") for line in narrow.stdout.splitlines()) == 2
    assert "No judge gives an opinion: the run's judge (Rules) needs rows with a known answer" in wide.stdout


def test_a_judge_of_texts_scores_the_responses(smoke: Path, tmp_path: Path) -> None:
    summary = json.loads((run_of(smoke) / "summary.json").read_text())
    summary["settings"]["eval"]["judge"] = {"_target_": "dnpo.judges.longer.Longer"}
    judge = open_judge(SavedPolicy(summary, 0, smoke / "store"))
    assert not isinstance(judge, str)
    responses = [Response("x", "sft", text, [1], 1, "eos") for text in ("short", "a much longer answer")]
    first, second = opinions(judge, [[user("a")], [user("a")]], responses, tmp_path / "ledger.sqlite")
    assert float(first) < float(second)
