"""Keep the options of a run and the keys of its stages in a few parameters.

As tags, one for each, they would push the note off the first screen of the run's page. Runs of earlier versions have
these tags; :func:`unpack` makes both alike.
"""

import json
from collections.abc import Iterator, Mapping

OPTIONS, STAGES, STEPS = "dnpo.options", "dnpo.stages", "dnpo.steps"
PREFIXES = {OPTIONS: "dnpo.", STAGES: "stage.", STEPS: "steps."}  # of the tags of earlier versions
ON_PAGE = (
    *("kind", "method", "seed", "sweep_name", "scale", "model", "data", "judge", "commit", "against"),
)  # these remain tags
LONGEST = 5900  # characters of a parameter; MLflow takes 6,000


def split_tags(tags: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tags that a run's page shows, and the other options without their prefix."""
    prefix = PREFIXES[OPTIONS]
    rest = {n: v for n, v in tags.items() if n.startswith(prefix) and n.removeprefix(prefix) not in ON_PAGE}
    return {n: v for n, v in tags.items() if n not in rest}, {n.removeprefix(prefix): v for n, v in rest.items()}


def pack(kind: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return parameters that hold these values, each short enough for MLflow.

    Args:
        kind: ``OPTIONS``, ``STAGES`` or ``STEPS``.
    """
    parts: list[dict[str, str]] = []
    for name, value in values.items():
        if not parts or len(json.dumps({**parts[-1], name: value})) > LONGEST:
            parts.append({})
        parts[-1][name] = value
    return {f"{kind}.{n}" if n else kind: json.dumps(part) for n, part in enumerate(parts)}


def unpack(tags: Mapping[str, str], params: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return all tags of a run, those packed into parameters too, and its other parameters."""
    packed = {name: kind for name in params for kind in PREFIXES if name == kind or name.startswith(f"{kind}.")}
    found = {f"{PREFIXES[kind]}{n}": v for name, kind in packed.items() for n, v in _read(params[name])}
    return {**tags, **found}, {name: value for name, value in params.items() if name not in packed}


def _read(text: str) -> Iterator[tuple[str, str]]:
    try:
        values = json.loads(text)
    except ValueError:  # not written by dnpo
        return
    if isinstance(values, dict):
        yield from ((str(name), str(value)) for name, value in values.items())
