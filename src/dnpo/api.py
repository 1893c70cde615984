"""Runs from Python: the same settings, gate, tracking and summary as ``dnpo train``.

import dnpo

settings = dnpo.compose("method=spin", "seed=1", "scale=smoke")
result = dnpo.run(settings)
result.table                       # a row per policy, as a data frame
result.samples(iteration=1)        # held-out responses with their scores
dnpo.open("outputs/DATE/TIME")     # a run that has finished
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.errors import SettingsError

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from dnpo.running.card import SavedPolicy


@dataclass(frozen=True)
class Settings:
    """The settings of a run, composed and checked.

    Attributes:
        overrides: the arguments of :func:`compose`.
        values: every setting of every part, as plain values.
    """

    overrides: tuple[str, ...]
    values: Mapping[str, Any]
    _composed: "DictConfig" = field(repr=False, compare=False)

    def plan(self) -> "pd.DataFrame":
        """The stages of the run in order: ``stage``, ``key``, and ``there``, which says whether the store has it."""
        import pandas as pd

        from dnpo.commands.common import make_store
        from dnpo.commands.train import build
        from dnpo.loop import chain

        _enter(self._composed)
        run, _, settings = build(_without_hydra(self._composed))
        store = make_store(settings)
        with run.ledger:
            stages = [stage for iteration in chain(run) for stage in iteration.stages]
        rows = [(stage.title, f"{stage.name}/{stage.key}", store.has(stage)) for stage in stages]
        return pd.DataFrame(rows, columns=["stage", "key", "there"])


def compose(*overrides: str) -> Settings:
    """Compose the settings of a run, as ``dnpo train`` does with these arguments, and check them.

    Args:
        overrides: such as ``method=spin`` or ``npo.alpha=0.1``.

    Raises:
        SettingsError: a setting is unknown, missing, out of range, or contains a secret; names the first such.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from dnpo.commands.common import explain
    from dnpo.commands.options import expand_options, refuse_idle_epochs
    from dnpo.commands.train import STARTING, VARYING, check_settings
    from dnpo.running.secrets import find_secrets
    from dnpo.settings import conf_folder

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="train"):
            composed = hydra_compose("train", list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(explain(error, "train", list(overrides))) from error
    for message in find_secrets(composed):
        raise SettingsError(message)
    _enter(composed)
    tree = _without_hydra(composed)
    expand_options(tree, composed.hydra, VARYING, STARTING)
    refuse_idle_epochs(tree, composed.hydra)
    checked = check_settings(tree)
    return Settings(tuple(overrides), {**checked.top, **checked.parts}, composed)


def run(settings: Settings, folder: Path | str | None = None) -> "Result":
    """Run the settings; stages that are in the store are not computed again.

    Args:
        folder: where to write the results; None for ``outputs/DATE/TIME`` in the current folder.

    Raises:
        DnpoError: the run cannot start or continue; the message says why. Finished stages are kept.
    """
    from omegaconf import OmegaConf, open_dict

    from dnpo.commands.train import run_job
    from dnpo.running.console import silence_libraries

    if settings.values["plan"] or settings.values["check"]:
        raise SettingsError("plan=true and check=true are for the command; use compose(…).plan() instead")
    out = Path(folder) if folder is not None else Path(f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}")
    out.mkdir(parents=True, exist_ok=True)
    composed = copy.deepcopy(settings._composed)
    OmegaConf.set_readonly(composed.hydra, False)
    with open_dict(composed.hydra):
        composed.hydra.runtime.output_dir = str(out.absolute())
    _enter(composed)
    silence_libraries()
    run_job(_without_hydra(composed), composed.hydra)
    return open_result(out)


def open_result(run: Path | str, store: Path | None = None) -> "Result":
    """Open a finished run.

    Args:
        run: its folder, such as ``outputs/DATE/TIME``.
        store: the store's folder, if it has moved.

    Raises:
        SettingsError: there is no finished run.
    """
    from dnpo.running.export import list_policies, read_summary

    folder = Path(run)
    summary = read_summary(folder)
    return Result(folder, summary, tuple(list_policies(summary, store)))


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: its folder, with ``summary.json`` and ``models/``.
        summary: the content of ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any] = field(repr=False)
    _policies: "tuple[SavedPolicy, ...]" = field(repr=False)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """All metrics, one row per policy; the index is the iteration (``SFT``, 0, 1, …)."""
        import pandas as pd

        return pd.DataFrame(self.summary["table"]).set_index("iteration")

    @property
    def iterations(self) -> list[str | int]:
        """The policies of the run: ``SFT``, 0, 1, …"""
        return [row["iteration"] for row in self.summary["table"]]

    def samples(self, iteration: str | int | None = None) -> "pd.DataFrame":
        """The held-out responses of a policy, one per row.

        Columns: ``id``, ``family``, ``prompt``, ``human``, ``kind`` (``greedy`` or ``sample``), ``sample``,
        ``response``, ``score``, ``second``, ``right``, ``tokens``, ``logprob`` (nats).

        Args:
            iteration: ``SFT`` or a number; None for the policy that the run keeps.
        """
        import pandas as pd

        stage = self._stage("evaluate", iteration)
        evaluation = self._folder(stage)
        items = pd.read_parquet(evaluation / "items.parquet")
        texts = pd.read_parquet(evaluation / "samples.parquet", columns=["text"])
        made = items[items["kind"] != "human"].reset_index(drop=True)
        made["response"] = texts["text"]
        split = self.summary["settings"]["eval"].get("split", "test")
        prompts = pd.read_parquet(self._folder({"prompts": stage["inputs"]["prompts"]}) / f"{split}.parquet")
        prompts["prompt"] = [messages[-1]["content"] for messages in prompts["messages"]]
        return made.merge(prompts[["id", "prompt", "human"]], on="id", how="left", validate="many_to_one")

    def pairs(self, iteration: int | None = None) -> "pd.DataFrame":
        """The pairs that an iteration was trained on, one per row; columns as in :class:`dnpo.records.Pair`.

        If there is a curriculum, these are the pairs that it chose, with their weights.

        Args:
            iteration: its number; None for the last.

        Raises:
            SettingsError: the iteration was trained on no pairs.
        """
        import pandas as pd

        from dnpo.running.push import TRAINED_ON

        wanted = self.iterations[-1 if iteration is None else self._place(iteration)]
        own = {stage["stage"]: stage for stage in self.summary["stages"] if stage["iteration"] == wanted}
        for name in TRAINED_ON:
            if name in own and (file := self._folder(own[name]) / "pairs.parquet").is_file():
                return pd.read_parquet(file)
        raise SettingsError(f"iteration {wanted}: was trained on no pairs")

    def policy(self, iteration: str | int | None = None) -> Path:
        """The folder of a policy, with its card; transformers and vLLM can load it.

        Args:
            iteration: ``SFT`` or a number; None for the policy that the run keeps.
        """
        return self.folder / "models" / self._policies[self._place(iteration)].name

    def _place(self, iteration: str | int | None) -> int:
        from dnpo.running.best import kept

        known = [str(each).lower() for each in self.iterations]
        wanted = known[kept(self.summary)] if iteration is None else str(iteration).lower()
        if wanted not in known:
            raise SettingsError(f"iteration {iteration}: this run has {', '.join(map(str, self.iterations))}")
        return known.index(wanted)

    def _stage(self, name: str, iteration: str | int | None) -> Mapping[str, Any]:
        wanted = self.iterations[self._place(iteration)]
        for stage in self.summary["stages"]:
            if stage["stage"] == name and stage["iteration"] == wanted:
                found: Mapping[str, Any] = stage
                return found
        raise SettingsError(f"iteration {wanted}: has no stage {name}")

    def _folder(self, stage: Mapping[str, Any]) -> Path:
        """The folder of a stage, given as its entry in the summary or as ``{name: key}``."""
        name, key = (stage["stage"], stage["key"]) if "stage" in stage else next(iter(stage.items()))
        folder: Path = self._policies[0].store / str(name) / str(key)
        if not folder.is_dir():
            raise SettingsError(
                f"{folder}: is missing; give store=… if the store has moved, or run the same settings again"
            )
        return folder


def _enter(composed: "DictConfig") -> None:
    """Register the composed settings with Hydra as the current job's."""
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(composed)


def _without_hydra(composed: "DictConfig") -> "DictConfig":
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
