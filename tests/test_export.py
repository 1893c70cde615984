"""Model folders and their cards: from a small run made by hand, and from whole runs."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dnpo.commands.export import main
from dnpo.errors import ModelError, SettingsError
from dnpo.policy.base import describe_saved
from dnpo.policy.loading import load
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.running.export import export, link
from dnpo.stats.overoptimised import LEARNS_FROM
from dnpo.store import content_hash, write_json
from dnpo.store.manifests import seal

from .commands import SMOKE, succeed, summary

IDS = torch.tensor([[1, 40, 41, 42, 50, 60, 61, 70]])


def finish(store: Path, name: str, settings: dict[str, Any], prompts: str) -> None:
    """Write the parts of a manifest that the export reads."""
    kind, key = name.split("/")
    policy = {"policy": describe_saved(store / name / "policy")} if prompts else {}
    content = {"stage": kind, "key": key, "settings": settings, "inputs": {"prompts": prompts}, "facts": policy}
    seal(store / name, content)


@pytest.fixture
def left(tmp_path: Path, make_policy: Callable[..., Policy]) -> Callable[..., Any]:
    """Makes the files of a run with fine-tuning and two iterations: full weights, adapters, or nothing trained."""

    def make(rank: int = 0, trained: bool = True, base: str = "scratch", dtype: str = "float32") -> Any:
        project, outside = tmp_path / "project", tmp_path / "base"
        store, run = project / "store", project / "outputs" / "run"
        run.mkdir(parents=True)
        made_of: dict[str, Any] = {"scratch": {"width": 32}, "hub": {"name": "some/model", "revision": "abc"}}.get(
            base, {}
        )
        own = store / "prompts" / "p" / "model"
        first = make_policy()
        if base == "local":
            first.save(outside)
            made_of = {"content": content_hash(outside)}
        model = {"dtype": dtype, "lora": {"rank": rank, "alpha": 8.0, "target_modules": "all-linear"}}
        model |= {"scratch": {}, "local": {"path": "../base"}, "hub": {"name": "some/model"}}[base]
        own.parent.mkdir(parents=True)
        if base == "scratch":
            first.save(own)
        else:
            first.tokenizer.save_pretrained(own)
        finish(store, "prompts/p", {"model": made_of, "data": {"name": "some/rows"}}, "")
        policies, before = [f"{'optimise' if k >= 0 else 'sft'}/{k + 1}" for k in (-1, 0, 1)], None
        for place, name in enumerate(policies):
            folder = store / name / "policy"
            if not trained:
                folder.mkdir(parents=True)
            elif rank == 0:
                make_policy(place + 1).save(folder)
            else:
                policy = load(str(outside if base == "local" else own), before)
                policy.model = Lora(rank=rank, alpha=8.0).on(policy.model, place)
                torch.manual_seed(place)
                for part, weight in policy.model.named_parameters():
                    if "lora_B" in part:
                        torch.nn.init.normal_(weight, std=0.3)
                policy.save(folder, before)
                before = folder
            finish(store, name, {}, "prompts/p")
        content = {
            "table": [{"iteration": k, "eval/score": 10.0 + i, "npo/shift": None} for i, k in enumerate(["SFT", 0, 1])],
            "choices": {"method": "dnpo", "data": "hub", "judge": "rules", "dsl": "score", "npo": "trainable"},
            "settings": {
                **{"iterations": 2, "seed": 3, "store": "store", "model": model, "data": {"max_response_tokens": 24}},
                **{
                    "dsl": {"start": 1},
                    "npo": {"start": 1, "alpha": 0.1},
                    "tracking": {"uri": "postgresql://me:secret@x"},
                    "judge": {"base_url": "http://me:secret@y/v1"},
                },
            },
            "cwd": str(project),
            "stages": [
                {"title": f"iteration {k} · optimise", "stage": "optimise", "key": str(k + 1), "iteration": k}
                for k in (0, 1)
            ],
            "policies": policies,
            "commit": "0123abc",
            "versions": {"torch": torch.__version__},
        }
        write_json(run / "summary.json", content)
        return SimpleNamespace(project=project, run=run, store=store, base=outside, own=own, summary=content)

    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def chained(left: Any, place: int, base: Path) -> torch.Tensor:
    """The logits of the policy that the next iteration of the run reads."""
    return logits(load(str(base), left.store / left.summary["policies"][place] / "policy").causal_lm)


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    found = ModelCard.load(folder / "README.md")
    return found.data.to_dict(), found.text


# --- the folders that a run leaves


def test_full_weights_are_linked_and_load_unchanged(left: Callable[..., Any]) -> None:
    made = left()
    cards = link(made.summary, made.run)
    assert [card.relative_to(made.run / "models").as_posix() for card in cards] == [
        f"{name}/README.md" for name in ("sft", "iteration-0", "iteration-1")
    ]
    for place, card in enumerate(cards):
        assert (card.parent / "model.safetensors").is_symlink()
        assert not card.is_symlink()
        model = AutoModelForCausalLM.from_pretrained(card.parent)
        assert torch.equal(logits(model), chained(made, place, made.own))
        tokenizer = AutoTokenizer.from_pretrained(card.parent)
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(made.own).chat_template


def test_links_hold_when_runs_and_store_move_together(left: Callable[..., Any], tmp_path: Path) -> None:
    made = left()
    link(made.summary, made.run)
    made.project.rename(tmp_path / "elsewhere")
    AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "outputs" / "run" / "models" / "iteration-1")


def test_links_hold_where_a_folder_above_is_itself_a_link(left: Callable[..., Any], tmp_path: Path) -> None:
    made = left()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (made.run.parent).rename(tmp_path / "deep" / "er" / "outputs")
    made.run.parent.symlink_to(tmp_path / "deep" / "er" / "outputs")
    link(made.summary, made.run)
    AutoModelForCausalLM.from_pretrained(made.run / "models" / "iteration-1")


@pytest.mark.parametrize("base", ["scratch", "local"])
def test_adapters_of_every_iteration_load_by_peft_and_by_transformers(base: str, left: Callable[..., Any]) -> None:
    made = left(rank=2, base=base)
    where = made.own if base == "scratch" else made.base
    cards = link(made.summary, made.run)
    for place, card in enumerate(cards):
        expected = chained(made, place, where)
        ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(where), card.parent)
        torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
        for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            torch.testing.assert_close(logits(auto.from_pretrained(card.parent)), expected, atol=1e-5, rtol=1e-5)
        assert json.loads((card.parent / "adapter_config.json").read_text())["r"] == 2 * (place + 1)
        AutoTokenizer.from_pretrained(card.parent)
        assert read_card(card.parent)[0]["library_name"] == "peft"
    moved = (logits(AutoModelForCausalLM.from_pretrained(where)) - expected).abs().max()
    assert moved > 0.1, "adapters that change nothing show nothing"
    assert [(card.parent / "adapter_model.safetensors").is_symlink() for card in cards] == [True, False, False]


@pytest.mark.parametrize("base", ["scratch", "local"])
def test_without_training_the_folder_is_the_base_model(base: str, left: Callable[..., Any]) -> None:
    made = left(trained=False, base=base)
    where = made.own if base == "scratch" else made.base
    card, *_ = link(made.summary, made.run)
    model = AutoModelForCausalLM.from_pretrained(card.parent)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(where)))
    AutoTokenizer.from_pretrained(card.parent)
    shown = os.path.relpath(where, made.project) if base == "scratch" else made.base.name
    assert f"this is the base model itself, {shown}." in card.read_text()


def test_without_training_the_card_names_the_base_model_of_the_hub(left: Callable[..., Any]) -> None:
    made = left(trained=False, base="hub")
    card, *_ = link(made.summary, made.run)
    AutoTokenizer.from_pretrained(card.parent)
    assert 'AutoModelForCausalLM.from_pretrained("some/model", revision="abc", dtype="float32")' in card.read_text()
    assert "vllm serve some/model --revision abc" in card.read_text()


def test_a_rerun_into_the_same_folder_replaces_what_was_there(left: Callable[..., Any]) -> None:
    made = left()
    link(made.summary, made.run)
    (made.run / "models" / "iteration-0" / "notes.txt").write_text("mine")
    shorter = {**made.summary, "policies": made.summary["policies"][:1], "table": made.summary["table"][:1]}
    (card,) = link(shorter, made.run)
    AutoModelForCausalLM.from_pretrained(card.parent)
    assert sorted(path.name for path in (made.run / "models").iterdir()) == ["iteration-0", "sft"]
    assert [path.name for path in (made.run / "models" / "iteration-0").iterdir()] == ["notes.txt"]
    assert len(link(made.summary, made.run)) == 3
    assert (made.run / "models" / "iteration-0" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"trained": False}])
def test_without_links_a_card_says_where_the_weights_are(
    settings: dict[str, Any], left: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = left(**settings)

    def refuse(self: Path, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for card in link(made.summary, made.run):
        assert [path.name for path in card.parent.iterdir()] == ["README.md"]
        said = card.read_text()
        assert "(Operation not permitted)" in said
        assert re.search(r"weights are in (store/|\.\./base)", said)
        assert str(made.store) not in said


# --- the card


def test_a_card_names_method_iteration_data_judge_settings_and_stage(left: Callable[..., Any]) -> None:
    made = left()
    *_, card = link(made.summary, made.run)
    data, text = read_card(card.parent)
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dnpo"],
        "datasets": ["some/rows"],
    }
    for said in (
        *("# dnpo, iteration 1", "| method | `dnpo` |", "| iteration | 1 |", "| judge | `rules` |", "| seed | 3 |"),
        *("| data | `hub`, name `some/rows` |", "| stage | `optimise/2` |", "| code | `0123abc` |", "npo.alpha=0.1"),
        *("| labels | `score` from iteration 1 on |", "| eval/score | 12 |", "- iteration 1 · optimise: `optimise/2`"),
        f"torch {torch.__version__}",
    ):
        assert said in text, said
    assert "npo/shift" not in text, "what was not measured is not told"
    assert "iteration 0 · optimise" not in text
    assert 'judge.base_url="http://…@y/v1"' in text
    assert "secret" not in text


@pytest.mark.parametrize("labelled_by", [*LEARNS_FROM, None])
@pytest.mark.parametrize("judge", [None, {"_target_": "dnpo.judges.exact.correct.Correct"}])
def test_a_card_names_the_judge_of_the_scores(
    judge: dict[str, str] | None, labelled_by: str | None, left: Callable[..., Any]
) -> None:
    made = left()
    made.summary["settings"]["eval"] = {"judge": judge}
    made.summary |= {} if labelled_by is None else {"labelled_by": labelled_by}
    *_, card = link(made.summary, made.run)
    said = f"`eval/score` comes from {'`eval.judge`' if judge else 'the judge named above'}"
    assert f"{said}{f'; {LEARNS_FROM[labelled_by]}' if labelled_by else ''}.\n" in card.read_text()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_card_names_no_folder_of_this_machine(rank: int, left: Callable[..., Any]) -> None:
    """Folders in settings, and of the base model outside the working folder; names of files and of the hub remain."""
    made = left(rank=rank, base="local")
    settings = made.summary["settings"]
    settings["model"] |= {"path": str(made.base)}
    settings["data"] |= {"path": ["/home/someone/my rows/rows.jsonl", "~/more.jsonl"], "name": "some/rows"}
    settings["launch"] = {"through": "srun --chdir=/home/someone/work go"}
    settings["trainer"] = {"rate": "1/2", "hint": "a / b"}
    for card in link(made.summary, made.run):
        text = card.read_text()
        for private in (str(made.project), str(made.base.parent), "/home", "someone", "../"):
            assert private not in text
        named = f'path="{made.base.name}"'
        for public in ("rows.jsonl", "more.jsonl", '"some/rows"', '"1/2"', "srun", '"a / b"', named):
            assert public in text


def test_a_card_names_parts_that_had_not_started(left: Callable[..., Any]) -> None:
    made = left()
    sft, zero, _ = (card.read_text() for card in link(made.summary, made.run))
    for text in (sft, zero):
        assert "| noise on the reference | `trainable` from iteration 1 on, so not yet here |" in text
    assert "# dnpo, before iteration 0" in sft


def test_a_card_names_a_base_model_of_the_hub_with_its_commit(left: Callable[..., Any]) -> None:
    made = left(base="hub")
    data, text = read_card(link(made.summary, made.run)[0].parent)
    assert data["base_model"] == "some/model"
    assert "name `some/model`, revision `abc`" in text


@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"trained": False}])
def test_the_code_on_a_card_runs(
    settings: dict[str, Any],
    left: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = left(**settings)
    link(made.summary, made.run)
    models = made.run / "models"
    export(made.run, models / "my own")
    for folder in (models / "iteration-1", models / "my own"):
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(models)
        capsys.readouterr()
        exec(code, {})
        assert capsys.readouterr().out.strip(), code


# --- copies that stand alone


@pytest.mark.parametrize(("rank", "base"), [(0, "scratch"), (2, "scratch"), (2, "local")])
@pytest.mark.parametrize("place", [0, 2])
def test_a_copy_needs_neither_store_nor_base(
    rank: int, base: str, place: int, left: Callable[..., Any], tmp_path: Path
) -> None:
    made = left(rank=rank, base=base)
    expected = chained(made, place, made.own if base == "scratch" else made.base)
    copy = tmp_path / "some" / "copy"
    export(made.run, copy, ["sft", "0", "1"][place])
    shutil.rmtree(made.project)
    shutil.rmtree(made.base, ignore_errors=True)
    assert not any(path.is_symlink() for path in copy.iterdir())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(copy)), expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(copy).chat_template
    assert read_card(copy)[0]["library_name"] == "transformers"
    assert "needs nothing else" in (copy / "README.md").read_text()
    assert [path.name for path in copy.parent.iterdir()] == ["copy"], "nothing is left beside it"


def test_adapters_are_merged_in_float32_and_saved_in_the_models_type(left: Callable[..., Any], tmp_path: Path) -> None:
    made = left(rank=2, dtype="bfloat16")
    export(made.run, tmp_path / "copy")
    exact = load(str(made.own), made.store / "optimise" / "2" / "policy").causal_lm.state_dict()
    for name, weight in load_file(tmp_path / "copy" / "model.safetensors").items():
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").dtype is torch.bfloat16


def test_without_training_the_copy_is_the_base_model(left: Callable[..., Any], tmp_path: Path) -> None:
    made = left(trained=False, base="local")
    export(made.run, tmp_path / "copy", "sft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(made.base)))


def test_a_store_that_moved_can_be_named(left: Callable[..., Any], tmp_path: Path) -> None:
    made = left()
    made.store.rename(tmp_path / "moved")
    with pytest.raises(SettingsError, match="give store=… if the store has moved"):
        export(made.run, tmp_path / "copy")
    export(made.run, tmp_path / "copy", store=tmp_path / "moved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


def test_a_base_model_that_changed_is_refused(left: Callable[..., Any], tmp_path: Path) -> None:
    made = left(rank=2, base="local")
    (made.base / "config.json").write_text((made.base / "config.json").read_text() + " ")
    with pytest.raises(ModelError, match=r"model\.path="):
        export(made.run, tmp_path / "copy")
    shutil.rmtree(made.base)
    with pytest.raises(ModelError, match="base model is gone"):
        export(made.run, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_wrong_arguments_are_answered_in_one_line(
    left: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = left()
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").touch()
    file.touch()
    old = tmp_path / "old"
    old.mkdir()
    (old / "summary.json").write_text("{}")
    new = str(tmp_path / "new")
    capsys.readouterr()
    for arguments, message in (
        (
            [str(made.run), "--iteration", "7", "--to", new],
            "iteration=7: this run has no such iteration; expected one of sft, 0, 1",
        ),
        ([str(made.run), "--to", str(full)], f"to={full}: exists"),
        ([str(made.run), "--to", str(file)], f"to={file}: exists"),
        ([str(made.run), "--to", str(file / "in")], f"to={file / 'in'}: Not a directory"),
        ([str(made.store), "--to", new], "no finished run there; expected a run's folder with a summary.json"),
        ([str(old), "--to", new], "earlier version"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert message in said
        answer = said.removeprefix(f"{first}\n") if (first := said.splitlines()[0]).startswith("dnpo ") else said
        assert answer.startswith("error: ")
        assert answer.count("\n") == 1
    assert [path.name for path in full.iterdir()] == ["precious"]
    assert not Path(new).exists()
    (tmp_path / "empty").mkdir()
    main([str(made.run), "--to", str(tmp_path / "empty")])
    assert "iteration-1 (optimise/2) is in" in capsys.readouterr().out


# --- of whole runs


@pytest.mark.long
def test_the_folders_of_a_run_generate_what_its_policies_generate(finished: Path) -> None:
    succeed(finished, *SMOKE, "hydra.run.dir=run")
    succeed(finished, *SMOKE, "hydra.run.dir=run")  # into the same folder
    content = summary(finished, "run/summary.json")
    assert content["choices"]["method"] == "dnpo"
    for place, name in enumerate(("sft", "iteration-0", "iteration-1")):
        folder = finished / "run" / "models" / name
        key = content["policies"][place]
        (prompts,) = (finished / "store" / "prompts").iterdir()
        policy = load(str(prompts / "model"), finished / "store" / key / "policy")
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is 3 plus 4?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        policy.causal_lm.set_attn_implementation(policy.own_attention)
        answers = [m.generate(**inputs, max_new_tokens=16, do_sample=False) for m in (model, policy.causal_lm.eval())]
        assert torch.equal(*answers)
        text = (folder / "README.md").read_text()
        assert f"| stage | `{key}` |" in text
        assert "| data | `tinyworld_smoke` |" in text


@pytest.mark.long
def test_a_run_with_adapters_leaves_adapters_that_load(adapted: Path, tmp_path: Path) -> None:
    content = summary(adapted)
    (run,) = adapted.glob("outputs/*/*")
    (prompts,) = (adapted / "store" / "prompts").iterdir()
    expected = logits(load(str(prompts / "model"), adapted / "store" / content["policies"][2] / "policy").causal_lm)
    ours = AutoPeftModelForCausalLM.from_pretrained(run / "models" / "iteration-1")
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    export(run, tmp_path / "copy", "1")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    torch.testing.assert_close(logits(copy), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_every_job_of_a_sweep_leaves_its_models(finished: Path) -> None:
    succeed(finished, "-m", *SMOKE, "iterations=1", "method=spin,dnpo", "hydra.sweep.dir=sweep")
    for job, method in (("0", "spin"), ("1", "dnpo")):
        folder = finished / "sweep" / job / "models" / "iteration-0"
        AutoModelForCausalLM.from_pretrained(folder)
        assert read_card(folder)[0]["tags"] == list(dict.fromkeys(["dnpo", method]))
    # One stage of the store, two cards.
    links = {(finished / "sweep" / job / "models/iteration-0/model.safetensors").resolve() for job in "01"}
    assert len(links) == 1
