"""List the files of dnpo that a batch crosses from disk to the optimizer, and in one policy step.

    python -m benchmarks.trace                         # this checkout
    python -m benchmarks.trace --checkout ../other     # another version of the code
    python -m benchmarks.trace --calls                 # with the functions of each file

The script runs one iteration at smoke scale, with a judge, labels by score and trained noise, while ``sys.setprofile``
records every Python function that is called in the main thread. A file of ``src/dnpo`` counts if one of its functions
is called

- **from disk to the optimizer**: from the request for the iteration's training to the optimizer's first step. Before
the request, prompts and the first policy are computed and every key is known. After it, responses, verdicts, pairs and
the reference's log-probabilities are computed first. With ``--prepare`` the ``prompts`` stage, which reads and encodes
the rows, counts too.
- **in one step**: from the call of ``training_step`` until the optimizer has made that step.

Two things do not count. The bodies of classes and modules do not, because no data flow through an import. The store
does not either: it names, locks, checks and renames the folders of stages. ``records.py``, which reads and writes their
rows, counts. Progress and tracking are off.

A file marked with * handles rows: one of its functions receives, keeps or returns a row, a packed batch, a tensor, or a
list of these. The other files load the policy, derive a seed, or name an optimizer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Set
from importlib import import_module
from inspect import CO_NEWLOCALS
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from benchmarks.quiet import Quiet

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("scale=smoke", "method=dnpo", "tracking=off", "device=cpu", "iterations=1", "dsl.start=0", "npo.start=0")
STORE = ("store.py", "store/")  # a module in earlier versions, then a package
FIRST = "training_step"
MADE_UP = "_check_logits"  # tries a loaded model on two invented sequences, which are not rows
ROWS = {
    "Prompt",
    "Response",
    "Verdict",
    "Pair",
    "ReferenceLogps",
    "Packed",
    "Batch",
    "PairBatch",
    "PairLogps",
    "Tensor",
}


def main() -> None:
    """Trace, print both lists."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="folder with src/dnpo and conf (default: this one)")
    parser.add_argument("--calls", action="store_true", help="name the functions as well")
    parser.add_argument("--prepare", action="store_true", help="begin with the stage that reads and encodes the rows")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.here:
        sys.exit(run_apart(given.checkout.resolve(), sys.argv[1:]))
    recorder = trace(given.checkout.resolve() / "src" / "dnpo", given.prepare)
    show("files that a batch crosses from disk to the optimizer", recorder.way, recorder.with_rows, given.calls)
    show("files that one policy step crosses", recorder.step, recorder.with_rows, given.calls)


def run_apart(checkout: Path, arguments: list[str]) -> int:
    """Run this script again on the code and the settings of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "DNPO_CONF": str(checkout / "conf")}
    environment |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "benchmarks.trace", "--here", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def show(title: str, calls: Mapping[str, list[str]], with_rows: Set[str], functions: bool) -> None:
    """Print the files in the order in which they were entered first."""
    print(f"\n{title}: {len(calls)}, of which {len(with_rows & set(calls))} handle rows")
    for file, names in calls.items():
        print(f" {'*' if file in with_rows else ' '} {file}" + (f"  ({', '.join(names)})" if functions else ""))


class Recorder:
    """Remembers which functions of a package are called, by file, until the optimizer has made a step.

    Attributes:
        way: functions of each file, in the order of their first calls.
        step: functions of each file after ``training_step`` was called.
        with_rows: files with a function that handled rows.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        self.way: dict[str, list[str]] = {}
        self.step: dict[str, list[str]] = {}
        self.with_rows: set[str] = set()
        self._known: set[tuple[CodeType, bool]] = set()
        self._in_step = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """The function that ``sys.setprofile`` calls."""
        code = frame.f_code
        if event not in ("call", "return") or not code.co_flags & CO_NEWLOCALS:  # a module's or class's body has it not
            return
        path = Path(code.co_filename)
        if not path.is_relative_to(self.package):
            return
        file = path.relative_to(self.package).as_posix()
        if file.startswith(STORE):
            return
        if event == "return":
            if MADE_UP not in code.co_qualname and any(map(is_rows, (argument, *frame.f_locals.values()))):
                self.with_rows.add(file)
            return
        self._in_step |= code.co_name == FIRST
        if (code, self._in_step) in self._known:
            return
        self._known.add((code, self._in_step))
        for calls in (self.way, self.step) if self._in_step else (self.way,):
            names = calls.setdefault(file, [])
            if code.co_qualname not in names:
                names.append(code.co_qualname)

    def stop(self, *_: Any) -> None:
        """End, after the first step."""
        if self._in_step:
            sys.setprofile(None)


def is_rows(value: Any) -> bool:
    """Whether a value is a row, a batch or a tensor, or a list or mapping of such."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple) and type(value).__name__ not in ROWS:
        value = next(iter(value), None)
    return any(kind.__name__ in ROWS for kind in type(value).__mro__)


def trace(package: Path, prepare: bool) -> Recorder:
    """Run an iteration until its optimizer has made a step, and record what is called.

    Args:
        package: folder from which dnpo must be imported.
        prepare: whether the ``prompts`` stage counts too.
    """
    from hydra import compose, initialize_config_dir
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import dnpo

    if Path(dnpo.__file__ or "").resolve().parent != package:
        raise RuntimeError(f"{dnpo.__file__} is not of {package}")
    train = import_module("dnpo.commands.train" if (package / "commands").is_dir() else "dnpo.train")
    store_of, chain = import_module("dnpo.store").Store, import_module("dnpo.loop").chain
    recorder = Recorder(package)
    with tempfile.TemporaryDirectory() as folder:
        with initialize_config_dir(os.environ["DNPO_CONF"], version_base="1.3"):
            run = train.build(compose("train", overrides=[*SETTINGS, f"ledger={folder}/ledger.sqlite"]))[0]
        before, iteration = chain(run)
        assert iteration.policy.key  # now the keys of all its inputs are known
        store = store_of(Path(folder) / "store")
        if prepare:
            sys.setprofile(recorder)
            store.get(before.prompts, Quiet())
            sys.setprofile(None)
        store.get(before.policy, Quiet())
        handle = register_optimizer_step_post_hook(recorder.stop)
        with run.ledger:
            sys.setprofile(recorder)
            store.get(iteration.policy, Quiet())
            sys.setprofile(None)
        handle.remove()
    if not recorder.step:
        raise RuntimeError(f"no {FIRST} was called")
    return recorder


if __name__ == "__main__":
    main()
