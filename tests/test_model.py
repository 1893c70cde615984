"""Models and tokenizers: what is refused and why, templates, encoding, saving and loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from dnpo.errors import ModelError
from dnpo.model import Lora, Policy, Pretrained, load
from dnpo.records import Prompt
from dnpo.tokenizer import PLAIN_TEMPLATE, encode, human_response, render
from tests.conftest import World

MakePolicy = Callable[..., Policy]
ASKED = [{"role": "user", "content": "What is 2 plus 2?"}]


@pytest.fixture
def saved(make_policy: MakePolicy, tmp_path: Path) -> Path:
    """A model folder as transformers writes it."""
    make_policy().save(tmp_path / "model")
    return tmp_path / "model"


def test_a_policy_comes_back_as_it_was_saved(saved: Path, make_policy: MakePolicy, world: World) -> None:
    prompts, human = [p.token_ids for p in world.prompts[:6]], [r.token_ids for r in world.human[:6]]
    assert load(str(saved), None).score(prompts, human, 6) == make_policy().score(prompts, human, 6)
    assert AutoModelForCausalLM.from_pretrained(saved).config.model_type == "llama"


def test_other_families_of_models_give_their_own_log_probabilities(world: World, tmp_path: Path) -> None:
    """GPT-2 has learned positions and a tied head; ours must agree with its own forward on padded batches."""
    config = GPT2Config(vocab_size=len(world.tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Policy(GPT2LMHeadModel(config).eval(), world.tokenizer)
    policy.save(tmp_path)
    ours = load(str(tmp_path), None).score(
        [p.token_ids for p in world.prompts[:5]], [r.token_ids for r in world.human[:5]], 5
    )
    for prompt, response, found in zip(world.prompts, world.human, ours, strict=False):
        ids = torch.tensor([prompt.token_ids + response.token_ids])
        logp = policy.causal_lm(ids).logits[0].detach().double().log_softmax(-1)
        start = len(prompt.token_ids)
        brute = sum(float(logp[start + t - 1, token]) for t, token in enumerate(response.token_ids))
        assert found == pytest.approx(brute, abs=1e-3)


# --- what is refused


def test_a_head_that_does_more_than_it_says_is_refused_by_name(world: World, tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=len(world.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.1,
        initializer_range=0.5,
        pad_token_id=0,
    )
    Policy(Gemma2ForCausalLM(config), world.tokenizer).save(tmp_path)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM does more"):
        load(str(tmp_path), None)


def test_a_tokenizer_larger_than_the_model_is_refused(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    make_policy(vocab_size=len(world.tokenizer) - 10).save(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer in .* has 300 tokens, the model embeds only 290"):
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
    with pytest.raises(ModelError, match=r"cannot be loaded.*safetensors"):
        load(str(saved), None)


def test_a_folder_without_a_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path=.*no model there"):
        Pretrained(path=str(tmp_path), lora=Lora())


def test_a_hub_that_does_not_answer_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9; a pinned revision goes on to the cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"model\.name=no/such: the hub does not answer"):
        Pretrained(name="no/such", lora=Lora()).identity()
    assert Pretrained(name="no/such", revision="abc", lora=Lora()).identity()["revision"] == "abc"


# --- identity


def test_a_local_model_is_known_by_its_contents(saved: Path, tmp_path: Path) -> None:
    before = Pretrained(path=str(saved), lora=Lora()).identity()
    moved = saved.rename(tmp_path / "moved")
    assert Pretrained(path=str(moved), lora=Lora()).identity() == before
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert Pretrained(path=str(moved), lora=Lora()).identity() != before


# --- templates and encoding


def test_a_tokenizer_without_a_template_gets_the_plain_one(saved: Path) -> None:
    (saved / "chat_template.jinja").unlink()
    policy = load(str(saved), None)
    assert policy.tokenizer.chat_template == PLAIN_TEMPLATE
    prompt, rest = render(policy.tokenizer, ASKED, "4.")
    assert prompt == "<s>### user\nWhat is 2 plus 2?\n### assistant\n"
    assert rest == "4.</s>\n"


def test_a_template_that_parts_training_from_generation_is_refused(saved: Path) -> None:
    """Generation would see 'bot:' where training text says 'assistant:'."""
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    policy = load(str(saved), None, chat_template=template)
    with pytest.raises(ModelError, match=r"part at character 22: generation has 'bot:', training has 'assistant:4'"):
        encode(policy.tokenizer, ASKED, "4")


@pytest.mark.parametrize("after", ["", "\n", "<|user|>\n"])
def test_a_response_ends_with_its_first_and_only_end_of_sequence(after: str, world: World, saved: Path) -> None:
    """Whatever the template puts after it is not part of the response: no sample has it."""
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


def test_a_fresh_adapter_changes_nothing_and_its_seed_is_its_own(make_policy: MakePolicy, world: World) -> None:
    prompts, human = [p.token_ids for p in world.prompts[:6]], [r.token_ids for r in world.human[:6]]
    plain, before = make_policy(), torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        policy = make_policy()
        policy.model = Lora(rank=4).on(policy.model, seed)
        assert policy.score(prompts, human, 6) == plain.score(prompts, human, 6)
        found.append(torch.cat([p.flatten() for n, p in policy.model.named_parameters() if "lora_A" in n]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


def test_the_reference_of_an_adapter_is_read_with_the_adapter_off(make_policy: MakePolicy, world: World) -> None:
    prompts, human = [p.token_ids for p in world.prompts[:6]], [r.token_ids for r in world.human[:6]]
    plain, policy = make_policy(), make_policy()
    policy.model = Lora(rank=4).on(policy.model, 0)
    reference = policy.reference()
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    assert reference.score(prompts, human, 6) == plain.score(prompts, human, 6)
    assert policy.score(prompts, human, 6) != pytest.approx(plain.score(prompts, human, 6), abs=0.1)
    assert any(p.requires_grad for p in policy.model.parameters())


# --- tokens as the model meets them


def test_a_response_begins_as_the_model_would_begin_it(shared: Path) -> None:
    """A SentencePiece tokenizer puts a space before every text of its own; after a line break the model never would."""
    tokenizer: Any = load(str(shared / "models" / "stories260K"), None).tokenizer
    prompt_ids, ids = encode(tokenizer, ASKED, "Once upon a time.")
    whole = tokenizer("<s>### user\nWhat is 2 plus 2?\n### assistant\nOnce upon a time.</s>", add_special_tokens=False)[
        "input_ids"
    ]
    assert prompt_ids + ids == whole
    assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")


def test_a_response_ends_at_whatever_ends_a_sample(saved: Path) -> None:
    """A template that closes turns with a token of its own, at which the model's generation stops."""
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


def test_a_prompt_begins_as_the_tokenizer_begins_texts(shared: Path) -> None:
    """stories260K's tokenizer puts <s> before every text: with a template that does not write it, without doubling."""
    silent = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    loud = "{{ bos_token }}" + silent.replace("A: ", "")
    for template in (silent.replace("A: ", ""), loud):
        tokenizer: Any = load(str(shared / "models" / "stories260K"), None, chat_template=template).tokenizer
        adds = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        prompt_ids, _ = encode(tokenizer, ASKED, "4.")
        assert prompt_ids.count(tokenizer.bos_token_id) == int(adds or template is loud)


def test_dropout_is_off_whatever_the_model_says(make_policy: MakePolicy, tmp_path: Path) -> None:
    """GPT-2 comes with 0.1: with it the policy is not the reference at step 0, and chance is not the run's own."""
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
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(saved), None)


def test_target_modules_that_the_model_lacks_are_named(make_policy: MakePolicy) -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.target_modules=nothing"):
        Lora(rank=2, target_modules="nothing").on(make_policy().model, 0)
