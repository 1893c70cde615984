"""Damage a finished store in many ways: is every damaged file named, and is none used?

    python -m tests.damages              # every kind of file in every way; some minutes
    python -m tests.damages --every 9    # every ninth of them

For each damage the same command is run again. It must fail, name the stage and the file, and compute nothing. After
``python -m dnpo.store remove`` it must end with the same numbers as the undamaged run.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.commands import numbers, run_command, succeed, summary, train

RUNS = {
    "whole": ("scale=smoke", "tracking=off"),
    "adapters": ("scale=smoke", "tracking=off", "model.lora.rank=4"),
}
# For each run, patterns of the kinds of files in its store.
FILES = {
    "whole": (
        "prompts/*/manifest.json",
        "prompts/*/train.parquet",
        "prompts/*/test-human.parquet",
        "prompts/*/model/tokenizer.json",
        "prompts/*/model/chat_template.jinja",
        "prompts/*/model/model.safetensors",
        "sft/*/policy/model.safetensors",
        "sft/*/policy/config.json",
        "sft/*/steps.json",
        "generate/*/shard-00001.parquet",
        "generate/*/manifest.json",
        "judge/*/verdicts.parquet",
        "pairs/*/pairs.parquet",
        "pairs/*/pairs.jsonl",
        "reference/*/shard-00000.parquet",
        "optimise/*/policy/model.safetensors",
        "optimise/*/manifest.json",
        "evaluate/*/samples.parquet",
        "evaluate/*/logprobs.npz",
        "evaluate/*/metrics.json",
        "drift/*/metrics.json",
    ),
    "adapters": (
        "optimise/*/policy/adapter-00/adapter_model.safetensors",
        "optimise/*/policy/adapter-01/adapter_config.json",
    ),
}
FOLDERS = {
    "whole": ("sft/*/policy", "optimise/*/policy", "prompts/*/model"),
    "adapters": ("sft/*/policy", "optimise/*/policy/adapter-00"),
}


def remove(path: Path) -> None:
    """Remove a file or a whole folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path: Path) -> None:
    """Truncate a file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """Truncate a file to nothing."""
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    """Append a byte."""
    path.write_bytes(path.read_bytes() + b"\n")


def add(path: Path) -> None:
    """Add another file of the same kind, which a stage would read too."""
    shutil.copy(path, path.with_name(f"shard-9{path.suffix}"))


WAYS = (remove, truncate, flip, empty, lengthen, add)


@dataclass(frozen=True)
class Damage:
    """One damage of the store of one run."""

    run: str
    pattern: str
    way: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.way.__name__} {self.pattern} ({self.run})"


def list_damages() -> Iterator[Damage]:
    """Yield every damage, in an order in which any few successive ones have different kinds."""
    for run, patterns in FOLDERS.items():
        yield from (Damage(run, pattern, remove) for pattern in patterns)
    for run, patterns in FILES.items():
        yield from (Damage(run, pattern, way) for pattern in patterns for way in WAYS)


def try_damage(damage: Damage, finished: Path, folder: Path, later: bool) -> str:
    """Damage a copy of a finished run, and run again.

    Args:
        finished: the run's folder.
        folder: where to copy it.
        later: remove the last evaluation too, so that there is something to compute.

    Returns:
        The problem; "" if there is none.
    """
    shutil.copytree(finished, folder, symlinks=True)
    path = max((folder / "store").glob(damage.pattern), key=lambda each: each.stat().st_mtime_ns)
    stage = "/".join(path.relative_to(folder / "store").parts[:2])
    if later:
        last = next(each for each in summary(folder)["stages"][::-1] if each["stage"] == "drift")
        if stage != f"drift/{last['key']}":
            shutil.rmtree(folder / "store" / "drift" / last["key"])
    damage.way(path)
    before = _stages(folder)
    done = train(folder, *RUNS[damage.run])
    if done.returncode != 1 or "Traceback" in done.stderr:
        return f"it ran and ended with {done.returncode}: {done.stderr}"
    name = f"shard-9{path.suffix}" if damage.way is add else path.name
    if stage not in done.stderr or name not in done.stderr:
        return f"neither {stage} nor {name} is named: {done.stderr}"
    if _stages(folder) != before:
        return f"it computed {_stages(folder) - before} before it said so"
    removed = run_command(folder, "dnpo.store.__main__", "remove", stage, "--yes")
    if removed.returncode:
        return f"it cannot be removed: {removed.stderr}"
    again = train(folder, *RUNS[damage.run])
    if again.returncode:
        return f"it does not run after the removal: {again.stderr}"
    return "" if numbers(summary(folder)) == numbers(summary(finished)) else "the numbers differ after the removal"


def _stages(folder: Path) -> set[Path]:
    return set((folder / "store").glob("[!.]*/*"))


def main() -> None:
    """Try the damages; exit with status 1 if one of them is not named, or is used."""
    parser = argparse.ArgumentParser(prog="python -m tests.damages", description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every so many of the damages (default: all)")
    chosen = list(list_damages())[:: parser.parse_args().every]
    wrong = 0
    with tempfile.TemporaryDirectory() as there:
        root = Path(there)
        for name in sorted({damage.run for damage in chosen}):
            (root / name).mkdir()
            succeed(root / name, *RUNS[name])
        for number, damage in enumerate(chosen):
            copy = root / "copy"
            problem = try_damage(damage, root / damage.run, copy, number % 2 == 0)
            wrong += bool(problem)
            print(f"{'WRONG' if problem else 'named'}  {damage}  {problem}", flush=True)
            shutil.rmtree(copy)
    print(f"{len(chosen)} damages: {len(chosen) - wrong} named and none of it used, same numbers after the removal")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
