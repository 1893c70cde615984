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

from analysis.claims_measures import BETWEEN, MEASURES, ends
from analysis.claims_rules import Region, Relation, Role, region
from dnpo.errors import SettingsError
from dnpo.settings import nearest
from dnpo.tracking.reading import SFT

FILE = Path(__file__).resolve().parent.parent / "claims.yaml"


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Premise(Strict):
    """A premise of a claim: it applies only to seeds for which ``metric`` of the arm ``runs`` is at least ``least``."""

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
        role: ``primary`` and ``secondary`` claims are tested, with a separate correction for each role; a ``check``
            follows from the construction or the mathematics.
        relation, target, margin: the region of the effect according to the claim, in its unit.
        sesoi: smallest effect of interest, in the claim's unit: a smaller deviation from the target is negligible.
        control: for a claim of non-inferiority: id of its positive control, an earlier claim that must be supported.
        after: id of an earlier claim that must be supported before this one can be.
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
    role: Role
    sweep: str
    measure: str
    arguments: Mapping[str, Any] = {}
    a: str
    b: str = ""
    relation: Relation
    target: float = 0.0
    margin: float = 0.0
    sesoi: float = 0.0
    control: str = ""
    after: str = ""
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
    def band(self) -> Region | None:
        """The effects that are negligible; None without a smallest effect of interest."""
        return Region(self.target - self.sesoi, self.target + self.sesoi) if self.sesoi else None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The least and the largest possible effect, in the claim's unit; None if its measure does not count units."""
        found = ends(self.measure, self.arguments)
        if found is None:
            return None
        low, high = (self.times * end for end in found)
        if self.measure in BETWEEN:
            return low, high
        a, b = map(len, self.sides)
        return a * low - b * high, a * high - b * low

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
        path: the file.
        scale: the data and model on which claims are measured, unless a claim gives another.
        seeds: the seeds that are run for these claims, fixed beforehand.
        sweeps: the sweeps by name, in the order in which they are run.
        arms: the options and settings by which the runs of each arm are recognised.
    """

    path: Path
    scale: str
    seeds: tuple[int, ...]
    sweeps: Mapping[str, Sweep]
    arms: Mapping[str, Mapping[str, str]]
    claims: tuple[Claim, ...]

    def by_role(self, role: Role) -> list[Claim]:
        """The claims of a role."""
        return [claim for claim in self.claims if claim.role == role]


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
    if not isinstance(tree, dict) or {"scale", "seeds", "sweeps", "arms", "claims"} != tree.keys():
        raise SettingsError(f"{path}: expected scale, seeds, sweeps, arms and claims, and nothing else")
    seeds = tree["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise SettingsError(f"{path}: seeds: expected a list of whole numbers, such as [5, 6, 7]")
    try:
        sweeps = {name: Sweep.model_validate(given or {}) for name, given in tree["sweeps"].items()}
        arms = {name: {str(tag): str(value) for tag, value in given.items()} for name, given in tree["arms"].items()}
    except (ValidationError, AttributeError) as error:
        raise SettingsError(f"{path}: sweeps or arms are not as expected: {error}") from error
    claims = tuple(_claim(given, tree["scale"], path) for given in tree["claims"])
    doubled = [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]
    if doubled:
        raise SettingsError(f"{path}: several claims have the id {doubled[0]}")
    earlier: dict[str, Claim] = {}
    for claim in claims:
        problem = _problem(claim, sweeps, arms) or _problem_of_protocol(claim, earlier)
        earlier[claim.id] = claim
        if problem:
            raise SettingsError(f"{path}: claim {claim.id}: {problem}")
    return Book(path, str(tree["scale"]), tuple(seeds), sweeps, arms, claims)


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


def _problem_of_protocol(claim: Claim, earlier: Mapping[str, Claim]) -> str:
    """What the protocol requires of a claim and is missing; empty if nothing is.

    Args:
        earlier: the claims before it in the file, by id; only these can be its control or its gate.
    """
    if claim.role == "check":
        given = [name for name in ("sesoi", "control", "after") if getattr(claim, name)]
        return f"a check takes no {' and no '.join(given)}" if given else ""
    if (claim.relation == "within") != (claim.sesoi == 0) or claim.sesoi < 0:
        return "needs a smallest effect of interest, sesoi, above 0; only within takes none, since its margin is one"
    answers = claim.measure == "by_prompt" and claim.arguments.get("column") in ("right", "second")
    if claim.role == "primary" and not answers:
        return "a primary claim is measured by right answers or by a second judge: by_prompt, column right or second"
    for name in ("control", "after"):
        other = getattr(claim, name)
        if other and other not in earlier:
            return f"{name}: there is no claim {other} before it in the file.{nearest(other, list(earlier))}"
    if (claim.relation in ("at_least", "at_most")) != bool(claim.control):
        return "at_least and at_most need a positive control, the id of a claim; other relations take none"
    if claim.control:
        return _problem_of_control(claim, earlier[claim.control])
    return ""


def _problem_of_control(claim: Claim, control: Claim) -> str:
    if claim.margin >= claim.sesoi:
        return f"margin is {claim.margin:g}; it must be below the smallest effect of interest, {claim.sesoi:g}"
    if control.control or control.role == "check":
        return (
            f"control {control.id} must be a primary or secondary claim with an effect: neither a "
            "check, nor itself a claim of non-inferiority"
        )
    assay = ("sweep", "measure", "arguments")
    differing = [name for name in assay if getattr(claim, name) != getattr(control, name)]
    return f"control {control.id} has another {' and '.join(differing)}" if differing else ""
