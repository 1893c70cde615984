"""Log-probabilities of responses against a brute force that runs every sequence alone, unpadded, through the model."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dnpo.logprobs import Sequences, logp_of_targets, sequences, sum_by_sequence, token_logits
from dnpo.model import Policy

VOCABULARY = 23
EOS = 2

# Unequal lengths on both sides; rows 2 and 4 end without EOS (cut at the limit), row 3 is empty, row 5 is EOS alone,
# and pad id 0 occurs inside a prompt and inside a completion, where it is a token like any other.
PROMPTS = [[1, 5, 9], [1, 7], [1, 5, 9, 0, 4, 4, 21], [1, 8, 8], [1], [1, 13, 6, 22]]
COMPLETIONS = [[11, 3, 17, EOS], [20, EOS], [6, 0, 19], [], [9, 5, 9, 14, 16, 22, 10], [EOS]]


def tiny(seed: int, layers: int = 2) -> LlamaForCausalLM:
    """A random float64 Llama whose probabilities are far from uniform, drawn without touching the global generator."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).double().eval()


def words(pad_id: int | None) -> PreTrainedTokenizerFast:
    """A tokenizer with one word an id; ``pad_id`` names its padding token, None leaves it without one."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    padding = {} if pad_id is None else {"pad_token": f"w{pad_id}"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w3")), eos_token=f"w{EOS}", **padding
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """One model for the module; no test changes it."""
    return tiny(seed=0)


@pytest.fixture(scope="module")
def policy(model: LlamaForCausalLM) -> Policy:
    """The model with padding id 0."""
    return Policy(model, words(0))


def brute_force(model: LlamaForCausalLM, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Σ_t log softmax(z)[y_t] in float64, token by token, from the model's own logits for this sequence alone."""
    total = 0.0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().numpy()
    for t, token in enumerate(completion):
        z = logits[len(prompt) + t - 1]
        total += float(z[token]) - math.log(float(np.exp(z - z.max()).sum())) - float(z.max())
    return total


def batch_of(indices: Sequence[int], pad_id: int = 0) -> Sequences:
    """Some of the rows above, in this order."""
    return sequences([PROMPTS[i] for i in indices], [COMPLETIONS[i] for i in indices], pad_id)


@torch.no_grad()
def logps(policy: Policy, batch: Sequences) -> Tensor:
    """As evaluation reads them."""
    return policy.logps(batch)


# --- layout -----------------------------------------------------------------------------------------------------------


def test_sequences_by_hand() -> None:
    """Every index tensor of a batch small enough to write out.

    Row 0:  5 6 | 7 8 2     completion at positions 2 3 4, predicted at 1 2 3
    Row 1:  9 | (empty)     padded with four 0s
    Row 2:  3 4 1 | 2       completion at position 3, predicted at 2; padded with one 0
    """
    batch = sequences([[5, 6], [9], [3, 4, 1]], [[7, 8, 2], [], [2]], pad_id=0)
    assert batch.count == 3
    assert batch.ids_ST.tolist() == [[5, 6, 7, 8, 2], [9, 0, 0, 0, 0], [3, 4, 1, 2, 0]]
    assert batch.mask_ST.tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.sequence_N.tolist() == [0, 0, 0, 2]
    assert batch.position_N.tolist() == [1, 2, 3, 2]
    assert batch.target_N.tolist() == [7, 8, 2, 2]


def test_mask_follows_length_not_id() -> None:
    """A token that happens to have the padding id is a token: it is attended to and, in a completion, counted."""
    batch = sequences([[0, 5]], [[0, 0, 7]], pad_id=0)
    assert batch.mask_ST.tolist() == [[1, 1, 1, 1, 1]]
    assert batch.target_N.tolist() == [0, 0, 7]


def test_unequal_numbers_of_prompts_and_completions_fail() -> None:
    """A silent zip would score responses against other prompts."""
    with pytest.raises(ValueError, match="zip"):
        sequences([[1], [1]], [[2]], pad_id=0)


# --- against the brute force ------------------------------------------------------------------------------------------


def test_logps_against_brute_force(model: LlamaForCausalLM, policy: Policy) -> None:
    """One test for shift, prompt, padding and end of sequence: any of them off moves some row by tenths of a nat."""
    found = logps(policy, batch_of(range(6)))
    expected = [brute_force(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-4, rel=1e-5)
    # The comparison means something only if the tokens' probabilities differ a good deal from 1/V and from each other.
    assert float(np.std([e / max(len(c), 1) for e, c in zip(expected, COMPLETIONS, strict=True)])) > 0.3


def test_a_token_is_predicted_by_the_position_before_it(model: LlamaForCausalLM, policy: Policy) -> None:
    """The shift by one: a first token's log-probability comes from the prompt's last position, not from its own."""
    prompt, token = [1, 5, 9], 11
    with torch.no_grad():
        logp_TV = model(input_ids=torch.tensor([[*prompt, token]])).logits[0].log_softmax(-1)
    right, unshifted = float(logp_TV[2, token]), float(logp_TV[3, token])
    found = float(logps(policy, sequences([prompt], [[token]], pad_id=0)))
    assert found == pytest.approx(right, abs=1e-5)
    assert abs(found - unshifted) > 0.1


def test_the_prompt_never_counts(policy: Policy) -> None:
    """Chain rule: tokens moved from completion to prompt take away exactly their own log-probability."""
    whole = [11, 3, 17, EOS]
    batch = sequences([[1, 5]] * 2 + [[1, 5, *whole[:2]]], [whole, whole[:2], whole[2:]], pad_id=0)
    all_four, first_two, last_two = logps(policy, batch).tolist()
    assert first_two + last_two == pytest.approx(all_four, abs=1e-4)
    assert first_two < -0.1
    assert last_two < -0.1


@pytest.mark.parametrize("pad_id", [EOS, 17, 22])
def test_padding_never_counts(policy: Policy, pad_id: int) -> None:
    """Whatever id fills the rows, even end-of-sequence or a token of the completions, and however long they are."""
    expected = logps(policy, batch_of(range(6)))
    torch.testing.assert_close(logps(policy, batch_of(range(6), pad_id)), expected, rtol=0, atol=1e-6)
    longer = sequences([*PROMPTS, [1] * 40], [*COMPLETIONS, [5] * 40], pad_id)
    torch.testing.assert_close(logps(policy, longer)[:6], expected, rtol=0, atol=1e-5)


def test_the_end_of_sequence_counts(model: LlamaForCausalLM, policy: Policy) -> None:
    """A finished response is less probable than the same words unfinished, by log p(EOS | all before)."""
    prompt, said = [1, 5, 9], [11, 3, 17]
    finished, unfinished = logps(policy, sequences([prompt] * 2, [[*said, EOS], said], pad_id=EOS)).tolist()
    with torch.no_grad():
        last_V = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0, -1].log_softmax(-1)
    assert finished - unfinished == pytest.approx(float(last_V[EOS]), abs=1e-4)
    assert finished < unfinished - 0.05


def test_an_empty_completion_has_log_probability_zero(policy: Policy) -> None:
    """The empty product, among other rows and alone."""
    assert logps(policy, batch_of([3, 0]))[0] == 0
    assert logps(policy, batch_of([3])).tolist() == [0.0]


def test_the_order_of_a_batch_is_irrelevant(policy: Policy) -> None:
    """Sums belong to their own sequence whatever stands beside it."""
    order = [4, 0, 3, 5, 2, 1]
    expected = logps(policy, batch_of(range(6)))[order]
    torch.testing.assert_close(logps(policy, batch_of(order)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_score_against_brute_force(model: LlamaForCausalLM, policy: Policy, batch_size: int) -> None:
    """``score`` sorts by length for speed; what it gives back is in the caller's order for every batch size."""
    expected = [brute_force(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert policy.score(PROMPTS, COMPLETIONS, batch_size) == pytest.approx(expected, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("pad_id", [EOS, 17, None])
def test_score_whatever_the_tokenizer_pads_with(policy: Policy, pad_id: int | None) -> None:
    """Also with a tokenizer that names no padding token at all, as Llama's does."""
    other = Policy(policy.model, words(pad_id))
    assert other.pad_id == (EOS if pad_id is None else pad_id)
    expected = policy.score(PROMPTS, COMPLETIONS, 3)
    assert other.score(PROMPTS, COMPLETIONS, 3) == pytest.approx(expected, abs=1e-6)


def test_probabilities_of_all_continuations_sum_to_one(policy: Policy) -> None:
    """Σ_y p(y | x) = 1 over all V² two-token completions: nothing is left out of, or added to, the normalisation."""
    everything = [[a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)]
    found = policy.score([[1, 5, 9]] * len(everything), everything, 600)
    assert sum(map(math.exp, found)) == pytest.approx(1.0, abs=1e-5)


def test_logps_gradient_against_brute_force() -> None:
    """The gradient that training follows, in every weight of the model, against autograd through the brute force."""
    model = tiny(seed=1)
    found = torch.autograd.grad(Policy(model, words(0)).logps(batch_of([0, 4])).sum(), list(model.parameters()))
    logp = torch.zeros((), dtype=torch.float64)
    for i in (0, 4):
        row = torch.tensor([[*PROMPTS[i], *COMPLETIONS[i]]])
        logp_TV = model(input_ids=row).logits[0].log_softmax(-1)
        for t, token in enumerate(COMPLETIONS[i]):
            logp = logp + logp_TV[len(PROMPTS[i]) + t - 1, token]
    for ours, theirs in zip(found, torch.autograd.grad(logp, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_token_logits_adds_the_bias() -> None:
    """A head with a bias, worked by hand: (1, 2)·(3, 4) + 0.5 = 11.5 and (1, 2)·(−1, 1) − 1 = 0."""
    hidden, weight, bias = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 4.0], [-1.0, 1.0]]),
        torch.tensor([0.5, -1.0]),
    )
    assert token_logits(hidden, weight, bias).tolist() == [[11.5, 0.0]]
    assert token_logits(hidden, weight, None).tolist() == [[11.0, 1.0]]


def test_logp_of_targets_by_hand() -> None:
    """Logits (ln 1, ln 2, ln 5) are probabilities 1/8, 2/8, 5/8; a shift of 1000 neither counts nor overflows."""
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log().expand(3, 3) + 1000
    expected = torch.tensor([0.125, 0.25, 0.625], dtype=torch.float64).log()
    torch.testing.assert_close(logp_of_targets(logits, torch.arange(3)), expected, rtol=0, atol=1e-9)


def test_sum_by_sequence_by_hand() -> None:
    """Sequence 1 has no token and gets 0; sequence 3 comes last and has none either."""
    found = sum_by_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert found.tolist() == [1.0, 0.0, 6.0, 0.0]


# --- precision --------------------------------------------------------------------------------------------------------


def test_bf16_model_sums_in_float32() -> None:
    """400 tokens of a bf16 model: the sum is exact to 1e-3 nats, where bf16 would lose more than an early margin.

    Both ways of losing it are shown: token values rounded to bf16 and summed exactly, and a sum kept in bf16.
    """
    policy = Policy(tiny(seed=2).to(torch.bfloat16), words(0))
    policy.head.weight.data.mul_(0.5)  # about 3.5 nats a token
    tokens = torch.randint(3, VOCABULARY, (400,), generator=Generator().manual_seed(1)).tolist()
    batch = sequences([[1, 5, 9]], [tokens], pad_id=0)
    found = logps(policy, batch)
    with torch.no_grad():
        logits_NV = policy.logits(policy.hidden(batch))
    assert logits_NV.dtype == torch.float32
    logp_N = logp_of_targets(logits_NV, batch.target_N)
    exact = math.fsum(logp_N.tolist())
    assert found.dtype == torch.float32
    assert abs(float(found) - exact) < 1e-3
    rounded_N = logp_N.bfloat16()
    assert abs(math.fsum(rounded_N.tolist()) - exact) > 0.05
    assert abs(float(sum_by_sequence(rounded_N, batch.sequence_N, 1)) - exact) > 0.05
