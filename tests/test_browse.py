"""``dnpo browse``: rows of runs on a page, tested by requests and in a real browser."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from dnpo.browse.runs import Run, _name_apart, find
from dnpo.browse.server import HEADERS, listen, make_app
from dnpo.errors import DataError, DnpoError, SettingsError
from dnpo.escape import HIDDEN
from dnpo.records import Rollout
from dnpo.tracking.reading import Database
from tests.browsing import (
    ACTIONS,
    MANY,
    found,
    make_large_run,
    make_run,
    served,
    tab,
    time_actions,
    wait_for,
    write,
)
from tests.commands import run_command

LOCAL = "http://127.0.0.1:1"
EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}&lt;b&gt;\x00\x1b[31m\u202egnp\u202c\u200b"
    "</textarea><svg onload=alert(3)>"
)


# --- runs -------------------------------------------------------------------------------------------------------------


def client(*folders: Path) -> TestClient:
    return TestClient(make_app(found(*folders)), base_url=LOCAL)


def get(page: TestClient, path: str) -> dict[str, Any]:
    response = page.get(path)
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


def rows(page: TestClient, query: str = "") -> list[int]:
    return [row["row"] for row in get(page, f"/rows?{query}")["rows"]]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two policies on five prompts; the judge gave one greedy answer no score."""
    scores = {
        "SFT": [[50, 50, 50, 50, 50], [10, 80, 40, 60, 20], [0, 100, 0, 0, 0], [100, 100, 0, 0, 100]],
        "0": [[50, 50, 50, 50, 30], [90, 70, 40, np.nan, 30], [100, 0, 0, 0, 0], [100, 0, 0, 0, 0]],
    }
    return make_run(tmp_path_factory.mktemp("few"), ["one", "two", "Three", "four", "five"], scores)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three policies on 20,000 prompts."""
    return make_large_run(tmp_path_factory.mktemp("many"))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_held_out_answers_equal_the_stores(smoke: Path) -> None:
    (folder,) = smoke.glob("outputs/*/*")
    (run,) = found(folder)
    page = client(folder)
    split = pq.read_table(run.prompts / "test.parquet").to_pylist()
    evaluations = list(run.evaluations())
    assert [name for name, _ in evaluations][:2] == ["SFT", "0"]
    shown = get(page, "/row?row=3")
    assert shown["human"] == split[3]["human"]
    assert [each["iteration"] for each in shown["runs"][0]["iterations"]] == [name for name, _ in evaluations]
    for policy, (_, stage) in zip(shown["runs"][0]["iterations"], evaluations, strict=True):
        items = pq.read_table(stage / "items.parquet").to_pylist()
        samples = pq.read_table(stage / "samples.parquet").to_pylist()
        own = [item for item in items if item["id"] == split[3]["id"] and item["kind"] != "human"]
        texts = [row["text"] for row in samples if row["id"].split("#")[0] == split[3]["id"]]
        assert len(own) == len(policy["answers"]) >= 2
        for item, text, answer in zip(own, texts, policy["answers"], strict=True):
            assert answer["text"] == text
            assert answer["score"] == pytest.approx(item["score"])
            assert answer["logprob"] == pytest.approx(item["logprob"], rel=1e-6)
            assert (answer["right"], answer["tokens"]) == (item["right"], item["tokens"])


def test_pairs_equal_the_stores(smoke: Path) -> None:
    (folder,) = smoke.glob("outputs/*/*")
    (run,) = found(folder)
    page = client(folder)
    for iteration, file in run.trained_on():
        table = pq.read_table(file).to_pylist()
        shown = get(page, f"/rows?view=pairs&of=0.{iteration}&sort=order")
        assert shown["of"] == len(table)
        assert [row["sides"][0]["text"] for row in shown["rows"]] == [pair["chosen"] for pair in table[:50]]
        flipped = get(page, f"/rows?view=pairs&of=0.{iteration}&flipped=yes")
        assert flipped["total"] == sum(pair["flipped"] for pair in table)
    assert flipped["total"] > 0
    reference = run.reference(file)
    assert reference is not None
    logps = [row for shard in reference.glob("*.parquet") for row in pq.read_table(shard).to_pylist()]
    one = next(row for row in logps if row["pair"] == 1)
    sides = get(page, f"/row?view=pairs&of=0.{iteration}&row=1")["sides"]
    assert [side["logprob"] for side in sides] == pytest.approx([one["chosen"], one["rejected"]], rel=1e-6)


def test_training_rows_without_pairs_are_shown_too(few: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(few.parents[2], tmp_path / "copy")
    path = next(folder.glob("outputs/*/*/summary.json"))
    summary = json.loads(path.read_text()) | {"cwd": str(folder)}
    del summary["stages"][2]["inputs"]["pairs"]
    summary["stages"].append({"stage": "optimise", "key": "trained-0", "iteration": 0, "inputs": {}})
    path.write_text(json.dumps(summary))
    rollouts = {"id": ["test-00002"], "text": ["tried"], "source": ["policy@0"], "score": [30.0], "step": [7]}
    write(folder / "store" / "optimise" / "trained-0" / "rollouts.parquet", Rollout, 1, **rollouts)
    shown = get(client(path.parent), "/row?view=pairs&row=0")
    assert [side["side"] for side in shown["sides"]] == ["response"]
    assert shown["sides"][0]["text"] == "tried"
    assert shown["messages"][0]["content"] == "Three"
    assert (shown["human"], shown["step"]) == ("human to Three", 7)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", [4, 2, 1, 0, 3]),
        ("sort=best", [0, 1, 2, 4, 3]),
        ("sort=changed", [0, 1, 4, 2, 3]),
        ("sort=fell", [1, 2, 4, 0, 3]),
        ("sort=rose", [0, 4, 2, 1, 3]),
        ("sort=order", [0, 1, 2, 3, 4]),
        ("sort=order&change=rose", [0, 4]),
        ("sort=order&change=same", [2]),
        ("sort=order&change=fell", [1]),
        ("sort=order&family=sums", [0, 3]),
        ("sort=order&outcome=wins", [0, 1]),
        ("sort=order&outcome=loses", [2]),
        ("sort=order&outcome=gained", [0]),
        ("sort=order&outcome=lost", [3]),
        ("sort=order&q=THREE", [2]),
        ("sort=order&q=test-0000", [0, 1, 2, 3, 4]),
        ("sort=order&q=answer 2 of SFT to 4", [4]),
        ("sort=order&q=(", []),
        ("sort=order&answer=samples&change=fell", [1, 4]),
        ("sort=worst&a=0.0&b=0.SFT", [0, 4, 2, 3, 1]),
        ("sort=order&page=2", []),
    ],
)
def test_held_out_answers_are_filtered_and_ordered(few: Path, query: str, wanted: list[int]) -> None:
    assert rows(client(few), query) == wanted


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("sort=order&flipped=yes", [0, 4]),
        ("sort=order&flipped=no&q=chosen 1", [1]),
        ("sort=order&q=REJECTED 3", [3]),
        ("sort=order&family=words", [1, 4]),
        ("sort=order&gap=equal", [0, 1, 2]),
        ("sort=order&gap=above", [3, 4]),
        ("sort=order&gap=below", []),
        ("sort=wide", [3, 4, 0, 1, 2]),
        ("sort=narrow", [0, 1, 2, 3, 4]),
        ("sort=worst", [0, 1, 2, 3, 4]),
    ],
)
def test_pairs_are_filtered_and_ordered(few: Path, query: str, wanted: list[int]) -> None:
    assert rows(client(few), f"view=pairs&{query}") == wanted


def test_a_missing_score_is_shown_with_its_reason(few: Path) -> None:
    answer = get(client(few), "/row?row=3")["runs"][0]["iterations"][1]["answers"][0]
    assert (answer["score"], answer["reason"]) == (None, "no reply")


def test_runs_are_side_by_side_where_their_prompts_are_the_same(tmp_path: Path) -> None:
    scores = {"SFT": [[50, 50], [1, 2], [3, 4]]}
    first = make_run(tmp_path / "a", ["same", "first"], scores, seed=1)
    second = make_run(tmp_path / "b", ["same", "second"], scores, seed=2)
    page = client(first, second)
    assert get(page, "/rows")["of"] == 3
    shown = {row: get(page, f"/row?row={row}") for row in range(3)}
    names = [[run["name"] for run in shown[row]["runs"]] for row in range(3)]
    assert names == [["spin, seed 1", "spin, seed 2"], ["spin, seed 1"], ["spin, seed 2"]]
    assert shown[2]["messages"][0]["content"] == "second"
    assert shown[2]["runs"][0]["iterations"][0]["answers"][0]["text"] == "answer 0 of SFT to 1"
    assert get(page, "/rows?a=0.SFT&b=1.SFT&q=second&sort=order")["rows"][0]["sides"][0]["score"] is None


def test_by_default_runs_of_one_seed_are_compared(tmp_path: Path) -> None:
    def usual(*seeds: int) -> list[str]:
        scores = {"SFT": [[50], [1]], "0": [[50], [1]]}
        folders = [make_run(tmp_path / f"{seeds}{n}", ["same"], scores, seed=seed) for n, seed in enumerate(seeds)]
        return [title.split(" · ")[0].split(" (")[0] for title in get(client(*folders), "/rows")["titles"]]

    assert usual(0, 1, 0, 1) == ["spin, seed 0"] * 2
    assert usual(0, 1, 2, 1) == ["spin, seed 1"] * 2
    assert usual(0, 1) == ["spin, seed 0", "spin, seed 1"]


def test_scores_of_different_judges_are_not_offered_for_comparison(tmp_path: Path) -> None:
    scores = {"SFT": [[50], [1], [3]]}
    first, second = (make_run(tmp_path / str(seed), ["same"], scores, seed=seed) for seed in (1, 2))
    other = make_run(tmp_path / "3", ["same"], scores, seed=3, judge="openai")
    warning = "Different judges scored these runs"
    assert warning not in client(first, second).get("/").text
    assert warning in client(first, other).get("/").text


# --- runs are found ---------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_id_or_folder_and_the_newest_by_default(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{smoke / 'mlflow.db'}"
    (folder,) = smoke.glob("outputs/*/*")
    (tracked,) = Database(uri).runs()
    by_id = find([tracked.id[:8]], None, uri, "dnpo")
    assert by_id[0].prompts == found(folder)[0].prompts
    monkeypatch.chdir(smoke)
    assert find([], None, uri, "dnpo")[0].summary == by_id[0].summary
    assert len(find([str(folder), tracked.id], None, uri, "dnpo")) == 1


def test_a_sweeps_folder_selects_its_runs_and_a_store_may_have_moved(few: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(few.parents[2], tmp_path / "copy")
    runs = find([str(next(folder.glob("outputs/*")))], folder / "store", "sqlite:///nowhere.db", "dnpo")
    assert [run.store for run in runs] == [folder / "store"]


def test_what_cannot_be_shown_is_refused(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="outputs/"):
        found()
    (tmp_path / "begun").mkdir()
    with pytest.raises(DataError, match="is not the folder of a run"):
        found(tmp_path / "begun")
    (tmp_path / "begun" / "train.log").touch()
    with pytest.raises(DataError, match="has not finished"):
        found(tmp_path / "begun")
    with pytest.raises(DnpoError, match="nothing"):
        find(["nothing"], None, "sqlite:///nowhere.db", "dnpo")
    with pytest.raises(DataError, match="store=FOLDER"):
        find([str(few)], tmp_path / "elsewhere", "sqlite:///nowhere.db", "dnpo")
    (tmp_path / "begun" / "summary.json").write_text('{"table": []}')
    with pytest.raises(DataError, match="earlier version"):
        found(tmp_path / "begun")


# --- requests ---------------------------------------------------------------------------------------------------------


def test_only_local_requests_are_answered_and_nothing_can_be_written(few: Path) -> None:
    page = client(few)
    assert page.get("/", headers={"host": "localhost:8000"}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1:80", ""):
        refused = page.get("/rows", headers={"host": host})
        assert refused.status_code == 400, host
        assert "answer" not in refused.text
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert page.request(method, "/rows").status_code == 405
    for path in ("/", "/page.js", "/page.css", "/rows", "/nothing", "/rows?sort=x"):
        response = page.get(path)
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
        assert "access-control-allow-origin" not in response.headers
    opened = listen(0)
    assert opened.getsockname()[0] == "127.0.0.1"
    opened.close()


def test_the_page_has_no_inline_script_and_loads_nothing_from_elsewhere(few: Path) -> None:
    page = client(few)
    text = page.get("/").text
    assert re.findall(r"<script[^>]*>(.*?)</script>", text) == [""]
    assert not re.search(r"\son\w+=|javascript:|style=", text)
    assert re.findall(r"""(?:src|href)=["'](?!/page\.|data:,)""", text) == []
    assert "http" not in page.get("/page.css").text + page.get("/page.js").text
    assert "innerHTML" not in page.get("/page.js").text


@pytest.mark.parametrize(
    "path",
    [
        *("/rows?sort=x", "/rows?page=0", "/rows?page=x", "/rows?b=9.9", "/rows?unknown=1", "/rows?view=x"),
        *("/row", "/row?row=5", "/row?row=-1", "/row?row=x", "/rows?view=pairs&of=7.0", "/row?view=pairs&row=99"),
    ],
)
def test_wrong_addresses_are_refused_by_name(few: Path, path: str) -> None:
    refused = client(few).get(path)
    assert refused.status_code == 400
    name, _, value = path.rpartition("&")[2].rpartition("?")[2].partition("=")
    assert name in refused.text or value in refused.text
    assert "Input" not in refused.text


def test_a_port_in_use_is_refused_by_its_setting() -> None:
    opened = listen(0)
    opened.listen()
    with opened, pytest.raises(SettingsError, match=f"port={opened.getsockname()[1]}"):
        listen(opened.getsockname()[1])
    with pytest.raises(SettingsError, match="port=99999"):
        listen(99999)


def test_a_request_on_20_000_rows_takes_less_than_a_fifth_of_a_second(many: Path) -> None:
    page = client(many)
    asked = ("q=4321", "q=nothing like it", "sort=changed", "family=dates&outcome=gained&answer=samples", "page=400")
    for query in ("", *asked, "view=pairs", *(f"view=pairs&{each}" for each in ("q=4321", "flipped=yes", "sort=wide"))):
        clock = time.process_time()
        get(page, f"/rows?{query}")
        assert time.process_time() - clock < 0.2, query


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(few: Path) -> None:
    command = [sys.executable, "-m", "dnpo", "browse", str(few), "port=0", "open=false"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/", said)
            assert address, said
            with urllib.request.urlopen(f"{address[0]}rows", timeout=60) as response:
                assert json.load(response)["of"] == 5
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # otherwise the block would wait for it if the test failed
    assert (process.returncode, out) == (0, "")
    (first,) = err.splitlines()
    assert ": reading " in first


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    done = run_command(tmp_path, "dnpo.cli", "browse", "nothing", "port=0")
    assert done.returncode == 1
    first, answer = done.stderr.splitlines()
    assert first.endswith(": reading nothing")
    assert answer.startswith("error: nothing: ")
    assert list(tmp_path.iterdir()) == []


# --- a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on the path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def shown(page: Any) -> list[int]:
    """The rows on the page, when it is at rest."""
    page.wait_for_selector("body:not([aria-busy])")
    return [int(row) for row in page.evaluate("[...document.querySelectorAll('#rows > li')].map(e => e.dataset.row)")]


def test_search_filters_keys_and_links_in_a_browser(few: Path, chromium: Any) -> None:
    with served(make_app(found(few))) as address, tab(chromium) as (page, events):
        page.goto(address)
        page.wait_for_selector("#rows > li")
        assert shown(page) == [4, 2, 1, 0, 3]
        page.keyboard.press("/")
        page.keyboard.type("three")
        wait_for(page, "document.querySelectorAll('#rows > li').length === 1")
        assert shown(page) == [2]
        page.keyboard.press("Escape")
        page.fill("input[name=q]", "")
        wait_for(page, "document.querySelectorAll('#rows > li').length === 5")
        page.select_option("select[name=family]", "sums")
        wait_for(page, "document.querySelectorAll('#rows > li').length === 2")
        page.select_option("fieldset:not([hidden]) select[name=sort]", "order")
        wait_for(page, "document.querySelector('#rows > li').dataset.row === '0'")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        page.keyboard.press("Enter")
        page.wait_for_selector(".detail table")
        assert "answer 2 of SFT to 0" in page.inner_text(".detail")
        link, state = page.url, page.inner_text("main")
        page.keyboard.press("Escape")
        assert page.query_selector(".detail") is None
        page.go_back()
        page.wait_for_selector(".detail table")
        page.keyboard.press("v")
        page.wait_for_selector("#rows.pairs > li")
        assert "flipped" in page.inner_text("#rows")
        scores = [each.inner_text() for each in page.query_selector_all("#rows .score, #rows .difference")]
        assert scores
        assert all(re.fullmatch(r"[+−]?\d+\.\d|–", score) for score in scores), "the same decimals everywhere"
        page.keyboard.press("?")
        assert page.is_visible("#keys")
        page.keyboard.press("Escape")
        assert not page.is_visible("#keys")
        page.goto(link)  # a link shows the same again
        page.wait_for_selector(".detail table")
        assert page.inner_text("main") == state
        assert page.input_value("select[name=family]") == "sums"
        page.goto(link.replace("runs=", "runs=0"))
        page.wait_for_selector("#notice:not([hidden])")
        page.goto(f"{address}?sort=nonsense")
        page.wait_for_selector("#notice:not([hidden])")
        assert "sort=nonsense" in page.inner_text("#notice")
        assert [event for event in events if "400" not in event] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_texts_stay_texts_in_a_browser(tmp_path: Path, chromium: Any, width: int) -> None:
    scores = {"SFT": [[50, 50], [1, 2], [3, 4]], "0": [[50, 50], [1, 2], [3, 4]]}
    run = make_run(tmp_path, [EVIL, "x" * 3000], scores, lambda *_: EVIL)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"choices": {"method": EVIL}}))
    (tmp_path / "outputs" / "other").mkdir()
    other = shutil.copytree(run, tmp_path / "outputs" / "other" / "copy")
    summary["stages"].append({"stage": "drift", "key": "d", "iteration": 0, "inputs": {}})
    (other / "summary.json").write_text(json.dumps(summary | {"choices": {"method": EVIL}}))
    with served(make_app(found(run, other))) as address, tab(chromium, width) as (page, events):
        for query in (
            "?sort=order&row=0",
            "?view=pairs&sort=order&row=0",
            "?q=%3Cscript%3E&family=%3Cimg%20src%3Dx%3E",
        ):
            page.goto(address + query)
            page.wait_for_selector(".detail" if "row" in query else "#foot:not(:empty)")
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            text = page.evaluate("document.body.textContent")
            assert not {chr(code) for code in HIDDEN} & set(text)
            assert page.evaluate("document.querySelectorAll('img, svg, textarea, main script').length") == 0
            if "row" in query:
                assert "<script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}&lt;b&gt;␀␛[31m⟨U+202E⟩" in text
        assert events == []


def test_20_000_rows_do_not_block_a_browser(many: Path, chromium: Any) -> None:
    """The CPU time of an action, in the page's thread, bounds every pause, however busy the machine is."""
    with served(make_app(found(many))) as address, tab(chromium) as (page, _):
        first, pauses = time_actions(page, address)
        assert 0 < first <= 1.0
        assert len(pauses) == len(ACTIONS)
        assert max(pauses.values()) < 0.2, pauses
        assert page.inner_text("#count") == f"{MANY:,} pairs"


def test_runs_of_one_name_are_told_apart_by_what_differs() -> None:
    def run(choices: dict[str, str] | None = None, **settings: Any) -> Run:
        summary = {
            "choices": {"method": "dnpo", "judge": "rules", **(choices or {})},
            "settings": {"seed": 0, **settings},
        }
        return Run("dnpo, seed 0", summary, Path("store"))

    def names(*some: Run) -> list[str]:
        return [each.name.removeprefix("dnpo, seed 0") for each in _name_apart(some)]

    rates = [run(trainer={"optimizer": {"lr": lr}}, store=f"store{lr}") for lr in (0.1, 0.3)]
    assert names(rates[0]) == [""]
    assert names(*rates) == [", trainer.optimizer.lr=0.1", ", trainer.optimizer.lr=0.3"]
    assert names(rates[0], rates[0]) == [" (1)", " (2)"]
    judges = [run({"judge": "longer"}, judge={"a": 1}), run(judge={"b": 2, "c": 3})]
    assert names(*judges) == [", judge=longer", ", judge=rules"]
    assert names(run(a=1, b=1, c=1), run(a=2, b=2, c=2)) == [" (1)", " (2)"]
    assert names(run(text="short"), run(text="long" * 20)) == [", text=short", ""]
