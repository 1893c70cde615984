"""The file of claims, read and checked: ``claims.yaml``."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from analysis.claims_measures import BETWEEN, MEASURES
from analysis.claims_rules import Region, Relation, region
from dnpo.errors import SettingsError
from dnpo.settings import nearest
from dnpo.tracking.reading import SFT

FILE = Path(__file__).resolve().parent.parent / "claims.yaml"


class Strict(BaseModel):
    """Unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Premise(Strict):
    """What has to hold in a run for a claim to be about its seed: a metric of the table is ``least`` or more."""

    runs: str
    metric: str
    least: float


class Sweep(Strict):
    """A sweep that claims read, and what ``--run`` adds to its command.

    Attributes:
        overrides: of settings.
        where_installed: more overrides, by the packages that they need.
    """

    overrides: tuple[str, ...] = ()
    where_installed: Mapping[str, tuple[str, ...]] = {}


class Claim(Strict):
    """One claim of a paper.

    Attributes:
        text: the claim, in our words.
        measured: what is measured here, in words.
        scale: of what it is told here.
        measure: a name in ``claims_measures``.
        a, b: arms and iterations, such as ``dnpo@1,2,3``: the mean over these; several are added up with ``+``. The
            effect is a less b.
        relation, target, margin: where the claim says that the effect lies, in its unit.
        times: numbers are multiplied by this to have the unit.
        matters: settings of what is measured beside, such as ``second_judge.``, that its runs have to share.
        caveat: what a reader has to know of what is measured.
    """

    id: str
    paper: str
    where: str
    text: str
    measured: str
    scale: str
    sweep: str
    measure: str
    arguments: Mapping[str, Any] = {}
    a: str
    b: str = ""
    relation: Relation
    target: float = 0.0
    margin: float = 0.0
    unit: str
    times: float = 1.0
    digits: int = 1
    premise: Premise | None = None
    matters: tuple[str, ...] = ()
    caveat: str = ""

    @property
    def region(self) -> Region:
        """Where it says that the effect lies."""
        return region(self.relation, self.target, self.margin)

    @property
    def sides(self) -> "tuple[list[Term], list[Term]]":
        """Both sides, taken apart."""
        return terms(self.a), terms(self.b)


@dataclass(frozen=True)
class Term:
    """An arm and the iterations over which its mean is taken."""

    arm: str
    iterations: tuple[int | str, ...]


@dataclass(frozen=True)
class Book:
    """The whole file.

    Attributes:
        scale: of what claims are told that say nothing else.
        sweeps: in the order in which they are run.
        arms: the tags that a run of each has.
    """

    scale: str
    sweeps: Mapping[str, Sweep]
    arms: Mapping[str, Mapping[str, str]]
    claims: tuple[Claim, ...]


def terms(text: str) -> list[Term]:
    """``spin@0 + dnpo@1,2`` taken apart.

    Raises:
        SettingsError: it is not written so.
    """
    found = []
    for part in text.split("+") if text.strip() else []:
        match = re.fullmatch(r"\s*([\w-]+)@((?:SFT|\d+)(?:,(?:SFT|\d+))*)\s*", part)
        if match is None:
            raise SettingsError(f"{text!r}: expected arms with iterations, such as dnpo@1,2,3 + spin@SFT")
        found.append(Term(match[1], tuple(k if k == SFT else int(k) for k in match[2].split(","))))
    return found


def read(path: Path) -> Book:
    """Read and check a file of claims.

    Raises:
        SettingsError: names the claim and what is wrong with it.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(tree, dict) or {"scale", "sweeps", "arms", "claims"} != tree.keys():
        raise SettingsError(f"{path}: expected scale, sweeps, arms and claims, and nothing else")
    try:
        sweeps = {name: Sweep.model_validate(given or {}) for name, given in tree["sweeps"].items()}
        arms = {name: {str(tag): str(value) for tag, value in given.items()} for name, given in tree["arms"].items()}
    except (ValidationError, AttributeError) as error:
        raise SettingsError(f"{path}: sweeps or arms are not as expected: {error}") from error
    claims = tuple(_claim(given, tree["scale"], path) for given in tree["claims"])
    doubled = [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]
    if doubled:
        raise SettingsError(f"{path}: id {doubled[0]} is given to several claims")
    for claim in claims:
        problem = _problem(claim, sweeps, arms)
        if problem:
            raise SettingsError(f"{path}: claim {claim.id}: {problem}")
    return Book(str(tree["scale"]), sweeps, arms, claims)


def _claim(given: Any, scale: str, path: Path) -> Claim:
    try:
        return Claim.model_validate({"scale": scale, **given})
    except (ValidationError, TypeError) as error:
        named = given.get("id", given) if isinstance(given, dict) else given
        raise SettingsError(f"{path}: claim {named}: {error}") from error


def _problem(claim: Claim, sweeps: Iterable[str], arms: Iterable[str]) -> str:
    """What is wrong with a claim; empty if nothing is."""
    if claim.sweep not in sweeps:
        return f"sweep {claim.sweep} is not among {', '.join(sweeps)}.{nearest(claim.sweep, list(sweeps))}"
    a, b = claim.sides
    named = [term.arm for term in a + b] + ([claim.premise.runs] if claim.premise else [])
    for arm in named:
        if arm not in arms:
            return f"arm {arm} is not among {', '.join(arms)}.{nearest(arm, list(arms))}"
    known = {**MEASURES, **BETWEEN}
    if claim.measure not in known:
        return f"there is no measure {claim.measure}.{nearest(claim.measure, list(known))}"
    of = 2 if claim.measure in BETWEEN else 1
    try:
        signature(known[claim.measure].function).bind(*[None] * of, **claim.arguments)
    except TypeError as error:
        return f"arguments of {claim.measure}: {error}"
    if not a:
        return "a is empty"
    if of == 2 and not (len(a) == len(b) == 1 and len(a[0].iterations) == len(b[0].iterations)):
        return f"{claim.measure} compares one arm with one other at as many iterations"
    if claim.margin < 0 or (claim.relation in ("greater", "less")) != (claim.margin == 0):
        return "at_least, at_most and within need a margin above 0, greater and less have none"
    return ""
