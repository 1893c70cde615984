"""Comparisons with TRL: its losses on the same numbers, and its trainer's loss on the same models and pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dnpo.optimise.batches import make_facts
from dnpo.optimise.objective import (
    Facts,
    PairLogps,
    logistic,
    odds_ratio,
    per_token,
    squared,
    surprise,
    without_reference,
)
from dnpo.policy.packing import pack
from dnpo.stages.files import write_preferences
from tests.conftest import World
from tests.test_objectives_pairs import random_pairs

trl = pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns at every import of an experimental loss."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def sure() -> tuple[PairLogps, PairLogps, Facts]:
    """Random pairs with hard labels, in float32 as in TRL."""
    policy, reference, known = random_pairs(64, seed=11)
    known = known._replace(strength_B=torch.ones(64, dtype=torch.float64))
    return (
        PairLogps(*(t.float() for t in policy)),
        PairLogps(*(t.float() for t in reference)),
        Facts(*(t.float() for t in known[:5])),
    )


def test_odds_ratio_equals_trls() -> None:
    """Its odds term has our λ as ``beta``; its likelihood term includes prompt tokens, so ours is added instead."""
    from trl.experimental.orpo import ORPOTrainer

    policy, _, known = sure()
    self = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(self, *per_token(policy, known))
    ours = odds_ratio(policy, known, weight=0.3)
    torch.testing.assert_close(ours, surprise(policy, known, mean=True) - theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_per_token_equals_trls(smoothing: float) -> None:
    """SimPO; their smoothing equals our soft labels of this strength."""
    from trl.experimental.cpo import CPOTrainer

    policy, _, known = sure()
    self = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.5,
        label_smoothing=smoothing,
        loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, *_ = CPOTrainer.cpo_loss(self, *per_token(policy, known))
    if smoothing:  # it flips the sign of β · gap − γ, but soft labels swap the pair
        gap_B = 2.0 * (per_token(policy, known).chosen_B - per_token(policy, known).rejected_B)
        zero_B = torch.zeros_like(gap_B)
        shifted = PairLogps(gap_B - 0.5, zero_B)
        ours = logistic(shifted, PairLogps(zero_B, zero_B), known, beta=1.0, smoothing=smoothing)
    else:
        ours = without_reference(policy, known, beta=2.0, margin=0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_equals_trls(smoothing: float) -> None:
    """Of the logistic loss, by CPO's loss without a reference: ours has a reference of zeros."""
    from trl.experimental.cpo import CPOTrainer

    policy, reference, known = sure()
    zero = PairLogps(*(torch.zeros_like(t) for t in reference))
    self = SimpleNamespace(
        alpha=0.0,
        beta=0.1,
        label_smoothing=smoothing,
        loss_type="sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, *_ = CPOTrainer.cpo_loss(self, *policy)
    torch.testing.assert_close(
        logistic(policy, zero, known, beta=0.1, smoothing=smoothing), theirs, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_losses_equal_trls_trainers(
    world: World, make_policy: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """From token ids on: its padded batches and reference model against our packed batches, on other weights."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written = world.pairs(8)
    write_preferences(tmp_path / "pairs.jsonl", written)
    rows = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    models = {}
    for name, seed in (("policy", 0), ("reference", 1)):
        models[name] = make_policy(seed)
        models[name].model.save_pretrained(tmp_path / name)
        world.tokenizer.save_pretrained(tmp_path / name)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8,
        beta=0.1,
        loss_type=kind,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
    )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float32)
    trainer = trl.DPOTrainer(model=str(tmp_path / "policy"), ref_model=reference, args=config, train_dataset=rows)
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, batch))
        packed = pack([p.prompt_ids for p in written] * 2, [p.chosen_ids for p in written] + [
            p.rejected_ids for p in written])  # fmt: skip
        logps = [PairLogps.split(models[name].logps(packed), len(written)) for name in ("policy", "reference")]
        known = make_facts(written)
        loss_B = logistic(*logps, known, beta=0.1) if kind == "sigmoid" else squared(*logps, known, beta=0.1, mean=True)
    assert float(loss_B.mean()) == pytest.approx(theirs, rel=1e-6)
    assert float((logps[0].chosen_B - logps[1].chosen_B).abs().max()) > 0.1
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["strength"] == 1.0
