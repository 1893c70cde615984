"""Push a policy of a finished run, and the pairs it was trained on, to the hub that ``HF_ENDPOINT`` names.

What is pushed does not name folders, users or keys of this machine, or the machine itself: paths on cards are shortened
to their last part, and all texts of the model and the cards are searched before anything is sent.
"""

import getpass
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dnpo.errors import SettingsError
from dnpo.escape import for_markdown, for_markdown_code
from dnpo.running.card import SavedPolicy, shorten_paths
from dnpo.running.export import CARD
from dnpo.running.secrets import KEY, PASSWORD, QUERY
from dnpo.wording import plural

PAIRS = "pairs.jsonl"
TRAINED_ON = ("curriculum", "pairs", "optimise")  # stages with the pairs of an iteration; a live training makes its own
TEXTS = (".md", ".json", ".jinja", ".txt")  # files of a model that are searched
NAMES_A_PATH = ("name_or_path", "_name_or_path", "base_model_name_or_path")  # fields that libraries write
SHORTEST = 3  # minimum length of the name of a user or a machine to look for
Kind = Literal["model", "dataset"]


class Pushed(NamedTuple):
    """A repository: its kind, the address of its page, and what it now contains."""

    kind: Kind
    url: str
    what: str


def push(
    policy: SavedPolicy,
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Pushed]:
    """Push a copy of a policy, and the pairs it was trained on if there are any.

    Args:
        policy: the policy.
        folder: its copy that :func:`dnpo.running.export.export` wrote; the paths on its card are shortened.
        repo: ``USER/NAME`` or ``NAME``: a model, and a data set of the same name for the pairs.
        public: whether others may see them; if not, a new repository is private, and an existing public one refused.
        say: receives a message about what is left out.

    Raises:
        SettingsError: a file would reveal this machine, or the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    folders: list[tuple[Kind, Path, str]] = [("model", folder, f"{policy.name}, its tokenizer and card")]
    pairs = find_pairs(policy)
    _clean(folder)
    aside = folder.with_name(f".{folder.name}.pairs.{os.getpid()}")
    try:
        if pairs is None:
            say(f"{policy.name} was trained on no pairs: only the model is pushed")
        else:
            aside.mkdir()
            shutil.copyfile(pairs, aside / PAIRS)
            with pairs.open(encoding="utf-8") as stream:
                rows = sum(1 for _ in stream)
            (aside / CARD).write_text(shorten_paths(_card_of_pairs(policy, rows)), encoding="utf-8")
            folders.append(("dataset", aside, f"the {plural(rows, 'pair')} it was trained on, and their card"))
        for _, each, _ in folders:
            _search(each, repo)
        with _explained(repo, api.endpoint):
            return [_send(api, kind, each, repo, public, what) for kind, each, what in folders]
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def find_pairs(policy: SavedPolicy) -> Path | None:
    """The file with the pairs that a policy was trained on; None if it was trained on none."""
    own = [stage for stage in policy.summary["stages"] if stage["iteration"] == policy.row["iteration"]]
    for name in TRAINED_ON:
        for stage in own:
            path = policy.store / str(stage["stage"]) / str(stage["key"]) / PAIRS
            if stage["stage"] == name and path.is_file():
                return path
    return None


def _send(api: Any, kind: Kind, folder: Path, repo: str, public: bool, what: str) -> Pushed:
    made = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
    if not public and not api.repo_info(made.repo_id, repo_type=kind).private:
        raise SettingsError(
            f"push={repo}: this {'data set' if kind == 'dataset' else kind} exists and is public; give public=true, or "
            "another name"
        )
    api.upload_folder(
        repo_id=made.repo_id, repo_type=kind, folder_path=folder, commit_message="Push from a run of dnpo"
    )
    return Pushed(kind, str(made), what)


@contextmanager
def _explained(repo: str, endpoint: str) -> Iterator[None]:
    """Turn the library's errors into one line that says what to change."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    where = f"push={repo}: {re.sub(r'://[^/@]+@', '://…@', endpoint)}"
    try:
        yield
    except HFValidationError as error:
        raise SettingsError(f"push={repo}: expected USER/NAME or NAME ({error})") from error
    except LocalTokenNotFoundError as error:
        raise SettingsError(
            f"{where} needs a token: give one that may write in HF_TOKEN, or call hf auth login"
        ) from error
    except OfflineModeIsEnabled as error:
        raise SettingsError(f"push={repo}: HF_HUB_OFFLINE is set, so nothing is sent; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        told = {
            401: "does not accept the token (401): give a valid one in HF_TOKEN, or call hf auth login",
            403: "does not let this token write there (403): give one that may write to this name, or another name",
            404: "has no such name (404), or does not show it to this token",
        }
        raise SettingsError(f"{where} {told.get(status, f'answered {status}: {_last_line(error)}')}") from error
    except (OSError, RuntimeError) as error:
        raise SettingsError(
            f"{where} cannot be reached ({_last_line(error)}); the copy is complete, push it later"
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests"):
            raise
        raise SettingsError(f"{where} cannot be reached ({_last_line(error)})") from error


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


# --- nothing of this machine


def _clean(folder: Path) -> None:
    """Shorten the paths on a copy's card, and remove those that libraries wrote into its configuration."""
    card = folder / CARD
    card.write_text(shorten_paths(card.read_text(encoding="utf-8")), encoding="utf-8")
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        paths = [name for name in NAMES_A_PATH if str(content.get(name, "")).startswith(("/", "~", "."))]
        if paths:
            kept = {name: value for name, value in content.items() if name not in paths}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _search(folder: Path, repo: str) -> None:
    """Refuse to push a text that reveals this machine.

    Raises:
        SettingsError: a text does; the message names the file and what it would reveal.
    """
    places = {str(Path.home()), str(Path.cwd()), os.path.realpath(Path.cwd())} - {"/"}
    own = [each for each in places if len(Path(each).parts) > 2]  # not /root, which many texts have
    names = {socket.gethostname()}
    with suppress(OSError, KeyError):
        names.add(getpass.getuser())
    inside = [re.compile(rf"[/@]{re.escape(name)}(?:[/:]|$)", re.MULTILINE) for name in names if len(name) >= SHORTEST]
    token = _token()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (*TEXTS, ".jsonl"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found = {
            "a key": bool(token and token in text) or any(each.search(text) for each in (KEY, PASSWORD, QUERY)),
            "a folder of this machine": any(each in text for each in (own if path.suffix == ".jsonl" else places)),
        }
        if path.suffix != ".jsonl":  # pairs are texts of the data and the policy, which may have such words
            found["a user or machine"] = any(each.search(text) for each in inside)
        told = [what for what, there in found.items() if there]
        if told:
            raise SettingsError(
                f"push={repo}: {path.name} would reveal {' and '.join(told)}, so nothing is pushed; push a copy "
                "(to=FOLDER) by hand after removing it"
            )


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


# --- the card of the pairs


def _card_of_pairs(policy: SavedPolicy, rows: int) -> str:
    from huggingface_hub import DatasetCardData

    method = str(policy.summary["choices"].get("method", "unnamed"))
    content = DatasetCardData(
        tags=list(dict.fromkeys(["dnpo", method, "preference"])), task_categories=["text-generation"]
    )
    flipped = policy.row.get("pairs/flipped")
    labels = "" if flipped is None else f" In {flipped:,} of them the generated response is the chosen one."
    data = policy.prompt_settings["data"].get("name")
    source = f"The prompts are from {for_markdown_code(data)}." if data else "The prompts are from the run's own data."
    return f"""---
{content.to_yaml()}
---

# Pairs of {for_markdown(method)}, iteration {policy.k}

The {rows:,} preference pairs on which iteration {policy.k} of a run of dnpo (method {for_markdown_code(method)}, seed \
{policy.summary["settings"]["seed"]}) was trained.{labels} {source} Generated responses are made by a model and may be \
wrong. This card grants no licence: the licences of the data and of the model apply.

{for_markdown_code(PAIRS)} has a pair in each line, in TRL's conversational preference format: `prompt`, `chosen` and \
`rejected` as lists of messages, and the `id`, sources (`human`, or `policy@k` for responses of the policy before \
iteration k), scores, strength and weight of the pair.
"""
