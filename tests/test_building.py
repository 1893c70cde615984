"""Settings become parts: values arrive as plain values, enter keys by name, and are refused by name."""

import ast
import dataclasses
import inspect
import json
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import dnpo
from dnpo import former
from dnpo.commands import common, train
from dnpo.data.hub import Hub
from dnpo.errors import SettingsError
from dnpo.evaluate.leaderboard import Leaderboard
from dnpo.judges.ensemble import Ensemble
from dnpo.judges.exact.rules import Rules
from dnpo.loop import chain
from dnpo.optimise.objective import Facts, PairLogps, log_ratio_gap, logistic
from dnpo.optimise.parts import (
    FixedNoise,
    Logistic,
    MatchedOffset,
    Noise,
    NoNoise,
    Offset,
    Optimisation,
    PairOptimisation,
    TrainableNoise,
    check_objective,
)
from dnpo.policy.base import Scratch
from dnpo.policy.model import Policy
from dnpo.settings import Bound, Count, Positive, build, check, check_values, locate, neutral_names, part_key

CONF = common.conf_folder()
PACKAGE = Path(dnpo.__file__).parent
SMOKE = ("scale=smoke", "tracking=off")


def composed(*overrides: str, config: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def built(*overrides: str) -> Any:
    """The run of a command at smoke scale."""
    return train.build(composed(*SMOKE, *overrides))[0]


def refusal(*overrides: str) -> str:
    with pytest.raises(SettingsError) as caught:
        built(*overrides)
    return str(caught.value)


def as_json(value: Any) -> Any:
    """The value, after checking that JSON does not change it."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    assert json.loads(text) == value
    return value


# --- lists and mappings


def options() -> dict[tuple[str, str], type]:
    """The class of every option of ``conf/`` that names one."""
    found = {}
    for file in sorted(CONF.glob("*/*.yaml")):
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and str(settings.get("_target_", "")).startswith("dnpo."):
            found[file.parent.name, file.stem] = typing.cast(type, locate(str(file), settings["_target_"]))
    return found


def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a part's settings."""
    plain = not dataclasses.is_dataclass(kind)
    hints = typing.get_type_hints(kind.__init__ if plain else kind)  # type: ignore[misc]
    names = inspect.signature(kind).parameters
    return {name: hints[name] for name in names if name in hints}


SAMPLES: dict[Any, list[Any]] = {
    Any: ["a", 3],
    str: ["a", "b"],
    int: [3, 4],
    float: [0.5, 0.25],
    str | list[str] | None: ["a", ["b", "c"]],
}


def example(hint: Any) -> Any:
    """A list or mapping that an annotation accepts; None if it accepts neither, or only parts."""
    origin, arguments = typing.get_origin(hint), [_plain(argument) for argument in typing.get_args(hint)]
    values = [_words(argument) or SAMPLES.get(argument, []) for argument in arguments]
    if origin in (list, Mapping, dict) and all(values):
        return values[0] if origin is list else dict(zip(*values, strict=False))
    return next((found for found in map(example, arguments) if found is not None), None)


def _plain(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _words(hint: Any) -> list[Any]:
    return list(typing.get_args(hint))[:2] if typing.get_origin(hint) is typing.Literal else []


def test_every_setting_that_takes_a_list_or_mapping_has_an_example() -> None:
    """Except mappings of parts."""
    assert example(str | list[str]) == ["a", "b"]
    assert example(dict[typing.Literal["x", "y"], str] | None) == {"x": "a", "y": "b"}
    assert example(Mapping[str, int]) == {"a": 3, "b": 4}
    assert example(str | None) is None
    without = [
        (group, option, name)
        for (group, option), kind in options().items()
        for name, hint in hints_of(kind).items()
        if any(word in str(hint) for word in ("list[", "dict[", "Mapping[", "Sequence[", "tuple["))
        and example(hint) is None
    ]
    assert {name for *_, name in without} == {"members", "measures"}


LISTED = [
    (group, option, name, example(hint))
    for (group, option), kind in options().items()
    for name, hint in hints_of(kind).items()
    if example(hint) is not None
    and not (group == "model" and option in ("hub", "local"))  # they need a model's folder: test_template.py
    and (group, option) != ("data", "mix")  # its weights need sources of the same names: test_mix.py
]


def test_lists_and_mappings_are_among_the_settings() -> None:
    assert {group for group, *_ in LISTED} >= {"data"}
    assert len(LISTED) >= 5


@pytest.mark.parametrize(("group", "option", "name", "value"), LISTED)
def test_lists_and_mappings_reach_parts_as_they_are(
    group: str, option: str, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python's lists and mappings, so that they can be compared, copied and written as JSON."""
    (tmp_path / "rows").write_text("{}")
    monkeypatch.setattr(Hub, "_contents", lambda self: {})  # the hub is not asked
    text = str(value).replace("'", "").replace(" ", "")
    needed = (
        [f"{group}.path={tmp_path / 'rows'}"] if "path: ???" in (CONF / group / f"{option}.yaml").read_text() else []
    )
    needed += ["judge.model=m"] if option == "openai" else []
    cfg = composed(*SMOKE, f"{group}={option}", f"++{group}.{name}={text}", *needed)
    assert OmegaConf.is_config(cfg[group][name])
    settings = train.check_settings(cfg).parts
    part = build(group, settings[group])
    found = getattr(part, name)
    assert type(found) is type(value)
    assert found == value
    assert name in str(as_json(part_key(part))) or hasattr(part, "identity")


def test_target_modules_given_by_a_command() -> None:
    """A list of names reaches the adapter, and the keys of the stages."""
    run = built("model.lora.rank=2", "model.lora.target_modules=[q_proj,v_proj]")
    assert type(run.model.lora.target_modules) is list
    assert run.model.lora.target_modules == ["q_proj", "v_proj"]
    assert as_json(part_key(run.model.lora))["target_modules"] == ["q_proj", "v_proj"]
    other = built("model.lora.rank=2", "model.lora.target_modules=[q_proj]")
    for ours, theirs in zip(chain(run), chain(other), strict=True):
        assert as_json(dict(ours.policy.settings))
        assert ours.policy.key != theirs.policy.key


def test_target_modules_are_where_adapters_are_put(make_policy: Callable[..., Policy]) -> None:
    lora = built("model.lora.rank=2", "model.lora.target_modules=[q_proj,v_proj]").model.lora
    names = {name.split(".lora_")[0].split(".")[-1] for name, _ in lora.on(make_policy().model, 0).named_parameters()
             if ".lora_" in name}  # fmt: skip
    assert names == {"q_proj", "v_proj"}


def test_lists_inside_a_bound_optimizer() -> None:
    """They reach torch and the key as lists."""
    given = ("trainer.optimizer._target_=torch.optim.AdamW", "+trainer.optimizer.betas=[0.8,0.99]")
    trainer = built(*given).plans[0].trainer
    assert type(trainer.optimizer.betas) is list
    assert as_json(part_key(trainer))["optimizer"] == {
        "_target_": "torch.optim.AdamW",
        "lr": 1e-4,
        "betas": [0.8, 0.99],
    }
    trainer.check("trainer")


def test_members_of_an_ensemble_are_parts_by_name() -> None:
    judge = built("judge=ensemble").judge
    assert type(judge.members) is dict
    assert len(as_json(part_key(judge))["ensemble"]) == len(judge.members) >= 2


def test_benchmarks_given_by_a_command() -> None:
    """For the command of the leaderboard, and for the leaderboard in an evaluation."""
    tree = common.plain(composed("model.path=x", "benchmarks=[arc,mmlu]", "shots={arc: 3}", config="leaderboard"))
    settings = check_values("", Leaderboard, {name: tree[name] for name in ("source", "benchmarks", "shots", "limit")})
    assert settings["benchmarks"] == ["arc", "mmlu"]
    assert type(settings["benchmarks"]) is list
    assert type(settings["shots"]) is dict
    evaluation = built("eval=leaderboard", "eval.leaderboard.benchmarks=[arc,mmlu]", "eval.leaderboard.shots={arc: 3}")
    part = evaluation.eval.leaderboard
    assert (type(part.benchmarks), type(part.shots)) == (list, dict)
    assert "arc" in str(as_json([dict(stage.settings) for stage in next(iter(chain(evaluation))).measures]))


# --- keys


def test_names_of_parts_are_unique_in_dnpo() -> None:
    """Keys have only the class name of a part of dnpo, so names must be unique."""
    classes: Counter[str] = Counter()
    parts = {target.rpartition(".")[2] for target in (*former.MOVED.values(), *former.MOVED_AT.values())}
    parts |= {kind.__name__ for kind in options().values()}
    parts |= {settings["_target_"].rpartition(".")[2] for settings in train.ABSENT.values()}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                classes[node.name] += 1
                if any(
                    isinstance(call, ast.Call) and ast.unparse(call.func) in ("neutral", "place")
                    for call in ast.walk(node)
                ):
                    parts.add(node.name)
    assert {"TrainableNoise", "PairOptimisation", "Logistic", "Rules", "Sampling", "NoJudge"} <= parts
    assert {name: classes[name] for name in parts if classes[name] != 1} == {}


def another(hint: Any, value: Any) -> Any:
    """Another value that an annotation accepts; the same value if none is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 1.0
    choices = [word for word in typing.get_args(hint) if isinstance(word, str)]
    return next((word for word in choices if word != value), value)


FROZEN = [
    kind
    for kind in dict.fromkeys(part for (group, _), part in options().items() if group != "launch")  # in no stage
    if dataclasses.is_dataclass(kind) and not hasattr(kind, "identity")
]


@pytest.mark.parametrize("kind", FROZEN, ids=lambda kind: kind.__name__)
def test_neutral_fields_are_in_no_key_and_all_others_are(kind: type) -> None:
    """For every dataclass in ``conf/`` without an ``identity()``."""
    needed: dict[str, Any] = {"optimizer": Bound("torch.optim.SGD", {"lr": 0.1}), "beta": 1.0, "shift": 1.0}
    needed["like"] = TrainableNoise()
    needed["shares"] = [1.0]
    needed["base"] = Logistic(beta=1.0)
    needed["wraps"] = Ensemble(members={"one": Rules(), "other": Rules()}, by="majority")
    needed["optimisation"] = Optimisation(needed["optimizer"])
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    part = kind(**{name: needed[name] for name in names if name in needed})
    gone, hints = neutral_names(kind), typing.get_type_hints(kind)
    assert set(part_key(part)) == {"_target_", *names} - set(gone)
    assert part_key(part)["_target_"] == kind.__name__
    for name in names:
        other = another(hints[name], getattr(part, name))
        if other == getattr(part, name):
            continue
        changed = dataclasses.replace(typing.cast(Any, part), **{name: other})
        assert (part_key(changed) == part_key(part)) is (name in gone), name


def test_the_neutral_settings_of_the_engine() -> None:
    """They change memory, time, the work that a killed run repeats, and rounding; nothing else."""
    training = {"micro_batch_size", "parallel", "checkpoint_every", "checkpointing", "compile"}
    assert set(neutral_names(Optimisation)) == training
    assert set(neutral_names(PairOptimisation)) == {*training, "share_prompt"}
    assert neutral_names(TrainableNoise) == neutral_names(FixedNoise) == ["cache_hidden"]
    assert neutral_names(MatchedOffset) == ["like"]
    assert neutral_names(Logistic) == neutral_names(Offset) == neutral_names(Scratch) == []


# --- parts of one's own


class Keeps:
    """A class that is not a dataclass but keeps its settings."""

    def __init__(self, *, width: Count, rate: Positive = 1.0) -> None:
        self.width, self.rate = width, rate


class Loses:
    """A class that keeps a setting under another name."""

    def __init__(self, *, width: Count, rate: Positive = 1.0) -> None:
        self.width, self._pace = width, rate


class Identified(Loses):
    """The same class with an ``identity()``."""

    def identity(self) -> dict[str, Any]:
        """Width and pace."""
        return {"width": self.width, "pace": self._pace}


@dataclass(frozen=True)
class Faster:
    """A dataclass of one's own with a neutral setting."""

    width: Count
    threads: Count = dataclasses.field(default=1, metadata={"changes result": False})


def own(kind: Any, **settings: Any) -> Any:
    settings = {"_target_": f"{__name__}.{kind.__name__}", **settings}
    return build("part", check("part", settings))


def test_a_plain_class_that_keeps_its_settings() -> None:
    """Defaults count too, and the whole import path: another module may have a class of this name."""
    key = as_json(part_key(own(Keeps, width=3)))
    assert key == {"_target_": f"{__name__}.Keeps", "width": 3, "rate": 1.0}
    assert part_key(own(Keeps, width=3, rate=2)) == {**key, "rate": 2.0}
    assert as_json(part_key(own(Faster, width=3, threads=4))) == {"_target_": f"{__name__}.Faster", "width": 3}
    assert part_key(own(Identified, width=3)) == {"width": 3, "pace": 1.0}


def test_a_plain_class_that_loses_a_setting_is_refused_by_name() -> None:
    """Otherwise two runs with different values of it would share their results."""
    with pytest.raises(SettingsError) as caught:
        own(Loses, width=3)
    said = str(caught.value)
    assert said.startswith(f"part._target_={__name__}.Loses: ")
    assert "rate" in said
    assert "width" not in said


class Descent(torch.optim.SGD):
    """A user's optimizer. Its positional parameter is the parameters to train."""

    def __init__(self, params: Any, pace: float = 0.1, *, twice: bool = False) -> None:
        super().__init__(params, lr=2 * pace if twice else pace)


@pytest.mark.parametrize("partial", [{}, {"_partial_": True}], ids=["plain", "partial"])
def test_a_custom_optimizer_is_built_once_its_parameters_exist(partial: dict[str, Any]) -> None:
    """An optimizer of any package; its settings are checked against the parameters of its class."""
    settings = {"_target_": "dnpo.optimise.parts.PairOptimisation"}
    given = {"_target_": f"{__name__}.Descent", **partial}

    def trainer(**more: Any) -> PairOptimisation:
        part: PairOptimisation = build("trainer", check("trainer", {**settings, "optimizer": {**given, **more}}))
        part.check("trainer")
        return part

    parameters = [torch.nn.Parameter(torch.ones(1))]
    assert trainer(pace=0.3, twice=True).optimizer(parameters).param_groups[0]["lr"] == 0.6
    key = as_json(part_key(trainer(pace=0.3)))["optimizer"]
    assert key == {"_target_": f"{__name__}.Descent", "pace": 0.3}
    with pytest.raises(SettingsError, match=r"^trainer\.optimizer\.pase: unknown setting\. Did you mean trainer\.opti"):
        trainer(pase=0.3)


# --- objectives of one's own


def hinge(policy: PairLogps, reference: PairLogps, facts: Facts, *, beta: float) -> Tensor:
    """A loss that is not a dataclass."""
    return torch.relu(1 - beta * log_ratio_gap(policy, reference))


def hinge_by_strength(policy: PairLogps, reference: PairLogps, facts: Facts, *, strength: float) -> Tensor:
    """The same with another name for β."""
    return hinge(policy, reference, facts, beta=strength)


@dataclass(frozen=True)
class ByTemperature:
    """The logistic loss by 1/β."""

    temperature: Positive

    @property
    def beta(self) -> float:
        """β."""
        return 1 / self.temperature

    def __call__(self, policy: PairLogps, reference: PairLogps, facts: Facts) -> Tensor:
        """A loss for each pair."""
        return logistic(policy, reference, facts, beta=self.beta)


@dataclass(frozen=True)
class Strong:
    """An objective without ``beta``."""

    strength: Positive = 2.0

    def __call__(self, policy: PairLogps, reference: PairLogps, facts: Facts) -> Tensor:
        """A loss for each pair."""
        return logistic(policy, reference, facts, beta=self.strength)


def objective(kind: Any, **settings: Any) -> list[str]:
    """Overrides that choose an objective of one's own."""
    return [
        f"objective._target_={__name__}.{kind.__name__}",
        *(f"~objective.{name}" for name in ("beta", "smoothing", "xi_min")),
        *(f"+objective.{name}={value}" for name, value in settings.items()),
    ]


@pytest.mark.parametrize(
    ("overrides", "beta"),
    [
        (["objective.beta=0.25"], 0.25),
        (objective(ByTemperature, temperature=4), 0.25),
        (objective(hinge, beta=0.25), 0.25),
        (objective(hinge, beta=0.25, _partial_="true"), 0.25),
    ],
    ids=["field", "property", "function", "partial function"],
)
def test_an_objective_declares_its_beta(overrides: list[str], beta: float) -> None:
    found = built(*overrides).plans[0].objective
    assert found.beta == beta
    pair = PairLogps(torch.tensor([1.0]), torch.tensor([2.0]))
    facts = Facts(*(torch.ones(1) for _ in Facts._fields))
    assert found(pair, pair, facts).shape == (1,)
    assert "_partial_" not in as_json(part_key(found))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (objective(Strong, strength=2), "Strong"),
        (objective(hinge_by_strength, strength=2), "hinge_by_strength"),
        (objective(hinge_by_strength, strength=2, _partial_="true"), "hinge_by_strength"),
    ],
)
def test_an_objective_without_a_beta_is_refused_by_name(overrides: list[str], name: str) -> None:
    said = refusal(*overrides)
    assert said.startswith("objective: ")
    assert name in said
    assert "beta" in said


def test_an_objective_of_an_earlier_layout_is_refused_with_the_reason() -> None:
    def two(policy: PairLogps, reference: PairLogps) -> Tensor:
        return logistic(policy, reference, beta=1.0)

    wrong: Any = two
    wrong.beta = 1.0
    with pytest.raises(SettingsError, match=r"cannot be called with \(policy, reference, facts\): too many positional"):
        check_objective(wrong)


@pytest.mark.parametrize("flag", ["reads_reference", "reads_rejected"])
def test_a_flag_of_an_objective_is_true_or_false(flag: str) -> None:
    wrong: Any = type("Wrong", (), {"beta": 1.0, flag: "no", "__call__": lambda self, policy, reference, facts: None})()
    with pytest.raises(SettingsError, match=f"Wrong.{flag} is 'no'; expected true or false"):
        check_objective(wrong)


@pytest.mark.parametrize("beta", [None, "1", True, float("nan"), float("inf"), lambda: 1.0])
def test_a_beta_that_is_not_a_number_is_refused(beta: Any) -> None:
    wrong: Any = type("Wrong", (), {"beta": beta})()
    with pytest.raises(SettingsError, match="Wrong has no number beta"):
        check_objective(wrong)


# --- settings of an earlier layout

OPTIMIZER = {"_target_": "torch.optim.RMSprop", "_partial_": True, "lr": 1.0e-4}
TRAINING = {
    "_target_": "dnpo.training.Optimisation",
    "optimizer": OPTIMIZER,
    "epochs": 1,
    "steps": 0,
    "batch_size": 64,
    "micro_batch_size": 0,
    "warmup": 0.1,
    "decay": True,
    "clip": 1.0,
    "autocast": False,
    "checkpoint_every": 25,
    "share_prompt": True,
    "checkpointing": False,
    "compile": False,
}
NOISE = {
    "_target_": "dnpo.npo.TrainableNoise",
    "_partial_": True,
    "alpha": 0.1,
    "max_variance": 1.0,
    "learning_rate": 1.0e-3,
    "start_log_std": -1.0,
    "cache_hidden": "auto",
}
FORMER: dict[str, dict[str, Any]] = {
    "npo": {**NOISE, "start": 1},
    "objective": {"_target_": "dnpo.objective.logistic", "_partial_": True, "beta": 1.0},
    "trainer": TRAINING,
    "sft": TRAINING | {"optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 4.0e-3}, "steps": 300},
    "model": {
        "lora": {"_target_": "dnpo.model.Lora", "rank": 0, "alpha": 16.0, "target_modules": "all-linear"},
        "_target_": "dnpo.model.Scratch",
        "width": 96,
        "layers": 2,
        "heads": 4,
        "mlp": 256,
        "vocabulary": 400,
        "context": 128,
        "seed": "${seed}",
    },
    "dsl": {"_target_": "dnpo.dsl.HigherScoreChosen", "start": 1, "unscored": "drop"},
}
"""The former compositions of the options of those folders."""

NOISES: list[tuple[dict[str, Any], Noise]] = [
    (FORMER["npo"], TrainableNoise()),
    (
        {"_target_": "dnpo.npo.FixedNoise", "_partial_": True, "variance": 0.5, "cache_hidden": "auto", "start": 1},
        FixedNoise(),
    ),
    (
        {"_target_": "dnpo.npo.MatchedOffset", "_partial_": True, "like": NOISE, "start": 1},
        MatchedOffset(TrainableNoise()),
    ),
    ({"_target_": "dnpo.npo.Offset", "_partial_": True, "shift": 1.5, "start": 1}, Offset(1.5)),
    ({"_target_": "dnpo.npo.NoNoise", "_partial_": True, "start": 0}, NoNoise()),
]


@pytest.mark.parametrize(("npo", "noise"), NOISES, ids=[type(noise).__name__ for _, noise in NOISES])
def test_files_of_an_earlier_layout(
    npo: dict[str, Any], noise: Noise, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's folder of settings still composes, checks and builds the same, with one line for removed settings."""
    for group, settings in {**FORMER, "npo": npo}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "former.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    chosen = [f"{group}=former" for group in FORMER]
    run = built(f"hydra.searchpath=[file://{tmp_path}]", *chosen)
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    gone = ["sft.share_prompt", *(["npo.start"] if noise == NoNoise() else [])]
    assert said[0].rpartition(": ")[2].removesuffix("; leave them out").split(", ") == gone
    first, last = run.plans[0], run.plans[-1]
    assert last.npo == noise
    assert (type(first.npo), first.npo == last.npo) == (NoNoise, noise == NoNoise())
    assert (type(first.dsl).__name__, type(last.dsl).__name__) == ("HumanChosen", "HigherScoreChosen")
    assert last.objective == Logistic(beta=1.0)
    assert last.trainer == PairOptimisation(Bound("torch.optim.RMSprop", {"lr": 1e-4}), checkpoint_every=25)
    assert run.sft == Optimisation(Bound("torch.optim.AdamW", {"lr": 4e-3}), steps=300, checkpoint_every=25)
    assert run.model == Scratch(lora=run.model.lora, seed=0)
    last.trainer.check("trainer")
    run.sft.check("sft")
    for iteration in chain(run):
        for stage in iteration.stages:
            as_json(dict(stage.settings))


def test_current_files_give_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    built()
    assert capsys.readouterr().err == ""


# --- what a place needs


@dataclass(frozen=True)
class Hollow:
    """A part without any of the methods that are needed."""


@pytest.mark.parametrize("place", ["data", "judge", "dsl", "npo", "objective"])
def test_a_part_that_lacks_what_its_place_needs_is_refused_by_name(place: str, tmp_path: Path) -> None:
    """Before anything is computed; the message names the missing methods."""
    with pytest.raises(SettingsError, match=rf"^{place}.*Hollow.*has no "):
        train.build(composed(*SMOKE, f"~{place}", f"+{place}={{_target_: {__name__}.Hollow}}"))


def shifted_hinge(
    policy: PairLogps, reference: PairLogps, facts: Facts, *, beta: Positive = 0.5, margin: float = 1.0
) -> Tensor:
    """An objective of one's own as a function, with defaults."""
    return (margin - beta * log_ratio_gap(policy, reference)).clamp(min=0)


def test_defaults_of_a_function_are_settings_too() -> None:
    """They decide results, so they are in the key, and margins are reported at the default β."""
    made = build("objective", {"_target_": f"{__name__}.shifted_hinge", "margin": 2.0})
    check_objective(made)
    assert (made.beta, made.margin) == (0.5, 2.0)
    assert part_key(made) == {"_target_": f"{__name__}.shifted_hinge", "beta": 0.5, "margin": 2.0}
