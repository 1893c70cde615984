"""Model folders: every loader refuses, by name, missing, unused, contradictory or misnamed files and tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForMaskedLM, LlamaForCausalLM

from dnpo.errors import ModelError
from dnpo.judges.asked.hf import HF
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.reward.reward import Reward
from dnpo.policy.base import Pretrained
from dnpo.policy.complete import check_finite, merge_adapter
from dnpo.policy.encoder import check_encoder
from dnpo.policy.folder import find_files, read_header
from dnpo.policy.loading import load, outline
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.policy.weights import Weights
from tests.commands import train
from tests.conftest import World
from tests.test_reward import bert, llama

MakePolicy = Callable[..., Policy]
Damage = Callable[[Path], object]
FILE = "model.safetensors"


@pytest.fixture
def saved(make_policy: MakePolicy, tmp_path: Path) -> Path:
    """A model folder as transformers writes it, with an untied head."""
    make_policy().save(tmp_path / "model")
    return tmp_path / "model"


def read_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in memory, so that the file can be written again."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def change(edit: Callable[[dict[str, Any]], dict[str, Any]], file: str = FILE) -> Damage:
    """Write the tensors of a folder again, changed."""

    def damage(folder: Path) -> None:
        save_file(edit(read_file(folder / file)), folder / file, {"format": "pt"})

    return damage


def without(*names: str) -> Damage:
    return change(lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names})


def rename(old: str, new: str) -> Damage:
    return change(lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()})


def prefix(text: str) -> Damage:
    return change(lambda tensors: {text + name: tensor for name, tensor in tensors.items()})


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return change(lambda tensors: {**tensors, name: make(tensors[name])})


def config(file: str = "config.json", **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, **changes}))

    return damage


def text(file: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(share * len(content))])

    return damage


def dangle(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("../../blobs/gone")


def shard(folder: Path) -> None:
    """Two files and an index."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    (folder / FILE).unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def without_shard(folder: Path) -> None:
    shard(folder)
    min(folder.glob("model-*.safetensors")).unlink()


def two_sets(folder: Path) -> None:
    kept = (folder / FILE).read_bytes()
    shard(folder)
    (folder / FILE).write_bytes(kept)


def misplace(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / f"{FILE}.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = next(f for f in files if f != index["weight_map"]["lm_head.weight"])
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def pickle(folder: Path) -> None:
    torch.save(read_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()


def pickle_as_safetensors(folder: Path) -> None:
    torch.save(read_file(folder / FILE), folder / FILE)


def pack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int8)


NAN = float("nan")
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 2}
DAMAGES: dict[str, tuple[Damage, str]] = {
    "head gone": (without("lm_head.weight"), r"missing.*1 tensor \(lm_head\.weight\).*set tie_word_embeddings to true"),
    "layer gone": (
        without(DOWN),
        r"missing \(they .*\): 1 tensor \(model\.layers\.1",
    ),
    "compiled": (
        prefix("_orig_mod."),
        r"missing.*21 tensors \(lm_head.*, …\).*torch\.compile has added _orig_mod\.",
    ),
    "parallel": (
        prefix("module."),
        r"DataParallel or DeepSpeed has added module\. .*every \*\.safetensors",
    ),
    "adapted": (prefix("base_model.model."), r"peft has added base_model\.model\. to the names"),
    "in two modules": (prefix("model.policy."), r"model\.policy\. is at the beginning of the names; remove it"),
    "unknown prefix": (prefix("student.inner."), r"student\.inner\. is at the beginning of the names; remove it"),
    "wrapped inside": (
        rename("self_attn", "_checkpoint_wrapped_module.self_attn"),
        "activation checkpointing has",
    ),
    "adapter not merged": (
        change(lambda t: {**t, "model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}),
        r"not part of LlamaForCausalLM: 1 tensor.*adapter that is not merged; merge it",
    ),
    "left over": (
        change(lambda t: {**t, "v_head.weight": torch.ones(1, 32)}),
        r"not part of .*1 tensor \(v_head\.weight",
    ),
    "fewer layers": (config(num_hidden_layers=1), r"not part of LlamaForCausalLM: 9 tensors \(model\.layers\.1\."),
    "more layers": (config(num_hidden_layers=3), r"missing.*9 tensors \(model\.layers\.2\."),
    "another width": (
        config(hidden_size=64, head_dim=16),
        r"another shape .*\(lm_head\.weight: 300×32",
    ),
    "one shape": (replaced(NORM, lambda t: t[:16]), r"another shape.*1 tensor \(model\.norm\.weight: 16 for 32\)"),
    "NaN": (
        replaced(DOWN, lambda t: t.fill_(NAN)),
        r"values that are not finite: 1 tensor \(model\.layers\.1",
    ),
    "infinite": (replaced(NORM, lambda t: t / 0), r"values that are not finite: 1 tensor \(model\.norm\.weight\)"),
    "integers": (replaced(NORM, pack), r"not floating-point, though .*1 tensor \(model\.norm\.weight \(I8\)\)"),
    "quantisation": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    "unknown quantisation": (config(quantization_config={"quant_method": "zip"}), r"quantised \(zip\)"),
    "a number as text": (config(hidden_size="32"), r"'hidden_size'.*expected int, got str"),
    "no heads": (config(num_attention_heads=0), r"num_attention_heads is 0 in config\.json, expected 1 or more"),
    "an activation that is none": (
        config(hidden_act="foo"),
        r"cannot be loaded: transformers refuses hidden_act='foo' in config\.json \(KeyError: 'foo'\)",
    ),
    "positions that are none": (
        config(rope_parameters={"rope_type": "foo", "rope_theta": 1e4}),
        r"transformers refuses rope_parameters\.rope_type='foo' in config\.json",
    ),
    "a number type that is none": (config(dtype="float99"), r"transformers refuses dtype='float99' in config\.json"),
    "a head of no width": (config(head_dim=0), r"transformers refuses head_dim=0 in config\.json \("),
    "names that are no names": (config(id2label=5), r"transformers refuses id2label=5 in config\.json \("),
    "a switch that is text": (config(use_cache="no"), r"transformers refuses use_cache='no' in config\.json"),
    "a type that is none": (config(model_type="unheard"), r"cannot be loaded.*unheard"),
    "no type": (config(model_type=None), r"config\.json names no model_type"),
    "cut configuration": (cut("config.json", 0.5), r"config\.json cannot be read"),
    "configuration that is a list": (
        text("config.json", "[1]"),
        r"config\.json cannot be read \(expected a JSON",
    ),
    "unreadable generation_config": (text("generation_config.json", "{"), r"generation_config\.json cannot be read"),
    "end that is text": (
        config("generation_config.json", eos_token_id="2"),
        r"eos_token_id in generation_.* '2'",
    ),
    "end beyond the vocabulary": (config(eos_token_id=9999), r"eos_token_id in config\.json is 9,999.*ends at 299"),
    "ends beyond it": (config(eos_token_id=[2, 300]), r"eos_token_id in config\.json is 300.*expected the id of"),
    "end before it": (config(eos_token_id=-3), r"eos_token_id in config\.json is -3"),
    "beginning beyond it": (config(bos_token_id=300), r"bos_token_id in config\.json is 300"),
    "padding beyond it": (config(pad_token_id=5000), r"pad_token_id in config\.json is 5,000"),
    "end beyond it in another file": (
        config("generation_config.json", eos_token_id=[2, 151645]),
        r"eos_token_id in generation_config\.json is 151,645, and the vocabulary in config\.json ends at 299",
    ),
    "padding beyond it in another file": (
        config("generation_config.json", pad_token_id=300),
        r"pad_token_id in generation_config\.json is 300",
    ),
    "binary tokenizer_config": (text("tokenizer_config.json", b"\xff\xfe"), r"tokenizer_config\.json cannot be read"),
    "empty tokenizer": (text("tokenizer.json", ""), r"tokenizer\.json is empty"),
    "no tokenizer": (without_tokenizer, r"it has no tokenizer: expected tokenizer\.json"),
    "tokenizer that is none": (
        text("tokenizer.json", "{}"),
        r"tokenizer\.json is not a tokenizer file: it has no model and",
    ),
    "binary template": (text("chat_template.jinja", b"\xff\xfe{"), r"chat_template\.jinja is not text"),
    "no context": (config(max_position_embeddings=-1), r"max_position_embeddings is -1 in config\.json"),
    "page": (text("tokenizer.json", "<!DOCTYPE html>"), r"tokenizer\.json is a page of a web site"),
    "pointer": (text(FILE, "version https://git-lfs.github.com/spec/v1\noid"), r"safetensors is a pointer of Git LFS"),
    "dangling link": (dangle, r"model\.safetensors is a link to \.\./\.\./blobs/gone, which is not there"),
    "empty weights": (text(FILE, b""), r"model\.safetensors is empty"),
    "cut weights": (cut(FILE, 0.9), r"model\.safetensors has [\d,]+ bytes where its header says"),
    "cut header": (cut(FILE, 0.005), r"model\.safetensors is not a safetensors file, or only the beginning"),
    "pickle": (pickle, r"its weights are pickled \(pytorch_model\.bin\), which is not read here"),
    "pickle as safetensors": (pickle_as_safetensors, r"model\.safetensors is a pickle of torch"),
    "GGUF as safetensors": (text(FILE, b"GGUF\x03\x00\x00\x00"), r"model\.safetensors is a GGUF file"),
    "weights by another name": (
        lambda folder: (folder / FILE).rename(folder / "weights.safetensors"),
        r"no weights: expected model\.safetensors.*there is weights\.safetensors",
    ),
    "shard gone": (
        without_shard,
        r"1 of the \d files of .*index\.json are not there: model-00001-of",
    ),
    "tensor in another shard": (misplace, r"not in the file that .* names: 1 tensor \(lm_head\.weight\)"),
    "two sets": (two_sets, r"two sets of weights, model\.safetensors and the files of model\.safetensors\.index\.json"),
    "index without a map": (text(f"{FILE}.index.json", "{}"), r"index\.json has no weight_map"),
    "adapter beside a model": (
        text("adapter_config.json", json.dumps(ADAPTER)),
        "an adapter .* on some/base; merge",
    ),
    "adapter of no base": (
        text("adapter_config.json", json.dumps({**ADAPTER, "base_model_name_or_path": None})),
        r"an adapter \(adapter_config\.json\) on a model that it does not name; merge",
    ),
    "adapter of a base that is no name": (text("adapter_config.json", "{}"), "on a model that it does not name; merge"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(name: str, saved: Path) -> None:
    """Both by the gate, before any weights are read, and at load; for a policy and for a judge; without a traceback."""
    damage, message = DAMAGES[name]
    damage(saved)
    for attempt in (lambda: outline(str(saved)), lambda: load(str(saved), None)):
        with pytest.raises(ModelError, match=f"^model: {saved}.*{message}"):
            attempt()
    objection = HF(path=str(saved), device="cpu").accepts([])
    assert objection is not None
    assert objection.startswith(f"judge.path={saved}: ")


def test_complete_folders_pass(saved: Path, make_policy: MakePolicy, tmp_path: Path) -> None:
    """One file or several, a tied head left out or written along with the embedding, names without the prefix."""
    expected = load(str(saved), None).fingerprint()
    shard(saved)
    assert load(str(saved), None).fingerprint() == expected
    assert outline(str(saved)).device.type == "meta"
    assert HF(path=str(saved), device="cpu").accepts([]) is None

    tied = tmp_path / "tied"
    make_policy(tie_word_embeddings=True).save(tied)
    assert "lm_head.weight" not in read_header(tied / FILE)
    first = load(str(tied), None).fingerprint()
    change(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})(tied)
    assert load(str(tied), None).fingerprint() == first
    outline(str(tied))

    rename("model.", "")(tied)
    assert load(str(tied), None).fingerprint() == first


def test_a_tied_head_with_other_values_is_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy(tie_word_embeddings=True).save(tmp_path)
    change(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})(tmp_path)
    for attempt in (lambda: outline(str(tmp_path)), lambda: load(str(tmp_path), None)):
        with pytest.raises(ModelError, match=r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight, but"):
            attempt()


def test_tied_tensors_are_named_once(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy(tie_word_embeddings=True).save(tmp_path)
    prefix("_orig_mod.")(tmp_path)
    with pytest.raises(
        ModelError, match=r"random\): 20 tensors \(model\.embed_tokens\.weight, .*not part .*: 20 tensors"
    ):
        outline(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_single_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    whole = torch.linspace(-3, 3, 1000).to(dtype)
    check_finite([("a", whole), ("none", whole[:0]), ("number", torch.tensor(3))], "here")
    for value in (NAN,) if dtype is torch.float8_e4m3fn else (NAN, float("inf"), -float("inf")):
        broken = whole.clone()
        broken[567] = value
        with pytest.raises(ModelError, match=r"^here: .*not finite: 1 tensor \(b\)"):
            check_finite([("a", whole), ("b", broken)], "here")


def test_a_folder_without_a_model_is_refused_with_its_kind(
    saved: Path, make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy()
    policy.model = Lora(rank=2).on(policy.model, 0)
    policy.save(tmp_path / "run")
    for path, message in (
        (
            tmp_path / "run" / "adapter-00",
            r"no model there, but an adapter \(adapter_config\.json\) on .*merge",
        ),
        (tmp_path, r"no model there; .*its subfolders model have one"),
        (saved / FILE, "no model there, only a file"),
        (tmp_path / "nowhere", "no model there; expected a folder with config.json"),
    ):
        with pytest.raises(ModelError, match=f"^model.path={path}: {message}"):
            Pretrained(path=str(path), lora=Lora())
        with pytest.raises(ModelError, match=f"^judge.path={path}: {message}"):
            HF(path=str(path), device="cpu")


def test_a_name_on_the_hub_that_is_a_folder_here_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would read the folder, and the stage keys would say the commit."""
    monkeypatch.chdir(saved.parent)
    for attempt, setting in (
        (lambda: Pretrained(name="model", lora=Lora()), "model"),
        (lambda: HF(path=None, name="model", device="cpu"), "judge"),
    ):
        with pytest.raises(ModelError, match=rf"^{setting}\.name=model: there is .*give {setting}\.path=model"):
            attempt()


def test_a_model_of_the_hub_is_checked_like_a_folder(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Through the cache, as the hub's own library lays it out."""
    commit, cache = "a" * 40, tmp_path / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    shutil.copytree(saved, snapshot)
    assert find_files("some/model", commit) == snapshot
    hub = {"revision": commit}
    outline("some/model", **hub)
    load("some/model", None, **hub)
    without("lm_head.weight")(snapshot)
    for attempt in (lambda: outline("some/model", **hub), lambda: load("some/model", None, **hub)):
        with pytest.raises(ModelError, match=r"^model: some/model: .*missing.*lm_head\.weight"):
            attempt()
    (snapshot / FILE).unlink()
    assert find_files("some/model", commit) is None
    assert outline("some/model", **hub).device.type == "meta"  # not downloaded yet: nothing to check


# --- adapters


ADAPTER_DAMAGES: dict[str, tuple[Damage, str]] = {
    "tensor gone": (
        change(lambda t: dict(sorted(t.items())[1:]), "adapter_model.safetensors"),
        r"is not complete: missing \(they .*\): 1 tensor \(base_model\.model.*lora_A",
    ),
    "left over": (
        change(lambda t: {**t, "base_model.model.x.lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors"),
        r"is not complete: not part of it: 1 tensor \(base_model\.model\.x\.lora_A\.weight\)",
    ),
    "another shape": (
        change(lambda t: {**t, min(t): torch.ones(2, 7)}, "adapter_model.safetensors"),
        "cannot be loaded: .*size mismatch",
    ),
    "NaN": (
        change(lambda t: {**t, min(t): t[min(t)].fill_(NAN)}, "adapter_model.safetensors"),
        r"values that are not finite: 1 tensor \(base_model",
    ),
    "configuration": (text("adapter_config.json", "{"), "cannot be loaded"),
    "rank": (config("adapter_config.json", r="two"), "cannot be loaded"),
    "weights": (text("adapter_model.safetensors", b"x"), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be loaded"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_a_damaged_adapter_is_refused(name: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    policy.model = Lora(rank=2).on(policy.model, 0)
    policy.save(tmp_path)
    folder = tmp_path / "adapter-00"
    merge_adapter(make_policy().model, folder, "model: base")
    damage, message = ADAPTER_DAMAGES[name]
    damage(folder)
    with pytest.raises(ModelError, match=f"^model: base: the adapter in {folder} {message}|: with {message}"):
        merge_adapter(make_policy().model, folder, "model: base")


# --- judges and encoders


def test_a_reward_model_must_be_complete(world: World, tmp_path: Path) -> None:
    folder = llama(world, tmp_path / "rm")
    assert Reward(path=str(folder), device="cpu").accepts([]) is None
    for damage, message in (
        (without(NORM), r"missing.*model\.norm\.weight"),
        (prefix("_orig_mod."), r"torch\.compile has added _orig_mod\."),
        (config(num_labels=2, id2label=None, label2id=None), r"another shape .*score\.weight"),
    ):
        copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        damage(copy)
        assert_refused(Reward(path=str(copy), device="cpu").accepts([]), rf"^judge\.path={copy}: .*{message}")
    two = bert(tmp_path / "two", num_labels=2)
    assert_refused(Reward(path=str(two), device="cpu").accepts([]), "2 outputs; expected one")


def assert_refused(objection: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        raise ModelError(objection or "it was accepted")


def test_a_judge_needs_a_causal_model_with_its_own_tokenizer(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """A masked language model gives probabilities too, and a tokenizer with more tokens would fail in the model."""
    both_ways = bert(tmp_path / "bert", BertForMaskedLM)
    with (
        Ledger(tmp_path / "ledger.sqlite") as ledger,
        pytest.raises(ModelError, match="reads a text in both directions"),
    ):
        HF(path=str(both_ways), device="cpu").canary(ledger)
    make_policy(vocab_size=len(world.tokenizer) - 10).save(tmp_path / "small")
    objection = HF(path=str(tmp_path / "small"), device="cpu").accepts([])
    assert_refused(objection, r"^judge\.path=.*the tokenizer has 300 tokens, the model embeds only 290")


def test_an_encoder_needs_only_its_body(tmp_path: Path) -> None:
    """A model pretrained with a head and saved without a pooler is used for its hidden states alone."""
    folder = bert(tmp_path / "encoder", BertForMaskedLM)
    assert any(name.startswith("cls.") for name in read_header(folder / FILE))
    assert not any("pooler" in name for name in read_header(folder / FILE))
    check_encoder(str(folder))
    for damage, message in (
        (without("bert.encoder.layer.1.output.dense.weight"), r"missing.*encoder\.layer\.1\.output\.dense\.weight"),
        (config(num_hidden_layers=1), r"not part of BertModel.*encoder\.layer\.1"),
        (prefix("module."), r"DataParallel or DeepSpeed has added module\."),
        (config(hidden_size=64), "another shape"),
    ):
        copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        damage(copy)
        with pytest.raises(ModelError, match=rf"^eval\.texts\.encoder={copy}: .*{message}"):
            check_encoder(str(copy))


def test_a_new_head_is_initialised_if_the_caller_asks_for_it(world: World, tmp_path: Path) -> None:
    """Fitting adds a new output head to a language model; its body must not be initialised at random."""
    from dnpo.judges.reward.models import start_classifier

    folder = llama(world, tmp_path / "base", LlamaForCausalLM)
    weights = Weights(str(folder), None, None, "base")
    assert start_classifier(weights, "cpu", None).model.score.weight.shape[0] == 1
    without(NORM)(folder)
    with pytest.raises(ModelError, match=rf"^base={folder}: .*missing.*1 tensor \(model\.norm\.weight\)"):
        start_classifier(weights, "cpu", None)


# --- the command


def test_the_gate_refuses_before_anything_is_computed(saved: Path, tmp_path: Path) -> None:
    """Once, without repeating names, and without leaving a stage in the store."""
    without("lm_head.weight")(saved)
    done = train(
        tmp_path, "scale=smoke", "tracking=off", "model=local", f"model.path={saved}", "npo=off", "judge=off", "dsl=off"
    )
    assert done.returncode == 1
    told = f"model.path={saved}: its weights do not fit the model: missing (they would be initialised at random): "
    assert f"{told}1 tensor (lm_head.weight)" in done.stderr
    assert "model: model:" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("store/*/*"))


def test_shapes_are_compared_before_memory_is_taken(saved: Path) -> None:
    """By the configuration these weights would take terabytes."""
    config(hidden_size=2**20, head_dim=16)(saved)
    with pytest.raises(ModelError, match=r"another shape than config\.json says: 21 tensors"):
        outline(str(saved))
