"""The key of a part: a field is neutral if and only if another value of it does not change the key."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir

from dnpo.commands.common import plain
from dnpo.commands.train import PARTS
from dnpo.judges.asked import prices, questions
from dnpo.settings import IS_PLACE, build, check, conf_folder, locate, neutral_names, part_key

CONF = conf_folder()
HUB = ["path=null", "name=some/model", "revision=0123456789abcdef"]
# Settings with which an option can be built and every field matters; a second entry names a model in the other way.
GIVEN: dict[tuple[str, str], list[list[str]]] = {
    ("model", "hub"): [["revision=0123456789abcdef", "lora.rank=4"]],
    ("data", "hub"): [["sample=1", "revision=0123456789abcdef"]],
    ("model", "local"): [["path=model", "lora.rank=4"]],
    ("curriculum", "prune"): [["encoder=model"]],
    ("model", "tiny"): [["lora.rank=4"]],
    ("generate", "server"): [["engine.base_url=http://b/v1"]],
    ("npo", "offset"): [["shift=1"]],
    ("judge", "openai"): [["model=gpt-4o"]],
    ("judge", "hf"): [["path=model"], HUB],
    ("judge", "reward"): [["path=model"], HUB],
    ("judge", "noisy"): [["judge@judge.wraps=openai", "wraps.model=gpt-4o", "wraps.mode=pairwise"]],
    **{("data", kind): [["path=rows", "sample=1"]] for kind in ("jsonl", "parquet", "csv", "arrow")},
    ("data", "mix"): [["+data@data.sources.world=tinyworld_smoke", "weights={world: 1}", "rows=5"]],
    **{
        (group, path.stem): [["keep=best", "steps=5"]]
        for group in ("trainer", "sft")
        for path in (CONF / group).glob("*.yaml")
    },
}
CASES = [
    pytest.param(group, path.stem, given, id=f"{group}={path.stem}-{number}")
    for group in PARTS
    if group not in ("tracking", "launch")  # are in no key
    for path in sorted((CONF / group).glob("*.yaml"))
    for number, given in enumerate(GIVEN.get((group, path.stem), [[]]))
]
# Values that the rules of the part allow, for fields whose next value would break a rule.
OTHER: dict[str, Any] = {
    "width": 192,
    "question": "{question} {y1} {y2}?",
    "heads": 2,
    "prices": str(prices.SHIPPED),
    "columns": {"prompt": "question"},
    "template": "{question} {y1} {y2}?",
    "template_arguments": {"enable_thinking": False},
    "pattern": r"Score: (\d+)",
    "chat_template_kwargs": {"a": 1},
    "extra_body": {"a": 1},
    "roles": {"bot": "assistant"},
    "shares": [1.0, 3.0, 2.0],
    "weights": {"world": 2.0},
    "engine": {"_target_": "dnpo.generate.server.Server", "base_url": "http://a/v1", "version": "new"},
}
# Fields that are not neutral but do not change the key of their part, with the reason.
ELSEWHERE = {
    **dict.fromkeys(
        ("max_prompt_tokens", "max_response_tokens", "long_responses"), "the stage that encodes puts them into its key"
    ),
    "lora": "the stages that train put it into their keys",
    "join": "it counts where a column is joined of several: test_files.py",
}


def other_value(hint: Any, value: Any) -> Any:
    """A value of this type that is not ``value``."""
    if get_origin(hint) is Annotated:
        return other_value(get_args(hint)[0], value)
    if get_origin(hint) in (Union, UnionType):
        return other_value(next(each for each in get_args(hint) if each is not NoneType), value)
    if get_origin(hint) is Literal:
        return next(each for each in get_args(hint) if each != value)
    if hint is bool:
        return not value
    if hint is int:
        return 7 if value is None else value + 1
    if hint is float:
        return value / 2 if value else 0.25
    if hint is str:
        return f"{value or ''}x"
    return None


def vary(target: Any, name: str, value: Any) -> Any:
    """Another value of one setting; for a nested part, the part with one setting changed."""
    if name in OTHER:
        return OTHER[name]
    if name == "sources":
        source, settings = next(iter(value.items()))
        return {source: vary(None, source, settings)}
    if isinstance(value, Mapping) and "_target_" in value:
        inner = next(key for key, each in value.items() if isinstance(each, int | float) and not isinstance(each, bool))
        return {**value, inner: value[inner] + 1}
    if isinstance(value, Mapping):
        return {**value, "second": {"_target_": "dnpo.judges.longer.Longer"}}
    return other_value(get_type_hints(target, include_extras=True)[name], value)


def in_group(group: str, given: Sequence[str]) -> list[str]:
    """Arguments for settings of a group; those that begin with + or choose a part are arguments already."""
    return [each if each.startswith("+") or "@" in each else f"{group}.{each}" for each in given]


def moved(value: str | None, folder: Path) -> str:
    """The same contents at another path; by default those of the shipped template."""
    source = Path(value) if value is not None else questions.SHIPPED / "score.yaml"
    copy = folder / "moved" / source.name
    copy.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, copy, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, copy)
    return str(copy)


def change(place: Path) -> None:
    """Change the contents at a path."""
    if place.is_dir():
        (place / "model.safetensors").write_bytes(b"other")
    elif place.suffix == ".yaml":
        place.write_text(place.read_text().replace("version: ", "version: other-"))
    else:
        place.write_bytes(place.read_bytes() * 2)


@pytest.mark.parametrize(("group", "option", "given"), CASES)
def test_neutral_fields_are_exactly_those_that_do_not_change_the_key(
    group: str, option: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path does not change the key if its contents are the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "rows").write_text('{"prompt": "a", "response": "b"}\n')
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = plain(compose("train", overrides=[f"{group}={option}", *in_group(group, given)]))
    settings = {key: value for key, value in tree[group].items() if key != "start"}
    target: Any = locate(group, settings["_target_"])
    if not dataclasses.is_dataclass(target):
        pytest.skip(f"{settings['_target_']} is no dataclass of settings yet")

    def key(**changed: Any) -> Any:
        return part_key(build(group, check(group, settings | changed)))

    plain_key, neutral = key(), neutral_names(target)
    wrong = {}
    for field in dataclasses.fields(target):
        name, value = field.name, settings.get(field.name, field.default)
        by_name = settings.get("name") is not None
        if (name == "path" and by_name) or (name in ("name", "revision") and "path" in settings and not by_name):
            continue  # one of both names the model
        if name == "engine" and group == "rollout" and option == "live":
            continue  # refused: test_engine.py
        if field.metadata.get(IS_PLACE) and name in ("base_url", "same_as", "headers"):
            continue  # an address and its settings: test_endpoints.py
        if field.metadata.get(IS_PLACE):
            place = moved(value, tmp_path)
            same = key(**{name: place}) == plain_key
            change(Path(place))
            if not same or key(**{name: place}) == plain_key:
                wrong[name] = "contents"
            continue
        unchanged = key(**{name: vary(target, name, value)}) == plain_key
        if unchanged != (name in neutral or name in ELSEWHERE):
            wrong[name] = "leaves the key as it is" if unchanged else "changes the key"
    assert wrong == {}
