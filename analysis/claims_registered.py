"""Check that claims were committed before the runs that they are tested on.

A file of claims is registered by the git commit that last changed it. A run tests it if all that the run computed, or
reused from the store, was made by a version of the code that contains this commit. Prompts are the exception: they are
the same for every run on the same data.
"""

import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dnpo.errors import DataError
from dnpo.tracking.reading import TrackedRun
from dnpo.wording import plural

SHARED = {"prompts"}  # titles of stages that every run on the same data shares
SHORT = 9  # digits of a commit that messages show


@dataclass(frozen=True)
class Registration:
    """The commit that registers a file of claims.

    Attributes:
        commit: the commit that last changed the file; "" if there is none.
        date: its date, as git gives it.
        problem: why the file is not registered; "" if it is.
    """

    path: Path
    commit: str = ""
    date: str = ""
    problem: str = ""
    _contains: dict[str, bool | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, path: Path) -> "Registration":
        """Find the registration of a file."""
        folder, name = path.resolve().parent, path.resolve().name
        last = _git(folder, "log", "-1", "--format=%H %cs", "--", name)
        if last is None:
            return cls(path, problem=f"{path.name} is not in a git repository, so nothing shows when it was written")
        if not last:
            return cls(path, problem=f"{path.name} is not committed, so nothing shows when it was written")
        commit, date = last.split()
        if _git(folder, "status", "--porcelain", "--", name):
            return cls(path, commit, date, f"{path.name} has changes that are not committed")
        return cls(path, commit, date)

    @property
    def text(self) -> str:
        """The registration in a phrase."""
        return self.problem or f"{self.path.name} of commit {self.commit[:SHORT]} ({self.date})"

    def objection(self, run: TrackedRun) -> str:
        """The reason why a run does not test the claims; "" if it does."""
        if self.problem:
            return self.problem
        made_by = origins(run)
        if not made_by:
            return "it is not known which commit made it"
        for commit in sorted(made_by):
            if not commit:
                return "it was made outside a git repository"
            contains = self._within(commit.rstrip("+"))
            if contains is None:
                return f"this repository does not know the commit {commit[:SHORT]} that made it"
            if not contains:
                return f"commit {commit[:SHORT]}, which made it, is older than {self.text}"
        return ""

    def _within(self, commit: str) -> bool | None:
        """Whether a commit contains the claims as they are now; None if the repository does not know it."""
        if commit not in self._contains:
            folder = self.path.resolve().parent
            known = _git(folder, "cat-file", "-e", f"{commit}^{{commit}}") is not None
            ancestor = _git(folder, "merge-base", "--is-ancestor", self.commit, commit) is not None
            self._contains[commit] = ancestor if known else None
        return self._contains[commit]


def split(registration: Registration, runs: Iterable[TrackedRun]) -> tuple[list[TrackedRun], Counter[str]]:
    """The runs that test the claims, and the number of the others by objection."""
    kept, objections = [], Counter[str]()
    for run in runs:
        if objection := registration.objection(run):
            objections[objection] += 1
        else:
            kept.append(run)
    return kept, objections


def describe(objections: Counter[str]) -> str:
    """The objections with their numbers of runs, in words."""
    return "; ".join(f"{plural(count, 'run')}: {why}" for why, count in objections.most_common())


def origins(run: TrackedRun) -> set[str]:
    """The commits that made the stages of a run, its own and reused ones; "" is a version outside a repository."""
    try:
        made_by: Sequence[dict[str, object]] = run.summary.get("made_by", [])
    except DataError:  # it did not finish
        made_by = []
    commits = {str(each.get("commit", "")) for each in made_by if set(_titles(each)) - SHARED}
    return commits | {run.tags["dnpo.commit"]} if "dnpo.commit" in run.tags else commits


def _titles(made: dict[str, object]) -> Iterable[str]:
    stages = made.get("stages", [])
    return [str(title) for title in stages] if isinstance(stages, list) else []


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git in a folder; None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
