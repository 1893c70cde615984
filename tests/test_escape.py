"""Users' texts, such as families' names, in every place with special characters."""

import ast
import csv
import io
import json
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name
from rich.console import Console

from dnpo import escape
from dnpo.screen import ScreenTable
from dnpo.stats.intervals import Estimate
from dnpo.stats.table import Cell, table, to_csv
from tests.commands import succeed, summary, train

FAMILIES = ("C++", "Q&A", "[/b]x[b]", "a/b", "../c", "d//", ".", "é日", "=1+1", "$x_1$ % #", "<b>|`*", "a:2B:b", "a+b")
SHORT = ("data.max_response_tokens=16", "data.max_prompt_tokens=90")
PRINTED = {("escape.py", "for_terminal(text)"), ("catalogue.py", "write_markdown()")}
CONTROLS = ("\x1b[31mred", "bell\x07", "\u202eturned", "back\rto the start")


def test_nothing_is_printed_without_escaping() -> None:
    """Users' texts pass through ``say`` or another function that makes control characters visible."""
    for file in Path(escape.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert (file.name, ast.unparse(node.args[0])) in PRINTED, f"{file}:{node.lineno}"


def test_printed_text_shows_its_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    escape.say("\x1b[31mred[/b]\n")
    escape.say("\x07", error=True)
    assert capsys.readouterr() == ("␛[31mred[/b]\n\n", "␇\n")


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_of_an_error_end_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/folder/" + 12 * "long" + "/summary.json"
    text = f"error: model.path={path}: no model there; expected a folder with config.json\n       or this"
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(escape.sys, "stderr", terminal := Terminal())
    escape.say(text, error=True)
    lines = terminal.getvalue().splitlines()
    assert " ".join(terminal.getvalue().split()) == " ".join(text.split()), "no word is broken, so it can be copied"
    assert all(len(line) < 50 for line in lines if path not in line)
    assert all(line.startswith("       ") for line in lines[1:])


def test_sentences_on_a_terminal_keep_numbers_with_what_they_count(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "store  " + "an interval of 95 % and 8.3 s in all, " * 6
    for width in range(30, 60):
        lines = escape.fold(text, width, hang=7).splitlines()
        assert all(len(line) < width and not line.lstrip().startswith(("%", "s ", "in ", "all")) for line in lines)
        assert all(line.startswith(" " * 7) for line in lines[1:])
        assert "\n".join(lines).split() == text.split()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(escape.sys, "stdout", terminal := Terminal())
    escape.tell(text, hang=7)
    assert terminal.getvalue() == escape.fold(text, 40, hang=7) + "\n"


@pytest.mark.parametrize("name", [*FAMILIES, *CONTROLS, "", "x" * 300, "\ud800"])
def test_every_name_can_be_tracked(name: str) -> None:
    key = escape.for_mlflow(f"eval/accuracy/{name}")
    for check in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        check(key)
    assert len(key) <= 250


def test_different_names_stay_different_and_ordinary_names_unchanged() -> None:
    names = [*FAMILIES, *CONTROLS, "x" * 300, "x" * 301, "C:2B::2B:"]
    assert len({escape.for_mlflow(name) for name in names}) == len(names)
    assert escape.for_mlflow("eval/accuracy/date of birth") == "eval/accuracy/date of birth"
    assert escape.for_mlflow("C++") == "C:2B::2B:"


@pytest.mark.parametrize("text", [*FAMILIES, *CONTROLS])
def test_a_table_on_the_terminal_shows_texts_unchanged(text: str) -> None:
    shown = ScreenTable(title=text)
    shown.add_column(text)
    shown.add_row(text)
    screen = Console(file=io.StringIO(), width=200, force_terminal=False)
    screen.print(shown)
    assert screen.file.getvalue().count(escape.for_terminal(text)) == 3  # type: ignore[attr-defined]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", screen.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "cell"),
    [("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("-cmd|x", "'-cmd|x"), ("-0.5", "-0.5"), ("+1e-3", "+1e-3")],
)
def test_no_cell_of_text_becomes_a_formula(text: str, cell: str) -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv(table({text: {text: Cell(Estimate(-1.0))}}))))
    assert (row["row"], row["column"], row["value"]) == (cell, cell, "-1.0")


def test_code_in_markdown_ends_where_it_should() -> None:
    assert escape.for_markdown_code("a`b``c|d\ne") == r"```a`b``c\|d e```"
    assert escape.for_markdown_code("`a`") == "`` `a` ``"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows whose families, prompts and file name contain special characters."""
    folder = tmp_path_factory.mktemp("hostile")
    names = [*FAMILIES, *CONTROLS]
    rows = [
        {"prompt": f"{names[i % len(names)]} number {i}?", "response": f"{i} [b]", "answer": str(i)}
        | {"family": names[i % len(names)]}
        for i in range(12 * len(names))
    ]
    (folder / "set[v1] [b].jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_on_rows_with_control_characters_is_tracked_and_shown(hostile: Path, migrated: Path) -> None:
    (hostile / "mlflow.db").write_bytes(migrated.read_bytes())
    settings = ("scale=smoke", "data=jsonl", "data.path='set[v1] [b].jsonl'", "iterations=1", "judge=exact", *SHORT)
    out = succeed(hostile, *settings)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", out)
    row = summary(hostile)["table"][-1]
    families = {name for name in row if name.startswith("eval/accuracy/")}
    assert len(families) > len(FAMILIES) // 2
    (run,) = MlflowClient(tracking_uri=f"sqlite:///{hostile / 'mlflow.db'}").search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert {name: row[name] for name in families} == {
        name: run.data.metrics[escape.for_mlflow(name)] for name in families
    }
    assert "Traceback" not in train(hostile, *settings, "plan=true").stderr
