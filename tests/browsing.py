"""Runs for ``dnpo browse``, its server, and its page in a headless browser, for tests and the benchmark."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from starlette.applications import Starlette

from dnpo.browse.runs import Run, find
from dnpo.browse.server import listen, make_server
from dnpo.records import Item, Pair, Prompt, Response, Verdict
from dnpo.tables import GROUP, schema

MANY = 20_000
FAMILIES = ("sums", "words", "dates")


# --- runs -------------------------------------------------------------------------------------------------------------


def write_manifest(stage: Path, **settings: Any) -> None:
    """Write what makes a stage finished, with its settings."""
    (stage / "manifest.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")


def write(path: Path, kind: type, count: int, **columns: Any) -> None:
    """Write rows; fields that are not given are empty, or 0."""
    empty: Callable[[pa.DataType], Any] = lambda of: (  # noqa: E731
        [] if pa.types.is_list(of) else "" if pa.types.is_string(of) else False if pa.types.is_boolean(of) else 0
    )
    arrays = [
        pa.array(columns[field.name], field.type, from_pandas=True)
        if field.name in columns
        else pa.array([empty(field.type)] * count, field.type)
        for field in schema(kind)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path.parent)
    table = pa.table(arrays, schema=schema(kind))
    pq.write_table(table, path, row_group_size=GROUP, write_page_checksum=True)


def make_run(
    folder: Path,
    prompts: Sequence[str],
    scores: Mapping[str, Any],
    say: Callable[[str, int, int], str] = lambda policy, answer, row: f"answer {answer} of {policy} to {row}",
    seed: int = 1,
    judge: str = "Rules",
) -> Path:
    """Make the folder of a finished run with its store: held-out answers of each policy, and pairs of iteration 0.

    Args:
        scores: of each policy, one row per answer: human, greedy, samples; one column per prompt.
        say: the text of an answer.
    """
    count, store = len(prompts), folder / "store"
    ids = [f"test-{i:05d}" for i in range(count)]
    families = [FAMILIES[i % 3] for i in range(count)]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    human = [f"human to {prompt}" for prompt in prompts]
    for split in ("test", "train"):
        path = store / "prompts" / "p" / f"{split}.parquet"
        write(path, Prompt, count, id=ids, messages=messages, human=human, family=families)
    stages: list[dict[str, Any]] = [{"stage": "prompts", "key": "p", "iteration": "SFT", "inputs": {}}]
    for policy, given in scores.items():
        values = np.asarray(given, float)
        answers = len(values) - 1
        texts = [say(policy, answer, row) for answer in range(answers) for row in range(count)]
        key = f"{policy}-{seed}"
        own = store / "evaluate" / key
        finish = ["eos"] * len(texts)
        write(own / "samples.parquet", Response, len(texts), text=texts, finish=finish)
        flat = values.reshape(-1)
        right = [bool(value >= 50) for value in flat]
        logprob = [None] * count + [-float(len(text)) for text in texts]
        write(own / "items.parquet", Item, len(flat), score=flat, right=right, logprob=logprob)
        reason = ["no reply" if np.isnan(value) else "" for value in flat]
        write(own / "verdicts.parquet", Verdict, len(flat), score=flat, reason=reason)
        write_manifest(own, judge={"_target_": judge})
        iteration = policy if policy == "SFT" else int(policy)
        inputs = {"prompts": "p", "policy": f"trained-{policy}"} | (
            {} if policy == "SFT" else {"pairs": f"pairs-{seed}"}
        )
        stages.append({"stage": "evaluate", "key": key, "iteration": iteration, "inputs": inputs})
    stages.append({"stage": "pairs", "key": f"pairs-{seed}", "iteration": 0, "inputs": {"prompts": "p"}})
    flipped = [i % 4 == 0 for i in range(count)]
    sources = {"chosen_source": ["policy@0" if flip else "human" for flip in flipped]}
    sources["rejected_source"] = ["human" if flip else "policy@0" for flip in flipped]
    write(
        store / "pairs" / f"pairs-{seed}" / "pairs.parquet",
        Pair,
        count,
        id=ids,
        messages=messages,
        chosen=[f"chosen {i}" for i in range(count)],
        rejected=[f"rejected {i}" for i in range(count)],
        chosen_score=[float(i % 100) for i in range(count)],
        rejected_score=[float(i % 3) for i in range(count)],
        flipped=flipped,
        strength=[1.0] * count,
        weight=[1.0] * count,
        **sources,
    )
    settings = {"store": "store", "seed": seed, "eval": {"split": "test"}}
    run = folder / "outputs" / "2026-01-01" / f"00-00-0{seed}"
    run.mkdir(parents=True)
    summary = {"cwd": str(folder), "settings": settings, "choices": {"method": "spin"}, "stages": stages}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def found(*folders: Path) -> list[Run]:
    return find([str(folder) for folder in folders], None, "sqlite:///nowhere.db", "dnpo")


def make_large_run(folder: Path) -> Path:
    """Make a run of three policies on 20,000 prompts."""
    draw = np.random.default_rng(0)
    scores = {policy: draw.integers(0, 101, (4, MANY)) for policy in ("SFT", "0", "1")}
    prompts = [f"Which number comes after {i}, and why does it do so?" for i in range(MANY)]
    text = "because it is what was asked for in this question, as anyone who can count knows "
    say: Callable[[str, int, int], str] = lambda policy, answer, row: f"{row + 1} by {policy}, {text * 2}"  # noqa: E731
    return make_run(folder, prompts, scores, say)


# --- a browser --------------------------------------------------------------------------------------------------------


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address of the application while it is served."""
    server, opened = make_server(app), listen(0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(60)
        opened.close()


@contextmanager
def tab(chromium: Any, width: int = 1280) -> Iterator[tuple[Any, list[str]]]:
    """A page of the browser, and events that must not happen there: dialogs, errors, requests elsewhere."""
    events: list[str] = []
    page = chromium.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(60_000)
    page.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("request", lambda asked: events.append(asked.url) if "//127.0.0.1:" not in asked.url else None)
    yield page, events
    page.close()


def wait_for(page: Any, expression: str) -> None:
    """Wait until an expression is true in the page, whose security policy blocks playwright's own method."""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


Action = Callable[[Any], None]
ACTIONS: Mapping[str, Action] = {
    "search": lambda page: page.fill("input[name=q]", "4321"),
    "no search": lambda page: page.fill("input[name=q]", ""),
    "order": lambda page: page.select_option("fieldset:not([hidden]) select[name=sort]", "changed"),
    "filter": lambda page: page.select_option("select[name=family]", "dates"),
    "next page": lambda page: page.click("#next"),
    "next row by key": lambda page: (page.evaluate("document.activeElement.blur()"), page.keyboard.press("j")),
    "open by key": lambda page: page.keyboard.press("Enter"),
    "close by key": lambda page: page.keyboard.press("Escape"),
    "open": lambda page: page.click("#rows > li:nth-child(2) .head"),
    "pairs": lambda page: page.click("nav [data-view=pairs]"),
}
OPEN = "document.querySelectorAll('.detail table').length"
ENDS = {  # what an action ends with; by default with new rows
    "next row by key": "document.activeElement.classList.contains('head')",
    "open by key": f"{OPEN} > 0",
    "close by key": f"{OPEN} === 0",
    "open": f"{OPEN} > 0",
}


def time_actions(page: Any, address: str) -> tuple[float, dict[str, float]]:
    """Return the CPU seconds of the first page, in the browser and in this process's server, and of each action.

    Those of an action are of the page's thread, and so bound every pause in it.
    """
    cdp = page.context.new_cdp_session(page)
    cdp.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        metrics = {each["name"]: each["value"] for each in cdp.send("Performance.getMetrics")["metrics"]}
        return float(metrics["TaskDuration"])

    clock = time.process_time()
    page.goto(address)
    page.wait_for_selector("#rows > li:nth-child(50)")
    first = busy() + time.process_time() - clock
    pauses = {}
    for name, act in ACTIONS.items():
        before, rows_before = busy(), page.evaluate("performance.getEntriesByName('rows').length")
        act(page)
        wait_for(page, ENDS.get(name, f"performance.getEntriesByName('rows').length > {rows_before}"))
        pauses[name] = busy() - before
    return first, pauses
