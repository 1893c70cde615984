"""Imports before any computation: errors in settings are reported at once, without an import of torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dnpo import __version__
from dnpo.settings import conf_folder

HEAVY = ["torch", "transformers", "openai", "httpx2", "numpy", "scipy", "pyarrow", "safetensors", "huggingface_hub"]
MODULES = [
    "dnpo.settings",
    "dnpo.records",
    "dnpo.store",
    "dnpo.policy.base",
    "dnpo.policy.lora",
    "dnpo.policy.weights",
    "dnpo.optimise.parts",
    "dnpo.methods.ppo",
    "dnpo.judges",
    "dnpo.judges.off",
    "dnpo.judges.longer",
    "dnpo.judges.ensemble",
    "dnpo.judges.noisy",
    "dnpo.judges.implicit",
    "dnpo.judges.self_judge",
    "dnpo.judges.augment",
    "dnpo.judges.given",
    "dnpo.judges.exact.answers",
    "dnpo.judges.exact.code",
    "dnpo.judges.exact.rules",
    "dnpo.judges.asked.ledger",
    "dnpo.judges.asked.questions",
    "dnpo.judges.asked.prices",
    "dnpo.judges.asked.endpoint",
    "dnpo.judges.asked.asking",
    "dnpo.judges.asked.batch",
    "dnpo.judges.asked.openai",
    "dnpo.judges.asked.hf",
    "dnpo.judges.reward.facts",
    "dnpo.judges.reward.preferences",
    "dnpo.judges.reward.reward",
]
IMPORT = """
import importlib, json, sys
heavy, modules = json.loads(sys.argv[1])
found, known = {}, set()
for module in modules:
    importlib.import_module(module)
    found[module] = [name for name in heavy if name in sys.modules and name not in known]
    known |= set(found[module])
print(json.dumps(found))
"""
NEEDED = {
    "openai": ["judge.model=x"],
    "hf": ["judge.path=model"],
    "reward": ["judge.path=model"],
}
BUILD = """
import json, sys
from hydra import compose, initialize_config_dir
from dnpo.commands.common import plain
from dnpo.settings import build, check
heavy, conf, options = json.loads(sys.argv[1])
found = {}
for option, more in options.items():
    with initialize_config_dir(conf, version_base="1.3"):
        settings = plain(compose("train", overrides=[f"judge={option}", *more]))["judge"]
    build("judge", check("judge", settings))
    found[option] = [name for name in heavy if name in sys.modules]
print(json.dumps(found))
"""


def found_by(script: str, given: object, folder: Path) -> dict[str, list[str]]:
    """The output of a new process, since the tests have already imported much."""
    command = [sys.executable, "-c", script, json.dumps(given)]
    result = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, list[str]] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The modules that each module imports first."""
    return found_by(IMPORT, [HEAVY, MODULES], tmp_path_factory.mktemp("light"))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_settings_imports_nothing_heavy(module: str, imported: dict[str, list[str]]) -> None:
    assert imported[module] == []


def test_every_judge_is_built_without_anything_heavy(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    options = {path.stem: NEEDED.get(path.stem, []) for path in sorted((conf_folder() / "judge").glob("*.yaml"))}
    assert found_by(BUILD, [HEAVY, str(conf_folder()), options], tmp_path) == {option: [] for option in options}


def test_runs_in_a_file_are_read_without_mlflow(migrated: Path, tmp_path: Path) -> None:
    """Its import takes longer than a report."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    script = """
import json, sys
from dnpo.tracking.reading import Database
(file,) = json.loads(sys.argv[1])
sweeps = Database(f"sqlite:///{file}", "Default").sweeps()
print(json.dumps({"sweeps": list(sweeps), "heavy": [each for each in ("mlflow", "sqlalchemy") if each in sys.modules]}))
"""
    assert found_by(script, [str(tmp_path / "mlflow.db")], tmp_path) == {"sweeps": [], "heavy": []}


FIRST = """
import io, json, runpy, sys

class Errors(io.StringIO):
    def write(self, text):
        if not self.getvalue():
            sys.__stdout__.write(json.dumps([text, [name for name in json.loads(sys.argv[1]) if name in sys.modules]]))
        return super().write(text)

sys.stderr = Errors()
from dnpo.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["chat", "RUN"], "loading the policy of RUN"),
        (["chat", "RUN", "iteration=1", "against=sft"], "loading iteration 1 and the fine-tuned policy of RUN"),
        (["sample", "RUN", "prompt=a"], "loading the policy of RUN"),
        (["export", "RUN", "to=out", "iteration=0"], "exporting iteration 0 of RUN"),
        (["report", "RUN"], "reading RUN for its report"),
        (["browse", "RUN", "port=0"], "reading RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_says_what_it_begins_before_it_imports_anything_heavy(
    given: list[str], what: str, tmp_path: Path
) -> None:
    """The refusal of a run that does not exist comes after it."""
    heavy = json.dumps([*HEAVY, "mlflow", "sqlalchemy", "matplotlib", "starlette"])
    command = [sys.executable, "-c", FIRST, heavy, *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout) == [f"dnpo {__version__}: {what}", []]
