"""Settings are checked before anything is built; a message names the wrong setting and the likely right one."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from dnpo.commands.naming import job_name, run_name
from dnpo.errors import SettingsError
from dnpo.optimise.parts import PairOptimisation
from dnpo.settings import (
    Count,
    Finite,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    build,
    check,
    check_values,
    locate,
    nearest,
    offer,
)

TINY_WORLD = "dnpo.data.tinyworld.TinyWorld"


class Inner:
    """A part inside another part."""

    def __init__(self, *, width: Count, rate: Positive = 1.0) -> None:
        self.width, self.rate = width, rate


class Outer:
    """A part with settings of every kind. Positional parameters are no settings."""

    def __init__(
        self,
        folder: str = "given by the run",
        *,
        inner: Inner | None = None,
        positive: Positive = 1.0,
        non_negative: NonNegative = 0.0,
        finite: Finite = 0.0,
        fraction: Fraction = 0.5,
        count: Count = 1,
        natural: Natural = 0,
        flag: bool = False,
        word: str = "",
        choice: Literal["mean", "sum"] = "mean",
        maybe: int | None = None,
        words: list[str] | None = None,
        between: Annotated[float, Range(gt=-1, le=2)] = 0.0,
        maybe_natural: Natural | None = None,
    ) -> None:
        self.folder = folder


INNER, OUTER = f"{__name__}.Inner", f"{__name__}.Outer"


def outer(**settings: Any) -> dict[str, Any]:
    """Check settings of ``Outer``."""
    return check("part", {"_target_": OUTER, **settings})


WORDS = {
    "positive": "a number above 0",
    "non_negative": "a number of at least 0",
    "finite": "a number",
    "fraction": "a number from 0 to 1",
    "count": "a whole number of at least 1",
    "natural": "a whole number of at least 0",
    "flag": "true or false",
    "word": "a valid string",
    "choice": "'mean' or 'sum'",
    "maybe": "a whole number or null",
    "words": "a valid",
    "between": "a number above -1 and at most 2",
    "maybe_natural": "a whole number of at least 0 or null",
}


def message(call: Callable[[], Any]) -> str:
    """The message of the SettingsError that a call raises."""
    with pytest.raises(SettingsError) as caught:
        call()
    return str(caught.value)


# --- names ------------------------------------------------------------------------------------------------------------


def test_options_are_listed_once_with_the_nearest_first() -> None:
    assert offer("spinn", ["dnpo", "spin"], "Options") == " Did you mean spin? Options: dnpo, spin."
    assert offer("nothing", ["dnpo", "spin"]) == " Known: dnpo, spin."
    assert offer("nothing", []) == " Known: none."


def test_unknown_key_offers_near_matches() -> None:
    """The message for a typing error names the setting as on the command line."""
    text = message(lambda: outer(fracton=0.5))
    assert text == "part.fracton: unknown setting. Did you mean part.fraction?"
    assert "data.flaws" in message(lambda: check("data", {"_target_": TINY_WORLD, "flaw": 0.1}))


def test_unknown_key_without_near_match_lists_all() -> None:
    """Without a similar name, the message lists the settings, and nothing else."""
    text = message(lambda: check("part", {"_target_": INNER, "width": 1, "zzz": 1}))
    assert text == "part.zzz: unknown setting. Known: part.rate, part.width."


def test_positional_parameters_are_not_settings() -> None:
    """Arguments that the run passes (a folder, a model) cannot be set."""
    assert message(lambda: outer(folder="/")).startswith("part.folder: unknown setting.")


@pytest.mark.parametrize("given", [{}, {"width": None}, {"width": "???"}], ids=["absent", "null", "???"])
def test_missing_required(given: dict[str, Any]) -> None:
    """The message for a missing required setting shows how to give it."""
    text = message(lambda: check("part", {"_target_": INNER, **given}))
    assert text == "part.width: needs a value; give part.width=…"


def test_no_target() -> None:
    """Settings without effect are an error; they are not ignored."""
    assert message(lambda: check("npo", {"alpha": 1.0})).startswith("npo: no _target_")


@pytest.mark.parametrize(
    "target", ["no_such_package.Thing", "dnpo.no_such_module.Thing", "dnpo.dsl.NoSuchLabeller", "", 3, None]
)
def test_target_that_cannot_be_imported(target: Any) -> None:
    """The message names the setting and the target; there is no traceback."""
    text = message(lambda: check("dsl", {"_target_": target}))
    assert text.startswith(f"dsl._target_={target}: cannot be imported")


@pytest.mark.parametrize("target", ["dnpo.dsl", "dnpo.records.HUMAN"], ids=["module", "constant"])
def test_target_that_cannot_be_called(target: str) -> None:
    """A dotted path without the class is a user's mistake, and the message says so."""
    assert message(lambda: check("dsl", {"_target_": target})).startswith("dsl._target_=")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("of_mine.LongrChosen", "(of_mine has no LongrChosen. Did you mean LongerChosen?)"),
        ("of_mine.LongerChosen.mke", "(of_mine.LongerChosen has no mke. Did you mean make?)"),
        ("dnpo.dsl.Zzz", "(dnpo.dsl has no Zzz)"),
        (
            "nowhere.Thing",
            "(there is no module nowhere in the current folder, on PYTHONPATH or among installed packages)",
        ),
        ("needs_another", "(No module named 'no_such_library')"),
    ],
)
def test_what_an_import_lacks_is_named(target: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_mine.py").write_text("class LongerChosen:\n    def make(self):\n        pass\n")
    (tmp_path / "needs_another.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    assert message(lambda: locate("dsl._target_", target)) == f"dsl._target_={target}: cannot be imported {said}"


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"positive": "1.0"},
        {"positive": True},
        {"positive": None},
        {"count": 1.0},
        {"count": 2.5},
        {"count": "3"},
        {"count": True},
        {"flag": 1},
        {"flag": "true"},
        {"word": 1},
        {"choice": "median"},
        {"choice": None},
        {"maybe": "none"},
        {"words": "one"},
        {"words": [1]},
    ],
    ids=str,
)
def test_wrong_type(wrong: dict[str, Any]) -> None:
    """Only whole numbers are converted to floats: "false" is not false, and 2.5 steps are not 2."""
    ((key, value),) = wrong.items()
    assert message(lambda: outer(**wrong)).startswith(f"part.{key}={value!r}: expected {WORDS[key]}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"positive": 0.0},
        {"positive": -1},
        {"positive": math.inf},
        {"positive": math.nan},
        {"non_negative": -1e-9},
        {"non_negative": math.inf},
        {"non_negative": math.nan},
        {"finite": math.nan},
        {"finite": -math.inf},
        {"fraction": 1.0000001},
        {"fraction": -0.1},
        {"fraction": math.nan},
        {"fraction": math.inf},
        {"count": 0},
        {"natural": -1},
        {"between": -1.0},
        {"between": 2.1},
        {"between": math.nan},
        {"maybe_natural": -1},
    ],
    ids=str,
)
def test_out_of_range(wrong: dict[str, Any]) -> None:
    """A value outside its range is refused before any computation; NaN is in no range."""
    ((key, value),) = wrong.items()
    words = WORDS[key] if math.isfinite(value) else WORDS[key].replace("a number", "a finite number")
    assert message(lambda: outer(**wrong)) == f"part.{key}={value!r}: expected {words}"


@pytest.mark.parametrize(
    "right",
    [
        {"positive": 1e-300},
        {"non_negative": 0.0},
        {"finite": -1e300},
        {"fraction": 0.0},
        {"fraction": 1.0},
        {"count": 1},
        {"natural": 0},
        {"natural": 2**70},
        {"between": 2.0},
        {"between": -0.999},
        {"maybe_natural": None},
        {"maybe_natural": 0},
        {"flag": True},
        {"word": "x"},
        {"choice": "sum"},
        {"maybe": None},
        {"maybe": 3},
        {"words": []},
        {"words": ["a", "b"]},
        {"inner": None},
    ],
    ids=str,
)
def test_endpoints_of_ranges_are_accepted(right: dict[str, Any]) -> None:
    """Every documented value is accepted and returned unchanged."""
    assert outer(**right) == {"_target_": OUTER, **right}


@pytest.mark.parametrize("name", ["positive", "non_negative", "finite", "fraction"])
def test_int_for_float_comes_back_as_float(name: str) -> None:
    """``alpha=1`` and ``alpha=1.0`` are the same setting; otherwise they would have two keys in the store."""
    value = outer(**{name: 1})[name]
    assert value == 1.0
    assert type(value) is float


def test_defaults_are_not_filled_in_and_special_keys_are_kept() -> None:
    """The result contains the given settings, so that Hydra can build from it; the given settings do not change."""
    given = {"_target_": OUTER, "_partial_": True, "fraction": 1}
    assert check("part", given) == {"_target_": OUTER, "_partial_": True, "fraction": 1.0}
    assert given == {"_target_": OUTER, "_partial_": True, "fraction": 1}


def test_real_part() -> None:
    """A part of dnpo: its signature is the schema, ranges included."""
    given = {"_target_": TINY_WORLD, "flaws": 0, "difficulty": 5}
    checked = check("data", given)
    assert checked == {"_target_": TINY_WORLD, "flaws": 0.0, "difficulty": 5}
    assert type(checked["flaws"]) is float
    for key, value in (("flaws", 1.5), ("difficulty", 6), ("train", 0), ("seed", -1), ("seed", "one")):
        assert message(lambda: check("data", {"_target_": TINY_WORLD, key: value})).startswith(f"data.{key}={value!r}")  # noqa: B023


# --- nested parts and foreign classes ---------------------------------------------------------------------------------


def test_nested_target_is_checked() -> None:
    """A part inside a part is checked by its signature, under its full name, and its values are converted as well."""
    checked = outer(inner={"_target_": INNER, "width": 2, "rate": 3})
    assert checked["inner"] == {"_target_": INNER, "width": 2, "rate": 3.0}
    assert type(checked["inner"]["rate"]) is float
    cases: list[tuple[dict[str, Any], str]] = [
        ({"_target_": INNER, "widht": 2}, "part.inner.widht: unknown setting. Did you mean part.inner.width?"),
        ({"_target_": INNER}, "part.inner.width: needs a value"),
        ({"_target_": INNER, "width": 0}, "part.inner.width=0: expected a whole number of at least 1"),
        ({"_target_": "no_such.Thing", "width": 1}, "part.inner._target_=no_such.Thing: cannot be imported"),
    ]
    for inner, expected in cases:
        assert message(lambda: outer(inner=inner)).startswith(expected)  # noqa: B023


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "torch.optim.RMSprop", "torch.optim.SGD"])
def test_torch_optimizer_names_are_checked(optimizer: str) -> None:
    """Otherwise a misspelt learning rate would silently train with PyTorch's default."""
    given = {"_target_": optimizer, "_partial_": True, "lr": 1.0e-4}
    assert check("trainer.optimizer", given) == given
    build("trainer.optimizer", given).check("trainer.optimizer")
    wrong = build("trainer.optimizer", {"_target_": optimizer, "_partial_": True, "lrr": 1.0e-4})
    text = message(lambda: wrong.check("trainer.optimizer"))
    assert text.startswith("trainer.optimizer.lrr: unknown setting. Did you mean trainer.optimizer.lr")


def test_torch_optimizer_inside_a_part() -> None:
    """The same at its real place, under ``trainer``."""
    target = "dnpo.optimise.parts.PairOptimisation"
    optimizer = {"_target_": "torch.optim.RMSprop", "lr": 1e-4}

    def trainer(**settings: Any) -> PairOptimisation:
        part: PairOptimisation = build("trainer", check("trainer", {"_target_": target, **settings}))
        part.check("trainer")
        return part

    assert trainer(optimizer=optimizer, clip=1).clip == 1.0
    text = message(lambda: trainer(optimizer={**optimizer, "lrr": 1.0}))
    assert text.startswith("trainer.optimizer.lrr: unknown setting. Did you mean trainer.optimizer.lr?")
    text = message(lambda: trainer(optimizer={**optimizer, "_target_": "torch.optim.RMSporp"}))
    assert text.startswith("trainer.optimizer._target_=torch.optim.RMSporp: cannot be imported")
    text = message(lambda: trainer(optimizer={**optimizer, "lr": -1.0}))
    assert text.startswith("trainer.optimizer.lr=-1.0: ")
    assert message(lambda: trainer()).startswith("trainer.optimizer: needs a value")


def test_a_wrong_key_is_named() -> None:
    given = {"_target_": "dnpo.data.files.JsonLines", "path": "rows.jsonl", "columns": {"prompt": "a", "nr": None}}
    limits = {"max_prompt_tokens": 9, "max_response_tokens": 9}
    assert message(lambda: check("data", given | limits)).endswith("'answer' or 'family', not 'nr'")


def test_settings_of_the_engine() -> None:
    """Settings of memory and time are checked like all others."""
    trainer = {
        "_target_": "dnpo.optimise.parts.PairOptimisation",
        "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True},
        "share_prompt": False,
        "checkpointing": True,
        "compile": True,
    }
    assert check("trainer", trainer) == trainer
    noise = "dnpo.optimise.parts.TrainableNoise"
    for value in ("auto", "on", "off"):
        assert check("npo", {"_target_": noise, "cache_hidden": value})["cache_hidden"] == value
    wrong: list[tuple[str, dict[str, Any], str]] = [
        (
            "npo",
            {"_target_": noise, "cache_hidden": True},
            "npo.cache_hidden=True: expected 'auto', 'on' or 'off'",
        ),
        (
            "npo",
            {"_target_": "dnpo.optimise.parts.Offset", "shift": 1.0, "cache_hidden": "on"},
            "npo.cache_hidden: unknown setting",
        ),
        ("trainer", trainer | {"checkpointing": "yes"}, "trainer.checkpointing='yes': expected true or false"),
        ("trainer", trainer | {"share_prompt": 1}, "trainer.share_prompt=1: expected true or false"),
        (
            "trainer",
            trainer | {"shareprompt": True},
            "trainer.shareprompt: unknown setting. Did you mean trainer.share_",
        ),
    ]
    for name, settings, expected in wrong:
        assert message(lambda: check(name, settings)).startswith(expected)  # noqa: B023


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_check_values_of_a_function_without_prefix() -> None:
    """The settings of the run itself have names without a part."""

    def run(*, seed: Natural, iterations: Count = 3) -> None:
        """A run."""

    assert check_values("", run, {"seed": 0}) == {"seed": 0}
    assert message(lambda: check_values("", run, {"seed": 0, "iteration": 2})) == (
        "iteration: unknown setting. Did you mean iterations?"
    )
    assert message(lambda: check_values("", run, {})) == "seed: needs a value; give seed=…"


def test_suggestions_of_nearest_names() -> None:
    """Similar names, all names, or none; private ones are never suggested."""
    assert nearest("alhpa", ["alpha", "beta"], "npo") == " Did you mean npo.alpha?"
    assert nearest("xyz", ["beta", "alpha", "_target_"]) == " Known: alpha, beta."
    assert nearest("target", ["_target_"]) == " Known: none."


BARE = """
import importlib.metadata as metadata, sys

blocked = {"pydantic", "pydantic_core", "hydra", "omegaconf", "pyarrow", "mlflow", "datasets", "openai", "scipy",
           "matplotlib", "rich", "pandas", "sklearn"}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, *rest)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
distribution = metadata.distribution
def without(name):
    if name.split("-")[0].lower() in blocked:
        raise metadata.PackageNotFoundError(name)
    return distribution(name)
metadata.distribution = without

import dnpo.optimise.preference, dnpo.optimise.npo, dnpo.optimise.objective, dnpo.optimise.training
import dnpo.policy.packing, dnpo.policy.model, dnpo.records

from dnpo.optimise.npo import TrainableModule
from dnpo.optimise.parts import PairOptimisation
from dnpo.settings import Bound
TrainableModule(4, 5, alpha=0.5)
PairOptimisation(optimizer=Bound("torch.optim.SGD", {"lr": 0.1}), steps=3)
assert not blocked & set(sys.modules), blocked & set(sys.modules)
try:
    import pydantic
except ImportError:
    print("bare")
"""


def test_training_needs_only_torch_transformers_peft_and_lightning() -> None:
    """On a borrowed machine nothing else may be installed."""
    found = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.stdout.strip().splitlines()[-1:] == ["bare"], found.stderr[-2000:]


def test_a_run_is_named_after_its_command() -> None:
    given = ["method=npo", "+sweep=main", "tracking.uri=sqlite:///x.db", "threads=2", "data.path=../shared/rows.jsonl"]
    assert run_name(given) == "method=npo +sweep=main data.path=rows.jsonl"
    assert run_name(["npo.alpha=.5", "model.name=a/b"]) == "npo.alpha=.5 model.name=a/b"
    assert run_name(["tracking=off"]) == "defaults"


def test_a_job_of_a_search_has_a_short_name(tmp_path: Path) -> None:
    given = ["npo.alpha=0.15676677195506075", "trainer.optimizer.lr=0.00016051911333587616", "+sweep=optuna"]
    assert job_name(tmp_path, given) == "alpha=0.1568 lr=0.0001605"
    assert job_name(tmp_path, ["npo.alpha=0.25", "data.path=rows-of-26.jsonl"]) == "alpha=0.25 path=rows-of-26.jsonl"
    assert job_name(tmp_path, ["method=dnpo", "seed=0"]) == "dnpo seed=0"


@pytest.mark.parametrize(
    ("given", "known", "offered"),
    [
        ("trainer.lr", ["trainer.clip", "trainer.optimizer.lr", "sft.optimizer.lr"], "trainer.optimizer.lr?"),
        (
            "lr",
            ["trainer.clip", "trainer.optimizer.lr", "sft.optimizer.lr"],
            "sft.optimizer.lr or trainer.optimizer.lr?",
        ),
        ("model.rank", ["model.lora.rank", "model.heads"], "model.lora.rank?"),
        ("data.temperature", ["generate.temperature", "data.train"], "generate.temperature?"),
        ("trainer.clp", ["trainer.clip", "sft.clip"], "trainer.clip?"),
        ("alhpa", ["generate.temperature", "npo.alpha"], "npo.alpha?"),
    ],
)
def test_a_setting_of_another_part_is_pointed_to(given: str, known: list[str], offered: str) -> None:
    assert nearest(given, known) == f" Did you mean {offered}"


def test_a_part_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command dnpo begins without this folder in the path, unlike ``python -m``."""
    (tmp_path / "of_my_own.py").write_text("import of_my_sibling\n\ndef part():\n    return of_my_sibling.VALUE\n")
    (tmp_path / "of_my_sibling.py").write_text("VALUE = 3\n")
    (tmp_path / "json.py").write_text("raise ImportError('hides a module of Python')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    assert locate("part._target_", "of_my_own.part")() == 3
    monkeypatch.delitem(sys.modules, "json")
    assert locate("part._target_", "json.dumps")([1]) == "[1]"
