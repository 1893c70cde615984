"""Quantised base weights: their values, adapters stacked on them, and whole runs."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dnpo.commands.export import main as export
from dnpo.errors import ModelError
from dnpo.optimise.ema import Average
from dnpo.policy.base import Pretrained
from dnpo.policy.folder import STACK
from dnpo.policy.loading import load, outline
from dnpo.policy.lora import Lora, stacked
from dnpo.policy.model import Policy
from dnpo.policy.quantised import count_bytes
from dnpo.running.gate import machine
from dnpo.settings import Quantisation
from dnpo.store import manifest
from tests.commands import SMOKE, TINY, Process, numbers, succeed, summary, train
from tests.conftest import World

MakePolicy = Callable[..., Policy]
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
LORA = Lora(rank=4, alpha=8.0)


@pytest.fixture
def base(make_policy: MakePolicy, tmp_path: Path) -> Path:
    """A model folder as transformers writes it, with layers wide enough for several scales in each."""
    make_policy(hidden_size=64, intermediate_size=128).save(tmp_path / "base")
    return tmp_path / "base"


def rows(world: World, count: int = 6) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and human responses."""
    return [p.token_ids for p in world.prompts[:count]], [r.token_ids for r in world.human[:count]]


def change(policy: Policy, seed: int) -> None:
    """Change all trained weights, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


def train_by_hand(base: Path, kind: Quantisation, folder: Path, earlier: Path | None, seed: int) -> Path:
    """Put a fresh adapter on the policy of ``earlier``, change and save it."""
    policy = load(str(base), earlier, quantization=kind)
    policy.model = LORA.on(policy.model, seed)
    change(policy, seed)
    policy.save(folder, earlier)
    return folder


@pytest.fixture
def stack(base: Path, tmp_path: Path) -> Callable[[Quantisation], Path]:
    """A policy of three trainings."""

    def make(kind: Quantisation) -> Path:
        folder = None
        for k in range(3):
            folder = train_by_hand(base, kind, tmp_path / f"{kind}-{k}", folder, k)
        assert folder is not None
        return folder

    return make


def brute(base: Path, kind: Quantisation, folder: Path) -> Any:
    """A plain model in float64: the dequantised weights, plus the products of all adapters."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    plain = AutoModelForCausalLM.from_pretrained(base).double()
    changed = 0
    for name, layer in theirs.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif type(layer).__name__ == "Linear8bitLt":
            weight = layer.weight.data.double() * layer.weight.SCB.double().unsqueeze(1) / 127
        else:
            continue
        total = weight.double()
        for adapter in sorted(folder.glob("adapter-*")):
            tensors = load_file(adapter / "adapter_model.safetensors")
            a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
            total = total + 8.0 / 4 * b @ a
        assert not torch.equal(weight, plain.get_submodule(name).weight)
        plain.get_submodule(name).weight.data = total
        changed += 1
    assert changed == 7 * plain.config.num_hidden_layers
    return plain


def alone(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log p of a completion through the model's own forward."""
    logp = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(completion).unsqueeze(-1)).sum()


# --- the weights and the stack


@KINDS
def test_log_probabilities_use_the_dequantised_weights_and_all_adapters(
    kind: Quantisation, base: Path, stack: Callable[[Quantisation], Path], world: World
) -> None:
    folder = stack(kind)
    policy, plain = load(str(base), folder, quantization=kind), brute(base, kind, folder)
    found = policy.score(*rows(world))
    expected = [
        float(alone(plain, prompt, completion).detach()) for prompt, completion in zip(*rows(world), strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-4)
    rounded, plain = (load(str(base), None, quantization=how).score(*rows(world)) for how in (kind, None))
    assert max(abs(a - b) for a, b in zip(rounded, plain, strict=True)) > 0.01


@KINDS
def test_training_mode_and_evaluation_mode_give_the_same_numbers_and_gradients(
    kind: Quantisation, base: Path, stack: Callable[[Quantisation], Path], world: World
) -> None:
    """bitsandbytes' layers use another kernel in evaluation mode; then 4-bit layers have no gradient."""
    folder = stack(kind)
    policy = load(str(base), folder, quantization=kind)
    with policy.evaluating():
        evaluated = policy.score(*rows(world))
    policy.model.train()
    assert policy.score(*rows(world)) == evaluated
    policy.model = LORA.on(policy.model, 7)
    assert policy.score(*rows(world)) == evaluated
    change(policy, 7)
    prompts, completions = rows(world, 1)
    found = alone(policy.causal_lm.train(), prompts[0], completions[0])
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    gradients = torch.autograd.grad(found, list(trained.values()))
    plain = brute(base, kind, folder)
    for name, p in trained.items():
        if ".lora_A." in name:  # d L / d A = scale Bᵀ (d L / d W)
            layer = plain.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A.")[0])
            other = trained[name.replace(".lora_A.", ".lora_B.")]
            layer.weight.data += 2.0 * other.detach().double() @ p.detach().double()
    alone(plain, prompts[0], completions[0]).backward()
    for (name, _), gradient in zip(trained.items(), gradients, strict=True):
        if ".lora_A." in name:
            layer = plain.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A.")[0])
            other = trained[name.replace(".lora_A.", ".lora_B.")].detach().double()
            torch.testing.assert_close(gradient.double(), 2.0 * other.t() @ layer.weight.grad, rtol=1e-3, atol=1e-4)


@KINDS
def test_earlier_adapters_do_not_change(
    kind: Quantisation, base: Path, stack: Callable[[Quantisation], Path], world: World, tmp_path: Path
) -> None:
    folder = stack(kind)
    policy = load(str(base), folder, quantization=kind)
    names = ["adapter-00", "adapter-01", "adapter-02"]
    assert stacked(policy.model) == names
    before = policy.score(*rows(world))
    policy.model = LORA.on(policy.model, 3)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    change(policy, 3)
    after = policy.score(*rows(world))
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1
    assert policy.reference().score(*rows(world)) == before
    assert policy.switched_off().score(*rows(world)) == before
    assert policy.score(*rows(world)) == after
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == trained
    policy.save(tmp_path / "next", folder)
    assert load(str(base), tmp_path / "next", quantization=kind).score(*rows(world)) == after
    for name in names:
        one, other = (at / name / "adapter_model.safetensors" for at in (folder, tmp_path / "next"))
        assert one.read_bytes() == other.read_bytes()
    assert json.loads((tmp_path / "next" / STACK).read_text()) == {
        "base": str(base),
        "quantization": kind,
        "adapters": [*names, "adapter-03"],
    }


@KINDS
def test_the_fingerprint_depends_on_base_and_adapters(
    kind: Quantisation, base: Path, stack: Callable[[Quantisation], Path], world: World
) -> None:
    folder = stack(kind)
    policy = load(str(base), folder, quantization=kind)
    before = policy.fingerprint()
    policy.score(*rows(world))
    assert policy.fingerprint() == load(str(base), folder, quantization=kind).fingerprint() == before
    assert load(str(base), None, quantization=kind).fingerprint() != before


@KINDS
def test_the_size_is_known_before_loading(kind: Quantisation, base: Path) -> None:
    """All bytes of a loaded model except the tables of bitsandbytes, which the layers of a larger model share."""
    found = count_bytes(outline(str(base)).causal_lm, kind)
    loaded = load(str(base), None, quantization=kind).causal_lm.state_dict()
    table = ("quant_map", "quant_state.", "weight_format")
    assert found == sum(t.numel() * t.element_size() for n, t in loaded.items() if not any(x in n for x in table))
    of = machine.shape(outline(str(base)), LORA, kind)
    assert of.weights == found < machine.shape(outline(str(base)), LORA).weights
    assert of.trained == machine.shape(outline(str(base)), LORA).trained


@KINDS
def test_a_moving_average_shares_the_quantised_weights(kind: Quantisation, base: Path, world: World) -> None:
    policy = load(str(base), None, quantization=kind)
    policy.model = LORA.on(policy.model, 0)
    start = policy.score(*rows(world))
    average = Average(policy, 1.0, 1)
    change(policy, 1)
    average.follow(0)
    assert average.policy.score(*rows(world)) == start
    theirs, ours = (dict(each.causal_lm.named_modules()) for each in (average.policy, policy))
    name = "model.layers.0.mlp.up_proj.base_layer"
    assert theirs[name].weight.data_ptr() == ours[name].weight.data_ptr()
    if kind == "int8":
        assert theirs[name].state.CB is ours[name].state.CB
    else:
        assert theirs[name].weight.quant_state is ours[name].weight.quant_state


@KINDS
def test_a_real_model_on_quantised_weights(kind: Quantisation, shared: Path, tmp_path: Path) -> None:
    """Its stories stay as likely as in float32, up to rounding of the weights."""
    base = shared / "models" / "stories260K"
    policy, plain = load(str(base), None, quantization=kind), load(str(base), None)
    prompt = policy.tokenizer.encode("Once upon a time")
    story = policy.tokenizer.encode(", there was a little girl named Lily. She loved to play in the park.")
    (found,), (exact,) = policy.score([prompt], [story]), plain.score([prompt], [story])
    assert found == pytest.approx(float(alone(brute(base, kind, tmp_path), prompt, story).detach()), abs=1e-3)
    assert 0 < abs(found - exact) / len(story) < 0.2


def test_products_in_bfloat16(base: Path, world: World) -> None:
    for kind in ("nf4", "int8"):
        half = load(str(base), None, quantization=kind, dtype="bfloat16")
        full = load(str(base), None, quantization=kind)
        assert half.score(*rows(world)) == pytest.approx(full.score(*rows(world)), abs=3.0)
        half.model = LORA.on(half.model, 0)
        assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}


def test_quantisation_is_in_the_identity(base: Path) -> None:
    plain = Pretrained(path=str(base), lora=LORA).identity()
    nf4, int8 = (Pretrained(path=str(base), lora=LORA, quantization=k).identity() for k in ("nf4", "int8"))
    assert nf4 == {**plain, "quantization": "nf4"}
    assert int8 == {**plain, "quantization": "int8"}
    assert "quantization" not in plain


# --- what is refused


def test_quantised_weights_without_an_adapter_are_refused(base: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.quantization=nf4: .*model\.lora\.rank=16"):
        Pretrained(path=str(base), lora=Lora(), quantization="nf4")


def test_missing_bitsandbytes_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python itself hides a module
    with pytest.raises(ModelError, match=r'model\.quantization=int8: needs bitsandbytes.*pip install "dnpo\[qlora\]"'):
        Pretrained(path=str(base), lora=LORA, quantization="int8")


@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_compiling_quantised_layers_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    done = train(tmp_path, *of(base), "model.quantization=nf4", f"{name}.compile=true")
    assert done.returncode == 1
    assert f"{name}.compile=true" in done.stdout + done.stderr
    assert not (tmp_path / "store").exists()


def test_an_unknown_kind_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    done = train(tmp_path, *of(base), "model.quantization=fp4")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "model.quantization" in said
    assert "nf4" in said


@KINDS
def test_adapters_belong_to_the_weights_that_they_were_trained_on(
    kind: Quantisation, base: Path, stack: Callable[[Quantisation], Path]
) -> None:
    folder = stack(kind)
    other: Quantisation = "int8" if kind == "nf4" else "nf4"
    with pytest.raises(ModelError, match=rf"model\.quantization: .* trained on {kind}, but the base is {other}"):
        load(str(base), folder, quantization=other)
    with pytest.raises(ModelError, match=rf"trained on {kind}, but the base is .*not quantised"):
        load(str(base), folder)
    (folder / STACK).unlink()
    with pytest.raises(ModelError, match=rf"not quantised, but the base is {kind}"):
        load(str(base), folder, quantization=kind)


def test_a_lost_adapter_is_named(base: Path, stack: Callable[[Quantisation], Path]) -> None:
    folder = stack("nf4")
    shutil.rmtree(folder / "adapter-01")
    with pytest.raises(ModelError, match="names adapter-00, adapter-01, adapter-02; there are adapter-00, adapter-02"):
        load(str(base), folder, quantization="nf4")


# --- whole runs


def of(base: Path) -> tuple[str, ...]:
    """Settings of a run of three iterations on a model."""
    return (*SMOKE, *TINY, "model=local", f"model.path={base}", "model.lora.rank=4", "iterations=3", "trainer.epochs=4")


@pytest.mark.long
@KINDS
def test_a_run_of_three_iterations_can_be_killed_and_exported(
    kind: Quantisation, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*of(base), f"model.quantization={kind}", "trainer.checkpoint_every=1")
    out = succeed(tmp_path, *settings)
    assert "Results by iteration" in out
    undisturbed = summary(tmp_path)
    assert [row["iteration"] for row in undisturbed["table"]] == ["SFT", 0, 1, 2]
    assert all(abs(row["loss/policy"]) < 1 for row in undisturbed["table"][1:])
    policies = [tmp_path / "store" / stage for stage in undisturbed["policies"]]
    assert [manifest(policy)["facts"]["policy"]["adapters"] for policy in policies] == [1, 2, 3, 4]

    last = policies[-1]
    for stage in undisturbed["stages"]:
        if stage["iteration"] == 2 and stage["stage"] not in ("generate", "judge", "label", "reference"):
            shutil.rmtree(tmp_path / "store" / stage["stage"] / stage["key"])
    assert not last.exists()
    process = Process(tmp_path, *settings)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").glob("optimise/*.partial/checkpoint.ckpt")):
        assert time.monotonic() < deadline
        assert process.returncode is None
        time.sleep(0.01)
    process.signal_group(signal.SIGKILL)
    process.communicate(timeout=60)
    succeed(tmp_path, *settings)
    assert numbers(summary(tmp_path)) == numbers(undisturbed)

    run = max((tmp_path / "outputs").glob("*/*"))
    capsys.readouterr()
    export([str(run), "--to", str(tmp_path / "copy")])
    said = capsys.readouterr().out
    assert f"model.quantization={kind}" in said
    assert "nats on average" in said
    copy: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").requires_grad_(False)
    assert copy.dtype == torch.bfloat16
    assert not hasattr(copy.config, "quantization_config")
    policy = load(str(base), last / "policy", quantization=kind)
    policy.model.requires_grad_(False)
    ids = torch.tensor([[1, 40, 41, 42, 50, 60, 61, 70]])
    theirs, ours = (each(input_ids=ids).logits.float().log_softmax(-1) for each in (copy, policy.causal_lm.eval()))
    assert float((theirs - ours).abs().max()) < 0.2
    card = (run / "models" / "iteration-2" / "README.md").read_text()
    assert "BitsAndBytesConfig(load_in_" in card
    if kind == "nf4":  # transformers' own 8-bit layers quantise activations too
        joined: Any = AutoPeftModelForCausalLM.from_pretrained(
            run / "models" / "iteration-2",
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype="float32",
            ),
        )
        joined.train()
        close = joined(input_ids=ids).logits.log_softmax(-1).detach()
        assert float((close - ours).abs().max()) < 1e-3
