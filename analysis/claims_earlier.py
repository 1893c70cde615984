"""Take measurements over from an earlier table of claims, whose runs need not be on this machine any more.

``claims.json`` keeps what a decision needs of every measured claim: its effect with the model that gives interval and
p, the means by seed, and the commits that made its runs. Outcomes are decided anew, since their correction is over all
claims of a role.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from analysis.claims_assess import Result
from analysis.claims_book import Book, Claim
from analysis.claims_registered import Registration, origins
from analysis.claims_rules import Effect
from dnpo.errors import DataError
from dnpo.stats.intervals import Components, Estimate, Mean, Unvaried

MODELS = {"mean": Mean, "unvaried": Unvaried}


class SweepRead(TypedDict):
    """What was read of a sweep: its runs and seeds in words, and the options of its runs by part."""

    text: str
    options: dict[str, list[str]]


@dataclass(frozen=True)
class Earlier:
    """An earlier table of claims.

    Attributes:
        results: its measurements, by claim.
        sweeps: what it says on the sweeps that had runs.
    """

    results: Mapping[str, Result] = field(default_factory=dict)
    sweeps: Mapping[str, "SweepRead"] = field(default_factory=dict)


NONE = Earlier()


def keep(result: Result) -> dict[str, Any]:
    """What :func:`read` needs of a measured claim, as plain values; empty if it was not measured."""
    effect = result.effect
    if effect is None:
        return {}
    names = {of: name for name, of in MODELS.items()}
    model = None if effect.model is None else {"kind": names[type(effect.model)], **asdict(effect.model)}
    return {
        "model": model,
        "components": None if effect.components is None else asdict(effect.components),
        "by_seed": {str(seed): list(means) for seed, means in result.by_seed.items()},
        "complete": list(result.complete),
        "measured_notes": list(result.notes),
        "commits": sorted({commit for run in result.runs for commit in origins(run)}) or list(result.commits),
    }


def read(path: Path, book: Book, registration: Registration | None) -> Earlier:
    """Read the ``claims.json`` of an earlier table.

    Args:
        registration: how the claims are registered now; None: the new table is exploratory and takes all.

    Raises:
        DataError: the file cannot be read, has other claims, or is registered otherwise.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows, registered, sweeps = tree["claims"], tree["registered"], tree["sweeps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"measured={path}: expected the claims.json of an earlier table of claims ({error})") from error
    if registration is not None and registered != registration.commit:
        raise DataError(
            f"measured={path}: its claims are of commit {str(registered)[:9] or 'none'}, not those of "
            f"{registration.text}; exploratory=true takes them, and marks the results"
        )
    known = {claim.id: claim for claim in book.claims}
    results = {}
    for row in rows:
        claim = known.get(row.get("id"))
        if claim is None or row.get("effect") is None:
            continue
        _refuse_others(path, claim, row)
        if registration is not None and row.get("exploratory"):
            raise DataError(f"measured={path}: claim {claim.id} was measured on exploratory runs")
        try:
            results[claim.id] = _result(claim, row)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"measured={path}: claim {claim.id} cannot be read ({error})") from error
    return Earlier(results, {name: sweep for name, sweep in sweeps.items() if sweep["options"]})


def _refuse_others(path: Path, claim: Claim, row: Mapping[str, Any]) -> None:
    for name, value in claim.model_dump(mode="json").items():
        if row.get(name) != value:
            raise DataError(f"measured={path}: claim {claim.id} has another {name} there: {row.get(name)}, not {value}")


def _result(claim: Claim, row: Mapping[str, Any]) -> Result:
    parts = dict(row["model"] or {})
    model = MODELS[parts.pop("kind")](**parts) if parts else None
    components = None if row["components"] is None else Components(**row["components"])
    estimate = Estimate(row["effect"], row["low"], row["high"])
    return Result(
        claim,
        "undecided",
        Effect(estimate, model, row["seeds"], row["items"], (), components),
        by={k: Estimate(e["value"], e["low"], e["high"]) for k, e in row["by_iteration"].items()},
        by_seed={int(seed): (a, b) for seed, (a, b) in row["by_seed"].items()},
        complete=tuple(row["complete"]),
        commits=tuple(row["commits"]),
        notes=tuple(row["measured_notes"]),
    )
