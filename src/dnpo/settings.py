"""How settings become parts, and are checked.

A part is a frozen dataclass: its fields are its settings, their annotations (``alpha: NonNegative``) are the schema,
and one verb does what it is for. Heavy imports stand inside the verb, so that wrong settings are answered at once. A
function can be a part too: its keyword-only parameters are its settings, what a run passes comes as positional ones.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_type_hints

from dnpo.errors import DnpoError, SettingsError


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
Dtype = Literal["float32", "bfloat16"]  # of weights

SPECIAL = ("_target_", "_partial_")
OWN = "dnpo."
CHANGES_RESULT = "changes result"  # a field's metadata; true by default
IS_PLACE = "is a place"  # the same; false by default


def neutral(default: Any = dataclasses.MISSING) -> Any:
    """A field of a part that cannot change a result, such as a batch size or where a file lies.

    This is the one list of such settings: stage keys, the analysis and the report read it. What a path leads to does
    decide results; a part that has paths says so by ``identity()``.
    """
    return dataclasses.field(default=default, metadata={CHANGES_RESULT: False})


def place(default: Any = dataclasses.MISSING) -> Any:
    """A neutral field that says where something lies, such as a path; the part's ``identity()`` says what does."""
    return dataclasses.field(default=default, metadata={CHANGES_RESULT: False, IS_PLACE: True})


def neutral_names(target: Callable[..., Any], places: bool = True) -> list[str]:
    """Those of a part's settings that cannot change a result.

    Args:
        places: also those that say where something lies, which is right where what lies there is known otherwise.
    """
    if not dataclasses.is_dataclass(target):
        return []
    return [
        field.name
        for field in dataclasses.fields(target)
        if not field.metadata.get(CHANGES_RESULT, True) and (places or not field.metadata.get(IS_PLACE, False))
    ]


CONTENTS = "contents"  # beside a part's settings: what decides its results, as a hash


def with_contents(settings: Mapping[str, Any], part: Any) -> dict[str, Any]:
    """A part's settings, with a hash of what it reads beside the places where it lies, nested parts too.

    By it runs can be compared: the same data in two folders are the same, other data under one name are not.
    """
    found = dict(settings)
    for name, value in settings.items():
        inner = getattr(part, name, None)
        if _is_part(value):
            found[name] = with_contents(value, inner)
        elif _are_parts(value) and isinstance(inner, Mapping):
            found[name] = {each: with_contents(some, inner[each]) for each, some in value.items()}
    if dataclasses.is_dataclass(part) and any(field.metadata.get(IS_PLACE) for field in dataclasses.fields(part)):
        text = json.dumps(part_key(part), sort_keys=True)
        found[CONTENTS] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


@dataclass(frozen=True)
class Bound:
    """A function, or a class that is not ours, with the settings given to it: it waits for what the run passes.

    What it names is imported when it is called or checked, and not before. Its settings can be read as attributes.

    Attributes:
        target: import path.
        settings: keyword arguments.
    """

    target: str
    settings: Mapping[str, Any]

    def __call__(self, *given: Any) -> Any:
        """What the target makes of ``given`` and the settings."""
        return self.resolve()(*given, **self.settings)

    def resolve(self) -> Callable[..., Any]:
        """The function or class itself."""
        return locate("_target_", self.target)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "settings" or name not in self.settings:
            raise AttributeError(f"{self.target} has no setting {name}")
        return self.settings[name]

    def check(self, name: str) -> None:
        """Import the target and hold the names of the settings against its parameters.

        Raises:
            SettingsError: it cannot be imported, or has no such parameter.
        """
        check_values(name, locate(f"{name}._target_", self.target), self.settings, types=False)


def part_key(part: Any) -> dict[str, Any]:
    """What decides a part's results, as it goes into stage keys, so that keys outlive the files that classes lie in.

    That is what its ``identity()`` says, else its class and those of its settings that can change a result. dnpo's own
    classes go in by their name, which is unique in dnpo, all others by their full import path.
    """
    if hasattr(part, "identity"):
        return dict(part.identity())
    if isinstance(part, Bound):
        return {"_target_": _name_in_key(part.target), **{key: _in_key(value) for key, value in part.settings.items()}}
    kind, gone = type(part), neutral_names(type(part))
    values = {each: _in_key(getattr(part, each)) for each in _parameters(kind) if each not in gone}
    return {"_target_": _name_in_key(f"{kind.__module__}.{kind.__qualname__}"), **values}


def _name_in_key(target: str) -> str:
    return target.rpartition(".")[2] if target.startswith(OWN) else target


def _in_key(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _in_key(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_in_key(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return part_key(value)


def check(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings of one part, a mapping with a ``_target_``, before anything is built.

    Args:
        name: where the settings stand, such as ``npo``; every message begins with it.
        settings: plain values; nested mappings with a ``_target_``, and mappings of such, are checked too.

    Returns:
        The settings with each value as its annotation has it (``alpha: 1`` becomes ``1.0``), so that one value has
        one spelling.

    Raises:
        SettingsError: the target does not exist, a key is not one of its keyword-only parameters (the message offers
            near matches), a required one is missing, or a value has the wrong type or lies outside its range.
    """
    if "_target_" not in settings:
        raise SettingsError(f"{name}: no _target_, so nothing says what these settings configure")
    target = None if _waits(settings["_target_"]) else locate(f"{name}._target_", settings["_target_"])
    bound = _bound_settings(target)
    for key in settings:
        if key.startswith("_") and key not in SPECIAL:
            raise SettingsError(f"{name}.{key}: unknown setting. Known with an underscore: {', '.join(SPECIAL)}.")
    values = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key, value in values.items():
        if key in bound and _is_part(value):
            values[key] = dict(value)  # whoever holds it checks it once it is built
        elif _is_part(value):
            values[key] = check(f"{name}.{key}", value)
        elif _are_parts(value):
            values[key] = {each: check(f"{name}.{key}.{each}", part) for each, part in value.items()}
    special = {key: value for key, value in settings.items() if key.startswith("_")}
    return special | (values if target is None else check_values(name, target, values))


def build(name: str, settings: Mapping[str, Any]) -> Any:
    """Build one part from its checked settings, nested parts first.

    Args:
        name: where the settings stand; messages begin with it.

    Raises:
        DnpoError: the part refuses its settings.
    """
    target = None if _waits(settings["_target_"]) else locate(f"{name}._target_", settings["_target_"])
    bound = _bound_settings(target)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key in bound and _is_part(value):
            own = {name: each for name, each in value.items() if name not in SPECIAL}
            values[key] = Bound(value["_target_"], own)
        elif _is_part(value):
            values[key] = build(f"{name}.{key}", value)
        elif _are_parts(value):
            values[key] = {each: build(f"{name}.{key}.{each}", part) for each, part in value.items()}
        elif key not in SPECIAL:
            values[key] = value
    if target is None or settings.get("_partial_"):
        return Bound(settings["_target_"], values)
    if not inspect.isclass(target):  # its defaults decide results too
        return Bound(settings["_target_"], _defaults(target) | values)
    try:
        part = target(**values)
    except DnpoError as error:
        raise error if str(error).startswith(name) else type(error)(f"{name}.{error}") from error
    for setting in _parameters(target):
        if not hasattr(part, "identity") and not hasattr(part, setting):
            raise SettingsError(
                f"{name}._target_={settings['_target_']}: has the setting {setting} and no attribute of this name, so "
                "nothing could say what its results depend on; make it a frozen dataclass"
            )
    return part


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a function that have a default, with it."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }


def require(name: str, part: Any, protocol: type) -> None:
    """Refuse a part that lacks something that its place needs, before anything is computed.

    Args:
        name: where the part stands, such as ``npo``.
        protocol: the class that says what the place needs: its public methods, properties and annotations.

    Raises:
        SettingsError: names the part and what it lacks.
    """
    public = {
        each for each in (*vars(protocol), *vars(protocol).get("__annotations__", {})) if not each.startswith("_")
    }
    lacking = sorted(each for each in public if not hasattr(part, each))
    if "__call__" in vars(protocol) and not callable(part):
        lacking.append("__call__")
    if lacking:
        kind = part.target if isinstance(part, Bound) else f"{type(part).__module__}.{type(part).__qualname__}"
        raise SettingsError(
            f"{name}._target_={kind}: has no {', '.join(lacking)}; {protocol.__module__}.{protocol.__name__} says what "
            f"{name} needs"
        )


def _waits(target: Any) -> bool:
    """Whether a target is imported only once it is needed: torch takes longer than all else together."""
    return isinstance(target, str) and target.startswith("torch.")


def _bound_settings(target: Callable[..., Any] | None) -> list[str]:
    """Those of a part's settings that are to stay bound, such as an optimizer, which waits for its parameters."""
    if not dataclasses.is_dataclass(target):
        return []
    return [name for name, hint in get_type_hints(target).items() if hint is Bound]


def _parameters(kind: Callable[..., Any]) -> list[str]:
    """The names of a part's settings."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.init]
    parameters = inspect.signature(kind).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def check_values(
    name: str, target: Callable[..., Any], values: Mapping[str, Any], *, types: bool = True
) -> dict[str, Any]:
    """Check plain values against the settings of ``target``; of what is not ours (``types=False``) the names alone."""
    parameters = inspect.signature(target).parameters
    keywords = {key: parameters[key] for key in (_parameters(target) if types else parameters)}
    for key in values:
        if key not in keywords:
            raise SettingsError(f"{_dotted(name, key)}: unknown setting.{nearest(key, keywords, name)}")
    for key, parameter in keywords.items():
        if types and parameter.default is parameter.empty and values.get(key) in (None, "???"):
            raise SettingsError(f"{_dotted(name, key)}: needs a value; give {_dotted(name, key)}=…")
    if not types:
        return dict(values)
    plain = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    hints = get_type_hints(target.__init__ if plain else target, include_extras=True)
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
    except PydanticUserError:  # dataclasses bring their own configuration
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


def conf_folder() -> Path:
    """Where the settings are: ``$DNPO_CONF``, else beside this file (a wheel), else in the checkout."""
    here = Path(__file__).resolve().parent
    if "DNPO_CONF" in os.environ:
        given = Path(os.environ["DNPO_CONF"]).absolute()
        if not (given / "train.yaml").is_file():
            raise SettingsError(f"DNPO_CONF={given}: expected a folder with a train.yaml")
        return given
    for folder in (here / "conf", here.parent.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise SettingsError(
        f"no settings found: neither {here / 'conf'} nor {here.parent.parent / 'conf'} has a train.yaml"
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
