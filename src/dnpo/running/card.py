"""Write the model cards of a finished run: each describes a policy, its origin and how to load it."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dnpo.escape import for_markdown, for_markdown_code, for_terminal
from dnpo.policy.base import read_saved
from dnpo.stats.overoptimised import LEARNS_FROM
from dnpo.store import manifest

Kind = Literal["full", "adapter", "base"]
PATH = re.compile(r"(?<![\w.:/~-])(?:~|\.{1,2})?(?:/[\w.@+=-]+){2,}/?|(?<![\w./])(?:~|\.{1,2})(?:/[\w.@+=-]+)+/?")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank accepts


@dataclass(frozen=True)
class SavedPolicy:
    """One policy of a finished run: its entry in the run's summary, and its files in the store.

    Attributes:
        summary: content of ``summary.json``.
        place: index of its row in the summary's table.
        store: the folder of finished stages.
    """

    summary: Mapping[str, Any]
    place: int
    store: Path

    @property
    def row(self) -> Mapping[str, Any]:
        """The policy's row of the table."""
        row: Mapping[str, Any] = self.summary["table"][self.place]
        return row

    @property
    def k(self) -> int:
        """The iteration that trained it; −1 is fine-tuning."""
        return self.place - 1

    @property
    def name(self) -> str:
        """``sft`` or ``iteration-K``."""
        return f"iteration-{self.k}" if self.k >= 0 else "sft"

    @property
    def stage(self) -> str:
        """The stage that trained it, as a path in the store."""
        return str(self.summary["policies"][self.place])

    @property
    def folder(self) -> Path:
        """The folder with its full weights or adapters; empty for the base model itself."""
        return self.store / self.stage / "policy"

    @property
    def adapters(self) -> list[Path]:
        """Its LoRA adapters in training order; each was trained on top of the ones before it."""
        return sorted(self.folder.glob("adapter-*"))

    @property
    def kind(self) -> Kind:
        """The kind of its files: full weights, adapters, or the base model itself."""
        kinds: dict[str, Kind] = {"whole": "full", "adapters": "adapter", "base": "base"}
        return kinds[read_saved(self.folder)["kind"]]

    @property
    def prompts(self) -> Path:
        """The folder of the prompts stage, with the run's tokenizer, and the base model if the run created it."""
        return self.store / str(manifest(self.store / self.stage)["inputs"]["prompts"])

    @cached_property
    def prompt_settings(self) -> Mapping[str, Any]:
        """The settings in the key of the prompts stage: names, commits and content hashes of base model and data."""
        settings: Mapping[str, Any] = manifest(self.prompts)["settings"]
        return settings

    @property
    def base(self) -> str:
        """The base model: its folder, or its name on the hub."""
        own, model = self.prompts / "model", self.summary["settings"]["model"]
        if (own / "config.json").is_file():
            return str(own)
        if model.get("path") is not None:
            return str(Path(self.summary["cwd"], model["path"]).resolve())
        return str(model["name"])

    @property
    def shown_base(self) -> str:
        """The base model as cards name it; see :meth:`show` for paths."""
        given = self.summary["settings"]["model"].get("path")
        return self.show(self.base) if given is None and Path(self.base).is_absolute() else str(given or self.base)

    def show(self, path: str | Path) -> str:
        """Return a path relative to the run's working folder: other people read the cards."""
        return os.path.relpath(path, self.summary["cwd"])

    @property
    def revision(self) -> str | None:
        """The commit of the base model on the hub; None if it is local."""
        revision: str | None = self.prompt_settings["model"].get("revision")
        return revision

    def setting(self, part: str, key: str, default: Any = None) -> Any:
        """Return a setting of the run; the default if the part lacks it or has null.

        If parts differ by iteration, the setting is taken from the iteration that made this policy.
        """
        own = self.summary["settings"].get(part, {})
        if isinstance(own, list):
            own = own[min(max(self.k, 0), len(own) - 1)]
        value = own.get(key)
        return default if value is None else value


def card(saved: SavedPolicy, folder: str, kind: Kind, rank: int, notes: str) -> str:
    """Return the text of a policy's card.

    Args:
        saved: the policy.
        folder: name of the folder that the card is for.
        kind: what that folder contains.
        rank: rank of the adapter in the folder.
        notes: remarks on the weights in the folder.
    """
    sections = [
        _front_matter(saved, kind),
        f"# {for_markdown(_title(saved))}\n\n{_origin(saved)}\n\n{_facts(saved)}",
        f"## How to load it\n\n{notes}\n\n{_loading(saved, folder, kind, rank)}",
        f"## Numbers\n\n{_numbers(saved)}",
        f"## Stages\n\n{_stages(saved)}",
        f"## Settings\n\n{_settings(saved)}",
        f"## Versions\n\n{_versions(saved)}",
    ]
    return shorten_paths("\n\n".join(sections) + "\n")


def shorten_paths(text: str) -> str:
    """Replace paths by their last part: absolute ones, and those that begin with a dot or a tilde.

    A setting's value that is a path is replaced as a whole, since it may have spaces.
    """

    def value(found: re.Match[str]) -> str:
        given = json.loads(found[2])
        path = isinstance(given, str) and given.startswith(("/", "~", "./", "../"))
        return f"{found[1]}{json.dumps(Path(given).name, ensure_ascii=False)}" if path else found[0]

    text = re.sub(r'^( {4}[\w.]+=)("(?:[^"\\]|\\.)*")$', value, text, flags=re.MULTILINE)
    return PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)


def _title(saved: SavedPolicy) -> str:
    method = _option(saved, "method")
    return f"{method}, iteration {saved.k}" if saved.k >= 0 else f"{method}, before iteration 0"


def _front_matter(saved: SavedPolicy, kind: Kind) -> str:
    """Return the metadata for the hub: only names that exist there, and no licence, since the card gives none."""
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
        f"{what}: self-improvement with synthetic preference data. It was made for research; nothing was done to "
        "make it safe. This card grants no licence: the licences of the base model and of the data apply."
    )


def _facts(saved: SavedPolicy) -> str:
    """Return a table of the method, iteration, data, judge and other parts."""
    settings = saved.prompt_settings
    pinned = ("name", "revision", "content")
    rows = {
        "method": _code(_option(saved, "method")),
        "iteration": str(saved.k) if saved.k >= 0 else "before the first",
        "base model": _describe(saved, "model", {n: settings["model"].get(n) for n in pinned})
        + _describe_scratch(saved),
        "data": _describe(saved, "data", {n: settings["data"].get(n) for n in pinned}),
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
    """Return the option chosen for a part, or its ``_target_`` if none was chosen from a folder."""
    chosen = saved.summary["choices"].get(part)
    return str(chosen or saved.setting(part, "_target_", "unnamed"))


def _describe(saved: SavedPolicy, part: str, more: Mapping[str, Any]) -> str:
    listed = {name: value if isinstance(value, list) else [value] for name, value in more.items() if value is not None}
    known = [f"{name} {' '.join(map(_code, values))}" for name, values in listed.items()]
    return ", ".join([_code(_option(saved, part)), *known])


def _describe_scratch(saved: SavedPolicy) -> str:
    return ", made from scratch in the run" if (saved.prompts / "model" / "config.json").is_file() else ""


def _describe_start(saved: SavedPolicy, part: str) -> str:
    """Describe a part and the iteration at which it starts, and say if this policy precedes it."""
    start = int(saved.setting(part, "start", 0))
    if start == 0:
        return _describe(saved, part, {})
    when = f"from iteration {start} on" + ("" if saved.k >= start else ", so not yet here")
    return f"{_describe(saved, part, {})} {when}"


def _lora(saved: SavedPolicy) -> str:
    lora = saved.setting("model", "lora", {})
    kind = saved.setting("model", "quantization")
    under = f", on base weights quantised to {kind}" if kind else ""
    rank = f"rank {lora['rank']}, alpha {lora['alpha']:g}{under}" if lora.get("rank") else ""
    return rank or "none: all weights were trained"


def _loading(saved: SavedPolicy, folder: str, kind: Kind, rank: int) -> str:
    """Return the code that loads the policy with transformers, and the command that serves it with vLLM."""
    hub = saved.prompt_settings["model"].get("name") if kind == "base" else None
    options = [f'revision="{saved.revision}"'] if hub and saved.revision else []
    if kind != "full":  # the base model may be saved in another dtype
        options.append(f'dtype="{saved.setting("model", "dtype", "float32")}"')
    quantised = saved.setting("model", "quantization") if kind == "adapter" else None
    if quantised:
        options.append(f"quantization_config=BitsAndBytesConfig({_quantisation(saved)})")
    code = ["trust_remote_code=True"] if saved.setting("model", "trust_remote_code", False) else []
    loader = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
    imports = {
        "AutoPeftModelForCausalLM": "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
        "AutoModelForCausalLM": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    }[loader] + (", BitsAndBytesConfig" if quantised else "")
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


def _quantisation(saved: SavedPolicy) -> str:
    """The arguments of transformers' ``BitsAndBytesConfig`` that quantise the base as in training."""
    if saved.setting("model", "quantization") == "int8":
        return "load_in_8bit=True"
    dtype = saved.setting("model", "dtype", "float32")
    nested = "bnb_4bit_use_double_quant=True"
    return f'load_in_4bit=True, bnb_4bit_quant_type="nf4", {nested}, bnb_4bit_compute_dtype="{dtype}"'


def _serving(saved: SavedPolicy, folder: str, kind: Kind, rank: int, hub: str | None) -> str:
    pinned = f" --revision {saved.revision}" if saved.revision else ""
    if hub:
        return f"    vllm serve {hub}{pinned} --tokenizer {folder}"
    if kind != "adapter":
        return f"    vllm serve {folder}"
    if saved.setting("model", "quantization"):
        return "vLLM would put the adapter on weights that are not quantised: serve a copy with whole weights instead."
    room = next((size for size in LORA_RANKS if size >= rank), None)
    if room is None:
        return (
            f"vLLM accepts ranks up to {LORA_RANKS[-1]}, but this adapter has {rank}: serve a copy with whole weights "
            "instead."
        )
    lora = f"--enable-lora --max-lora-rank {room} --lora-modules {saved.name}={folder}"
    return f"    vllm serve {saved.shown_base}{pinned} {lora}"


def _numbers(saved: SavedPolicy) -> str:
    """Return the policy's metrics as a table."""
    known = {n: v for n, v in saved.row.items() if v is not None and n not in ("iteration", "seconds")}
    rows = [
        f"| {for_markdown(name)} | {value:.4g} |" if isinstance(value, float) else f"| {for_markdown(name)} | {value} |"
        for name, value in known.items()
    ]
    split = _code(saved.setting("eval", "split", "test"))
    text = (
        f"On the split {split}; `loss/policy` and `loss/noise` are means over the last tenth of the steps, "
        "log-probabilities are in nats."
    )
    if "eval/score" in known:
        judge = "`eval.judge`" if saved.setting("eval", "judge") else "the judge named above"
        learns = LEARNS_FROM.get(saved.summary.get("labelled_by", ""))  # runs of earlier versions do not say
        text += f" `eval/score` comes from {judge}{f'; {learns}' if learns else ''}."
    return "\n".join([f"{text}\n", "| metric | value |", "| --- | --- |", *rows])


def _stages(saved: SavedPolicy) -> str:
    own = [stage for stage in saved.summary["stages"] if stage["iteration"] == saved.row["iteration"]]
    return "\n".join(f"- {for_markdown(stage['title'])}: {_code(stage['stage'] + '/' + stage['key'])}" for stage in own)


def _settings(saved: SavedPolicy) -> str:
    """List all settings as ``part.key=value``.

    The settings of tracking are left out: addresses may contain passwords, and cards are meant for other people.
    """
    public = {part: value for part, value in saved.summary["settings"].items() if part != "tracking"}
    lines = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in _flat(public).items()]
    chosen = [f"{part}={name}" for part, name in saved.summary["choices"].items()]
    text = re.sub(r'://[^/@"\s]+@', "://…@", "\n".join([*chosen, "", *lines]))
    return "\n".join(f"    {line}".rstrip() for line in for_terminal(text).splitlines())


def _versions(saved: SavedPolicy) -> str:
    return ", ".join(f"{name} {version}" for name, version in saved.summary["versions"].items())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names."""
    names: dict[str, Any] = {}
    for key, value in tree.items():
        names |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return names


def _code(value: Any) -> str:
    return for_markdown_code(value)
