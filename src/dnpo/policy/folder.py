"""Check a model's folder by its files, without reading weights or importing heavy modules.

The check finds files whose contents do not match their names, and files that contradict each other. ``complete.py``
checks whether the tensors fit the model, with the model's code.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dnpo.errors import ModelError

CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
STACK = "policy.json"  # describes adapters on quantised weights
WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
OBJECTS = (
    *(CONFIG, GENERATION, ADAPTER, INDEX, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json"),
)
PARTS = {"tokenizer.json": ("model", "added_tokens")}  # every such file has these keys
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
TOKENS = tuple(
    f"{name}_token_id"
    for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start", "forced_bos", "forced_eos")
)
OTHERS = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja")
TOKENIZERS = ("tokeniz*", "vocab*", "*.model", "*.tiktoken")
BEGINNINGS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`",
    b"<": "is a page of a web site, not the file itself; download it again",
    b"PK\x03\x04": "is a pickle of torch (or another zip), despite its name",
    b"\x80": "is a pickle, despite its name",
    b"GGUF": "is a GGUF file, despite its name",
}
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
FLOATS = {"F16", "BF16", "F32", "F64"}
LONGEST_HEADER = 100_000_000  # bytes; safetensors has the same limit
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
NAMED = 3  # examples in a message


class Kept(NamedTuple):
    """A tensor of a safetensors file: its type, as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def name_some(names: Collection[str]) -> str:
    """List the first few names, and indicate if there are more."""
    ordered = sorted(names)
    return ", ".join(ordered[:NAMED]) + (", …" if len(ordered) > NAMED else "")


def count_tensors(names: Collection[str]) -> str:
    """Give the number of tensors and the names of the first few."""
    return f"{len(names):,} tensor{'' if len(names) == 1 else 's'} ({name_some(names)})"


def explain_missing(folder: Path, marker: str = CONFIG) -> str:
    """Explain why a folder without ``config.json`` (or another marker) is not a model, and what it contains instead."""
    expected = f"expected a folder with {marker}, *.safetensors and a tokenizer"
    if folder.is_file():
        return f"no model there, only a file; {expected}"
    if (folder / marker).is_symlink():
        return f"no model there: {_describe_link(folder / marker)}; {expected}"
    if (folder / ADAPTER).is_file():
        return f"no model there, but {_describe_adapter(folder)}"
    within = sorted(file.parent.name for file in folder.glob(f"*/{marker}")) if folder.is_dir() else []
    hint = f" (its subfolders {name_some(within)} have one)" if within else ""
    return f"no model there; {expected}{hint}"


def check_name(name: str, what: str) -> None:
    """Check that a name on the hub is not also a local folder, which transformers would read instead.

    Raises:
        ModelError: there is such a folder.
    """
    if Path(name).is_dir():
        setting = what.partition("=")[0].removesuffix("name") + "path"
        raise ModelError(f"{what}: there is a folder of that name, which would be read instead; give {setting}={name}")


def check_folder(folder: Path, what: str, *, trained: bool = False) -> None:
    """Check a model's folder.

    Args:
        what: the setting and its value, for the message.
        trained: whether the weights will be trained and saved; then they must not be quantised.

    Raises:
        ModelError: names every file that cannot be used, or that contradicts another.
    """
    problems = list(_find_problems(folder, trained))
    if problems:
        raise ModelError(f"{what}: {'; '.join(problems)}")


def read_quantisation(folder: Path) -> str | None:
    """The kind of quantisation that a configuration names; None if it names none."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    return str(found.get("quant_method", "of an unknown kind")) if isinstance(found, dict) else str(found)


def read_context(folder: Path) -> int | None:
    """The tokens that a model reads at most; None if its configuration names none, or cannot be read."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, LookupError, TypeError):  # what is wrong is said when the model is loaded
        return None
    return found if isinstance(found, int) else None


def adapters(folder: Path) -> list[Path]:
    """The folders of a policy's LoRA adapters, in the order in which they were trained."""
    return sorted(folder.glob("adapter-*"))


def check_stack(folder: Path, quantisation: str | None) -> None:
    """Check that no adapter of a policy is missing, and that they were trained on weights quantised like the base.

    Args:
        quantisation: how the base is quantised; None if it is not.

    Raises:
        ModelError: an adapter is missing, or the quantisation differs.
    """
    found = [adapter.name for adapter in adapters(folder)]
    stack: dict[str, Any] = {"quantization": None, "adapters": found}
    if (folder / STACK).is_file():
        try:
            stack |= _read_object(folder / STACK)
        except (OSError, ValueError) as error:
            raise ModelError(f"model: {folder / STACK} cannot be read ({error})") from error
    if found and stack["quantization"] != quantisation:
        made, asked = (kind or "weights that are not quantised" for kind in (stack["quantization"], quantisation))
        raise ModelError(
            f"model.quantization: the adapters in {folder} were trained on {made}, but the base is {asked}"
        )
    if stack["adapters"] != found:
        named = ", ".join(map(str, stack["adapters"]))
        raise ModelError(f"model: {folder / STACK} names {named}; there are {', '.join(found) or 'no adapters'}")


def find_files(where: str, revision: str | None) -> Path | None:
    """The folder of a model's files on this machine; None if they are not downloaded from the hub yet."""
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(where, CONFIG, revision=revision)
    folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        return None
    try:
        return folder if all(file.is_file() for file in weight_files(folder)) else None
    except (ValueError, LookupError):
        return folder  # the folder exists but cannot be read; ``check_folder`` reports that


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, as transformers chooses them.

    Raises:
        OSError, ValueError: the index cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def read_header(file: Path) -> dict[str, Kept]:
    """Read which tensors a safetensors file has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a complete safetensors file; the message is a predicate of the file's name.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ValueError("is not a safetensors file, or only the beginning of one")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            kept = {name: Kept(str(each["dtype"]), tuple(each["shape"])) for name, each in header.items()}
            spans = sorted((*each["data_offsets"], name) for name, each in header.items())
            sizes = {name: BYTES.get(each.dtype, 0) * math.prod(each.shape) for name, each in kept.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"is not a safetensors file: its header cannot be read ({error})") from error
    end = 0
    for first, last, name in spans:
        if first != end or (sizes[name] and last - first != sizes[name]):
            raise ValueError(f"is damaged: the size of {name} does not match its type and shape")
        end = last
    if size != 8 + length + end:
        raise ValueError(f"has {size:,} bytes where its header says {8 + length + end:,}; copy or download it again")
    return kept


def _find_problems(folder: Path, trained: bool) -> Iterator[str]:
    found: dict[str, dict[str, Any]] = {}
    sound = True
    for name in (*OBJECTS, *OTHERS):
        file = folder / name
        problem = _describe_impostor(file)
        if problem is None and name in OBJECTS and file.is_file():
            try:
                found[name] = _read_object(file)
                if lacking := [key for key in PARTS.get(name, ()) if key not in found[name]]:
                    problem = f"{name} is not a tokenizer file: it has no {' and no '.join(lacking)}"
            except (OSError, ValueError) as error:
                problem = f"{name} cannot be read ({error})"
        if problem is not None:
            sound = False
            yield problem
    if not sound or CONFIG not in found:
        return
    config = found[CONFIG]
    if ADAPTER in found:
        yield f"it has {CONFIG} and {_describe_adapter(folder)}; take {ADAPTER} out if it is merged already"
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        yield f"{CONFIG} names no model_type, so the kind of model is unknown"
    if trained and (kind := read_quantisation(folder)) is not None:
        yield (
            f"{CONFIG} says that its weights are quantised ({kind}): such weights are not trained here, and an adapter "
            "merged into them would be rounded; give the model in float32, bfloat16 or float16"
        )
    for size in SIZES:
        value = config.get(size)
        if isinstance(value, int) and value < 1:
            yield f"{size} is {value} in {CONFIG}, expected 1 or more"
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        yield "it has no tokenizer: expected tokenizer.json; save it along with the model"
    text = config.get("text_config")
    for source, settings in ((CONFIG, config), (CONFIG, text), (GENERATION, found.get(GENERATION))):
        if isinstance(settings, dict):
            yield from _check_ids(settings, source, _vocabulary(config))
    yield from _check_weights(folder, found.get(INDEX), read_quantisation(folder) is not None)


def _describe_impostor(file: Path) -> str | None:
    """Describe a file whose contents do not match its name; None if they do."""
    if file.is_symlink() and not file.exists():
        return _describe_link(file)
    if not file.exists():
        return None
    if not file.is_file():
        return f"{file.name} is a folder, not a file"
    with file.open("rb") as opened:
        beginning = opened.read(64)
    if not beginning and file.suffix != ".jinja":
        return f"{file.name} is empty"
    for start, what in BEGINNINGS.items():
        # like a web page, a template may begin with "<"; a safetensors header may begin with any byte
        if beginning.startswith(start) and not (start == b"<" and file.suffix in (".jinja", ".txt")):
            if start in (b"<", b"\x80") and file.suffix == ".safetensors" and beginning[8:9] == b"{":
                continue
            return f"{file.name} {what}"
    if file.suffix in (".jinja", ".txt"):
        try:
            file.read_text(encoding="utf-8")
        except ValueError as error:
            return f"{file.name} is not text ({error})"
    return None


def _describe_link(file: Path) -> str:
    return f"{file.name} is a link to {file.readlink()}, which is not there"


def _describe_adapter(folder: Path) -> str:
    try:
        base = _read_object(folder / ADAPTER).get("base_model_name_or_path")
    except (OSError, ValueError):
        base = None
    named = base if isinstance(base, str) and base.strip() else "a model that it does not name"
    return (
        f"an adapter ({ADAPTER}) on {named}; merge it with peft (merge_and_unload), save the merged model with its "
        "tokenizer, and give that folder"
    )


def _read_object(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, not {type(content).__name__}")
    return content


def _check_ids(settings: Mapping[str, Any], file: str, vocabulary: int | None) -> Iterator[str]:
    """Check that the token ids in a file are within the vocabulary; -1 for padding means the last one."""
    for name in TOKENS:
        value = settings.get(name)
        for number in value if isinstance(value, list) else [value]:
            if number is None or (number == -1 and name == "pad_token_id"):
                continue
            if not isinstance(number, int) or isinstance(number, bool):
                yield f"{name} in {file} is {number!r}, expected a token id"
            elif number < 0 or (vocabulary is not None and number >= vocabulary):
                end = "" if vocabulary is None else f", and the vocabulary in {CONFIG} ends at {vocabulary - 1:,}"
                yield f"{name} in {file} is {number:,}{end}; expected the id of one of its tokens"


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    """The number of tokens (for a multimodal model, in its text settings); None if it is not given."""
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, dict) else {}):
        size = settings.get("vocab_size")
        if isinstance(size, int) and size > 0:
            return size
    return None


def _check_weights(folder: Path, index: Mapping[str, Any] | None, quantised: bool) -> Iterator[str]:
    """Check the index and the headers of the weights."""
    single = folder / WEIGHTS
    if (problem := _describe_impostor(single)) is not None:
        yield problem
        return
    placed: dict[str, str] = {}
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            yield f"{INDEX} has no weight_map from tensors to files"
            return
        placed = weight_map
        if single.is_file() and set(placed.values()) != {WEIGHTS}:
            yield f"there are two sets of weights, {WEIGHTS} and the files of {INDEX}; take one of them out"
            return
        gone = {name for name in placed.values() if not (folder / name).exists()}
        if gone:
            yield f"{len(gone)} of the {len(set(placed.values()))} files of {INDEX} are not there: {name_some(gone)}"
            return
    files = weight_files(folder)
    if not files:
        yield _describe_other_weights(folder)
        return
    headers: dict[str, dict[str, Kept]] = {}
    for file in files:
        problem = _describe_impostor(file)
        try:
            headers[file.name] = {} if problem is not None else read_header(file)
        except (OSError, ValueError) as error:
            problem = f"{file.name} {error}" if isinstance(error, ValueError) else f"{file.name}: {error.strerror}"
        if problem is not None:
            yield problem
            return
    amiss = {name for name, file in placed.items() if name not in headers.get(file, {})}
    if amiss:
        yield f"not in the file that {INDEX} names: {count_tensors(amiss)}"
    twice = {name for name, count in Counter(name for each in headers.values() for name in each).items() if count > 1}
    if twice:
        yield f"in several files: {count_tensors(twice)}"
    packed = {
        f"{name} ({each.dtype})"
        for header in headers.values()
        for name, each in header.items()
        if each.dtype not in FLOATS and name.endswith((".weight", ".bias"))
    }
    if packed and not quantised:
        yield f"not floating-point, though {CONFIG} names no quantisation: {count_tensors(packed)}"


def _describe_other_weights(folder: Path) -> str:
    """Describe what the folder contains instead of readable weights."""
    pickled = sorted({file.name for pattern in PICKLED for file in folder.glob(pattern)})
    if pickled:
        return (
            f"its weights are pickled ({name_some(pickled)}), which is not read here, since a pickle can run any code; "
            "if you trust them, load them with transformers, and save_pretrained() writes safetensors"
        )
    others = sorted(file.name for end in ("safetensors", "gguf", "h5", "msgpack") for file in folder.glob(f"*.{end}"))
    there = f"; there is {name_some(others)}" if others else ""
    return f"there are no weights: expected {WEIGHTS}, or {INDEX} with its files{there}"
