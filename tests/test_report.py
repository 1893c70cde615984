"""The report: its contents for runs and sweeps, also broken ones; their contents are always plain text in it."""

import base64
import itertools
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from dnpo import catalogue, palette
from dnpo.commands.report import main
from dnpo.errors import DataError
from dnpo.escape import HIDDEN
from dnpo.report.comparison import MEASURES, Items, ReportMeasure, compare
from dnpo.report.content import content
from dnpo.report.drawing import draw_response, height_of_response
from dnpo.report.groups import group_runs
from dnpo.report.markdown import render
from dnpo.report.outcome import Ranking
from dnpo.report.page import html, make_visible, number, strip_secrets, tied
from dnpo.report.response import Response, find_responses
from dnpo.report.selection import select
from dnpo.running.notes import describe_sweep
from dnpo.running.sweep import summarise
from dnpo.stats.intervals import Estimate
from dnpo.stats.paired import compare_paired
from dnpo.stats.significance import holm
from dnpo.tracking.reading import Database
from dnpo.tracking.writing import MLflowTracking
from dnpo.wording import duration
from tests.commands import succeed

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)></style><style>*{display:none}</style>{{7*7}}{% raw %}"
    "\"'`&amp;&lt;--><!-- ]]> $\\frac$ \x00\x07\x1b[31m\x7f\u202egnp.exe\u2066 "
    "\u05e9\u05dc\u05d5\u05dd \ud800 javascript:alert(3)"
)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "h1", "h2", "h3", "p", "a"),
    *(
        "code",
        "span",
        "strong",
        "bdi",
        "br",
        "wbr",
        "div",
        "dl",
        "dt",
        "dd",
        "ul",
        "li",
        "details",
        "summary",
        "figure",
        "img",
    ),
    *("figcaption", "table", "thead", "tbody", "tr", "th", "td", "pre", "em", "hr", "ol", "blockquote"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "src", "alt", "dir", "tabindex"),
    *("open", "style"),
}


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.styles: list[str] = []
        self._words: list[str] = []
        self.comments: list[str] = []
        self._in_style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        (self.styles if self._in_style else self._words).append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._words).split())


def check_harmless(page: Page) -> None:
    """No element, attribute or address but those of the template."""
    assert page.tags <= TAGS, page.tags - TAGS
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    assert not page.comments
    for tag, name, value in page.attributes:
        if name == "href":
            assert re.fullmatch(r"#[a-z]+(-\d+)?", value), value
        if name == "src":
            assert tag == "img"
            assert value.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,"))
        if name == "style":
            assert re.fullmatch(r"color: #[0-9A-F]{6}", value, re.I)
    policy = next(v for tag, name, v in page.attributes if tag == "meta" and v.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    css = (Path(sys.modules["dnpo.report"].__file__ or "").parent / "style.css").read_text()
    assert "".join(page.styles).strip() == f"{palette.write_css()}\n{css}".strip()
    assert "http" not in css
    assert "url(" not in css
    for _, name, value in page.attributes:
        if name == "src" and "svg" in value[:20]:
            picture = ET.fromstring(base64.b64decode(value.split(",", 1)[1]))
            for element in picture.iter():
                assert not element.tag.endswith(("script", "foreignObject", "image", "style}a"))
                for key, target in element.attrib.items():
                    assert not key.lower().startswith("on")
                    if key.endswith("href"):
                        assert target.startswith("#")


# --- tracked runs made by hand ----------------------------------------------------------------------------------------


class Lab:
    """A tracking store in a folder, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"

    def run(
        self,
        name: str,
        table: Sequence[Mapping[str, Any]] | None,
        *,
        seed: int = 0,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        sweep: str = "",
        status: str = "FINISHED",
        summary: Mapping[str, Any] | None = None,
        files: Mapping[str, Callable[[Path], object]] | None = None,
        metrics: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        tracking = MLflowTracking(uri=self.uri, artifacts=str(self.folder / "artifacts"))
        where = self.folder / "multirun" / sweep if sweep else None
        if where is not None:
            where.mkdir(parents=True, exist_ok=True)
        own = {
            "dnpo.kind": "run",
            "dnpo.seed": str(seed),
            **({"dnpo.sweep_name": sweep} if sweep else {}),
            **(tags or {}),
        }
        tracking.start(name, {"seed": seed, "iterations": 2, **(params or {})}, own, where)
        for metric, values in (metrics or {}).items():
            for step, value in enumerate(values):
                tracking.metrics({metric: value}, step)
        for path, writer in (files or {}).items():
            file = self.folder / "scratch" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            writer(file)
            tracking.artifact(file, path.rpartition("/")[0])
        if table is not None:
            file = self.folder / "summary.json"
            file.write_text(json.dumps({"table": list(table), **(summary or {})}))
            tracking.artifact(file)
        tracking.finish(status)  # type: ignore[arg-type]

    def page(self, given: str) -> tuple[str, Page]:
        text = html(content(select(Database(self.uri), given), self.uri))
        return text, Page(text)


@pytest.fixture
def lab(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return Lab(tmp_path)


def scored(scores: Mapping[str, Sequence[float]]) -> Callable[[Path], object]:
    """Writes items: of each prompt the scores of its samples."""
    rows = [
        {"id": key, "family": "", "kind": "sample", "sample": i, "score": score, "second": None, "right": None}
        for key, samples in scores.items()
        for i, score in enumerate(samples)
    ]
    return lambda path: pq.write_table(pa.Table.from_pylist(rows), path)


def paired_runs(lab: Lab, seeds: Sequence[int], groups: Mapping[str, float]) -> dict[str, np.ndarray]:
    """A sweep whose methods differ from SPIN by these points after iteration 1, and their scores by seed and item."""
    rng = np.random.default_rng(1)
    base = rng.normal(50, 10, (len(seeds), 40))
    found = {method: base + shift + rng.normal(0, 2, base.shape) for method, shift in groups.items()}
    for method, values in found.items():
        for seed, row, first in zip(seeds, values, base, strict=True):
            files = {
                # two samples whose mean is the score
                "items/iteration-0.parquet": scored({f"p{i}": (v - 1, v + 1) for i, v in enumerate(first)}),
                "items/iteration-1.parquet": scored({f"p{i}": (v - 1, v + 1) for i, v in enumerate(row)}),
            }
            lab.run(
                f"method={method} seed={seed}",
                [{"iteration": 0, "eval/score": first.mean()}, {"iteration": 1, "eval/score": row.mean()}],
                seed=seed,
                tags={"dnpo.method": method, "dnpo.dsl": "off", "dnpo.npo": "off" if method == "spin" else "trainable"},
                sweep="main",
                files=files,
                summary={"policies": [f"optimise/first{seed}", f"optimise/{method}{seed}"]},
            )
    return found


def test_a_sweep_is_compared_over_items_and_seeds_with_stars_by_the_corrected_test(lab: Lab) -> None:
    found = paired_runs(lab, (0, 1, 2), {"spin": 0.0, "dnpo": 10.0, "npo": 0.0})
    text, page = lab.page("main")
    check_harmless(page)
    ps = []
    for method in ("dnpo", "npo"):
        result = compare_paired(found[method], found["spin"], kind="scores", interval="t")
        assert result.difference.half is not None
        cell = f"{result.difference.value:+.1f} ± {result.difference.half:.1f}".replace("-", "−")
        ps.append(result.p)
        assert f"{cell}*" in page.text if method == "dnpo" else cell in page.text
        assert f"{found[method].mean():.1f} ±" in page.text
    assert [p <= 0.05 for p in holm(ps)] == [True, False]
    assert "after Holm's correction over 2 tests different from spin: dnpo at k = 1" in page.text
    # once at the top and once in the tables; none at k = 0, where all have the same policy
    assert text.count('class="n star"') == 2
    assert "varies method" in page.text
    assert "seeds 0, 1, 2" in page.text
    assert "Missing:" not in page.text


def test_a_sweep_of_one_seed_is_reported_as_such(lab: Lab) -> None:
    paired_runs(lab, (4,), {"spin": 0.0, "dnpo": 10.0})
    _, page = lab.page("main")
    assert "only one seed" in page.text
    assert "One seed: the interval is over items only" in page.text


def test_missing_jobs_of_an_unfinished_sweep_are_listed(lab: Lab) -> None:
    paired_runs(lab, (0, 1), {"spin": 0.0})
    for seed, status in ((0, "FINISHED"), (1, "FAILED")):
        table = [{"iteration": k, "eval/score": 60.0} for k in (0, 1)] if status == "FINISHED" else None
        lab.run(f"method=dnpo seed={seed}", table, seed=seed, tags={"dnpo.method": "dnpo"}, sweep="main", status=status)
    _, page = lab.page("main")
    assert "3 of 4 runs used; not complete" in page.text
    assert re.search(r"method=dnpo seed=1 \(run \w{8}, seed 1\) failed\.", page.text)
    assert "dnpo has no finished run with seed 1." in page.text
    assert "dnpo and spin are compared over the seeds that both have." in page.text


def test_a_sweep_counts_over_optimised_runs_by_setting(lab: Lab) -> None:
    gains = {name: {"value": 1.0, "low": 0.5, "high": 1.5} for name in ("eval/score", "second/score")}
    table = [{"iteration": "SFT", "eval/score": 50.0}, {"iteration": 0, "eval/score": 60.0, "drift/kl": 0.25}]
    for method, seed in itertools.product(("spin", "dnpo"), range(3)):
        found = gains if method == "dnpo" and seed else None
        tags = {"dnpo.method": method, "dnpo.dsl": "off" if method == "spin" else "score"}
        name = f"method={method} seed={seed}"
        lab.run(name, table, seed=seed, tags=tags, sweep="main", summary={"overoptimised": found})
    text, _ = lab.page("main")
    assert "Over-optimised? dnpo, seeds 1, 2 of 3: the judge" in text
    assert text.count("Over-optimised?") == 1
    assert "KL of the policy to its reference" in text  # a table of its own


def test_scores_are_doubted_only_where_training_learns_from_their_judge(lab: Lab) -> None:
    table = [{"iteration": "SFT", "eval/score": 50.0}, {"iteration": 0, "eval/score": 60.0}]
    for sweep, labellers in {"one": {"dnpo": "same"}, "other": {"spa": "other"}, "none": {"spin": "nobody"}}.items():
        for method, labelled_by in labellers.items():
            tags = {"dnpo.method": method, "dnpo.dsl": "score"}
            lab.run(f"method={method}", table, tags=tags, sweep=sweep, summary={"labelled_by": labelled_by})
    for method, labelled_by in {"dnpo": "same", "spa": "other", "spin": "nobody"}.items():
        tags = {"dnpo.method": method, "dnpo.dsl": "score"}
        lab.run(f"method={method}", table, tags=tags, sweep="all", summary={"labelled_by": labelled_by})
    doubt = (
        "learns from the judge that gives the scores above; a rise of these scores alone is no "
        "evidence of better answers."
    )
    assert f"Training {doubt}" in lab.page("one")[1].text
    assert "no evidence" not in lab.page("other")[1].text
    assert "no evidence" not in lab.page("none")[1].text
    assert f"The training of dnpo {doubt}" in lab.page("all")[1].text


def test_a_sweep_without_a_finished_run_has_a_page(lab: Lab) -> None:
    lab.run("method=spin seed=0", None, tags={"dnpo.method": "spin"}, sweep="main", status="KILLED")
    _, page = lab.page("main")
    check_harmless(page)
    assert "method=spin seed=0" in page.text
    assert "was interrupted" in page.text
    assert "No finished run has a result yet." in page.text


def test_a_branching_sweep_counts_only_the_last_iteration_of_each_run(lab: Lab) -> None:
    for iterations in (2, 3):
        for method, score in (("spin", 50.0), ("dsl", 60.0)):
            for seed in (0, 1):
                table = [{"iteration": k, "eval/score": score + 10 * k + seed} for k in range(iterations)]
                # as the sweep's acts_from=last has it; a part that is off has no start but its default
                params = {"iterations": iterations, "dsl.start": (iterations - 1) * (method == "dsl"), "npo.start": 0}
                tags = {"dnpo.method": method, "dnpo.dsl": "score" if method == "dsl" else "off", "dnpo.npo": "off"}
                name = f"method={method} iterations={iterations} seed={seed}"
                lab.run(name, table, seed=seed, params=params, tags=tags, sweep="ablation")
    selection = select(Database(lab.uri), "ablation")
    groups = group_runs(selection.runs)
    assert groups.branching
    assert groups.varies == ("method",)
    assert groups.iterations == [1, 2]
    assert [group.label for group in groups.groups] == ["spin", "dsl"]
    assert [[group.values(k, "eval/score") for k in (1, 2)] for group in groups.groups] == [
        [[60.0, 61.0], [70.0, 71.0]],
        [[70.0, 71.0], [80.0, 81.0]],
    ]
    assert not groups.missing


def test_methods_of_different_numbers_of_iterations_lack_nothing(lab: Lab) -> None:
    for method, iterations in (("dpo", 1), ("spin", 3)):
        for seed in (0, 1) if method == "spin" else (0,):
            table = [{"iteration": k, "eval/score": 50.0 + k + seed} for k in range(iterations)]
            tags = {"dnpo.method": method, "dnpo.dsl": "off", "dnpo.npo": "off"}
            lab.run(f"{method} {seed}", table, seed=seed, params={"iterations": iterations}, tags=tags, sweep="both")
    groups = group_runs(select(Database(lab.uri), "both").runs)
    assert not groups.branching
    assert groups.missing == ("dpo has no finished run with seed 1.",)


def test_runs_are_labelled_by_the_fewest_settings_and_a_rerun_counts_once(lab: Lab) -> None:
    for alpha in (0.01, 0.1):
        for seed in (0, 1, 1):
            # values that follow from the seed, or are paths, do not distinguish runs
            params = {"npo.alpha": alpha, "npo.rate": 2 * alpha, "data.seed": seed, "store": f"store{seed}"}
            tags = {"dnpo.alive": f"{alpha} {seed}"}
            table = [{"iteration": 0, "eval/loss": alpha}]
            lab.run(f"{alpha} {seed}", table, seed=seed, params=params, tags=tags, sweep="alpha")
    groups = group_runs(select(Database(lab.uri), "alpha").runs)
    assert [group.label for group in groups.groups] == ["npo.alpha=0.01", "npo.alpha=0.1"]
    assert [group.seeds for group in groups.groups] == [[0, 1], [0, 1]]
    assert groups.missing == ("Left out, because a newer run has the same settings and seed: 2 runs.",)


def test_settings_that_only_some_runs_recorded_are_named_once(lab: Lab) -> None:
    part = {"sft._target_": "dnpo.optimise.parts.Optimisation"}
    table = [{"iteration": 0, "eval/loss": 1.0}]
    lab.run("a", table, seed=0, params=part, sweep="old")
    assert "before these settings existed" not in lab.page("old")[0]
    lab.run("b", table, seed=1, params={**part, "sft.keep": "last", "sft.patience": "0"}, sweep="old")
    note = "1 run from before these settings existed, with their defaults: sft.keep=last, sft.patience=0."
    text, _ = lab.page("old")
    assert Page(sections(text)["settings"]).text.count(note) == 1
    assert text.count("before these settings existed") == 1


def sections(text: str) -> dict[str, str]:
    """The content below each heading, by the heading's id, and the part before the first one."""
    parts = re.split(r'<h2 id="(\w+)">', text.partition("<body>")[2])
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_a_page_begins_with_one_sentence_one_figure_and_one_table_and_ends_with_the_settings(lab: Lab) -> None:
    paired_runs(lab, (0, 1, 2), {"spin": 0.0, "dnpo": 10.0, "npo": 0.0})
    run = Database(lab.uri).runs()[-1]
    for given, title, names in (
        ("main", "main: 3 settings of method", "last policy of score difference dnpo"),
        (run.id, "npo, seed 2", "policy score k = 0"),
    ):
        text, _ = lab.page(given)
        parts = sections(text)
        assert list(parts)[-1] == "settings"
        first = parts[""]
        places = [first.index(each) for each in ('<div class="outcome">', "<figure>", "<table", '<dl class="facts">')]
        assert places == sorted(places)
        assert (first.count("<figure>"), first.count("<table"), first.count('<div class="outcome">')) == (1, 1, 1)
        page = Page(first)
        assert names in page.text
        assert f"<h1><bdi>{title}</bdi></h1>" in first
        assert re.search(rf"<title>{title} · dnpo (sweep|run)</title>", text)
        for name, content_below in parts.items():
            assert len(Page(content_below).text.split()) > 3, f"{name} is empty"
        assert "claims" not in parts, "no claim was tested"
        links = re.findall(r'<a href="#(\w+)">', first)
        assert ["", *links] == list(parts), "the links are in the order of the page"
        assert str(lab.folder) not in text, "a path of this machine"
    best = re.search(r"dnpo is best with (\S+) ± \S+ points of 100 \(\+(\S+) ± ", Page(lab.page("main")[0]).text)
    assert best
    assert 8 < float(best[2]) < 12


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        (
            [("spin", 19.8, ""), ("dnpo", 18.5, "−1.3 ± 15.3")],
            "spin is best with 19.8 points of 100, but no difference is",
        ),
        ([("spin", 19.8, ""), ("dnpo", 9.5, "−10.3 ± 1.3*")], "spin is best with 19.8 points of 100."),
        ([("dnpo", 20.8, "+1.0 ± 15.3"), ("spin", 19.8, "")], "(+1.0 ± 15.3 compared with spin, not significant)."),
        ([("dnpo", 20.8, "+1.0 ± 0.3*"), ("spin", 19.8, "")], "(+1.0 ± 0.3 compared with spin)."),
        ([("spin", 19.8, "")], "spin is best with 19.8 points of 100."),
    ],
)
def test_a_page_calls_a_setting_best_only_with_what_its_difference_is_worth(
    rows: list[tuple[str, float, str]], end: str
) -> None:
    ranked = [(label, Estimate(mean), str(mean), difference) for label, mean, difference in rows]
    starred = any(difference.endswith("*") for *_, difference in rows)
    ranking = Ranking(ReportMeasure(catalogue.metric("eval/score")), "spin", tuple(ranked), 0, starred, 1)
    assert end in ranking.sentence


def test_the_command_of_a_sweep_is_code_below_what_is_missing(lab: Lab) -> None:
    for seed in range(15):
        lab.run(f"spin seed={seed}", None, seed=seed, sweep="main", status="FAILED")
    groups = group_runs(select(Database(lab.uri), "main").runs)
    text = render(describe_sweep("main", 15, groups, [], {}, {}, ["-m", "+sweep=main"], []))
    assert "<pre><code>python -m dnpo.train -m +sweep=main" in text
    assert text.count("<li>") == 13
    assert "<li>3 more are on the report's page.</li>" in text


def test_a_note_is_shown_as_markdown_without_links_and_pictures() -> None:
    note = (
        "### dnpo, seed 1\n\n**Done**: 50.0 to 53.2.\n\n| score | KS |\n| --- | ---: |\n| a\\|b &emsp; | 0.25 |\n\n"
        "- one\n\nTo draw it:\n\n"
        "    dnpo report x\n\n![comparison](get-artifact?path=x) \n\n[link](http://x) <b>raw</b> ![x](http://y)"
    )
    text = render(note)
    page = Page(text)
    assert "<strong>Done</strong>: 50.0 to 53.2." in text
    assert '<td>a|b</td>\n<td class="n">0.25</td>' in text
    assert "<li>one</li>" in text
    assert "<pre><code>dnpo report x" in text
    assert "dnpo, seed 1" not in page.text, "the page has it as its title"
    assert not {"a", "img", "b"} & page.tags
    assert "[link](http://x) <b>raw</b>" in page.text


def answered(path: Path) -> None:
    """A table of answers to two prompts."""
    rows = [["How many?", "Two.", None, "One.", 20.0, "Two.", "a"], [EVIL, EVIL, 2.0, EVIL, 1.0, EVIL, "b"]]
    columns = ["prompt", "iteration 0", "iteration 0, score", "SFT", "SFT, score", "human", "id"]
    path.write_text(json.dumps({"columns": columns, "data": rows}))


def test_samples_have_links_of_their_own_and_can_be_folded(lab: Lab) -> None:
    lab.run("method=dnpo", [{"iteration": "SFT", "eval/score": 1.0}], files={"samples.json": answered})
    (run,) = Database(lab.uri).runs()
    text, page = lab.page(run.id)
    check_harmless(page)
    shown = sections(text)["samples"]
    assert shown.count("<details") == 2
    assert "How many? #1 How many? human Two. 20.0 SFT One. iteration 0 Two." in Page(shown).text
    ids = {value for _, name, value in page.attributes if name == "id"}
    links = {value for _, name, value in page.attributes if name == "href"}
    assert {"sample-1", "sample-2"} <= ids
    assert {link.removeprefix("#") for link in links} <= ids, "every link leads somewhere"
    # a browser opens what is folded only if the target is inside
    assert re.search(r'<details[^>]*><summary>[^<]*</summary>\s*<div class="pair" id="sample-2">', shown)


def search(lab: Lab, settings: Sequence[Mapping[str, float]]) -> None:
    """A sweep with two seeds of each of these settings, whose score is 10 times their sum, plus the seed."""
    for place, params in enumerate(settings):
        for seed in (0, 1):
            score = 10 * sum(params.values()) + seed
            rows = [{"iteration": "SFT", "eval/score": 1.0}, {"iteration": 0, "eval/score": score}]
            tags = {"dnpo.method": "dnpo", "dnpo.dsl": "off", "dnpo.npo": "trainable"}
            lab.run(f"{place} {seed}", rows, seed=seed, tags=tags, params=params, sweep="search")


def find_lines(lab: Lab) -> dict[str, dict[str, list[tuple[float, float]]]]:
    groups = group_runs(Database(lab.uri).runs(sweeps=["search"]))
    return {
        each.setting: {label: [(x, round(y.value, 6)) for x, y in points] for label, points in each.lines.items()}
        for each in find_responses(groups, MEASURES[0], Items())
    }


def test_the_response_to_a_setting_is_a_curve_for_each_of_the_other_settings(lab: Lab) -> None:
    search(lab, [{"npo.alpha": alpha, "npo.start": start} for start in (0, 1) for alpha in (1.0, 0.01, 0.1)])
    found = find_lines(lab)
    assert list(found) == ["npo.alpha"], "two starts make no curve"
    assert found["npo.alpha"] == {
        "npo.start=0": [(0.01, 0.6), (0.1, 1.5), (1.0, 10.5)],
        "npo.start=1": [(0.01, 10.6), (0.1, 11.5), (1.0, 20.5)],
    }
    _, page = lab.page("search")
    check_harmless(page)
    assert any(
        v.startswith("Judge's score of sampled answers over npo.alpha") for _, n, v in page.attributes if n == "alt"
    )


def test_numbers_of_a_search_are_shortened_where_they_remain_different(lab: Lab) -> None:
    search(lab, [{"npo.alpha": alpha} for alpha in (0.15676677195506075, 0.0341795291206, 0.5)])
    labels = [group.label for group in group_runs(Database(lab.uri).runs(sweeps=["search"])).groups]
    assert labels == ["npo.alpha=0.1568", "npo.alpha=0.03418", "npo.alpha=0.5"]
    found = find_lines(lab)["npo.alpha"]
    assert [x for points in found.values() for x, _ in points] == [0.0341795291206, 0.15676677195506075, 0.5]


@pytest.mark.parametrize("alphas", [(0.0342, 0.0563, 0.1512, 0.1568), (0.001, 0.01, 0.1, 1.0)])
def test_ticks_of_a_response_do_not_overlap(lab: Lab, alphas: Sequence[float]) -> None:
    search(lab, [{"npo.alpha": alpha, "sft.lr": (1 + n) * 1e-4} for n, alpha in enumerate(alphas)])
    groups = group_runs(Database(lab.uri).runs(sweeps=["search"]))
    for response in find_responses(groups, MEASURES[0], Items()):
        figure = Figure(figsize=(2.4, 2.7), layout="constrained")
        draw_response(figure, response, 2.4)
        figure.draw_without_rendering()
        (axis,) = figure.axes
        left, right = axis.get_xlim()
        shown = [
            label for at, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True) if left <= at <= right
        ]
        ends = [label.get_window_extent() for label in shown if label.get_text()]
        assert len(ends) > 1
        assert all(before.x1 < after.x0 for before, after in itertools.pairwise(ends))


@pytest.mark.parametrize("wide", [2.4, 4.2])
def test_the_legend_of_a_response_hides_nothing(wide: float) -> None:
    points = [(float(n), Estimate(20.0, 10.0, 30.0)) for n in (2, 3, 4)]  # wherever a legend is, there is an interval
    lines = {f"method={name}": points for name in ("spin", "dsl", "npo", "dnpo")}
    response = Response("iterations", MEASURES[0], lines, dict.fromkeys(lines, ("off", "off")), True)
    figure = Figure(figsize=(wide, height_of_response(response, wide)), layout="constrained")
    draw_response(figure, response, wide)
    figure.draw_without_rendering()
    ((axis,), (legend,)) = figure.axes, figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert not box.overlaps(axis.get_tightbbox())
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1, "the legend is cut"
    assert whole.y0 <= box.y0
    assert axis.get_window_extent().height > 0.4 * whole.height


def test_numbers_that_are_almost_equal_are_shown_whole(lab: Lab) -> None:
    search(lab, [{"npo.alpha": alpha} for alpha in (0.15676677195, 0.15676677196)])
    labels = [group.label for group in group_runs(Database(lab.uri).runs(sweeps=["search"])).groups]
    assert labels == ["npo.alpha=0.15676677195", "npo.alpha=0.15676677196"]


def test_a_random_search_is_shown_as_points_for_each_setting(lab: Lab) -> None:
    search(
        lab,
        [{"npo.alpha": 0.02, "sft.lr": 3e-4}, {"npo.alpha": 0.5, "sft.lr": 1e-4}, {"npo.alpha": 0.1, "sft.lr": 2e-4}],
    )
    found = find_lines(lab)
    assert {setting: [x for x, _ in lines[""]] for setting, lines in found.items()} == {
        "npo.alpha": [0.02, 0.1, 0.5],
        "sft.lr": [1e-4, 2e-4, 3e-4],
    }
    groups = group_runs(Database(lab.uri).runs(sweeps=["search"]))
    assert all(not each.joined for each in find_responses(groups, MEASURES[0], Items()))


def test_a_sweeps_tracked_run_has_the_mean_of_each_setting_and_the_best(lab: Lab) -> None:
    search(lab, [{"npo.alpha": alpha} for alpha in (0.1, 1.0)])
    groups = group_runs(Database(lab.uri).runs(sweeps=["search"]))
    compared = [each for m in MEASURES if (each := compare(groups, m, Items())) is not None]
    found = summarise(groups, compared)
    assert list(found) == [-1, 0]
    assert found[0] == pytest.approx(
        {"best/eval/score": 10.5, "mean/eval/score/npo.alpha 0.1": 1.5, "mean/eval/score/npo.alpha 1.0": 10.5}
    )
    catalogue.check(found[0])


def test_an_unfinished_run_gets_a_page_with_its_numbers_so_far(lab: Lab) -> None:
    metrics = {"eval/score": [40.0, 45.5], "iteration/loss/policy": [0.7], "loss/policy": [0.71, 0.69, 0.66]}
    lab.run("method=dnpo", None, tags={"stage.prompts": "abc123"}, status="FAILED", metrics=metrics)
    run = Database(lab.uri).runs()[0]
    _, page = lab.page(run.id[:8])
    check_harmless(page)
    assert (
        "This run has no summary, so the page shows what it tracked before it ended (policies: k = 0, k = 1)."
        in page.text
    )
    assert "from 40.0 to 45.5 points of 100" in page.text
    assert "abc123" in page.text
    lab.run("seed=1", None, seed=1, status="FAILED")
    _, page = lab.page(Database(lab.uri).runs()[1].id)
    assert "(no policy)" in page.text


def test_a_run_without_a_judge_has_no_scores_and_says_so(lab: Lab) -> None:
    rows = [{"iteration": "SFT", "eval/loss": 2.0}, {"iteration": 0, "eval/loss": 1.5, "eval/accuracy": float("nan")}]
    lab.run("judge=off", rows, tags={"dnpo.judge": "off"})
    _, page = lab.page(Database(lab.uri).runs()[0].id)
    check_harmless(page)
    assert "No judge scored the answers of this run" in page.text
    assert (
        "Held-out loss of human responses: from 2.000 to 1.500 nats a token, fine-tuning to iteration 0 (−0.500)."
        in page.text
    )
    assert "nan" not in page.text.lower().replace("tenan", "")


# --- hostile contents -------------------------------------------------------------------------------------------------


ORDINARY = "f74fb9ce39c35187"  # the key of a stage
POLICY = f"optimise/{ORDINARY}"


def hostile(lab: Lab) -> None:
    """A sweep of two runs, one failed, in which every text is :data:`EVIL`."""
    clean = EVIL.replace("\ud800", "").replace("\x00", "")  # databases accept neither
    pair = {
        "id": EVIL,
        "messages": [{"role": EVIL, "content": EVIL}, {"role": "user", "content": EVIL}],
        **{"chosen": EVIL, "rejected": EVIL, "chosen_source": EVIL, "rejected_source": f"policy@{EVIL}"},
        **{"chosen_score": 80.0, "rejected_score": None, "flipped": True},
    }
    stage = {"title": EVIL, "stage": EVIL, "key": EVIL, "iteration": 0, "reused": False, "inputs": {EVIL: EVIL}}
    accuracy = {"value": 0.5, "low": None, "high": None, "rows": 10}
    logps = {name: -np.arange(1.0, 9.0) for name in ("chosen", "rejected", "new")}
    files: dict[str, Callable[[Path], object]] = {
        "pairs/iteration-0.json": lambda path: path.write_text(json.dumps([pair, {**pair, "flipped": False}])),
        "logprobs/iteration-0.npz": lambda path: np.savez(
            path, **logps, **{f"{name}_tokens": np.full(8, 4) for name in logps}
        ),
    }
    for seed, method in ((0, clean), (0, "spin")):
        lab.run(
            clean,
            [{"iteration": 0, "eval/score": 50.0, "pairs/pairs": 2, "pairs/flipped": 1, EVIL: 3.0}],
            seed=seed,
            tags={"dnpo.method": method, "dnpo.judge": clean, "dnpo.data": clean, "mlflow.note.content": clean},
            params={"judge.model": clean, "model.name": clean, "data.path": f"https://me:hunter2@host/{clean}"},
            sweep="evil",
            summary={
                "stages": [stage, {**stage, "key": f"{EVIL}2", "inputs": {EVIL: EVIL}}, {**stage, "key": ORDINARY}],
                "policies": [EVIL if method == clean else POLICY],
                "commit": EVIL,
                "versions": {EVIL: EVIL},
                "judge_agreement": [{"data": EVIL, "accuracy": accuracy, "unscored": 0}],
            },
            files=files,
        )
    lab.run(clean, None, seed=1, tags={"dnpo.method": clean, "stage.x": clean}, sweep="evil", status="FAILED")
    database = Database(lab.uri)
    own = select(database, "evil").own
    assert own is not None
    database.client.set_tag(own.id, "mlflow.note.content", clean)
    named = ("role", "text", "where", "measured", "outcome", "effect")
    claim = {**dict.fromkeys(named, EVIL), "low": None, "notes": [EVIL]}
    other = {"text": "it helps", "outcome": "supported", "exploratory": True, "effect": 1.5, "low": 1, "high": 2}
    other |= {"digits": 1, "b": "spin@1"}
    path = lab.folder / "claims.json"
    path.write_text(json.dumps({"claims": [claim, other]}))
    database.client.log_artifact(own.id, str(path), "analysis")
    (lab.folder / "bad.png").write_text("<svg onload=alert(1)>")
    database.client.log_artifact(own.id, str(lab.folder / "bad.png"), "analysis")
    for inches in (3.3, 6.9):  # a column and a page
        Figure(figsize=(inches, 1)).savefig(lab.folder / f"{inches}.png", dpi=300)
        database.client.log_artifact(own.id, str(lab.folder / f"{inches}.png"), "analysis")


@pytest.mark.parametrize("which", ["sweep", "run", "failed"])
def test_all_content_of_runs_is_shown_as_text(lab: Lab, which: str) -> None:
    hostile(lab)
    runs = Database(lab.uri).runs()
    given = {"sweep": "evil", "run": runs[0].id, "failed": runs[2].id}[which]
    text, page = lab.page(given)
    text.encode("utf-8")  # no half of a surrogate pair is left
    assert not {chr(code) for code in HIDDEN} & set(text)
    check_harmless(page)
    shown = " ".join(str(make_visible(EVIL)).split())
    clean = " ".join(str(make_visible(EVIL.replace("\ud800", "").replace("\x00", ""))).split())
    assert clean in page.text
    values = " ".join(value for _, name, value in page.attributes if name == "alt")
    assert page.text.count("{{7*7}}") + values.count("{{7*7}}") == text.count("{{7*7}}") > 0
    assert "hunter2" not in text
    if which != "failed":
        assert page.text.count(shown) >= 12  # prompts, roles, ids, both responses, sources, stages, versions
        assert "https://…@host/" in page.text
    if which == "sweep":
        assert "it helps supported exploratory" in " ".join(page.text.split())
        assert "+1.5 (+1.0 to +2.0)" in page.text


KEYS = """() => {
    const keys = [...document.querySelectorAll('td.key')].filter(each => !each.textContent.includes('script'));
    const lines = (key) => {
        const range = document.createRange();
        range.selectNodeContents(key);
        return range.getClientRects().length;
    };
    return {
        found: keys.map(each => each.textContent),
        broken: keys.filter(each => lines(each) > 1).map(each => each.textContent),
    };
}"""


def test_a_browser_runs_no_script_and_requests_nothing(lab: Lab) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the path")
    hostile(lab)
    text, _ = lab.page("evil")
    path = lab.folder / "page.html"
    path.write_text(text, encoding="utf-8")
    events: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: events.append(message.text))
        page.on("request", lambda request: events.append(request.url[:100]))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        page.wait_for_timeout(200)
        tiles = page.evaluate("[...document.querySelectorAll('.tile *')].every(e => e.scrollWidth <= e.clientWidth)")
        drawn = page.evaluate(
            "[...document.images].filter(i => i.src.startsWith('data:image/svg')).map(i => i.width / i.naturalWidth)"
        )
        brought = page.evaluate(
            "[...document.images].filter(i => i.src.startsWith('data:image/png')).map(i => i.width)"
        )
        assert tiles
        assert min(drawn) > 0.75, "letters of 9.5 points are not much smaller on a phone"
        broken = page.evaluate("[...document.images].filter(each => !each.naturalWidth).length")
        width = page.evaluate("document.documentElement.scrollWidth")
        on_screen = page.evaluate(KEYS)
        page.emulate_media(media="print", color_scheme="dark")
        page.set_viewport_size({"width": 690, "height": 1000})  # paper of 21 cm less its margins
        wide = "e => e.scrollWidth > e.parentElement.clientWidth + 1"
        cut = page.evaluate(f"[...document.querySelectorAll('.scroll')].filter({wide}).length")
        on_paper = page.evaluate(KEYS)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert [event for event in events if not event.startswith(("data:image/", path.as_uri()))] == []
    assert broken == 0
    column, whole = brought
    assert column < 390 < 600 < whole, "letters of a wide figure stay readable; it scrolls"
    assert width <= 390
    for keys in (on_screen, on_paper):
        assert {ORDINARY, f"k = 0: {POLICY}"} <= set(keys["found"]), "keys of stages and of policies"
        assert any(re.fullmatch("[0-9a-f]{32}", key) for key in keys["found"]), "ids of runs"
        assert keys["broken"] == [], "keys on several lines"
    assert cut == 0, "columns that paper cuts"
    assert paper == "rgb(255, 255, 255)", "also where the screen is dark"


def test_numbers_times_and_addresses_are_readable() -> None:
    tie = "\N{NO-BREAK SPACE}"
    assert tied("flips, %: 19.8 ± 4.0 (mean ± half)") == f"flips,{tie}%: 19.8{tie}±{tie}4.0 (mean ± half)"
    assert tied("the 95 % interval") == f"the 95{tie}% interval"
    assert [number(v, "+.1f") for v in (1.25, -2.0, None, float("nan"), "text")] == ["+1.2", "−2.0", "–", "–", "–"]
    assert [duration(s) for s in (None, 0.42, 59.6, 61, 3600, 7500)] == [
        *("–", "0.4 s", "1 min", "1 min 1 s", "1 h 0 min", "2 h 5 min"),
    ]
    assert strip_secrets("postgresql://me:pass@host/db") == "postgresql://…@host/db"
    assert strip_secrets("sqlite:///mlflow.db and a@b.c") == "sqlite:///mlflow.db and a@b.c"
    assert make_visible("a\r\nb\x1b\u202e\ttext") == "a\nb␛⟨U+202E⟩\ttext"


# --- the command ------------------------------------------------------------------------------------------------------


def test_missing_runs_are_reported_with_exit_status_1(
    lab: Lab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab.run("seed=0", [{"iteration": 0}], sweep="main")
    lab.run("seed=1", [{"iteration": 0}], seed=1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "train.log").touch()
    (tmp_path / "day" / "10-00").mkdir(parents=True)
    (tmp_path / "day" / "10-00" / "summary.json").write_text("{}")
    for given, message in (
        ("mian", "no run and no sweep of that name is tracked .*Did you mean main"),
        (str(tmp_path / "folder"), "is not the folder of a run or of a tracked sweep"),
        (str(tmp_path / "begun"), r"its run has not finished, since it has no summary\.json"),
        (str(tmp_path / "day"), r"is not the folder of a run, but it has 1 run: `dnpo report \S+10-00`"),
        ("", "no run and no sweep of that name"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([given, "--uri", lab.uri])
        assert stopped.value.code == 1
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["main", "--uri", f"sqlite:///{tmp_path / 'none.db'}"])
    assert "there is no such database" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["main", "--uri", lab.uri, "--out", str(tmp_path / "none" / "page.html")])
    assert "expected a file that can be written" in capsys.readouterr().err


def test_the_folder_of_an_unfinished_run_names_its_run(lab: Lab, tmp_path: Path) -> None:
    tracking = MLflowTracking(uri=lab.uri, artifacts=str(lab.folder / "artifacts"))
    tracking.start("killed", {}, {"dnpo.kind": "run", "dnpo.seed": "0"}, None, tmp_path)
    selection = select(Database(lab.uri), str(tmp_path))
    assert [run.id for run in selection.runs] == [tracking.id]
    assert not selection.runs[0].finished


def test_the_beginning_of_an_id_has_to_be_unique(lab: Lab) -> None:
    for seed in range(17):  # two of them begin with the same letter
        lab.run(f"seed={seed}", None, seed=seed)
    database = Database(lab.uri)
    firsts = [run.id[0] for run in database.runs()]
    twice = next(letter for letter in firsts if firsts.count(letter) > 1)
    with pytest.raises(DataError, match="runs have ids that begin so; give more of it"):
        select(database, twice)


@pytest.fixture(scope="module")
def trained(smoke: Path, migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep of real, tiny runs, and a run without a judge."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(smoke / "store", folder / "store")
    shutil.copy(migrated, folder / "mlflow.db")
    succeed(folder, "-m", "+sweep=main", "scale=smoke", "seed=0")
    succeed(folder, "scale=smoke", "method=npo", "judge=off", "iterations=1")
    return folder


@pytest.mark.long
def test_real_runs_can_be_asked_for_by_name_folder_and_id(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    database = Database()
    sweep_folder = next(path.parent for path in trained.glob("multirun/*/*/sweep.json"))
    runs = {run.id: run for run in database.runs(sweeps=["main"])}
    parent = database.parent(next(iter(runs.values())))
    assert parent is not None
    for given in ("main", str(sweep_folder), str(sweep_folder.relative_to(trained)), parent.id, parent.id[:12]):
        found = select(database, given)
        assert found.sweep
        assert {run.id for run in found.runs} == set(runs)
        assert found.own is not None
        assert found.own.id == parent.id
    alone = next(run for run in database.runs() if run.id not in runs)
    folder = next(path.parent for path in trained.glob("outputs/*/*/summary.json"))
    for given in (alone.id, alone.id[:10], str(folder)):
        assert [run.id for run in select(database, given).runs] == [alone.id]
    job = select(database, str(sweep_folder / "1"))  # a job's folder is a run's
    assert not job.sweep
    assert job.runs[0].summary == json.loads((sweep_folder / "1" / "summary.json").read_text())

    main(["main", "--out", "page.html", "--no-log"])
    assert parent.artifact("report.html") is None
    main(["main"])
    kept = parent.artifact("report.html")
    assert kept is not None
    page = Page(kept.read_text())
    check_harmless(page)
    assert (trained / "report-main.html").read_text() == kept.read_text()
    assert "kept in MLflow as report.html" in capsys.readouterr().out


@pytest.mark.long
def test_a_real_sweep_shows_its_pictures_pairs_and_lineage(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    database = Database()
    selection = select(database, "main")
    text = html(content(selection, "sqlite:///mlflow.db"))
    page = Page(text)
    titles = [value for tag, name, value in page.attributes if tag == "img" and name == "alt"]
    for title in (
        "Judge's score of sampled",
        "Right greedy",
        "Held-out loss",
        "Labels flipped",
        "Policy loss",
        "Noise",
    ):
        twice = title.startswith("Judge")  # also at the top of the page
        assert sum(each.startswith(title) for each in titles) == 1 + twice, title
    assert sum("responses under the policy after iteration 1" in each for each in titles) == 2
    run = selection.runs[-1]
    for stage in run.summary["stages"]:
        assert stage["key"] in page.text
    shown = content(selection, "")
    assert {"supervised fine-tuning", "label"} < set(shown["costs"]["kinds"]), "as in the table of stages"
    assert shown["settings"]["changed"]
    assert not any(name.startswith("augment.") for name, *_ in shown["settings"]["changed"]), "a default of its part"
    assert "2 runs finished" in page.text
    tracked = run.artifact("pairs/iteration-1.json")
    assert tracked is not None
    pairs = json.loads(tracked.read_text())
    one = Page(html(content(select(database, run.id), "")))
    check_harmless(one)
    first, last = (f"{run.row(k)['eval/score']:.1f}" for k in ("SFT", 1))
    assert f"Judge's score of sampled answers: {first} → {last} points of 100" in one.text
    shown = [pair for pair in pairs if pair["flipped"]][:4] + [pair for pair in pairs if not pair["flipped"]][:2]
    for pair in shown:
        for words in (pair["messages"][-1]["content"], pair["chosen"], pair["rejected"]):
            assert " ".join(words.split()) in one.text
    assert "written by a person" in one.text
    assert "generated in iteration 1" in one.text


@pytest.mark.long
def test_a_real_run_without_a_judge(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    run = next(run for run in Database().runs() if run.option("judge") == "off")
    page = Page(html(content(select(Database(), run.id), "")))
    check_harmless(page)
    assert "No judge scored the answers of this run" in page.text
    for name, value, usual in (("judge", "off", "rules"), ("iterations", "1", "4"), ("method", "npo", "dnpo")):
        assert re.search(rf"\b{name} {value} {usual}\b", page.text)
