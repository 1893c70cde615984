"""Further measurements, on a short whole run: each number is computed again from its rows."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dnpo.commands.train import build
from dnpo.errors import SettingsError
from dnpo.evaluate.texts import PACKAGES, Texts, similarity
from dnpo.judges.exact.rules import Correct
from dnpo.loop import chain
from dnpo.records import Item, Pair, Prompt, Response
from dnpo.settings import conf_folder
from dnpo.stages.plan import Iteration, Run
from dnpo.store import Store
from dnpo.tables import read
from tests.conftest import Report, verdicts


def have_packages() -> bool:
    from importlib.util import find_spec

    return all(find_spec(module) for module in PACKAGES)


def laid_out(*overrides: str) -> tuple[Run, list[Iteration]]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", overrides=["scale=smoke", "method=spin", "tracking=off", *overrides])
    run, _, _ = build(cfg)
    return run, list(chain(run))


class Done(NamedTuple):
    run: Run
    iterations: list[Iteration]
    store: Store

    def metrics(self, k: int, name: str) -> dict[str, Any]:
        stage = next(stage for stage in self.iterations[k + 1].measures if stage.name == name)
        found: dict[str, Any] = json.loads((self.store.folder(stage) / "metrics.json").read_text())
        return found


@pytest.fixture(scope="module")
def done(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A smoke run of one iteration with a second judge; its other stages exist already."""
    run, iterations = laid_out("iterations=1", "judge@second_judge=correct", "eval.samples=2")
    store = Store(shutil.copytree(smoke / "store", tmp_path_factory.mktemp("measured") / "store"))
    for iteration in iterations:
        for stage in iteration.stages:
            store.get(stage, Report())
    return Done(run, iterations, store)


def test_measures_that_are_not_asked_for_make_no_stage() -> None:
    _, iterations = laid_out()
    assert [[stage.name for stage in iteration.measures] for iteration in iterations] == [[], ["drift"], ["drift"]]
    _, cooler = laid_out("generate.temperature=0.7")
    assert not any(iteration.measures for iteration in cooler), (
        "such samples are not the policy's own, so their KL is none"
    )


@pytest.mark.long
def test_the_second_judge_reads_the_responses_that_the_first_one_read(done: Done) -> None:
    iteration = done.iterations[1]
    second = next(stage for stage in iteration.measures if stage.name == "second")
    items = read(done.store.folder(second) / "items.parquet", Item)
    first = read(done.store.folder(iteration.evaluation) / "items.parquet", Item)
    assert [(i.id, i.kind, i.sample, i.score) for i in items] == [(i.id, i.kind, i.sample, i.score) for i in first]
    # again, from the texts
    held = {p.id: p for p in read(done.store.folder(iteration.prompts) / "test.parquet", Prompt)}
    samples = read(done.store.folder(iteration.evaluation) / "samples.parquet", Response)
    count = len(held)
    for item, response in zip(items[count:], samples[: 3 * count], strict=True):
        assert response.id.split("#")[0] == item.id
        said = verdicts(Correct(), [held[item.id]], [Response(item.id, "x", response.text, [], 0, "eos")])
        assert said[0].score == item.second
    of_samples = [item.second for item in items if item.kind == "sample"]
    assert done.metrics(0, "second")["second/score"] == pytest.approx(np.mean([s for s in of_samples if s is not None]))


@pytest.mark.long
def test_drift_is_the_mean_log_ratio_of_the_policys_own_samples(done: Done) -> None:
    iteration = done.iterations[1]
    folder = done.store.folder
    policy = done.run.policy({"prompts": folder(iteration.prompts), "policy": folder(iteration.policy)})
    reference = done.run.policy({"prompts": folder(iteration.prompts), "policy": folder(done.iterations[0].policy)})
    ids = {p.id: p.token_ids for p in read(folder(iteration.prompts) / "train.parquet", Prompt)}
    new = [r for r in read(folder(iteration.evaluation) / "samples.parquet", Response) if r.id in ids]
    assert len(new) == done.run.eval.sequences
    both = [model.score([ids[r.id] for r in new], [r.token_ids for r in new]) for model in (policy, reference)]
    apart = np.subtract(*both)
    found = done.metrics(0, "drift")
    assert found["drift/kl"] == pytest.approx(apart.mean(), abs=1e-4)
    assert found["drift/kl_token"] == pytest.approx(apart.sum() / sum(r.tokens for r in new), abs=1e-5)
    assert found["drift/kl_error"] == pytest.approx(apart.std(ddof=1) / len(new) ** 0.5, rel=1e-3)


@pytest.mark.long
@pytest.mark.skipif(not have_packages(), reason="sacrebleu and rouge-score (extra eval) are not installed")
def test_texts_are_compared_with_the_chosen_responses_of_their_prompts(done: Done) -> None:
    _, iterations = laid_out("iterations=1", "eval=texts", "eval.samples=2", "eval.sequences=96", "eval.texts.rows=20")
    iteration = iterations[1]
    stage = next(stage for stage in iteration.measures if stage.name == "texts")
    assert done.store.has(iteration.evaluation), (
        "texts are a stage of their own: the evaluation is the same without them"
    )
    folder = done.store.get(stage, Report())
    ids = {p.id for p in read(done.store.folder(iteration.prompts) / "train.parquet", Prompt)}
    new = [r for r in read(done.store.folder(iteration.evaluation) / "samples.parquet", Response) if r.id in ids][:20]
    assert iteration.pairs is not None
    chosen = {p.id: p.chosen for p in read(done.store.folder(iteration.pairs) / "pairs.parquet", Pair)}
    again = similarity([r.text for r in new], [chosen[r.id] for r in new])
    found = json.loads((folder / "metrics.json").read_text())
    assert found["texts/bleu"] == pytest.approx(again.metrics["bleu"])
    assert found["texts/rouge_l"] == pytest.approx(again.metrics["rouge_l"])


def test_missing_packages_are_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnpo.evaluate.texts.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r'text metrics need sacrebleu and rouge-score.*pip install "dnpo\[eval\]"'):
        Texts()


def test_a_leaderboards_key_depends_on_its_items_and_not_on_their_path(tmp_path: Path) -> None:
    identities = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "winogrande.jsonl").write_text("{}\n")
        part = {
            "_target_": "dnpo.evaluate.leaderboard.Leaderboard",
            "source": str(tmp_path / name),
            "batch_size": len(name),
        }
        identities.append(instantiate(part).identity())
    assert identities[0] == identities[1]
    (tmp_path / "there" / "winogrande.jsonl").write_text("{} \n")
    assert instantiate(part).identity() != identities[0]
    with pytest.raises(SettingsError, match="source=nowhere: there is no such folder"):
        instantiate({**part, "source": "nowhere"}).identity()
