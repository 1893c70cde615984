"""Check settings and build parts from them.

A part is a frozen dataclass: its fields are its settings, their annotations (``alpha: NonNegative``) are the schema,
and one method does its work. Heavy modules are imported inside that method, so wrong settings are reported at once. A
function can be a part too: its keyword-only parameters are its settings, and the run passes the positional ones.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from dnpo.errors import DnpoError, SettingsError

NEAR = "Did you mean"  # begins the sentence that offers the nearest words


@dataclass(frozen=True)
class Range:
    """The range of a number, which pydantic checks; parts import it without importing pydantic."""

    gt: float | None = None
    ge: float | None = None
    le: float | None = None
    lt: float | None = None

    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = (
        True  # tells pydantic that __iter__ yields constraints
    )

    def __iter__(self) -> Iterator[Any]:
        from pydantic import Field

        field: Any = Field(gt=self.gt, ge=self.ge, le=self.le, lt=self.lt, allow_inf_nan=False)
        yield from field.metadata

    def __str__(self) -> str:
        """The range in words, to follow the word number."""
        if self.ge is not None and self.le is not None:
            return f" from {self.ge:g} to {self.le:g}"
        bounds = {"above": self.gt, "of at least": self.ge, "below": self.lt, "at most": self.le}
        return " and".join(f" {words} {bound:g}" for words, bound in bounds.items() if bound is not None)


Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Finite = Annotated[float, Range()]
Fraction = Annotated[float, Range(ge=0, le=1)]
Count = Annotated[int, Range(ge=1)]
Natural = Annotated[int, Range(ge=0)]
Dtype = Literal["float32", "bfloat16"]  # of weights
Quantisation = Literal["nf4", "int8"]  # of a base model's weights, in 4 or 8 bits

SPECIAL = ("_target_", "_partial_")
OF_NUMBERS = {  # pydantic's names of errors that :func:`expected` puts into words
    *("bool_type", "int_type", "float_type", "int_from_float", "finite_number"),
    *("list_type", "tuple_type", "dict_type", "too_long", "missing"),
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
}
OWN = "dnpo."
CHANGES_RESULT = "changes result"  # a field's metadata; true by default
IS_PLACE = "is a place"  # another key of metadata; false by default


def neutral(default: Any = dataclasses.MISSING) -> Any:
    """Declare a field that cannot change a part's results, such as a batch size or a path.

    There is no other list of such settings: stage keys, analysis and report read these declarations. The contents at a
    path do decide results: a part with paths includes them in its ``identity()``.
    """
    return dataclasses.field(default=default, metadata={CHANGES_RESULT: False})


def place(default: Any = dataclasses.MISSING) -> Any:
    """Declare a neutral field that is a location, such as a path; the part's ``identity()`` includes its contents."""
    return dataclasses.field(default=default, metadata={CHANGES_RESULT: False, IS_PLACE: True})


def neutral_names(target: Callable[..., Any], places: bool = True) -> list[str]:
    """The names of a part's settings that cannot change a result.

    Args:
        places: whether to include locations; right only if their contents are compared in another way.
    """
    if not dataclasses.is_dataclass(target):
        return []
    return [
        field.name
        for field in dataclasses.fields(target)
        if not field.metadata.get(CHANGES_RESULT, True) and (places or not field.metadata.get(IS_PLACE, False))
    ]


CONTENTS = "contents"  # added to a part's settings: a hash of all that decides its results


def with_contents(settings: Mapping[str, Any], part: Any, at: str = "") -> dict[str, Any]:
    """Add to the settings of every part that has locations, nested parts included, a hash of the contents there.

    The hash makes runs comparable: the same data in two folders are equal, different data under one name are not.

    Args:
        at: the place of the part in the run, such as ``eval``, for messages.
    """
    tree = dict(settings)
    for name, value in settings.items():
        inner = getattr(part, name, None)
        if is_part(value):
            tree[name] = with_contents(value, inner, _join_names(at, name))
        elif _are_parts(value) and isinstance(inner, Mapping):
            tree[name] = {each: with_contents(some, inner[each], f"{at}.{name}.{each}") for each, some in value.items()}
    if dataclasses.is_dataclass(part) and any(field.metadata.get(IS_PLACE) for field in dataclasses.fields(part)):
        with named_within({each: f"{at}.{each}" for each in setting_names(type(part))} if "." in at else {}):
            text = json.dumps(part_key(part), sort_keys=True)
        tree[CONTENTS] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return tree


@dataclass(frozen=True)
class Bound:
    """A function, or a class from outside dnpo, with its settings; the run calls it with the remaining arguments.

    The target is imported only when it is called or checked. Its settings can be read as attributes.

    Attributes:
        target: import path.
        settings: keyword arguments.
    """

    target: str
    settings: Mapping[str, Any]

    def __call__(self, *given: Any) -> Any:
        """Call the target with the positional arguments and the settings."""
        return self.resolve()(*given, **self.settings)

    def resolve(self) -> Callable[..., Any]:
        """Import the function or class."""
        return locate("_target_", self.target)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "settings" or name not in self.settings:
            raise AttributeError(f"{self.target} has no setting {name}")
        return self.settings[name]

    def check(self, name: str) -> None:
        """Import the target and check that its parameters include all settings.

        Raises:
            SettingsError: it cannot be imported, or lacks a parameter.
        """
        check_values(name, locate(f"{name}._target_", self.target), self.settings, types=False)


def part_key(part: Any) -> dict[str, Any]:
    """The settings that decide a part's results, for stage keys.

    These are the part's ``identity()``, or else its class and the settings that can change a result. dnpo's own classes
    appear by name, which is unique in dnpo, so that keys stay the same when a class moves to another file; all others
    appear by their full import path.
    """
    if hasattr(part, "identity"):
        return dict(part.identity())
    if isinstance(part, Bound):
        return {"_target_": _name_in_key(part.target), **{key: _in_key(value) for key, value in part.settings.items()}}
    return settings_key(part)


def settings_key(part: Any) -> dict[str, Any]:
    """A part's class and the settings that can change a result, for its ``identity()`` to build on."""
    kind, gone = type(part), neutral_names(type(part))
    values = {each: _in_key(getattr(part, each)) for each in setting_names(kind) if each not in gone}
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
        name: dotted name of the settings, such as ``npo``; every message begins with it.
        settings: plain values; nested parts, and mappings of parts, are checked too.

    Returns:
        The settings, each converted to its annotated type (``alpha: 1`` becomes ``1.0``), so that equal values look
        the same.

    Raises:
        SettingsError: the target does not exist, a key is not one of its keyword-only parameters (the message offers
            near matches), a required one is missing, or a value has the wrong type or is out of range.
    """
    if "_target_" not in settings:
        raise SettingsError(f"{name}: no _target_, the import path of the part that these settings configure")
    target = None if _waits(settings["_target_"]) else locate(f"{name}._target_", settings["_target_"])
    bound = _bound_settings(target)
    for key in settings:
        if key.startswith("_") and key not in SPECIAL:
            raise SettingsError(f"{name}.{key}: unknown setting. Known with an underscore: {', '.join(SPECIAL)}.")
    values = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key, value in values.items():
        if key in bound and is_part(value):
            values[key] = dict(value)  # checked by the outer part once it is built
        elif is_part(value):
            values[key] = check(f"{name}.{key}", value)
        elif _are_parts(value):
            values[key] = {each: check(f"{name}.{key}.{each}", part) for each, part in value.items()}
    special = {key: value for key, value in settings.items() if key.startswith("_")}
    return special | (values if target is None else check_values(name, target, values))


def build(name: str, settings: Mapping[str, Any]) -> Any:
    """Build one part from its checked settings, nested parts first.

    Args:
        name: dotted name of the settings; messages begin with it.

    Raises:
        DnpoError: the part refuses its settings.
    """
    target = None if _waits(settings["_target_"]) else locate(f"{name}._target_", settings["_target_"])
    bound = _bound_settings(target)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key in bound and is_part(value):
            own = {name: each for name, each in value.items() if name not in SPECIAL}
            values[key] = Bound(value["_target_"], own)
        elif is_part(value):
            values[key] = build(f"{name}.{key}", value)
        elif _are_parts(value):
            values[key] = {each: build(f"{name}.{key}.{each}", part) for each, part in value.items()}
        elif key not in SPECIAL:
            values[key] = value
    if target is None:
        return Bound(settings["_target_"], values)
    if not inspect.isclass(target):  # a function's defaults decide results too
        return Bound(settings["_target_"], _defaults(target) | values)
    try:
        part = target(**values)
    except DnpoError as error:
        raise error if str(error).startswith(name) else type(error)(f"{name}.{error}") from error
    for setting in setting_names(target):
        if not hasattr(part, "identity") and not hasattr(part, setting):
            raise SettingsError(
                f"{name}._target_={settings['_target_']}: has the setting {setting} but no attribute of this name, so "
                "stage keys cannot include it; make it a frozen dataclass"
            )
    return part


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The default values of a function's settings."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }


def require(name: str, part: Any, protocol: type) -> None:
    """Refuse a part that does not implement a protocol, before anything is computed.

    Args:
        name: dotted name of the part, such as ``npo``.
        protocol: the class whose public methods, properties and annotations the part must have.

    Raises:
        SettingsError: the part lacks some of them; names the part and what it lacks.
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
            f"{name}._target_={kind}: has no {', '.join(lacking)}; {protocol.__module__}.{protocol.__name__} defines "
            f"what {name} needs"
        )


def _waits(target: Any) -> bool:
    """Whether the import of a target is postponed: importing torch takes longer than all other checks together."""
    return isinstance(target, str) and target.startswith("torch.")


def _bound_settings(target: Callable[..., Any] | None) -> list[str]:
    """The names of a part's settings that stay a :class:`Bound`, such as an optimizer: the run calls it later."""
    if not dataclasses.is_dataclass(target):
        return []
    return [name for name, hint in get_type_hints(target).items() if hint is Bound]


def setting_names(kind: Callable[..., Any]) -> list[str]:
    """The names of a part's settings."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.init]
    parameters = inspect.signature(kind).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def part_settings(target: Callable[..., Any]) -> list[str]:
    """The names of the settings of a part, or of a library's class, which has positional parameters too."""
    plain = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    return list(inspect.signature(target).parameters) if plain else setting_names(target)


def check_values(
    name: str, target: Callable[..., Any], values: Mapping[str, Any], *, types: bool = True
) -> dict[str, Any]:
    """Check plain values against the settings of ``target``: names, and unless ``types=False`` their types.

    Raises:
        SettingsError: a setting is unknown, missing, or has the wrong type.
    """
    parameters = inspect.signature(target).parameters
    keywords = {key: parameters[key] for key in (setting_names(target) if types else parameters)}
    inner = [each for each in flat(values) if "." in each and each.split(".")[0] in keywords]
    for key in values:
        if key not in keywords:
            raise SettingsError(f"{_join_names(name, key)}: unknown setting.{nearest(key, [*keywords, *inner], name)}")
    for key, parameter in keywords.items():
        if types and parameter.default is parameter.empty and values.get(key) in (None, "???"):
            raise SettingsError(f"{_join_names(name, key)}: needs a value; give {_join_names(name, key)}=…")
    if not types:
        return dict(values)
    plain = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    hints = get_type_hints(target.__init__ if plain else target, include_extras=True)
    return {
        key: value
        if key not in hints or is_part(value) or _are_parts(value)
        else check_value(_join_names(name, key), value, hints[key])
        for key, value in values.items()
    }


def is_part(value: Any) -> bool:
    """Whether plain settings describe a part."""
    return isinstance(value, Mapping) and "_target_" in value


def _are_parts(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(is_part(part) for part in value.values())


def accepts(target: Callable[..., Any], key: str, value: Any) -> bool:
    """Whether a value has the type of a setting of ``target``."""
    plain = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    hints = get_type_hints(target.__init__ if plain else target, include_extras=True)
    return key not in hints or is_valid(value, hints[key])


def is_valid(value: Any, hint: Any) -> bool:
    """Whether a value has a type, and is in its range."""
    try:
        check_value("", value, hint)
    except SettingsError:
        return False
    return True


def check_value(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to a type.

    Raises:
        SettingsError: it has another type, or is out of range; the message begins with the name.
    """
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # pydantic takes no configuration for a type that has its own, such as a dataclass
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        words = expected(hint, finite=first["type"] == "finite_number") if first["type"] in OF_NUMBERS else ""
        if first["type"] in ("is_instance_of", "dataclass_type", "dataclass_exact_type"):
            words = "the settings of a part, with a _target_"
        problem = f"expected {words}" if words else first["msg"].replace("Input should be", "expected")
        if first["loc"][-1:] == ("[key]",):
            problem = f"{problem}, not {first['input']!r}"
        quoted = first["type"] == "string_type" and isinstance(value, bool | int | float)
        advice = f"""; to give it as text, quote it: '{name}="…"'""" if quoted else ""
        raise SettingsError(f"{name}={value!r}: {problem[0].lower()}{problem[1:]}{advice}") from None


def expected(hint: Any, finite: bool = False, several: bool = False) -> str:
    """Say what a setting of numbers or switches must be, such as ``a number above 0``; "" for other types.

    Args:
        finite: whether to say that infinity is no such number.
        several: whether to speak of several such values.
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        words = expected(inner[0], finite, several)
        return words and words + "".join(str(each) for each in inner[1:] if isinstance(each, Range))
    if kind in (list, tuple, Sequence):
        words = expected(inner[0], finite, several=True)
        return words and f"{len(inner) if kind is tuple and Ellipsis not in inner else 'a list of'} {words}"
    if kind in (dict, Mapping):
        words = expected(inner[1], finite)
        return words and f"{{NAME: {words}, …}}"
    if kind in (Union, UnionType):
        words = expected(inner[0], finite) if len(inner) == 2 and inner[1] is NoneType else ""
        return words and f"{words} or null"
    if hint is bool:
        return "true or false"
    if hint not in (int, float):
        return ""
    words = "finite " * finite + ("whole number" if hint is int else "number")
    return f"{words}s" if several else f"a {words}"


def locate(name: str, target: str) -> Callable[..., Any]:
    """Import the object that a dotted path names.

    Raises:
        SettingsError: it cannot be imported; names the setting.
    """
    try:
        value = _import(target)
    except Exception as error:
        raise SettingsError(f"{name}={target}: cannot be imported ({error})") from None
    if not callable(value):
        raise SettingsError(f"{name}={target}: expected a class or function, found a {type(value).__name__}")
    return cast(Callable[..., Any], value)


def _import(target: str) -> Any:
    """Import the modules of a dotted path, and take the attributes that follow.

    The current folder is searched too, last: ``python -m`` does so by itself, the command ``dnpo`` does not.
    """
    if "" not in sys.path:
        sys.path.append("")
    path, *rest = target.split(".")
    try:
        found: Any = import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # the module exists, and imports another that does not
            raise
        places = "in the current folder, on PYTHONPATH or among installed packages"
        raise ImportError(f"there is no module {path} {places}") from None
    for name in rest:
        outer, path = path, f"{path}.{name}"
        try:
            found = getattr(found, name) if hasattr(found, name) else import_module(path)
        except ModuleNotFoundError as error:
            if error.name not in (outer, path):  # outer may be a class
                raise
            near = nearest(name, dir(found))
            raise ImportError(f"{outer} has no {name}{f'.{near}' if NEAR in near else ''}") from None
    return found


@contextmanager
def named_within(names: Mapping[str, str]) -> Iterator[None]:
    """Make errors name settings by their place in a run.

    Args:
        names: maps the names in the errors to the names in the run, such as ``{"source": "eval.leaderboard.source"}``.
    """
    try:
        yield
    except DnpoError as error:
        if not names:
            raise
        text = rename_settings(str(error), names)
        if text == str(error):
            raise
        raise type(error)(text) from error


def rename_settings(text: str, names: Mapping[str, str]) -> str:
    """Rename the settings in a text, wherever ``=``, a colon or the name of an inner setting follows."""
    pattern = rf"(?<![\w./])({'|'.join(map(re.escape, names))})(?=[=:]|\.\w)"
    return re.sub(pattern, lambda found: names[found[1]], text)


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Write a sentence that offers the known words nearest to ``word``, or lists them all.

    Settings of the same name are preferred to similar names, first those of the same part.
    """
    known = sorted(key for key in known if not key.split(".")[-1].startswith("_"))
    names = [_join_names(prefix, key) for key in known]
    part, _, last = word.rpartition(".")
    same = [key for key in known if "." in key and key.split(".")[-1] == last]
    related = [key for key in same if part and key.split(".")[0] == part.split(".")[0]]
    close = related or same[:3] or difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if not close and known:  # a name without its part: alhpa for npo.alpha
        ends = difflib.get_close_matches(last, {key.split(".")[-1] for key in known}, n=3, cutoff=0.75)
        close = [key for end in ends for key in known if key.split(".")[-1] == end][:3]
    if close:
        return f" {NEAR} {' or '.join(_join_names(prefix, key) for key in close)}?"
    return f" Known: {', '.join(sorted(names)) or 'none'}."


def offer(word: str, known: Iterable[str], title: str = "Known") -> str:
    """Write a sentence that offers the known words nearest to ``word``, if any are near, and one that lists all."""
    known = list(known)
    close = nearest(word, known)
    return f"{close if NEAR in close else ''} {title}: {', '.join(known) or 'none'}."


def _join_names(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def conf_folder() -> Path:
    """The folder of the settings: ``$DNPO_CONF``, else next to this file (a wheel), else in the checkout.

    Raises:
        SettingsError: there is no such folder.
    """
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
    """Flatten nested settings to dotted names."""
    names: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            names |= flat(value, f"{prefix}{key}.")
        else:
            names[f"{prefix}{key}"] = value
    return names
