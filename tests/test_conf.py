"""Every option composes, with every scale and method, and every key is one that its target reads."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import dnpo
from dnpo.commands.train import PARTS, build, check_optimizers, check_settings
from dnpo.errors import SettingsError
from dnpo.loop import chain
from dnpo.settings import conf_folder, part_key
from dnpo.store import Store
from tests.commands import run_command
from tests.test_recipes import read_recipe

ROOT = Path(__file__).resolve().parent.parent
CONF = conf_folder()
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
SCALES = sorted(p.stem for p in (CONF / "scale").glob("*.yaml"))
OPTIONS = sorted((group, p.stem) for group in PARTS for p in (CONF / group).glob("*.yaml"))
# What the options that need a value are given here; nothing of it has to exist to be checked.
NEEDED = {
    ("model", "local"): ["model.path=x"],
    ("npo", "offset"): ["npo.shift=1"],
    ("launch", "torchrun"): ["launch.devices=2"],
    ("judge", "openai"): ["judge.model=x"],
    ("judge", "hf"): ["judge.path=x"],
    ("judge", "reward"): ["judge.path=x"],
    ("data", "mix"): ["+data@data.sources.world=tinyworld"],
    **{("data", kind): ["data.path=x"] for kind in ("jsonl", "parquet", "csv", "arrow")},
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize(("method", "scale"), itertools.product(METHODS, SCALES))
def test_every_method_composes_with_every_scale(method: str, scale: str) -> None:
    check_settings(composed(f"method={method}", f"scale={scale}"))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_binds_its_target_and_its_file_shows_every_setting(group: str, option: str) -> None:
    """The composed settings contain every parameter of every target."""
    import inspect

    from dnpo.settings import locate

    settings = check_settings(composed(f"{group}={option}", *NEEDED.get((group, option), []))).parts
    part = settings[group]
    target = locate(group, part["_target_"])
    known = {
        p.name
        for p in inspect.signature(target).parameters.values()
        if p.kind is p.KEYWORD_ONLY or dataclasses.is_dataclass(target)
    }
    # A model is given by path or by name; each option shows one of both. Fine-tuning has no setting for pairs.
    elsewhere = {"model": {"path", "name", "revision"}, "sft": {"share_prompt"}}
    assert known - set(part) <= elsewhere.get(group, set())


def test_methods_have_the_parts_of_their_definition() -> None:
    """SPIN has neither labels by quality nor noise; the related methods add one or both from iteration 1 on."""
    targets = {}
    for method in ("spin", "dsl", "npo", "dnpo", "fixed_noise"):
        cfg = composed(f"method={method}")
        targets[method] = cfg.dsl._target_.split(".")[-1], cfg.npo._target_.split(".")[-1]
        assert cfg.npo.get("start") == (None if targets[method][1] == "NoNoise" else 1)
    assert targets == {
        "spin": ("HumanChosen", "NoNoise"),
        "dsl": ("HigherScoreChosen", "NoNoise"),
        "npo": ("HumanChosen", "TrainableNoise"),
        "dnpo": ("HigherScoreChosen", "TrainableNoise"),
        "fixed_noise": ("HumanChosen", "FixedNoise"),
    }


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("spin_paper", {"rollout": 1, "dsl": "HumanChosen", "curriculum": "Accumulate", "reference": "start"}),
        ("alpha_spin", {"rollout": 1, "dsl": "HumanChosen", "curriculum": "Mix", "reference": "start"}),
        ("dpo", {"rollout": 0, "dsl": "GivenPairs", "objective": "Logistic", "reference": "start"}),
        ("orpo", {"rollout": 0, "dsl": "GivenPairs", "objective": "OddsRatio", "reference": "none"}),
        ("spa", {"rollout": 2, "dsl": "FirstTwo", "objective": "Refined", "judge": "Implicit", "reference": "start"}),
        ("robust", {"rollout": 2, "dsl": "FirstTwo", "curriculum": "Robust", "reference": "initial"}),
        ("rest_em", {"rollout": 8, "dsl": "Right", "objective": "Likelihood", "start": "initial", "reference": "none"}),
        ("raft", {"rollout": 8, "dsl": "Best", "objective": "Likelihood", "start": "previous", "reference": "none"}),
        ("hg_dpo", {"rollout": 8, "dsl": "BestWorst", "objective": "Statistics", "reference": "start"}),
        ("self_rewarding", {"rollout": 4, "dsl": "BestWorst", "judge": "SelfJudge", "reference": "start"}),
        ("scip", {"rollout": 1, "dsl": "HumanChosen", "curriculum": "Prune", "reference": "start"}),
        ("online_dpo", {"rollout": 2, "dsl": "BestWorst", "objective": "Logistic", "reference": "initial"}),
        ("osp", {"rollout": 4, "dsl": "Ranked", "judge": "SelfJudge", "strength": "AskedStrength"}),
        ("sapo", {"rollout": 1, "dsl": "HumanChosen", "ema": "MovingAverage", "reference": "ema"}),
    ],
)
def test_methods_consist_of_these_parts(method: str, words: dict[str, Any]) -> None:
    """The parts of the last iteration, by name; a number is the number of samples per prompt."""
    run, _, _ = build(composed(f"method={method}"))
    last = run.plans[-1]
    for place, word in words.items():
        part = getattr(last, place)
        found = part.samples if place == "rollout" else part if isinstance(part, str) else type(part).__name__
        assert found == word, place
    assert run.judge.measures_texts


def test_the_7b_scale_is_the_papers_setting() -> None:
    cfg = composed("scale=7b")
    assert cfg.model.name == "alignment-handbook/zephyr-7b-sft-full"
    assert (cfg.data.name, cfg.data.sample) == ("HuggingFaceH4/ultrachat_200k", 20000)
    assert (cfg.data.max_prompt_tokens, cfg.data.max_prompt_tokens + cfg.data.max_response_tokens) == (512, 1024)
    trainer = cfg.trainer
    assert trainer.optimizer._target_ == "torch.optim.RMSprop"
    assert (trainer.optimizer.lr, trainer.epochs, trainer.batch_size) == (5e-7, 3, 4)
    assert (trainer.warmup, trainer.decay) == (0.1, True)
    assert (cfg.objective.beta, cfg.trainer.autocast, cfg.sft.epochs) == (0.1, True, 0)
    assert cfg.model.dtype == "float32", "in bf16 weights, steps of 5e-7 round away"


def test_choosing_a_part_overrides_the_scale() -> None:
    assert composed("scale=7b", "sft=finetune").sft.epochs == 3
    assert composed("scale=smoke", "data=tinyworld").data.train == 4800


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+npo.alhpa=1"], r"npo\.alhpa: unknown setting\. Did you mean npo\.alpha"),
        (["generate.temperature=-1"], r"^generate\.temperature=-1: "),
        (["rollout.temperature=-1"], r"^rollout\.temperature=-1: "),
        (["plan=true", "check=true"], r"^plan=true, check=true: give one of them"),
        (["npo.alpha=-1"], r"npo\.alpha=-1: expected a number of at least 0"),
        (["npo.alpha=much"], r"npo\.alpha='much': .*number"),
        (["iterations=0"], r"iterations=0: expected a whole number of at least 1"),
        (["iterations=1.5"], r"iterations=1\.5: .*whole number"),
        (["npo.start=-1"], r"npo\.start=-1: "),
        (["+npo.shift=1"], r"npo\.shift: unknown setting"),
        (["model=local"], r"model\.path: needs a value"),
        (["data.difficulty=9"], r"data\.difficulty=9: .*1, 2, 3, 4 or 5"),
        (["eval.split=train"], r"eval\.split='train': .*'validation' or 'test'"),
        (["+iteration=3"], r"iteration: unknown setting\. Did you mean iterations"),
        (["npo.cache_hidden=always"], r"npo\.cache_hidden='always': .*'auto', 'on' or 'off'"),
        (["npo=fixed", "npo.cache_hidden=3"], r"npo\.cache_hidden=3: .*'auto', 'on' or 'off'"),
        (["trainer.share_prompt=2"], r"trainer\.share_prompt=2: .*true or false"),
        (["trainer.checkpointing=sometimes"], r"trainer\.checkpointing='sometimes': .*true or false"),
        (["sft.compile=1"], r"sft\.compile=1: .*true or false"),
        (["judge._target_=dnpo.judges.nobody"], r"judge\._target_=dnpo\.judges\.nobody: cannot be imported"),
    ],
)
def test_wrong_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_settings(composed(*overrides))


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("data.path=x", "data=jsonl, data=arrow, data=csv, data=parquet"),
        ("judge.base_url=x", "judge=openai"),
        ("second_judge.deadline=1", "second_judge=openai"),
        ("model.path=x", "model=local"),
        ("data.split=train", "data=hub"),
        ("npo.shift=1", "npo=offset"),
    ],
)
def test_a_setting_of_another_option_names_it(setting: str, options: str, tmp_path: Path) -> None:
    done = run_command(tmp_path, "dnpo.train", setting)
    assert done.returncode == 1
    name = setting.partition("=")[0]
    first = options.partition(",")[0]
    assert done.stderr == f"error: {name}: a setting of {options}; give that too, such as {first} {name}=…\n"


class Own(torch.optim.SGD):
    """An optimizer of a user."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.optimizer.lrr=1", r"trainer\.optimizer\.lrr: unknown setting\. Did you mean trainer\.optimizer\.lr"),
        ("trainer.optimizer._target_=torch.optim.Nothing", r"trainer\.optimizer\._target_=.*cannot be imported"),
        ("+trainer.optimizer.etas=[2,1] trainer.optimizer._target_=torch.optim.Rprop", r"trainer\.optimizer\.etas="),
        ("trainer.optimizer.lr=abc trainer.optimizer._target_=tests.test_conf.Own", r"lr=abc: expected a number$"),
    ],
)
def test_a_wrong_optimizer_is_named_before_anything_is_computed(override: str, message: str) -> None:
    """Torch is imported for it only if something is trained; this holds for plans too."""
    run, _, _ = build(composed("tracking=off", *override.split()))
    with pytest.raises(SettingsError, match=message):
        check_optimizers(run, list(chain(run)), Store(Path("there-is-no-such-folder")))


@pytest.mark.parametrize("training", ["sft", "trainer", "augment.optimisation"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lr", "a number above 0"),
        ("weight_decay", "a number of at least 0"),
        ("betas", "2 numbers of at least 0 and below 1"),
        ("amsgrad", "true or false"),
        ("fused", "true or false or null"),
    ],
)
@pytest.mark.parametrize("value", ["abc", "-1", "null", "[1,abc]", "true", "inf", "0"])
def test_a_setting_of_an_optimizer_says_what_it_must_be(training: str, setting: str, words: str, value: str) -> None:
    """Before torch is imported, so for plans too; in a list, ``trainer`` has a value for each iteration."""
    right = {"true": ("amsgrad", "fused"), "null": ("fused",), "0": ("weight_decay",)}
    given = ["tracking=off", "augment=tiny", f"{training}.optimizer._target_=torch.optim.AdamW"]
    given += ["iterations=2", f"++{training}.optimizer.{setting}={value}"]
    if setting in right.get(value, ()):
        build(composed(*given))
        return
    words = words.replace("a number", "a finite number") if value == "inf" else words
    message = rf"^{training}\.optimizer\.{setting}.*=.*: expected {words}$"
    with pytest.raises(SettingsError, match=message):
        build(composed(*given))


@pytest.mark.parametrize("value", ["abc", "-1", "null", "true", "0"])
def test_the_rate_of_the_noise_says_what_it_must_be(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^npo\.learning_rate=.*: expected a number above 0$"):
        build(composed("tracking=off", "method=dnpo", f"npo.learning_rate={value}"))


SAME = [
    "trainer.micro_batch_size=2",
    "trainer.checkpoint_every=7",
    "trainer.share_prompt=false",
    "trainer.checkpointing=true",
    "trainer.compile=true",
    "npo.cache_hidden=on",
    "sft.checkpointing=true",
]
OTHER = ["trainer.batch_size=2", "trainer.autocast=true", "trainer.optimizer.lr=1", "npo.alpha=3", "sft.steps=4"]


def keys(*overrides: str) -> list[dict[str, Any]]:
    """What the training parts contribute to the keys of stages."""
    run, _, _ = build(composed("method=dnpo", "scale=smoke", "tracking=off", *overrides))
    parts = [part for plan in run.plans for part in (plan.trainer, plan.npo, plan.objective)]
    return [part_key(part) for part in (run.sft, *parts)]


def test_settings_that_cannot_change_a_result_are_in_no_key() -> None:
    """Settings with the same result find the existing stages; settings with another result do not."""
    known = keys()
    for override in SAME:
        assert keys(override) == known, override
    for override in OTHER:
        assert keys(override) != known, override
    assert all("_target_" in key for key in known)
    assert not {"micro_batch_size", "cache_hidden"} & {name for key in known for name in key}


def test_a_part_still_has_the_settings_that_are_in_no_key() -> None:
    """Stages run with these settings."""
    run, _, resolved = build(composed("method=dnpo", "scale=smoke", "tracking=off", *SAME))
    plan = run.plans[-1]
    assert plan.npo.cache_hidden == resolved["npo"]["cache_hidden"] == "on"
    trainer = plan.trainer
    assert resolved["trainer"]["micro_batch_size"] == trainer.micro_batch_size == 2
    assert (trainer.share_prompt, trainer.checkpointing, trainer.compile) == (False, True, True)
    assert run.sft.checkpointing


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sft.epochs=30"], "sft.epochs=30: has no effect while sft.steps=60; add sft.steps=0"),
        (["trainer.epochs=2", "trainer.steps=9"], "trainer.epochs=2: has no effect while trainer.steps=9; add"),
        (["trainer.epochs=[2,1]", "trainer.steps=9"], "trainer.epochs=[2,1]: has no effect while trainer.steps=9; add"),
    ],
)
def test_epochs_that_steps_replace_are_refused(given: list[str], said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        dnpo.compose("scale=smoke", *given)
    assert said in str(refused.value)
    dnpo.compose("scale=smoke", *given, *(f"{each.split('.')[0]}.steps=0" for each in given[:1]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("dsl.by=3", "dsl.by: write +dsl.by=…, since the file of this part does not name it"),
        ("dsl.bi=3", "dsl.bi: unknown setting. Did you mean dsl.by "),
        ("trainer.optimizer.betas=[0.9,0.9]", "trainer.optimizer.betas: unknown setting."),
        ("trainer.optimizer.momentum=0.9", "trainer.optimizer.momentum: write +trainer.optimizer.momentum=…, since"),
    ],
)
def test_a_setting_that_the_file_of_its_part_does_not_name(given: str, said: str, tmp_path: Path) -> None:
    """A class of one's own, and one of a library."""
    read_recipe("method").write(tmp_path)
    done = run_command(tmp_path, "dnpo.train", "--config-dir=conf", "method=brief", "plan=true", given)
    assert f"error: {said}" in done.stderr
