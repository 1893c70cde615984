"""Read lm-eval's tasks from a folder of JSON lines.

A task's items are in ``TASK_test.jsonl``, ``TASK_val.jsonl`` or ``TASK.jsonl`` (``truthfulqa`` for mc1 and mc2), its
examples in ``TASK_fewshot.jsonl`` or ``TASK_train_fewshot.jsonl``. Every row may have an ``id``. Other fields:

==============  ====================================================================================================
arc_easy        question, choices, answer (number of the right choice)
arc_challenge   as arc_easy
mmlu            as arc_easy, and subject
winogrande      context_options (two beginnings), continuation, answer
hellaswag       activity_label, endings, label, and ctx or lm-eval's ctx_a and ctx_b (it capitalises ctx_b)
gsm8k           question, answer (ending in ``#### NUMBER``)
truthfulqa      question, mc1 and mc2, both with choices and labels (1 is true)
==============  ====================================================================================================
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from dnpo.data.parsing import open_text, parse_json
from dnpo.data.turns import is_blank
from dnpo.data.unusable import RowError, read_rows
from dnpo.errors import DataError
from dnpo.seeding import derive

Row = dict[str, Any]
DEFINITIONS = Path(__file__).parent / "tasks"
LENDERS = {"arc_easy": "arc_challenge"}  # a task without a file of examples uses the other task's


@dataclass(frozen=True)
class BenchmarkTask:
    """One of lm-eval's tasks.

    Attributes:
        definition: as in lm-eval's YAML files, without data.
        rows: its items.
        examples: rows that can be examples before a question.
        note: a remark on the examples, for the report.
    """

    definition: dict[str, Any]
    rows: list[Row]
    examples: list[Row]
    note: str = ""


def offline(folder: Path, name: str) -> list[BenchmarkTask]:
    """Read a task from the rows of a folder; MMLU gives one task for each subject, with that subject's examples.

    Raises:
        DataError: a file is missing, or a row is not valid.
    """
    definition = yaml.safe_load((DEFINITIONS / f"{name}.yaml").read_text(encoding="utf-8"))
    stem = name.partition("_mc")[0]
    path = _first(folder, [f"{stem}_test", f"{stem}_val", stem])
    if path is None:
        raise DataError(
            f"source={folder}: has no {stem}_test.jsonl, {stem}_val.jsonl or {stem}.jsonl; add one, or name the "
            "benchmarks there are in benchmarks=[…]"
        )
    rows = _read(path, name)
    if not rows:
        raise DataError(f"{path}: has no rows")
    lender = LENDERS.get(name, stem)
    own, lent = ([f"{of}_fewshot", f"{of}_train_fewshot"] for of in (stem, lender))
    found = _first(folder, own) or _first(folder, lent)
    questions = {_question(row) for row in rows}
    examples = [row for row in _read(found, name) if _question(row) not in questions] if found else []
    note = f"{name} takes its examples from {found.name}" if found and found.stem not in own else ""
    if name != "mmlu":
        return [BenchmarkTask(definition, rows, examples, note)]
    return [
        BenchmarkTask(
            {**definition, "task": f"mmlu_{subject}"},
            [row for row in rows if row["subject"] == subject],
            [row for row in examples if row["subject"] == subject],
        )
        for subject in dict.fromkeys(row["subject"] for row in rows)
    ]


def _first(folder: Path, stems: list[str]) -> Path | None:
    return next((folder / f"{stem}.jsonl" for stem in stems if (folder / f"{stem}.jsonl").is_file()), None)


def _question(row: Row) -> str:
    """The text that identifies an item, so that a question is never an example for itself."""
    return json.dumps([row.get(name) for name in ("question", "query", "context_options", "choices")])


def _read(path: Path, task: str) -> list[Row]:
    """Read the rows of a file, with the fields that the task's definition uses.

    Raises:
        DataError: a row is not valid; names file and line of the first such row, and counts them by reason.
    """
    seen = set()

    def make(where: str, raw: Any) -> Row:
        try:
            row = {"id": str(raw["id"]), **FORMS[task](raw)} if "id" in raw else FORMS[task](raw)
        except KeyError as error:
            problem = f"has no {error.args[0]}, which {task} needs"
            raise RowError(problem, problem) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise RowError(f"cannot be used for {task}", f"cannot be used for {task}: {error}") from error
        if row.get("id") in seen:
            raise RowError("the id of another row", f"the id {row['id']} occurs twice")
        if "id" in row:
            seen.add(row["id"])
        return row

    with open_text(f"source={path.parent}", path) as stream:
        raw = list(parse_json(path, stream))
    rows, bad = read_rows(raw, make)
    bad.refuse(len(raw))
    return rows


def _choice(row: Row, choices: str = "choices", answer: str = "answer") -> Row:
    """The choices and the index of the right one."""
    given, right = row[choices], row[answer]
    if not isinstance(given, list) or not all(isinstance(text, str) and not is_blank(text) for text in given):
        raise ValueError(f"{choices} is {given!r}, expected a list of texts")
    if not isinstance(right, int) or not 0 <= right < len(given):
        raise ValueError(f"{answer} is {right!r}, expected a number from 0 to {len(given) - 1}")
    return {"choices": given, "answer": right}


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str) or is_blank(row[name]):
        raise ValueError(f"{name} is {row[name]!r}, expected a text")
    return cast(str, row[name])


def _arc(row: Row) -> Row:
    return {"question": _text(row, "question"), **_choice(row)}


def _mmlu(row: Row) -> Row:
    made = {"subject": _text(row, "subject"), **_arc(row)}
    if len(made["choices"]) != 4:
        raise ValueError(f"there are {len(made['choices'])} choices, expected 4")
    return made


def _winogrande(row: Row) -> Row:
    made = _choice(row, "context_options")
    if len(made["choices"]) != 2:
        raise ValueError(f"there are {len(made['choices'])} beginnings, expected 2")
    return {
        "context_options": made["choices"],
        "answer": made["answer"],
        "continuation": _text(row, "continuation").strip(),
    }


def _hellaswag(row: Row) -> Row:
    context = row["ctx"] if "ctx_a" not in row else f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    made = _choice({**row, "label": int(row["label"])}, "endings", "label")
    query = _plain(f"{_text(row, 'activity_label')}: {context}")
    return {"query": query, "choices": list(map(_plain, made["choices"])), "gold": made["answer"]}


def _plain(text: str) -> str:
    """Remove WikiHow's marks, as lm-eval does for HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _gsm8k(row: Row) -> Row:
    if "####" not in _text(row, "answer"):
        raise ValueError(f"answer is {row['answer']!r}, expected one that ends in #### NUMBER")
    return {"question": _text(row, "question"), "answer": row["answer"]}


def _truthfulqa(form: str) -> Callable[[Row], Row]:
    """Sort the choices, with their labels, by a hash, so that their position gives no information."""

    def convert(row: Row) -> Row:
        question = _text(row, "question")
        choices, labels = row[form]["choices"], row[form]["labels"]
        pairs = list(zip(choices, labels, strict=True))
        if not {0, 1} >= set(labels) or not sum(labels) or (form == "mc1" and sum(labels) > 1):
            one = "a single 1" if form == "mc1" else "at least one 1"
            raise ValueError(f"{form}.labels is {labels}, expected 0 for what is false and {one}")
        random.Random(derive(0, question, *sorted(choices))).shuffle(pairs)
        labels = [label for _, label in pairs]
        kept = {"question": question, "choices": [text for text, _ in pairs]}
        return {**kept, "gold": labels.index(1)} if form == "mc1" else {**kept, "labels": labels}

    return convert


FORMS: Mapping[str, Callable[[Row], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "truthfulqa_mc1": _truthfulqa("mc1"),
    "truthfulqa_mc2": _truthfulqa("mc2"),
    "winogrande": _winogrande,
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
}
