"""A policy and its pairs are pushed to a hub, private, without traces of this machine; errors say what to change."""

import getpass
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from dnpo.commands.export import main
from dnpo.running.card import shorten_paths

from .hub_server import TOKEN, Hub, hub
from .test_export import left

__all__ = ["left"]  # a fixture

ROWS = 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go by the older protocol
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


@pytest.fixture
def run(left: Callable[..., Any]) -> Any:
    """A run by hand whose settings name folders of this machine; iteration 1 has pairs."""
    made = left()
    content = made.summary
    content["settings"] |= {
        "ledger": str(made.project / "led ger.sqlite"),
        "store": str(made.store),
        "data": {"path": "../../somebody/rows.jsonl", "max_response_tokens": 24},
        "launch": {"through": f"srun --chdir {made.project}/deep/er"},
    }
    content["stages"] += [{"title": "iteration 1 · label", "stage": "pairs", "key": "k", "iteration": 1}]
    content["table"][2]["pairs/flipped"] = 1
    (made.run / "summary.json").write_text(json.dumps(content))
    folder = made.store / "pairs" / "k"
    folder.mkdir(parents=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"id": f"p{n}", "prompt": []}) + "\n" for n in range(ROWS)))
    return made


def refuse(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1


def test_policy_and_pairs_are_pushed_private_with_cards(
    run: Any, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run.run), "push=me/good"])
    said = capsys.readouterr().out
    assert f"{server.address}/me/good has iteration-1, its tokenizer and card (private)" in said
    assert f"{server.address}/datasets/me/good has the {ROWS} pairs it was trained on, and their card (private)" in said
    assert server.private == {("model", "me/good"): True, ("dataset", "me/good"): True}
    model = server.of("model", "me/good")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"} <= set(model)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in model.items():
        (fetched / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(fetched)
    assert ModelCard.load(fetched / "README.md").data.to_dict()["library_name"] == "transformers"
    pairs = server.of("dataset", "me/good")
    assert set(pairs) == {"README.md", "pairs.jsonl"}
    assert pairs["pairs.jsonl"] == (run.store / "pairs" / "k" / "pairs.jsonl").read_bytes()
    text = pairs["README.md"].decode()
    assert f"The {ROWS} preference pairs on which iteration 1" in text
    assert "In 1 of them the generated response is the chosen one." in text


def test_nothing_that_is_pushed_reveals_this_machine(run: Any, server: Hub) -> None:
    main([str(run.run), "push=me/good"])
    texts = {name: text.decode(errors="replace") for (*_, name), text in server.files.items()}
    for name, text in texts.items():
        for private in (str(run.project), str(Path.home()), str(Path.cwd()), "somebody", "secret", TOKEN):
            assert private not in text, (name, private)
        for person in (getpass.getuser(), socket.gethostname()):
            assert f"/{person}/" not in text, (name, person)
    card = server.files["model", "me/good", "README.md"].decode()
    assert 'ledger="led ger.sqlite"' in card  # the last part stays
    assert 'data.path="rows.jsonl"' in card
    assert "srun --chdir er" in card


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("in /home/anna/store and", "in store and"),
        ('    data.path="/home/Anna B/rows.jsonl"', '    data.path="rows.jsonl"'),
        ("~/secret/model", "model"),
        ("../other/model.", "model."),
        ("https://huggingface.co/some/model", "https://huggingface.co/some/model"),
        ("some/model", "some/model"),
        ("optimise/0123abc and eval/accuracy", "optimise/0123abc and eval/accuracy"),
        ("s3://bucket/folder/x", "s3://bucket/folder/x"),
    ],
)
def test_paths_are_shortened_and_names_are_not(text: str, short: str) -> None:
    assert shorten_paths(text) == short


def test_text_that_would_reveal_this_machine_stops_the_push(
    run: Any, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.store / "pairs" / "k" / "pairs.jsonl"
    for text, what in ((f"see {Path.cwd()}/x", "a folder of this machine"), (f"key {TOKEN}", "a key")):
        path.write_text(json.dumps({"id": text}) + "\n")
        refuse(str(run.run), "push=me/good")
        assert f"push=me/good: pairs.jsonl would reveal {what}, so nothing is pushed" in capsys.readouterr().err
    assert server.requests == []


def test_a_public_repository_is_written_only_if_asked_for(
    run: Any, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.private["model", "me/good"] = False
    refuse(str(run.run), "push=me/good")
    assert "push=me/good: this model exists and is public; give public=true" in capsys.readouterr().err
    assert server.files == {}
    main([str(run.run), "push=me/good", "public=true"])
    assert server.private["dataset", "me/good"] is False
    assert server.of("model", "me/good")


def test_a_policy_without_pairs_is_pushed_alone(run: Any, server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run.run), "iteration=sft", "push=me/good"])
    assert "sft was trained on no pairs: only the model is pushed" in capsys.readouterr().out
    assert server.of("model", "me/good")
    assert not server.of("dataset", "me/good")


def test_errors_of_the_hub_give_advice(
    run: Any, server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        refuse(str(run.run), "push=me/good")
        said = capsys.readouterr().err
        assert TOKEN not in said
        first, answer = said.splitlines()
        assert first.startswith("dnpo "), said
        return answer

    server.refuses = {"/api/repos/create": 403}
    assert re.match(rf"error: push=me/good: {server.address} does not let this token write there \(403\)", told())
    server.refuses = {"/api/models/me/good/commit": 403}
    assert "(403)" in told()
    server.refuses = {}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token (401): give a valid one in HF_TOKEN" in told()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refuse(str(run.run), "push=not a name!")
    assert "push=not a name!: expected USER/NAME or NAME" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert re.search(r"push=me/good: http://127\.0\.0\.1:9 cannot be reached \(", told())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in told()
    assert server.files == {}


def test_a_copy_is_kept_in_the_given_folder(run: Any, server: Hub, tmp_path: Path) -> None:
    main([str(run.run), f"to={tmp_path / 'copy'}", "push=me/good"])
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(server.of("model", "me/good"))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_arguments(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "to=FOLDER or push=REPO is needed"),
        (["to=x", "public=true"], "public=true needs push=REPO"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(run.run), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
