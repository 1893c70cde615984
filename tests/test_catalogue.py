"""The catalogue of metrics: it has what runs track, refuses what it does not have, and alone has names and units."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from rich.console import Console as RichConsole

from dnpo import catalogue
from dnpo.catalogue import GROUPS, OPEN, Metric, add, find, metric, name_by_iteration
from dnpo.commands.train import build
from dnpo.errors import DnpoError
from dnpo.judges.agreement.table import LINES
from dnpo.loop import chain
from dnpo.running.console import Console, wide_table
from dnpo.running.execute import execute
from dnpo.settings import conf_folder
from dnpo.store import Store
from dnpo.tracking.writing import MLflowTracking, Tracking
from tests.commands import SMOKE, TINY

ROOT = Path(catalogue.__file__).parents[2]
METRICS = [each for group in GROUPS for each in group.metrics]
LIKE_A_METRIC = re.compile(
    rf"(?:{'|'.join(sorted({each.name.split('/')[0] for each in METRICS if '/' in each.name} | {'second', 'judge'}))})"
    r"/[a-z]+(?:_[a-z]+)*(?:/[a-z_]+)?"
)


# --- what it says


@pytest.mark.parametrize("each", METRICS, ids=lambda each: each.name)
def test_every_metric_is_there_once_and_can_be_shown(each: Metric) -> None:
    assert [other.name for other in METRICS].count(each.name) == 1
    assert find(each.name) == each
    assert each.title
    assert each.label
    assert each.title[0] == each.title[0].upper()
    assert each.digits >= 0
    assert each.format(0.5)
    placeholders = OPEN.findall(each.name)
    assert len(placeholders) <= 1
    assert all(placeholders == OPEN.findall(text) for text in (each.title, each.label))


def test_values_are_shown_in_the_unit() -> None:
    share, score = metric("eval/accuracy"), metric("eval/score")
    assert (share.format(0.5625), share.format_with_unit(0.5625), share.heading) == ("56.2", "56.2 %", "accuracy, %")
    assert (score.format(53.25), score.axis) == ("53.2", "Judge's score of sampled answers, points of 100")
    assert metric("logps/chosen").format(-1234.5) == "−1,234.50"
    assert share.format(-0.00001, signed=True) == "0.0", "what rounds to zero has no sign"
    assert metric("npo/variance").heading == "s²"
    assert metric("agreement/length_bias").format_with_unit(0.031, signed=True) == "+3.1 pp"


def test_families_and_variants_are_found() -> None:
    assert metric("eval/accuracy/facts").title == "Right greedy answers, facts"
    assert metric("texts/distinct_2_within").title == "Distinct 2-grams of a text"
    assert metric("eval/pass_at_4").title == "Prompts with a right answer among 4 samples"
    assert metric("against/eval/pass_at_1").title.startswith("Prompts with a right answer among 1 sample,")
    assert metric("eval/accuracy/1 samples").title == "Right greedy answers, 1 samples"  # the user's own word
    second = metric("second/score")
    assert second.title == "Judge's score of sampled answers, second judge"
    assert (second.unit, second.digits, second.better) == ("points of 100", 1, "higher")
    for name in (
        "sft/loss/policy",
        "like/npo/shift",
        "iteration/grad_norm/last",
        "against/second/win",
        "judge/verdicts",
    ):
        assert metric(name).name == name
    assert metric("agreement/kappa_low").digits == 2


@pytest.mark.parametrize(
    "name",
    ["evl/score", "eval/", "second/loss", "sft/eval/score", "judge/score", "pairs/score", ""],
)
def test_unknown_metrics_are_not_found(name: str) -> None:
    assert find(name) is None


def test_metrics_by_iteration_and_by_step_have_different_names() -> None:
    assert name_by_iteration("loss/policy") == "iteration/loss/policy"
    assert name_by_iteration("logps/new") == "iteration/logps/new"
    assert name_by_iteration("eval/score") == "eval/score"
    assert name_by_iteration("seconds") == "seconds"


def test_the_page_equals_the_catalogue() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == catalogue.write_markdown(), (
        "python -m dnpo.catalogue > docs/metrics.md"
    )


# --- everyone reads it


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and LIKE_A_METRIC.fullmatch(node.value):
            yield node.value


def test_every_metric_that_code_or_claims_name_is_in_it() -> None:
    paths = [path for folder in ("src/dnpo", "analysis") for path in (ROOT / folder).rglob("*.py")]
    named = {name: path for path in paths for name in strings(path)}
    claims = yaml.safe_load((ROOT / "claims.yaml").read_text())["claims"]
    for claim in claims:
        named |= {each: claim["id"] for each in claim.get("arguments", {}).values() if "/" in str(each)}
    assert len(named) > 60
    assert {name: where for name, where in named.items() if find(name) is None} == {}
    assert all(line.metric for line in LINES)


def test_the_screen_has_an_uncut_column_for_each_measured_metric(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row: dict[str, Any] = {"eval/accuracy/arithmetic": 0.5, "loss/policy": None, "eval/win": 0.25}
    row |= dict.fromkeys(("eval/score", "second/score", "logps/chosen", "logps/rejected", "logps/new"), 1234.5)
    rows = [{"iteration": "SFT", **row}, {"iteration": 0, **row, "loss/policy": 0.25}]
    table = wide_table(rows, {}, None)
    assert [str(column.header) for column in table.columns][:4] == ["  it.", "score", "score, 2nd", "arithmetic, %"]
    Console(width=20).table(table)
    *_, first, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["0", "1,234.5", "1,234.5", "50.0", "25.0", *["1,234.50"] * 3, "0.2500"]
    assert first.split()[-1] == "–"
    terminal = Console(width=40)
    terminal.rich = RichConsole(width=40, force_terminal=True)
    terminal.table(table, split=True)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, shown)) <= 40
    parts = [line.split() for line in shown if line.startswith("    0 ")]
    assert [cell for part in parts for cell in part[1:]] == last.split()[1:]


# --- what runs track


class Recorder(Tracking):
    """Remembers which metrics were tracked, and takes those alone that are in the catalogue."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def metrics(self, values: Mapping[str, float], step: int, *args: Any, **more: Any) -> None:
        super().metrics(values, step, *args, **more)
        self.names |= values.keys()


RHYMES = """
from collections.abc import Sequence
from typing import Any

from dnpo.catalogue import Metric, add
from dnpo.evaluate.texts import Measured

add(Metric("texts/rhymes", "Lines that rhyme", "rhymes", "%", better="higher"))


class Rhymes:
    rows = 8

    def __init__(self, *, sound: int = 2) -> None:
        self.sound = sound

    def identity(self) -> dict[str, Any]:
        return {"sound": self.sound}

    def measure(self, generated: Sequence[str], positive: Sequence[str], device: str, seed: int) -> Measured:
        ends = [text.strip()[-self.sound :] == other.strip()[-self.sound :] for text, other in zip(generated, positive)]
        return Measured({"rhymes": sum(ends) / len(ends)}, {"rhymes": [float(end) for end in ends]}, {})
"""
SMALL = (*SMOKE, *TINY)


@pytest.mark.long
def test_everything_that_a_run_tracks_is_in_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rhymes_of_ones_own.py").write_text(RHYMES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    overrides = ["method=dnpo", "npo=matched", "iterations=2", "judge@second_judge=correct"]
    overrides += ["+eval.texts={_target_: rhymes_of_ones_own.Rhymes}"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", overrides=[*SMALL, *overrides])
    run, _, settings = build(cfg)
    recorder = Recorder()
    with run.ledger:
        execute(list(chain(run)), Store(tmp_path / "store"), Console(), recorder, settings, tmp_path)
    assert {"texts/rhymes", "sft/loss/policy", "like/loss/noise", "loss/policy", "second/score"} <= recorder.names
    assert {"iteration/loss/policy", "iteration/margin/saturated", "drift/kl", "stagnation/ks"} <= recorder.names
    assert {"labels/noise", "judge/verdicts", "tokens_per_second", "grad_norm/policy"} <= recorder.names


@pytest.mark.parametrize("make", [Tracking, lambda: MLflowTracking(uri="sqlite:///nowhere.db")], ids=["off", "mlflow"])
def test_a_metric_outside_the_catalogue_is_refused_by_name(make: Any) -> None:
    tracking: Tracking = make()
    tracking.metrics({"eval/score": 50.0, "sft/loss/policy": 1.0}, 0)
    with pytest.raises(DnpoError, match=r"eval/scor: .* Did you mean eval/score"):
        tracking.metrics({"eval/scor": 50.0}, 0)


def test_a_custom_metric_can_be_added_and_none_can_be_changed() -> None:
    mine = Metric("mine/<way>/wit", "Wit, <way>", "wit <way>", "%")
    add(mine)
    add(mine)
    assert metric("mine/dry/wit").title == "Wit, dry"
    Tracking().metrics({"mine/dry/wit": 0.5, "against/mine/dry/wit": 0.5}, 0)
    with pytest.raises(DnpoError, match="eval/score"):
        add(Metric("eval/score", "Something else", "else"))
