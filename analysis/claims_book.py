"""Read and check the file of claims, ``claims.yaml``."""

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
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Premise(Strict):
    """A condition on a seed for a claim to apply: in the table of its ``runs``, ``metric`` is at least ``least``."""

    runs: str
    metric: str
    least: float


class Sweep(Strict):
    """A sweep that claims read.

    Attributes:
        overrides: settings that ``run=true`` adds to its command.
        where_installed: further settings, by the packages that they need.
        methods: whether its arms are methods, which may differ in more than labels and noise.
    """

    overrides: tuple[str, ...] = ()
    where_installed: Mapping[str, tuple[str, ...]] = {}
    methods: bool = False


class Claim(Strict):
    """One claim of a paper.

    Attributes:
        text: the claim, paraphrased.
        measured: what is measured here, in words.
        scale: the data and model on which it is measured.
        measure: a name in ``claims_measures``.
        a, b: an arm and iterations, such as ``dnpo@1,2,3``, for the mean over these iterations; ``+`` adds several. The
            effect is a − b.
        relation, target, margin: the region of the effect according to the claim, in its unit.
        times: factor that converts values to the unit.
        matters: settings of optional measures, such as ``second_judge.``, in which its runs must agree.
        caveat: a limitation of the measure that a reader must know.
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
        """The region of the effect according to the claim."""
        return region(self.relation, self.target, self.margin)

    @property
    def sides(self) -> "tuple[list[Term], list[Term]]":
        """The terms of both sides."""
        return terms(self.a), terms(self.b)


@dataclass(frozen=True)
class Term:
    """An arm, and the iterations over which it is averaged."""

    arm: str
    iterations: tuple[int | str, ...]


@dataclass(frozen=True)
class Book:
    """The whole file of claims.

    Attributes:
        scale: the data and model on which claims are measured, unless a claim gives another.
        sweeps: the sweeps by name, in the order in which they are run.
        arms: the options and settings by which the runs of each arm are recognised.
    """

    scale: str
    sweeps: Mapping[str, Sweep]
    arms: Mapping[str, Mapping[str, str]]
    claims: tuple[Claim, ...]


def terms(text: str) -> list[Term]:
    """Parse one side of a claim, such as ``spin@0 + dnpo@1,2``.

    Raises:
        SettingsError: it has another form.
    """
    result = []
    for part in text.split("+") if text.strip() else []:
        match = re.fullmatch(r"\s*([\w-]+)@((?:SFT|\d+)(?:,(?:SFT|\d+))*)\s*", part)
        if match is None:
            raise SettingsError(f"{text!r}: expected arms with iterations, such as dnpo@1,2,3 + spin@SFT")
        result.append(Term(match[1], tuple(k if k == SFT else int(k) for k in match[2].split(","))))
    return result


def read(path: Path) -> Book:
    """Read and check a file of claims.

    Raises:
        SettingsError: the file or a claim is not valid; names the claim and the problem.
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
        raise SettingsError(f"{path}: several claims have the id {doubled[0]}")
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
    """The problem with a claim; empty if there is none."""
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
        return f"{claim.measure} compares one arm with one other, each at the same number of iterations"
    if claim.margin < 0 or (claim.relation in ("greater", "less")) != (claim.margin == 0):
        return "at_least, at_most and within need a margin above 0; greater and less take none"
    return ""
