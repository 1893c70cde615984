"""Model cards: what a policy is, which run made it and how to load it, from what the run left behind."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dnpo.store import manifest

Kind = Literal["full", "adapter", "base"]
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


@dataclass(frozen=True)
class SavedPolicy:
    """One policy of a finished run: what the run's summary says of it, and where the store has it.

    Attributes:
        place: its row in the summary's table.
        store: the folder of finished stages.
    """

    summary: Mapping[str, Any]
    place: int
    store: Path

    @property
    def row(self) -> Mapping[str, Any]:
        """Its row of the table."""
        found: Mapping[str, Any] = self.summary["table"][self.place]
        return found

    @property
    def k(self) -> int:
        """The iteration that made it; −1 is fine-tuning."""
        return self.place - 1

    @property
    def name(self) -> str:
        """``sft`` or ``iteration-K``."""
        return f"iteration-{self.k}" if self.k >= 0 else "sft"

    @property
    def stage(self) -> str:
        """The stage that made it, as a path in the store."""
        return str(self.summary["policies"][self.place])

    @property
    def folder(self) -> Path:
        """Full weights, adapters, or nothing where it is the base model itself."""
        return self.store / self.stage / "policy"

    @property
    def adapters(self) -> list[Path]:
        """Its LoRA adapters, in the order in which they were trained, each on what those before it give."""
        return sorted(self.folder.glob("adapter-*"))

    @property
    def kind(self) -> Kind:
        """What the store has of it."""
        return "full" if (self.folder / "config.json").is_file() else "adapter" if self.adapters else "base"

    @property
    def prompts(self) -> Path:
        """The stage with the run's tokenizer, and the base model if it was made there."""
        return self.store / str(manifest(self.store / self.stage)["inputs"]["prompts"])

    @cached_property
    def prompt_settings(self) -> Mapping[str, Any]:
        """What decided base model and data, for the store: names with commits, hashes of contents."""
        found: Mapping[str, Any] = manifest(self.prompts)["settings"]
        return found

    @property
    def base(self) -> str:
        """The base model: a folder, or its name on the hub."""
        own, model = self.prompts / "model", self.summary["settings"]["model"]
        if (own / "config.json").is_file():
            return str(own)
        if model.get("path") is not None:
            return str(Path(self.summary["cwd"], model["path"]).resolve())
        return str(model["name"])

    @property
    def revision(self) -> str | None:
        """The commit of a base model that is on the hub."""
        found: str | None = self.prompt_settings["model"].get("revision")
        return found

    def setting(self, part: str, key: str, default: Any = None) -> Any:
        """A setting of the run; the default where the part has none of this name, or null."""
        found = self.summary["settings"].get(part, {}).get(key)
        return default if found is None else found


def card(saved: SavedPolicy, folder: str, kind: Kind, rank: int, notes: str) -> str:
    """The card of a policy.

    Args:
        saved: the policy.
        folder: name of the folder in which the card is to lie.
        kind: what that folder has.
        rank: of the adapter in it.
        notes: what is to be said of it.
    """
    sections = [
        _front_matter(saved, kind),
        f"# {_title(saved)}\n\n{_origin(saved)}\n\n{_facts(saved)}",
        f"## How to load it\n\n{notes}\n\n{_loading(saved, folder, kind, rank)}",
        f"## Numbers\n\n{_numbers(saved)}",
        f"## Stages\n\n{_stages(saved)}",
        f"## Settings\n\n{_settings(saved)}",
        f"## Versions\n\n{_versions(saved)}",
    ]
    return "\n\n".join(sections) + "\n"


def _title(saved: SavedPolicy) -> str:
    method = _option(saved, "method")
    return f"{method}, iteration {saved.k}" if saved.k >= 0 else f"{method}, before iteration 0"


def _front_matter(saved: SavedPolicy, kind: Kind) -> str:
    """What the hub reads. Only names that mean something there; no licence, which is not this program's to give."""
    from huggingface_hub import ModelCardData

    model, data = saved.prompt_settings["model"].get("name"), saved.prompt_settings["data"].get("name")
    content = ModelCardData(
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=model,
        datasets=[data] if data else None,
        tags=["dnpo", _option(saved, "method"), *(["lora"] if kind == "adapter" else [])],
    )
    return f"---\n{content.to_yaml()}\n---"


def _origin(saved: SavedPolicy) -> str:
    last = len(saved.summary["table"]) - 2
    what = (
        f"The policy after iteration {saved.k} (of 0 to {last}) of a run of dnpo"
        if saved.k >= 0
        else "The policy before the first iteration, after supervised fine-tuning if there was any, of a run of dnpo"
    )
    return (
        f"{what}: self-improvement with synthetic preference data. It was made for research; nothing was done for "
        "its safety. This card grants no licence: those of the base model and of the data hold."
    )


def _facts(saved: SavedPolicy) -> str:
    """Method, iteration, data, judge and what else was in force, as a table."""
    made = saved.prompt_settings
    pinned = ("name", "revision", "content")
    rows = {
        "method": _code(_option(saved, "method")),
        "iteration": str(saved.k) if saved.k >= 0 else "before the first",
        "base model": _describe(saved, "model", {n: made["model"].get(n) for n in pinned}) + _describe_scratch(saved),
        "data": _describe(saved, "data", {n: made["data"].get(n) for n in pinned}),
        "judge": _describe(saved, "judge", {"model": saved.setting("judge", "model")}),
        "labels": _describe_start(saved, "dsl"),
        "noise on the reference": _describe_start(saved, "npo"),
        "objective": _describe(saved, "objective", {"beta": saved.setting("objective", "beta")}),
        "supervised fine-tuning": _describe(saved, "sft", {}),
        "trainer": _describe(saved, "trainer", {}),
        "adapters": _lora(saved),
        "seed": str(saved.summary["settings"]["seed"]),
        "stage": _code(saved.stage),
        "code": _code(saved.summary["commit"]) if saved.summary["commit"] else "outside a git checkout",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _option(saved: SavedPolicy, part: str) -> str:
    """The option chosen for a part; of one that was not chosen from a folder, what it is built from."""
    chosen = saved.summary["choices"].get(part)
    return str(chosen or saved.setting(part, "_target_", "unnamed"))


def _describe(saved: SavedPolicy, part: str, more: Mapping[str, Any]) -> str:
    listed = {name: value if isinstance(value, list) else [value] for name, value in more.items() if value is not None}
    known = [f"{name} {' '.join(map(_code, values))}" for name, values in listed.items()]
    return ", ".join([_code(_option(saved, part)), *known])


def _describe_scratch(saved: SavedPolicy) -> str:
    return ", made from scratch in the run" if (saved.prompts / "model" / "config.json").is_file() else ""


def _describe_start(saved: SavedPolicy, part: str) -> str:
    """A part that starts at an iteration, and whether it had here."""
    start = int(saved.setting(part, "start", 0))
    if start == 0:
        return _describe(saved, part, {})
    when = f"from iteration {start} on" + ("" if saved.k >= start else ", so not yet here")
    return f"{_describe(saved, part, {})} {when}"


def _lora(saved: SavedPolicy) -> str:
    lora = saved.setting("model", "lora", {})
    return f"rank {lora['rank']}, alpha {lora['alpha']:g}" if lora.get("rank") else "none: all weights were trained"


def _loading(saved: SavedPolicy, folder: str, kind: Kind, rank: int) -> str:
    """Code for transformers and a command for vLLM."""
    hub = saved.prompt_settings["model"].get("name") if kind == "base" else None
    options = [f'revision="{saved.revision}"'] if hub and saved.revision else []
    if kind != "full":  # the base may have been saved in another
        options.append(f'dtype="{saved.setting("model", "dtype", "float32")}"')
    code = ["trust_remote_code=True"] if saved.setting("model", "trust_remote_code", False) else []
    loader = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
    imports = {
        "AutoPeftModelForCausalLM": "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
        "AutoModelForCausalLM": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    }[loader]
    model = json.dumps(hub) if hub else "folder"
    python = f"""```python
{imports}

folder = {json.dumps(folder, ensure_ascii=False)}  # the folder with this card
tokenizer = AutoTokenizer.from_pretrained({", ".join(["folder", *code])})
model = {loader}.from_pretrained({", ".join([model, *options, *code])})
messages = [{{"role": "user", "content": "…"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens={saved.setting("data", "max_response_tokens", 128)})
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
    return f"{python}\n\n{_serving(saved, folder, kind, rank, hub)}"


def _serving(saved: SavedPolicy, folder: str, kind: Kind, rank: int, hub: str | None) -> str:
    pinned = f" --revision {saved.revision}" if saved.revision else ""
    if hub:
        return f"    vllm serve {hub}{pinned} --tokenizer {folder}"
    if kind != "adapter":
        return f"    vllm serve {folder}"
    room = next((size for size in LORA_RANKS if size >= rank), None)
    if room is None:
        return (
            f"vLLM takes ranks up to {LORA_RANKS[-1]}, and this is {rank}: there the copy with whole weights is needed."
        )
    lora = f"--enable-lora --max-lora-rank {room} --lora-modules {saved.name}={folder}"
    return f"    vllm serve {saved.base}{pinned} {lora}"


def _numbers(saved: SavedPolicy) -> str:
    """Its row of the run's table."""
    known = {n: v for n, v in saved.row.items() if v is not None and n not in ("iteration", "seconds")}
    rows = [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in known.items()
    ]
    judged = " `eval/score` is by the judge named above, who also labels where labels go by score."
    split = saved.setting("eval", "split", "test")
    text = f"On the split `{split}`; losses are means over the last tenth of the steps, log-probabilities are in nats."
    return "\n".join(
        [f"{text}{judged if 'eval/score' in known else ''}\n", "| metric | value |", "| --- | --- |", *rows]
    )


def _stages(saved: SavedPolicy) -> str:
    own = [stage for stage in saved.summary["stages"] if stage["iteration"] == saved.row["iteration"]]
    return "\n".join(f"- {stage['title']}: {_code(stage['stage'] + '/' + stage['key'])}" for stage in own)


def _settings(saved: SavedPolicy) -> str:
    """All settings as ``part.key=value``, but for where the run was tracked: cards are for others, and an address may
    carry a password."""
    told = {part: value for part, value in saved.summary["settings"].items() if part != "tracking"}
    lines = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in _flat(told).items()]
    chosen = [f"{part}={name}" for part, name in saved.summary["choices"].items()]
    text = re.sub(r'://[^/@"\s]+@', "://…@", "\n".join([*chosen, "", *lines]))
    return f"```\n{text}\n```"


def _versions(saved: SavedPolicy) -> str:
    return ", ".join(f"{name} {version}" for name, version in saved.summary["versions"].items())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _code(value: Any) -> str:
    return f"`{value}`"
