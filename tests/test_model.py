"""Models and tokenizers: what is refused and why, templates, encoding, saving and loading."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from dnpo.errors import ModelError
from dnpo.policy import loading
from dnpo.policy.base import Pretrained
from dnpo.policy.loading import load
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy, by_length
from dnpo.policy.packing import ATTENTION, Packed, pack
from dnpo.policy.template import PLAIN_TEMPLATE, render
from dnpo.policy.tokenizer import encode, human_response
from dnpo.records import Prompt
from tests.conftest import World

MakePolicy = Callable[..., Policy]
ASKED = [{"role": "user", "content": "What is 2 plus 2?"}]
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rows(world: World, count: int = 6) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and human responses."""
    return [p.token_ids for p in world.prompts[:count]], [r.token_ids for r in world.human[:count]]


def alone(model: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
    """log p of each completion by the model's own forward on this sequence alone, without packing."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logp = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        found.append(logp[len(prompt) - 1 : -1].gather(1, torch.tensor(completion).unsqueeze(-1)).sum())
    return torch.stack(found)


def gradients(model: nn.Module, logp_S: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean in every trained weight, by name; 0 if the mean does not depend on it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(logp_S.mean(), list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


def same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-12) -> None:
    """The same gradients, of the same weights."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def saved(make_policy: MakePolicy, tmp_path: Path) -> Path:
    """A model folder as transformers writes it."""
    make_policy().save(tmp_path / "model")
    return tmp_path / "model"


def test_a_policy_comes_back_as_it_was_saved(saved: Path, make_policy: MakePolicy, world: World) -> None:
    prompts, human = rows(world)
    assert load(str(saved), None).score(prompts, human) == make_policy().score(prompts, human)
    assert AutoModelForCausalLM.from_pretrained(saved).config.model_type == "llama"


def test_saved_policies_do_not_name_our_attention(saved: Path, make_policy: MakePolicy) -> None:
    """Other libraries load the policy and do not have this attention function."""
    assert make_policy().causal_lm.config._attn_implementation == ATTENTION
    assert ATTENTION not in (saved / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(saved).config._attn_implementation == "sdpa"


def test_other_families_of_models_give_their_own_log_probabilities(world: World, tmp_path: Path) -> None:
    """GPT-2 has learned positions and a tied head; the policy must agree with the model's own forward."""
    config = GPT2Config(
        vocab_size=len(world.tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Policy(GPT2LMHeadModel(config).eval(), world.tokenizer)
    policy.save(tmp_path)
    ours = load(str(tmp_path), None).score(*rows(world, 5))
    for prompt, response, found in zip(world.prompts, world.human, ours, strict=False):
        ids = torch.tensor([prompt.token_ids + response.token_ids])
        logp = policy.causal_lm(ids).logits[0].detach().double().log_softmax(-1)
        start = len(prompt.token_ids)
        brute = sum(float(logp[start + t - 1, token]) for t, token in enumerate(response.token_ids))
        assert found == pytest.approx(brute, abs=1e-3)


# --- what is refused


class Louder(LlamaForCausalLM):
    """Changes its logits in a way that its configuration does not name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 1.5
        return found


class Reversed(LlamaForCausalLM):
    """Computes its own positions of tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(
            *args, **kwargs, position_ids=torch.arange(40, 40 + 3 * kwargs["input_ids"].shape[1], 3)[None]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Louder,
            "model: Louder does not compute its logits",
        ),
        (Reversed, "model: Reversed attends across sequences that are packed without padding"),
    ],
)
def test_a_model_with_undeclared_changes_to_its_logits_is_refused_by_name(
    kind: type[LlamaForCausalLM], message: str, make_policy: MakePolicy, world: World
) -> None:
    model: Any = kind(make_policy().causal_lm.config)
    with pytest.raises(ModelError, match=message):
        loading._check(Policy(model, world.tokenizer), "here")
    assert model.config._attn_implementation == ATTENTION


def test_a_tokenizer_larger_than_the_model_is_refused(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    make_policy(vocab_size=len(world.tokenizer) - 10).save(tmp_path)
    with pytest.raises(ModelError, match=r"the tokenizer has 300 tokens, the model embeds only 290"):
        load(str(tmp_path), None)


def test_a_tokenizer_without_an_end_is_refused(saved: Path) -> None:
    config = json.loads((saved / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load(str(saved), None)


def test_weights_are_read_from_safetensors_only(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"its weights are pickled \(pytorch_model\.bin\).*safetensors"):
        load(str(saved), None)


def test_a_folder_without_a_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path=.*no model there"):
        Pretrained(path=str(tmp_path), lora=Lora())


def test_a_hub_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9; a pinned revision is read from the cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"model\.name=no/such: the hub does not answer"):
        Pretrained(name="no/such", lora=Lora()).identity()
    assert Pretrained(name="no/such", revision="abc", lora=Lora()).identity()["revision"] == "abc"


# --- identity


def test_a_local_models_identity_depends_on_its_contents(saved: Path, tmp_path: Path) -> None:
    before = Pretrained(path=str(saved), lora=Lora()).identity()
    moved = saved.rename(tmp_path / "moved")
    assert Pretrained(path=str(moved), lora=Lora()).identity() == before
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert Pretrained(path=str(moved), lora=Lora()).identity() != before


# --- templates and encoding


def test_a_tokenizer_without_a_template_gets_the_plain_template(saved: Path) -> None:
    (saved / "chat_template.jinja").unlink()
    policy = load(str(saved), None)
    assert policy.tokenizer.chat_template == PLAIN_TEMPLATE
    rendered = render(policy.tokenizer, ASKED, "4.")
    assert rendered.prompt.text == "<s>### user\nWhat is 2 plus 2?\n### assistant\n"
    assert rendered.rest.text == "4.</s>\n"


def test_a_template_that_differs_between_training_and_generation_is_refused(saved: Path) -> None:
    """Generation would see 'bot:' where training text says 'assistant:'."""
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    policy = load(str(saved), None, chat_template=template)
    with pytest.raises(
        ModelError, match=r"differ from character 22 on: generation has 'bot:', training has 'assistant:4'"
    ):
        encode(policy.tokenizer, ASKED, "4")


@pytest.mark.parametrize("after", ["", "\n", "<|user|>\n"])
def test_a_response_ends_with_its_first_and_only_end_of_sequence(after: str, world: World, saved: Path) -> None:
    """Text of the template after it is not part of the response, since no sample has it."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ eos_token + {after!r} }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer: Any = load(str(saved), None, chat_template=template).tokenizer
    prompt_ids, ids = encode(tokenizer, ASKED, "2 plus 2 is 4.")
    assert tokenizer.decode(prompt_ids) == "<s><|user|>What is 2 plus 2?<|assistant|>"
    assert tokenizer.decode(ids) == "2 plus 2 is 4.</s>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_template_without_an_end_gets_one(saved: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ' ' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer: Any = load(str(saved), None, chat_template=template).tokenizer
    assert encode(tokenizer, ASKED, "4.")[1][-1] == tokenizer.eos_token_id


def test_a_response_over_the_limit_is_cut_and_has_no_end(world: World) -> None:
    prompt = Prompt("a", ASKED, "long")
    ids = world.human[0].token_ids
    cut = human_response(world.tokenizer, prompt, ids, 3)
    assert (cut.token_ids, cut.tokens, cut.finish) == (ids[:3], 3, "length")
    assert cut.text == world.tokenizer.decode(ids[:3]), "it is judged by what is left, as a sample is"
    whole = human_response(world.tokenizer, prompt, ids, len(ids))
    assert (whole.token_ids, whole.finish, whole.text) == (ids, "eos", "long")


def test_the_models_own_stop_tokens_end_a_response_too(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert policy.stop_ids == [policy.tokenizer.eos_token_id]
    policy.causal_lm.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, 9]
    assert policy.stop_ids == [policy.tokenizer.eos_token_id, 9]


# --- adapters


def test_a_fresh_adapter_changes_nothing_and_depends_only_on_its_seed(make_policy: MakePolicy, world: World) -> None:
    prompts, human = rows(world)
    plain, before = make_policy(), torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        policy = make_policy()
        policy.model = Lora(rank=4).on(policy.model, seed)
        assert policy.score(prompts, human) == plain.score(prompts, human)
        found.append(torch.cat([p.flatten() for n, p in policy.model.named_parameters() if "lora_A" in n]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


def test_the_reference_of_an_adapter_is_read_with_the_adapter_off(make_policy: MakePolicy, world: World) -> None:
    prompts, human = rows(world)
    plain, policy = make_policy(), make_policy()
    policy.model = Lora(rank=4).on(policy.model, 0)
    reference = policy.reference()
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    assert reference.score(prompts, human) == plain.score(prompts, human)
    assert policy.score(prompts, human) != pytest.approx(plain.score(prompts, human), abs=0.1)
    assert any(p.requires_grad for p in policy.model.parameters())


# --- the cost of training


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flop_of_training_equal_torchs_count_of_matrix_products(
    family: str, make_policy: MakePolicy, world: World
) -> None:
    policy, tokens = make_policy(), 12
    if family == "gpt2":
        small = GPT2Config(vocab_size=len(world.tokenizer), n_embd=16, n_layer=2, n_head=2)
        policy = Policy(GPT2LMHeadModel(small), world.tokenizer)
    model = type(policy.model)(policy.model.config)  # with the attention of transformers
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None] % 50).logits.sum().backward()
    products = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert policy.count_flop() * tokens == products["aten.mm"] + products.get("aten.addmm", 0)


def test_adapters_save_the_gradients_of_frozen_weights(make_policy: MakePolicy) -> None:
    policy, width = make_policy(), 2
    whole = policy.count_flop()
    policy.model = Lora(rank=width, target_modules=["o_proj"]).on(policy.model, 0)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert policy.count_flop() == whole * 4 / 6 + 6 * trained


# --- tokens in the model's context


def test_a_response_starts_with_the_tokens_that_the_model_would_generate(shared: Path) -> None:
    """A SentencePiece tokenizer puts a space before every text; after a line break the model would write none."""
    tokenizer: Any = load(str(shared / "models" / "stories260K"), None).tokenizer
    prompt_ids, ids = encode(tokenizer, ASKED, "Once upon a time.")
    whole = tokenizer("<s>### user\nWhat is 2 plus 2?\n### assistant\nOnce upon a time.</s>", add_special_tokens=False)[
        "input_ids"
    ]
    assert prompt_ids + ids == whole
    assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")


def test_a_response_ends_at_every_token_that_ends_a_sample(saved: Path) -> None:
    """A template that closes turns with a special token, at which the model's generation stops."""
    policy = load(str(saved), None)
    tokenizer: Any = policy.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}<pad>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    pad = tokenizer.pad_token_id
    policy.causal_lm.generation_config.eos_token_id = [tokenizer.eos_token_id, pad]
    _, ids = encode(tokenizer, ASKED, "2 plus 2 is 4.", policy.stop_ids)
    assert ids[-1] == pad
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == "2 plus 2 is 4."


def test_a_prompt_keeps_the_tokenizers_start_token(shared: Path) -> None:
    """stories260K's tokenizer puts <s> before every text: kept with a template without it, and never doubled."""
    silent = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    loud = "{{ bos_token }}" + silent.replace("A: ", "")
    for template in (silent.replace("A: ", ""), loud):
        tokenizer: Any = load(str(shared / "models" / "stories260K"), None, chat_template=template).tokenizer
        adds = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        prompt_ids, _ = encode(tokenizer, ASKED, "4.")
        assert prompt_ids.count(tokenizer.bos_token_id) == int(adds or template is loud)


def test_dropout_is_off_even_if_the_model_has_it(make_policy: MakePolicy, tmp_path: Path) -> None:
    """GPT-2 ships dropout 0.1: the policy would differ from the reference at step 0, at random."""
    make_policy(attention_dropout=0.5).save(tmp_path)
    policy = load(str(tmp_path), None)
    assert policy.causal_lm.config.attention_dropout == 0.0
    policy.model.train()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(policy.causal_lm(ids).logits, policy.causal_lm(ids).logits)


def test_a_template_that_cannot_render_is_named(saved: Path) -> None:
    policy = load(str(saved), None, chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(ModelError, match=r"model\.chat_template: cannot render \['user'\] \(no system role\)"):
        encode(policy.tokenizer, ASKED, "4")


def test_a_broken_weight_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ModelError, match=r"model: .*: model\.safetensors is not a safetensors file"):
        load(str(saved), None)


@pytest.mark.parametrize("modules", [["lm_head"], ["q_proj", "lm_head"], r".*lm_head"], ids=str)
def test_an_adapter_on_the_output_head_is_refused(modules: Any, make_policy: MakePolicy) -> None:
    """Log-probabilities use the head's plain weight, so they would ignore the adapter."""
    policy = make_policy()
    policy.model = Lora(rank=2, target_modules=modules).on(policy.model, 0)
    with pytest.raises(ModelError, match=r"output head of LlamaForCausalLM .*not in model\.lora\.target_modules"):
        _ = policy.head


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_a_tied_embedding_is_refused(make_policy: MakePolicy) -> None:
    """Merging would change the head as well, so the saved model would differ from the trained one."""
    policy = make_policy(tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"model\.lora\.target_modules"):
        _ = Policy(Lora(rank=2, target_modules=["embed_tokens"]).on(policy.model, 0), policy.tokenizer).head


def test_all_linear_means_all_layers_but_the_head(make_policy: MakePolicy) -> None:
    policy = make_policy()
    policy.model = Lora(rank=2).on(policy.model, 0)
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in policy.model.named_parameters() if "lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert policy.head.weight_VH is policy.causal_lm.lm_head.weight


def test_target_modules_that_the_model_lacks_are_named(make_policy: MakePolicy) -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.target_modules=nothing"):
        Lora(rank=2, target_modules="nothing").on(make_policy().model, 0)


# --- the head of the configuration


def test_the_head_of_a_plain_model(make_policy: MakePolicy) -> None:
    policy = make_policy()
    head = policy.head
    assert head.weight_VH is policy.causal_lm.lm_head.weight
    assert (head.bias_V, head.scale, head.cap) == (None, 1.0, math.inf)


@pytest.mark.parametrize(
    ("model", "scale", "cap", "bias"),
    [
        (
            Gemma2ForCausalLM(Gemma2Config(vocab_size=300, head_dim=8, final_logit_softcapping=2.5, **SMALL)),
            1,
            2.5,
            False,
        ),
        (CohereForCausalLM(CohereConfig(vocab_size=300, logit_scale=0.0625, **SMALL)), 0.0625, math.inf, False),
        (GraniteForCausalLM(GraniteConfig(vocab_size=300, logits_scaling=8.0, **SMALL)), 0.125, math.inf, False),
        (PhiForCausalLM(PhiConfig(vocab_size=300, **SMALL)), 1, math.inf, True),
    ],
    ids=["Gemma2", "Cohere", "Granite", "Phi"],
)
@torch.no_grad()
def test_the_head_of_other_families(
    model: Any, scale: float, cap: float, bias: bool, world: World, tmp_path: Path
) -> None:
    """Caps, scales and biases are read from the configuration and the layer, and are kept by saving."""
    if bias:
        model.lm_head.bias.normal_()
    model.eval()
    ids = torch.tensor([[1, 5, 9, 30]])
    expected = model(input_ids=ids).logits[0, 1:3]
    for policy in (Policy(model, world.tokenizer), None):
        if policy is None:
            Policy(model, world.tokenizer).save(tmp_path)
            policy = load(str(tmp_path), None)
        head = policy.head
        assert (head.scale, head.cap, head.bias_V is not None) == (scale, cap, bias)
        found = head.logits(policy.hidden(pack([[1, 5]], [[9, 30]])))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- gradients, against autograd through the whole model on each sequence alone, in float64


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("share", [False, True])
def test_gradients_of_all_weights(tied: bool, share: bool, make_policy: MakePolicy, world: World) -> None:
    """With a tied head the embedding has both gradients: as the input embedding and as the output head."""
    prompts, human = rows(world, 2)
    prompts, human = prompts * 2, human + [h[: len(h) // 2] for h in human]
    policy = make_policy(tie_word_embeddings=tied)
    policy.model.double()
    expected = alone(policy.causal_lm, prompts, human)
    found = policy.logps(pack(prompts, human, share_prompt=share))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    grads = gradients(policy.model, expected)
    assert ("lm_head.weight" in grads) is not tied
    # Llama's norms are float32 whatever the weights are, and a shared prompt adds two gradients before them.
    same(gradients(policy.model, found), grads, 1e-5 if share else 1e-12)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_gradients_with_a_frozen_head(tied: bool, make_policy: MakePolicy, world: World) -> None:
    """Only the body is trained; the head has no gradient, and its product is not made."""
    prompts, human = rows(world, 3)
    policy = make_policy(tie_word_embeddings=tied)
    policy.model.double()
    policy.head.weight_VH.requires_grad_(False)
    expected = gradients(policy.model, alone(policy.causal_lm, prompts, human))
    assert "lm_head.weight" not in expected
    found = policy.logps(pack(prompts, human))
    same(gradients(policy.model, found), expected)
    found = policy.logps(pack(prompts, human))
    found.sum().backward()
    assert policy.head.weight_VH.grad is None


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_gradients_through_an_adapter(tied: bool, make_policy: MakePolicy, world: World) -> None:
    """Gradients only in its weights; also after a step, when its values equal those of the merged weights."""
    prompts, human = rows(world, 3)
    policy = make_policy(tie_word_embeddings=tied)
    policy.model = Lora(rank=3).on(policy.model.double(), 0)
    policy.model.double()
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    expected = alone(policy.causal_lm, prompts, human)
    found = policy.logps(pack(prompts, human))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    grads = gradients(policy.model, expected)
    assert all("lora_" in name for name in grads)
    same(gradients(policy.model, found), grads)
    merged: Any = policy.model.merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(alone(merged, prompts, human), expected, rtol=0, atol=1e-10)


def test_gradients_add_up_over_micro_batches(make_policy: MakePolicy, world: World) -> None:
    """``backward`` on parts of a batch, weighted by rows, gives the gradients of the whole batch."""
    prompts, human = rows(world, 5)
    policy = make_policy(tie_word_embeddings=True)
    policy.model.double()
    expected = gradients(policy.model, alone(policy.causal_lm, prompts, human))
    for part in (slice(0, 2), slice(2, 5)):
        (policy.logps(pack(prompts[part], human[part])).sum() / 5).backward()
    same({n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}, expected)


# --- fingerprints


def test_a_fingerprint_depends_on_the_weights_and_nothing_else(make_policy: MakePolicy, tmp_path: Path) -> None:
    """Equal for equal weights in any folder; different if the last bit of one weight changes."""
    known = make_policy().fingerprint()
    assert make_policy().fingerprint() == known
    assert make_policy(seed=1).fingerprint() != known
    for folder in (tmp_path / "one", tmp_path / "other"):
        make_policy().save(folder)
        assert load(str(folder), None).fingerprint() == known
    assert make_policy().reference().fingerprint() == known
    policy = make_policy()
    policy.model.to(torch.float64).to(torch.float32)
    assert policy.fingerprint() == known
    policy.model.train()
    policy.score([[1, 2]], [[3]])
    assert policy.fingerprint() == known
    with torch.no_grad():
        weight = policy.causal_lm.model.layers[1].mlp.up_proj.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert policy.fingerprint() != known
    assert make_policy().fingerprint() == known


def test_a_fingerprint_depends_on_types_and_frozen_weights(make_policy: MakePolicy) -> None:
    known = make_policy().fingerprint()
    assert Policy(make_policy().model.bfloat16(), make_policy().tokenizer).fingerprint() != known
    frozen = make_policy()
    frozen.model.requires_grad_(False)
    assert frozen.fingerprint() == known, "whether something is trained is no weight"
    with torch.no_grad():
        frozen.causal_lm.lm_head.weight[0, 0] += 1
    assert frozen.fingerprint() != known
    # The same bytes in the same order, with another name or shape.
    for change in (lambda w: w.view(2, -1), lambda w: w.view(torch.int32)):
        other = make_policy()
        norm = other.causal_lm.model.norm
        norm.weight = nn.Parameter(change(norm.weight.detach()), requires_grad=False)
        assert other.fingerprint() != known
    renamed = make_policy()
    norm = renamed.causal_lm.model.norm
    norm.scale = norm.weight
    del norm.weight
    assert renamed.fingerprint() != known
    swapped = make_policy()
    layers = swapped.causal_lm.model.layers
    layers[0].self_attn.q_proj, layers[0].self_attn.k_proj = layers[0].self_attn.k_proj, layers[0].self_attn.q_proj
    assert swapped.fingerprint() != known


def test_a_fingerprint_depends_on_the_adapter(make_policy: MakePolicy) -> None:
    """It depends on whether there is an adapter, on its initial values and on its present values."""
    found = [make_policy().fingerprint()]
    for seed in (0, 1):
        policy = make_policy()
        policy.model = Lora(rank=2).on(policy.model, seed)
        found.append(policy.fingerprint())
    with torch.no_grad():
        next(p for n, p in policy.model.named_parameters() if "lora_B" in n)[0, 0] = 1e-3
    found.append(policy.fingerprint())
    assert len(set(found)) == 4


# --- batches for scoring


def test_batches_by_length() -> None:
    """The shortest come first; a batch has limited tokens or one longer sequence; each occurs once."""
    assert list(by_length([5, 1, 3, 4, 2], 6)) == [[1, 4, 2], [3], [0]]
    assert list(by_length([5, 1, 3, 4, 2], 7)) == [[1, 4, 2], [3], [0]]
    assert list(by_length([5, 1, 3, 4, 2], 10)) == [[1, 4, 2, 3], [0]]
    assert list(by_length([9, 20, 8], 7)) == [[2], [0], [1]]
    assert list(by_length([3, 3, 3], 6)) == [[0, 1], [2]]
    assert list(by_length([], 7)) == []
    assert list(by_length([7] * 4)) == [[0, 1, 2, 3]]
    lengths = [(17 * i) % 101 + 1 for i in range(300)]
    found = list(by_length(lengths, 256))
    assert sorted(i for some in found for i in some) == list(range(300))
    assert all(sum(lengths[i] for i in some) <= 256 for some in found)


def test_scores_are_computed_in_batches_with_a_limit_on_tokens(
    make_policy: MakePolicy, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts count too; rows are in the caller's order, and no gradients are kept."""
    prompts, human = rows(world, 40)
    policy = make_policy()
    expected = policy.score(prompts, human)
    assert expected == pytest.approx(alone(policy.causal_lm, prompts, human).tolist(), abs=1e-4)
    seen: list[int] = []
    real = Policy.hidden

    def hidden(self: Policy, batch: Packed) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(len(batch.ids_T))
        return real(self, batch)

    monkeypatch.setattr(Policy, "hidden", hidden)
    monkeypatch.setattr(by_length, "__defaults__", (100,))
    assert policy.score(prompts, human) == pytest.approx(expected, abs=1e-4)
    assert sum(seen) == sum(map(len, prompts)) + sum(map(len, human))
    assert max(seen) <= 100
    assert len(seen) > 5
    with pytest.raises(ValueError, match="zip"):
        policy.score(prompts, human[1:])


def test_evaluating_puts_the_mode_back(make_policy: MakePolicy) -> None:
    policy = make_policy()
    for mode in (True, False):
        policy.model.train(mode)
        with pytest.raises(KeyError), policy.evaluating():
            raise KeyError(policy.model.training)
        with policy.evaluating():
            assert not policy.model.training
        assert policy.model.training is mode


def test_the_reference_is_a_frozen_copy(make_policy: MakePolicy, world: World) -> None:
    """Training the policy does not change it, and none of its weights can be trained."""
    prompts, human = rows(world)
    policy = make_policy()
    reference, before = policy.reference(), make_policy().score(prompts, human)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    assert reference.score(prompts, human) == before
    assert policy.score(prompts, human) != pytest.approx(before, abs=0.1)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not reference.model.training
