"""Settings are checked against the signature of what they configure: the signature is the schema.

The settings of a target are its keyword-only parameters; what a run passes to it (a model, rows, a folder) comes as
positional parameters. Types and ranges are read from the annotations, such as ``alpha: NonNegative``.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast, get_type_hints

from dnpo.errors import SettingsError


@dataclass(frozen=True)
class Range:
    """Where a number has to lie, for pydantic to check; imported by parts that run where pydantic is not."""

    gt: float | None = None
    ge: float | None = None
    le: float | None = None

    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = (
        True  # by this pydantic knows what __iter__ is for
    )

    def __iter__(self) -> Iterator[Any]:
        from pydantic import Field

        field: Any = Field(gt=self.gt, ge=self.ge, le=self.le, allow_inf_nan=False)
        yield from field.metadata


Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Finite = Annotated[float, Range()]
Fraction = Annotated[float, Range(ge=0, le=1)]
Count = Annotated[int, Range(ge=1)]
Natural = Annotated[int, Range(ge=0)]

SPECIAL = ("_target_", "_partial_")
OWN = "dnpo."


def stage_key(settings: Mapping[str, Any], not_in_key: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a part as they go into stage keys, so that keys outlive the files that classes lie in.

    dnpo's own parts go in by the name of their class, which is unique in dnpo, all others by their full import path.
    How a part is built (``_partial_``) decides no result and stays out.

    Args:
        settings: checked settings with a ``_target_``; nested parts are treated alike.
        not_in_key: those of the settings that cannot change a result.
    """
    return {name: _in_key(name, value) for name, value in settings.items() if name not in (*not_in_key, "_partial_")}


def _in_key(name: str, value: Any) -> Any:
    if name == "_target_" and str(value).startswith(OWN):
        return str(value).rpartition(".")[2]
    if isinstance(value, Mapping):
        return stage_key(value)
    return value


def check(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings of one part, a mapping with a ``_target_``, before anything is built.

    Args:
        name: where the settings stand, such as ``npo``; every message begins with it.
        settings: plain values; nested mappings with a ``_target_`` of their own, and mappings of such, are checked too.

    Returns:
        The settings with each value as its annotation has it (``alpha: 1`` becomes ``1.0``), so that one value has
        one spelling.

    Raises:
        SettingsError: the target does not exist, a key is not one of its keyword-only parameters (the message offers
            near matches), a required one is missing, or a value has the wrong type or lies outside its range.
    """
    if "_target_" not in settings:
        raise SettingsError(f"{name}: no _target_, so nothing says what these settings configure")
    target = locate(f"{name}._target_", settings["_target_"])
    for key in settings:
        if key.startswith("_") and key not in SPECIAL:
            raise SettingsError(f"{name}.{key}: unknown setting. Known with an underscore: {', '.join(SPECIAL)}.")
    values = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key, value in values.items():
        if _is_part(value):
            values[key] = check(f"{name}.{key}", value)
        elif _are_parts(value):
            values[key] = {each: check(f"{name}.{key}.{each}", part) for each, part in value.items()}
    # Of foreign classes (an optimizer, say) only the names are checked: their annotations are their own affair.
    own = target.__module__.split(".")[0] != "torch"
    special = {key: value for key, value in settings.items() if key.startswith("_")}
    return special | check_values(name, target, values, types=own)


def check_values(
    name: str, target: Callable[..., Any], values: Mapping[str, Any], *, types: bool = True
) -> dict[str, Any]:
    """Check plain values against the parameters of ``target``; see :func:`check`."""
    parameters = inspect.signature(target).parameters
    keywords = {p.name: p for p in parameters.values() if p.kind is p.KEYWORD_ONLY or not types}
    for key in values:
        if key not in keywords:
            raise SettingsError(f"{_dotted(name, key)}: unknown setting.{nearest(key, keywords, name)}")
    for key, parameter in keywords.items():
        if types and parameter.default is parameter.empty and values.get(key) in (None, "???"):
            raise SettingsError(f"{_dotted(name, key)}: needs a value; give {_dotted(name, key)}=…")
    if not types:
        return dict(values)
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    return {
        key: value
        if key not in hints or _is_part(value) or _are_parts(value)
        else _check_value(_dotted(name, key), value, hints[key])
        for key, value in values.items()
    }


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _are_parts(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_part(part) for part in value.values())


def _check_value(name: str, value: Any, hint: Any) -> Any:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # dataclasses bring a configuration of their own
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise SettingsError(f"{name}={value!r}: {problem[0].lower()}{problem[1:]}") from None


def locate(name: str, target: str) -> Callable[..., Any]:
    """The object that a dotted path names, or a SettingsError that names the setting."""
    from hydra.utils import get_object

    try:
        found: Any = get_object(target)
    except Exception as error:
        raise SettingsError(f"{name}={target}: cannot be imported ({error})") from None
    if not callable(found):
        raise SettingsError(f"{name}={target}: expected a class or function, found a {type(found).__name__}")
    return cast(Callable[..., Any], found)


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence that offers the known words nearest to ``word``, or lists them all."""
    known = sorted(key for key in known if not key.split(".")[-1].startswith("_"))
    names = [_dotted(prefix, key) for key in known]
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if close:
        return f" Did you mean {' or '.join(_dotted(prefix, key) for key in close)}?"
    return f" Known: {', '.join(sorted(names)) or 'none'}."


def _dotted(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
