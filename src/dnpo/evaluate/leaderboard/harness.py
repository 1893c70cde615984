"""Run lm-eval with a policy as its model, and return its result for every item. No other file imports lm-eval.

This calls lm-eval's ``evaluate``, not ``simple_evaluate``. The latter seeds the generators of the whole process, runs
git, lists every installed package, and uses the same number of examples for all tasks.
"""

import contextlib
import copy
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnpo.errors import DataError, ModelError, SettingsError
from dnpo.evaluate.leaderboard.rows import BenchmarkTask
from dnpo.policy.model import Policy
from dnpo.policy.packing import ATTENTION

SEED = 1234  # lm-eval's own, for the choice of examples
# The folders of lm-eval's definitions that are needed; reading all of them takes half a minute.
FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
    "mmlu": "mmlu/default",
}


def available() -> None:
    """Raise if lm-eval is not installed.

    Raises:
        SettingsError: lm-eval is missing; the message has the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise SettingsError('the leaderboard needs lm-eval, which is not installed: pip install "dnpo[eval]"')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show neither the warnings of lm-eval nor progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def running(policy: Policy, batch_size: int) -> Iterator[Any]:
    """Give the policy as a model of lm-eval, with its original attention and without lm-eval's output.

    On exit, the mode, the attention and the state of every random generator are restored.
    """
    model = policy.causal_lm
    chance = random.getstate(), np.random.get_state()
    with policy.evaluating(), torch.random.fork_rng(), _quiet():
        model.set_attn_implementation(policy.own_attention)
        try:
            yield _model(policy, batch_size)
        finally:
            model.set_attn_implementation(ATTENTION)
            random.setstate(chance[0])
            np.random.set_state(chance[1])


def _model(policy: Policy, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]
        """lm-eval's model; it generates at most half of its context.

        ``cut`` records the items whose prompt did not fit, by task and number.
        """

        def __init__(self) -> None:
            # a copy of the tokenizer, since lm-eval adds a padding token if there is none
            tokenizer = copy.deepcopy(policy.tokenizer)
            super().__init__(policy.model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
            self.cut: set[tuple[str, int]] = set()
            self.asked: list[tuple[str, int]] = []

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self.asked = [(r.task_name, r.doc_id) for r in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            for item, (_, context, answer) in zip(self.asked, requests, strict=True):
                if len(answer) > self.max_length:
                    raise ModelError(
                        f"{item[0]}: an answer has {len(answer)} tokens, the model's context {self.max_length}; the "
                        "benchmark cannot be measured with this model"
                    )
                if len(context) + len(answer) > self.max_length + 1:
                    self.cut.add(item)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            for request in requests:
                prompt, settings = request.args
                tokens = min(settings.get("max_gen_toks", self.max_gen_toks), self.max_length // 2)
                settings["max_gen_toks"] = tokens
                if len(self.tok_encode(prompt)) > self.max_length - tokens:
                    self.cut.add((request.task_name, request.doc_id))
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    return Model()


def of_rows(tasks: Sequence[BenchmarkTask], shots: int) -> dict[str, Any]:
    """Build lm-eval's tasks over rows, with ``shots`` examples, or all if there are fewer."""
    from lm_eval.tasks import TaskManager

    loaded: dict[str, Any] = TaskManager(include_defaults=False).load([_define(task) for task in tasks])["tasks"]
    for task, each in zip(tasks, loaded.values(), strict=True):
        _prepare(each, min(shots, len(task.examples)))
    return loaded


def _define(task: BenchmarkTask) -> dict[str, Any]:
    from datasets import Dataset

    splits = {"test": Dataset.from_list(task.rows)}
    if task.examples:
        splits["examples"] = Dataset.from_list(task.examples)
    examples = {"fewshot_split": "examples"} if task.examples else {}
    return {**task.definition, "custom_dataset": lambda **_: splits, "test_split": "test", **examples}


def of_hub(names: Sequence[str], shots: int) -> dict[str, Any]:
    """Load lm-eval's tasks over the data sets of the hub.

    Raises:
        DataError: the hub does not answer.
        SettingsError: a task needs packages that are not installed.
    """
    import lm_eval.tasks

    definitions = Path(lm_eval.tasks.__file__).parent
    folders = dict.fromkeys(str(definitions / FOLDERS.get(name, name)) for name in names)
    manager = lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=False)
    try:
        loaded: dict[str, Any] = manager.load(list(names))["tasks"]
    except ImportError as error:
        raise SettingsError(f'{", ".join(names)}: {error}; pip install "dnpo[eval]"') from error
    except (OSError, ValueError) as error:  # datasets raises one of these if neither the hub nor the cache has the data
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"source=hub: {', '.join(names)} cannot be loaded ({reason}); give source=FOLDER") from error
    for task in loaded.values():
        _prepare(task, shots)
    return loaded


def _prepare(task: Any, shots: int) -> None:
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SEED)
    if task.config.task == "truthfulqa_mc2":
        task.set_config("process_results", mass_of_the_true)


def mass_of_the_true(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """TruthfulQA's mc2: the probability of the true answers among all answers (Lin et al. 2022, section 3.2).

    lm-eval computes 0/0 if all probabilities are too small for a float; here the largest is scaled to 1.
    """
    labels = np.array(doc["labels"] if "labels" in doc else doc["mc2_targets"]["labels"])
    logps = np.array([logp for logp, _ in results])
    chances = np.exp(logps - logps.max())
    return {"acc": float(chances[labels == 1].sum() / chances.sum())}


@cache
def _manager(include_path: str | None) -> Any:
    """lm-eval's list of the tasks in a folder, or of its own tasks, which takes ten seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_path is None)


def of_names(names: Sequence[str], include_path: str | None, shots: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Load tasks, groups or tags of lm-eval; return, for each of these names, lm-eval's tasks.

    Args:
        include_path: a folder with further definitions, which replace lm-eval's of the same name; a group in it can
            contain only tasks of this folder.
        shots: number of examples before each question, by name; by default each task's own.

    Raises:
        SettingsError: there is no task of a name, or it needs packages that are not installed.
        DataError: the data of a task cannot be read.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise SettingsError(f"include_path={include_path}: there is no such folder")
    with _quiet():
        own = [_manager(include_path)] if include_path is not None else []
        managers = {name: next((m for m in own if name in m.all_tasks), None) or _manager(None) for name in names}
        for name, manager in managers.items():
            if name not in manager.all_tasks:
                known = [each for some in (*own, manager) for each in some.all_tasks]
                near = get_close_matches(name, known, 3)
                folder = f" or in include_path={include_path}" if own else "; your own need include_path=FOLDER"
                hint = f". Did you mean {' or '.join(near)}?" if near else ""
                raise SettingsError(f"tasks: there is no task, group or tag {name} in lm-eval{folder}{hint}")
        return {name: _load(manager, name, shots) for name, manager in managers.items()}


def _load(manager: Any, name: str, shots: Mapping[str, int]) -> dict[str, Any]:
    try:
        found = dict(manager.load([name])["tasks"])
    except ImportError as error:
        raise SettingsError(f'tasks: {name}: {error}; pip install "dnpo[eval]"') from error
    except Exception as error:  # definitions may run any code, and data sets raise many kinds of errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"tasks: {name} cannot be loaded ({reason})") from error
    for task in found.values():
        _prepare(task, shots.get(name, task.config.num_fewshot or 0))
    return found


def first_metric(task: Any, results: Mapping[str, Any]) -> tuple[str, str]:
    """The metric that a task's definition names first, with its first filter of answers.

    Args:
        results: lm-eval's results of the task, by metric and filter.
    """
    known = [name.split(",", 1) for name in results if "," in name and "_stderr," not in name]
    metrics = [str(each["metric"]) for each in task.config.metric_list or () if isinstance(each.get("metric"), str)]
    filters = [str(each["name"]) for each in task.config.filter_list or ()]
    ordered = [(metric, filter_) for metric in metrics for filter_ in (*filters, "none") if [metric, filter_] in known]
    metric, filter_ = ordered[0] if ordered else known[0]
    return metric, filter_


def run_named(
    lm: Any, tasks: Mapping[str, Any], limit: int | None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Run the tasks; return lm-eval's result for every item, each with its ``task``, and its results by task."""
    done = _evaluate(lm, tasks, limit)
    samples = [{**sample, "task": task} for task in tasks for sample in done["samples"][task]]
    return samples, {task: done["results"][task] for task in tasks}


def run(lm: Any, tasks: Mapping[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """Run the tasks and return lm-eval's result for every item, each with its ``task``."""
    done = _evaluate(lm, tasks, limit)
    return [{**sample, "task": task} for task in tasks for sample in done["samples"][task]]


def _evaluate(lm: Any, tasks: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    loaded = {"tasks": dict(tasks), "groups": {}, "group_map": {}}
    done: dict[str, Any] = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return done
