"""The look of figures and LaTeX tables: paired whiskers, intervals in range, axes, legends, text, files for papers."""

import io
import math
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from analysis import claims_book, claims_tables, command, floats
from analysis.claims_assess import Result
from analysis.claims_rules import Effect
from analysis.drawing import COLUMN, FOOT_SIZE, PAGE, STYLE, find_look
from analysis.keeping import DrawnFigure
from analysis.results import average, benchmarks, results, score
from analysis.selection import CONSTANT, DNPO, FIXED, NPO, SPIN
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text
from statsmodels.stats.proportion import proportion_confint

from dnpo.escape import for_latex
from dnpo.palette import PAPER, SAMPLES
from dnpo.stats.intervals import Estimate, Mean, estimate_mean
from dnpo.stats.paired import compare_paired
from dnpo.stats.table import Cell, latex, markdown, table
from tests.recording import Recorder, analysis, chosen, read

FIGURES = [name for name in command.scripts() if name.startswith("fig")]
TABLES = [name for name in command.scripts() if name.startswith("table")]


@pytest.fixture(scope="module")
def drawn(recorder: Recorder) -> dict[str, DrawnFigure]:
    """Every figure, laid out."""
    found = {}
    for name in FIGURES:
        script = command.load(command.scripts()[name])
        with rc_context(STYLE):
            made = script.make(chosen(recorder, sweeps=[script.SWEEP]))
            made.figure.draw_without_rendering()
        found[name] = made
    return found


@pytest.fixture(scope="module")
def written(recorder: Recorder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of every figure and table, and what the command printed."""
    folder = tmp_path_factory.mktemp("figures")
    with redirect_stdout(io.StringIO()) as printed:
        assert analysis(recorder, "all", "--out", str(folder)) == 0
    (folder / "stdout.txt").write_text(printed.getvalue())
    return folder


def test_all_draws_what_it_can_and_logs_it_to_each_sweep(recorder: Recorder, written: Path) -> None:
    out = (written / "stdout.txt").read_text()
    assert f"{len(command.scripts())} drawn in" in out, out
    for name in command.scripts():
        endings = ("png", "svg", "csv", "pdf", "tex") if name.startswith("fig") else ("csv", "md", "tex")
        assert all((written / f"{name}.{ending}").stat().st_size > 100 for ending in endings)
    experiment = recorder.client.get_experiment_by_name("dnpo").experiment_id
    kept = {
        sweep: {each.path for each in recorder.client.list_artifacts(recorder.parents[experiment, sweep], "analysis")}
        for sweep in ("main", "ablation", "fixed_vs_trainable", "methods")
    }
    assert {"analysis/fig05_benchmark.png", "analysis/table01_main.tex"} <= kept["main"]
    assert kept["ablation"] == {f"analysis/fig08_ablation.{e}" for e in ("png", "svg", "csv", "pdf", "tex")} | {
        f"analysis/table06_ablation.{e}" for e in ("csv", "md", "tex")
    }
    assert "analysis/fig13_fixed_vs_trainable.svg" in kept["fixed_vs_trainable"]
    assert {"analysis/fig14_methods.png", "analysis/table02_rivals.md"} <= kept["methods"]


# --- intervals


@pytest.mark.parametrize(("hits", "count"), [(1, 40), (20, 40), (39, 40), (300, 1000)])
def test_the_interval_of_independent_answers_is_wilsons(hits: int, count: int) -> None:
    share = hits / count
    found = Mean(share, math.sqrt(share * (1 - share) / count), df=1e9).share(count)
    assert (found.low, found.high) == pytest.approx(proportion_confint(hits, count, method="wilson"), abs=1e-6)


def test_no_interval_of_a_share_leaves_0_to_1() -> None:
    draw = np.random.default_rng(0)
    outside = 0
    for rate in (0.0, 0.02, 0.3, 0.98, 1.0):
        for seeds, items in ((1, 8), (2, 8), (5, 96)):
            mean = estimate_mean((draw.random((seeds, items)) < rate).astype(float))
            assert mean is not None
            share, plain = mean.share(items), mean.estimate()
            assert share.low is not None
            assert share.high is not None
            assert 0 <= share.low <= share.value <= share.high <= 1
            assert share.low < share.high, "a share of 0 or 1 in a sample is not known exactly"
            if plain.low is not None and plain.high is not None:
                outside += plain.low < 0 or plain.high > 1
    assert outside, "t intervals of such samples lie in range too, so this test shows nothing"


def test_no_interval_of_an_amount_is_negative() -> None:
    mean = Mean(80.0, 29.0, df=4)
    plain, found = mean.estimate(), mean.amount()
    assert plain.low is not None
    assert plain.low < 0
    # t of 4 degrees of freedom: 2.7764; exp(2.7764 × 29 / 80) = 2.7358
    assert (found.low, found.high) == pytest.approx((80 / 2.73575, 80 * 2.73575), rel=1e-4)
    assert Mean(0.0, 0.0, df=4).amount() == Estimate(0.0), "equal values say nothing about others"
    assert Mean(80.0, 0.0, df=4).amount() == Estimate(80.0)
    assert Mean(0.5, 0.0, df=4).share(8) == Estimate(0.5)


def test_no_share_of_a_figure_or_table_leaves_its_range(written: Path) -> None:
    shares = 0
    for name in ("fig01_generated_vs_human", "fig05_benchmark", "fig07_dnpo_vs_spin", "fig08_ablation"):
        for row in read(written / f"{name}.csv"):
            for column in row:
                if row.get("base") or not column.endswith("low") or "less" in column or not row[column]:
                    continue
                high = float(row[column.removesuffix("low") + "high"])
                assert 0 <= float(row[column]) <= high <= 100, (name, row)
                shares += 1
        for row in read(written / f"{name}.csv"):
            if row.get("base") and row["low"]:
                assert -100 <= float(row["low"]) <= float(row["high"]) <= 100
    for row in read(written / "table06_ablation.csv"):
        assert not row["low"] or 0 <= float(row["low"]) <= float(row["high"]) <= 1
    assert shares > 80


def test_a_table_shows_both_sides_of_a_lopsided_interval() -> None:
    cells = {
        "a": {
            "x": Cell(Estimate(0.02, 0.001, 0.09), p=0.01, sides=True),
            "y": Cell(Estimate(0.5, 0.4, 0.602), sides=True),
        },
        "b": {"x": Cell(Estimate(0.02, 0.001, 0.09))},
    }
    found = table(cells, scale=100)
    assert "| 2.0 −1.9 +7.0\\* | 50.0 ± 10.1 |" in markdown(found)
    assert "| b | 2.0 ± 4.5 |" in markdown(found)
    assert "$2.0_{-1.9}^{+7.0}{}^{*}$" in latex(found)
    assert "distances" in found.caption
    assert "distances" not in table({"b": cells["b"]}).caption


# --- paired differences


def error_bars(axis: Axes) -> dict[str, list[tuple[float, float, float]]]:
    """Height, lower and upper end of each point of a panel, by label."""
    found = {}
    for container in axis.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, (bars,) = container.lines
            heights = [float(y) for y in line.get_ydata()]
            ends = [tuple(float(y) for _, y in segment) for segment in bars.get_segments()]
            found[str(container.get_label())] = [(y, *end) for y, end in zip(heights, ends, strict=True)]
    return found


@pytest.mark.parametrize(
    ("name", "column"), [("fig05_benchmark", ""), ("fig06_judge_score", "score"), ("fig11_second_judge", "second")]
)
def test_differences_have_the_whiskers_of_the_paired_comparison(
    recorder: Recorder, drawn: dict[str, DrawnFigure], name: str, column: str
) -> None:
    cells = chosen(recorder, sweeps=["main"]).chains()
    measure = score(column) if column else average(benchmarks(cells))
    levels, differences = drawn[name].figure.axes[:2]
    assert {SPIN, DNPO} <= set(error_bars(levels))
    (found,) = error_bars(differences).values()
    for k, shown in zip((1, 2), found, strict=True):
        sides = [measure.metric.scale * results(cells, measure, method, k, cells.seeds) for method in (DNPO, SPIN)]
        expected = compare_paired(*sides, interval="t").difference
        assert shown == pytest.approx((expected.value, expected.low, expected.high))
        alone = error_bars(levels)[DNPO][k + 1]
        assert shown[2] - shown[1] != pytest.approx(alone[2] - alone[1], rel=0.01), "these are the level's whiskers"


def test_a_gain_with_a_worse_held_out_loss_has_a_caution(drawn: dict[str, DrawnFigure]) -> None:
    """The loss of the invented runs of DNPO is worse than SPIN's at k=1 and k=2, whichever gain is certain."""
    found = 0
    for name in ("fig05_benchmark", "fig06_judge_score", "fig07_dnpo_vs_spin", "fig11_second_judge"):
        foot = " ".join(drawn[name].figure.get_supxlabel().split())
        lows = {
            row["iteration"]: row.get("low" if "base" in row else "win_less_lose_low")
            for row in drawn[name].rows
            if "base" in row or ("win_mean" in row and name == "fig07_dnpo_vs_spin")
        }
        gains = [f"{DNPO} k={k}" for k, low in lows.items() if low is not None and low > 0]
        assert (f"Caution, gains over {SPIN} of {', '.join(gains)}: the held-out loss" in foot) == bool(gains), name
        found += bool(gains)
    assert found
    assert "Caution" not in drawn["fig13_fixed_vs_trainable"].figure.get_supxlabel()


def test_without_the_base_there_is_no_panel_of_differences(recorder: Recorder) -> None:
    script = command.load(command.scripts()["fig06_judge_score"])
    made = script.make(chosen(recorder, sweeps=["main"], tags={"dnpo.dsl": "score"}))
    assert len(made.figure.axes) == 1
    assert "differences" not in made.figure.get_supxlabel()


# --- panels


def test_figures_fit_a_column_or_a_page_with_text_that_can_be_read(drawn: dict[str, DrawnFigure]) -> None:
    for name, made in drawn.items():
        assert made.figure.get_figwidth() in (COLUMN, PAGE), name
        written = [text for text in made.figure.findobj(Text) if text.get_text().strip()]
        assert min(text.get_fontsize() for text in written) >= FOOT_SIZE > 5.5
        whole = made.figure.get_tightbbox()  # of everything drawn, in inches
        assert min(whole.x0, whole.y0) > -0.02, name
        assert whole.x1 < made.figure.get_figwidth() + 0.02, name
        assert whole.y1 < made.figure.get_figheight() + 0.02, name


def test_labels_of_axes_do_not_overlap(drawn: dict[str, DrawnFigure]) -> None:
    for name, made in drawn.items():
        boxes = [axis.yaxis.label.get_window_extent() for axis in made.figure.axes if axis.get_ylabel()]
        for one in boxes:
            assert not any(one is not other and one.overlaps(other) for other in boxes), name


def test_legends_are_off_the_data(drawn: dict[str, DrawnFigure]) -> None:
    legends = 0
    for name, made in drawn.items():
        inside = [legend for axis in made.figure.axes if (legend := axis.get_legend())]
        for legend in (*made.figure.legends, *inside):
            box = legend.get_window_extent()
            over = [axis.get_title() for axis in made.figure.axes if axis.get_window_extent().padded(-1).overlaps(box)]
            assert not over, (name, over)
            titles = [axis.title for axis in made.figure.axes] + [axis._left_title for axis in made.figure.axes]
            assert not any(t.get_text() and t.get_window_extent().overlaps(box) for t in titles), name
            title = made.figure.get_suptitle()  # ends in blank lines, which make room for the legend
            extent, lines = made.figure._suptitle.get_window_extent(), len(title.split("\n"))
            assert box.y1 < extent.y1 - extent.height * len(title.rstrip().split("\n")) / lines + 3, name
            legends += 1
    assert legends >= len(FIGURES) - 1


def test_panels_of_the_same_quantity_share_their_axis(drawn: dict[str, DrawnFigure]) -> None:
    for name, columns in (
        ("fig02_stagnation", 2),
        ("fig10_movement", 2),
        ("fig08_ablation", 2),
        ("fig01_generated_vs_human", 1),
    ):
        for first in range(columns):
            panels = drawn[name].figure.axes[first::columns]
            assert len(panels) > 1
            assert len({axis.get_xlim() for axis in panels}) == 1, name
            assert len({axis.get_ylim() for axis in panels}) == 1, name
    panels = drawn["fig14_methods"].figure.axes  # the last of three rows has no panel of KL over KL
    assert len(panels) == 14
    for first in (0, 5, 10):
        assert len({axis.get_ylim() for axis in panels[first : first + 5]}) == 1
    for first in range(5):
        assert len({axis.get_xlim() for axis in panels[first::5]}) == 1
    assert len({axis.get_xlabel() for axis in panels if axis.get_xlabel()}) == 5


def test_methods_that_no_other_one_beats_for_less_are_named(drawn: dict[str, DrawnFigure]) -> None:
    drawing = drawn["fig14_methods"]
    panel = drawing.figure.axes[0]
    named = re.split(r" ›\s", panel.get_title("left"))
    by_method = {row["method"]: (row["generated/tokens_mean"], -row["eval/score_mean"]) for row in drawing.rows}
    for method, mine in by_method.items():
        beaten = any(all(np.less_equal(other, mine)) and other != mine for other in by_method.values())
        assert (method in named) == (not beaten), method
    assert len(named) > 1
    assert not any(axis.get_title("left") for axis in drawing.figure.axes[-4:]), "an untrained policy has no KL"


def test_methods_off_the_front_are_hollow(recorder: Recorder) -> None:
    """With the same costs and a quality that differs by 30 points."""
    where = "fronts"
    for name, gain in (("worse", 0.0), ("better", 30.0)):
        for seed in range(3):
            recorder.run(SPIN, seed, experiment=where, tags={"dnpo.method": name}, gain=gain)
    script = command.load(command.scripts()["fig14_methods"])
    with rc_context(STYLE):
        made = script.make(chosen(recorder, where, sweeps=["main"]))
    rows = {row["method"]: row for row in made.rows}
    for place, x in enumerate(("generated/tokens", "judge/verdicts", "trained/flop", "drift/initial")):
        axis = made.figure.axes[place if x != "drift/initial" else 4]
        hollow = {
            str(bar.get_label()): bar.lines[0].get_markerfacecolor() == PAPER
            for bar in axis.containers
            if isinstance(bar, ErrorbarContainer)
        }
        assert hollow == {"worse": True, "better": False}, x
        assert [rows[name][f"beaten_by:eval/score:{x}"] for name in hollow] == ["better", ""]
    legend = [text.get_text() for text in made.figure.legends[0].get_texts()]
    assert {"off the front", "front of the means", "better", "worse"} <= set(legend)


def test_ticks_are_complete(drawn: dict[str, DrawnFigure]) -> None:
    for name in ("fig01_generated_vs_human", "fig07_dnpo_vs_spin"):
        for axis in drawn[name].figure.axes:
            assert {0, 100} <= set(axis.get_xticks())
    for name in ("fig05_benchmark", "fig06_judge_score", "fig11_second_judge"):
        shown = [label.get_text() for label in drawn[name].figure.axes[1].get_xticklabels()]
        assert shown == ["SFT", "0", "1", "2"]
    for made in drawn.values():
        for axis in made.figure.axes:
            low, high = sorted(axis.get_ylim())
            assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 2


def test_whiskers_have_the_colour_of_their_method(drawn: dict[str, DrawnFigure]) -> None:
    for axis in drawn["fig13_fixed_vs_trainable"].figure.axes:
        for container in axis.containers:
            line, _, bars = container.lines
            colours = {to_hex(each) for part in bars for each in part.get_color()} | {to_hex(line.get_color())}
            assert colours == {find_look(str(container.get_label())).colour.lower()}
    methods = {
        str(each.get_label()) for axis in drawn["fig13_fixed_vs_trainable"].figure.axes for each in axis.containers
    }
    assert methods == {SPIN, FIXED, NPO, CONSTANT}
    stairs = {
        to_hex(patch.get_edgecolor())
        for patch in drawn["fig02_stagnation"].figure.axes[0].patches
        if not patch.get_fill()
    }
    assert {colour.lower() for colour in SAMPLES.values()} == {each[:7] for each in stairs}


# --- files


def test_text_in_pictures_is_text(written: Path) -> None:
    picture = (written / "fig06_judge_score.svg").read_text()
    for words in ("human responses", "policy after iteration", "95 % t intervals"):
        assert re.search(rf"<text[^>]*>[^<]*{words}", picture), words
    for name in FIGURES:
        content = (written / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in content, name  # TrueType, which programs can edit
        assert b"/Type3" not in content, name


def test_title_and_footer_are_in_the_caption_and_not_in_the_pdf(written: Path, drawn: dict[str, DrawnFigure]) -> None:
    for name, made in drawn.items():
        text = (written / f"{name}.tex").read_text()
        title = " ".join(made.figure.get_suptitle().split())
        foot = " ".join(made.figure.get_supxlabel().split())
        assert f"\\caption[{for_latex(title)}]{{{for_latex(f'{title}. {foot}')}}}" in text
        assert f"\\includegraphics{{{name}.pdf}}" in text
        assert f"\\label{{fig:{name}}}" in text
        assert text.startswith("\\begin{figure*}" if made.figure.get_figwidth() == PAGE else "\\begin{figure}")


def test_tables_have_rules_of_booktabs_a_caption_and_a_label(written: Path) -> None:
    for name in TABLES:
        text = (written / f"{name}.tex").read_text()
        places = [
            text.index(part)
            for part in ("\\caption[", f"\\label{{tab:{name}}}", "\\toprule", "\\midrule", "\\bottomrule")
        ]
        assert all(a < b for a, b in pairwise(places))
        assert "\\hline" not in text
        title = command.load(command.scripts()[name]).TITLE
        assert for_latex(title) in text


HARD = "a_b & 5 % of #1 $x$ {y} ~ ^ \\ < > | α-SPIN λ ≤ ≥ ± − → … “quoted” é × ′ F"


def compile_latex(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    packages = "\\usepackage{array}\n\\usepackage{booktabs}\n\\usepackage{graphicx}\n"
    document = f"\\documentclass[twocolumn]{{article}}\n{packages}\\begin{{document}}\n{body}\n\\end{{document}}\n"
    (folder / "paper.tex").write_text(document)
    return subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
    )


def parse_latex(text: str) -> None:
    """Environments are nested, braces balanced, and the rows of each tabular have its number of columns."""
    open_environments: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{([\w*]+)\}", text):
        if kind == "begin":
            open_environments.append(name)
        else:
            assert open_environments.pop() == name
    assert not open_environments
    bare = text.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
    assert bare.count("{") == bare.count("}")
    for columns, body in re.findall(
        r"\\begin\{tabular\}\{((?:[lr]|[>@p]\{[^}]*\})+)\}(.*?)\\end\{tabular\}", text, re.DOTALL
    ):
        wide = len(re.sub(r"[>@]?\{[^}]*\}", "", columns))
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert rows
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {wide - 1}
    assert not re.search(r"(?<!\\)[#%](?!$)", re.sub(r"\{%\n", "{\n", text), re.MULTILINE)


def test_claims_are_a_separate_table(written: Path) -> None:
    numbers, words = (written / "table02_rivals.tex").read_text().split("\\end{table*}")[:2]
    assert "\\label{tab:table02_rivals}" in numbers
    assert "Rafailov" not in numbers
    assert "\\label{tab:table02_rivals_words}" in words
    assert "Rafailov" in words
    assert "\\shortstack[r]{generated\\\\tokens}" in numbers


def test_latex_is_well_formed(written: Path) -> None:
    for name in (*FIGURES, *TABLES):
        parse_latex((written / f"{name}.tex").read_text())
    with pytest.raises(AssertionError):
        parse_latex("\\begin{tabular}{lr}\n\\toprule\na & b & c \\\\\n\\end{tabular}")
    with pytest.raises(AssertionError):
        parse_latex("\\begin{table}\\caption{50 % of}\\end{table}")


@pytest.fixture(scope="module")
def claimed() -> str:
    """The LaTeX of all registered claims, one measured and all others not."""
    claims = claims_book.read(claims_book.FILE).claims
    effect = Effect(Estimate(1.25, 0.5, 2.0), None, 5, 480)
    results = [Result(claim, "not measured", reason="no runs with 5 % & x_y") for claim in claims]
    results[0] = replace(results[0], outcome="supported", effect=effect, p=0.01, p_adjusted=0.04, reason="")
    return claims_tables.latex(results, "All of claims.yaml.")


def test_claims_are_floats_like_all_tables(claimed: str) -> None:
    parse_latex(claimed)
    assert "hline" not in claimed
    assert claimed.count("\\toprule") == claimed.count("\\caption[") == claimed.count("\\label{tab:claims_")
    assert len(set(re.findall(r"label\{(.*?)\}", claimed))) == claimed.count("\\label")
    assert r"no runs with 5 \% \& x\_y" in claimed
    assert "+1.2 (+0.5 to +2.0)" in claimed


@pytest.mark.long
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_tables_of_claims_fit_on_pages(claimed: str, tmp_path: Path) -> None:
    done = compile_latex(tmp_path, claimed)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Float too large" not in done.stdout


@pytest.mark.long
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(written: Path) -> None:
    files = "\n".join(f"\\input{{{name}.tex}}\n\\clearpage" for name in (*FIGURES, *TABLES))
    odd = floats.table("odd", HARD, HARD, latex(table({HARD: {"α": Cell(Estimate(1234.5, 1200.0, 1269.0))}})), [HARD])
    done = compile_latex(written, f"{files}\n{odd}")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Output written on paper.pdf" in done.stdout
    broken = compile_latex(written, "\\input{table01_main.tex}\\undefined")
    assert broken.returncode != 0
