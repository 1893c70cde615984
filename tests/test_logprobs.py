"""Log-probabilities: of a model against a brute force on single sequences, and of the head against autograd.

The head's function is compared in float64 with log_softmax and gather: values and all gradients, with a smaller last
tile, with tiles that are kept or made again, and with several blocks of rows.
"""

import math
from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dnpo.policy import logprobs
from dnpo.policy.logprobs import Head, Tally, sum_by_sequence, tiles, token_logps
from dnpo.policy.model import Policy
from dnpo.policy.packing import Packed, pack

VOCABULARY = 23
EOS = 2
EXACT = 1e-12

# Unequal lengths on both sides; rows 2 and 4 end without EOS (cut at the limit), row 3 is empty, row 5 is EOS alone,
# and pad id 0 occurs inside a prompt and inside a completion, where it is a token like any other.
PROMPTS = [[1, 5, 9], [1, 7], [1, 5, 9, 0, 4, 4, 21], [1, 8, 8], [1], [1, 13, 6, 22]]
COMPLETIONS = [[11, 3, 17, EOS], [20, EOS], [6, 0, 19], [], [9, 5, 9, 14, 16, 22, 10], [EOS]]


def tiny(seed: int, layers: int = 2) -> LlamaForCausalLM:
    """A random float64 Llama whose probabilities are far from uniform; the global generator is not used."""
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
    """A model outside any policy, with its original attention; no test changes it."""
    return tiny(seed=0)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The same weights as a policy."""
    return Policy(tiny(seed=0), words(0))


def brute_force(model: LlamaForCausalLM, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Σ_t log softmax(z)[y_t] in float64, token by token, from the model's own logits for this sequence alone."""
    total = 0.0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().numpy()
    for t, token in enumerate(completion):
        z = logits[len(prompt) + t - 1]
        total += float(z[token]) - math.log(float(np.exp(z - z.max()).sum())) - float(z.max())
    return total


def batch_of(indices: Sequence[int]) -> Packed:
    """Some of the rows above, in this order."""
    return pack([PROMPTS[i] for i in indices], [COMPLETIONS[i] for i in indices])


@torch.no_grad()
def logps(policy: Policy, batch: Packed) -> Tensor:
    """As in evaluation."""
    return policy.logps(batch)


# --- against the brute force ------------------------------------------------------------------------------------------


def test_logps_against_brute_force(model: LlamaForCausalLM, policy: Policy) -> None:
    """One test for shift, prompt, borders and end of sequence: each error changes some row by tenths of a nat."""
    found = logps(policy, batch_of(range(6)))
    expected = [brute_force(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=EXACT, rel=0)
    # The comparison needs probabilities that differ clearly from 1/V and from each other.
    assert float(np.std([e / max(len(c), 1) for e, c in zip(expected, COMPLETIONS, strict=True)])) > 0.3


def test_a_token_is_predicted_by_the_position_before_it(model: LlamaForCausalLM, policy: Policy) -> None:
    """The shift by one: the logits of the first token are at the prompt's last position, not at the token's."""
    prompt, token = [1, 5, 9], 11
    with torch.no_grad():
        logp_TV = model(input_ids=torch.tensor([[*prompt, token]])).logits[0].log_softmax(-1)
    right, unshifted = float(logp_TV[2, token]), float(logp_TV[3, token])
    found = float(logps(policy, pack([prompt], [[token]])))
    assert found == pytest.approx(right, abs=EXACT)
    assert abs(found - unshifted) > 0.1


def test_the_prompt_never_counts(policy: Policy) -> None:
    """Chain rule: moving tokens from the completion to the prompt subtracts exactly their log-probabilities."""
    whole = [11, 3, 17, EOS]
    batch = pack([[1, 5]] * 2 + [[1, 5, *whole[:2]]], [whole, whole[:2], whole[2:]])
    all_four, first_two, last_two = logps(policy, batch).tolist()
    assert first_two + last_two == pytest.approx(all_four, abs=EXACT)
    assert first_two < -0.1
    assert last_two < -0.1


@pytest.mark.parametrize("filler", [0, EOS, 17, 22])
def test_padding_never_counts(policy: Policy, filler: int) -> None:
    """For padding tokens of every kind, even end-of-sequence or a token of the completions, and any length."""
    expected = logps(policy, batch_of(range(6)))
    for around in ([], [filler] * 40, [filler] * 300):
        batch = pack([[filler], *PROMPTS, [1]], [around, *COMPLETIONS, around])
        torch.testing.assert_close(logps(policy, batch)[1:7], expected, rtol=0, atol=EXACT)


def test_the_end_of_sequence_counts(model: LlamaForCausalLM, policy: Policy) -> None:
    """A finished response is less probable than the same words without EOS, by log p(EOS | all before)."""
    prompt, said = [1, 5, 9], [11, 3, 17]
    finished, unfinished = logps(policy, pack([prompt] * 2, [[*said, EOS], said])).tolist()
    with torch.no_grad():
        last_V = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0, -1].log_softmax(-1)
    assert finished - unfinished == pytest.approx(float(last_V[EOS]), abs=EXACT)
    assert finished < unfinished - 0.05


def test_an_empty_completion_has_log_probability_zero(policy: Policy) -> None:
    """The empty sum is 0, among other rows and alone."""
    assert logps(policy, batch_of([3, 0]))[0] == 0
    assert logps(policy, batch_of([3])).tolist() == [0.0]


def test_the_order_of_a_batch_is_irrelevant(policy: Policy) -> None:
    """Sums are of one sequence only, with any other sequence in the batch."""
    order = [4, 0, 3, 5, 2, 1]
    expected = logps(policy, batch_of(range(6)))[order]
    torch.testing.assert_close(logps(policy, batch_of(order)), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("tokens", [1, 8, 17, 8192])
def test_score_against_brute_force(
    model: LlamaForCausalLM, policy: Policy, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``score`` sorts by length for speed; its result is in the caller's order for every batch size."""
    from dnpo.policy import model as module

    monkeypatch.setattr(module.by_length, "__defaults__", (tokens,))
    expected = [brute_force(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert policy.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=EXACT, rel=0)


@pytest.mark.parametrize("pad_id", [EOS, 17, None])
def test_score_with_any_padding_token(policy: Policy, pad_id: int | None) -> None:
    """Also for a tokenizer without a padding token, such as Llama's."""
    other = Policy(policy.model, words(pad_id))
    assert other.pad_id == (EOS if pad_id is None else pad_id)
    assert other.score(PROMPTS, COMPLETIONS) == policy.score(PROMPTS, COMPLETIONS)


def test_probabilities_of_all_continuations_sum_to_one(policy: Policy) -> None:
    """Σ_y p(y | x) = 1 over all V² two-token completions: the normalisation is exact."""
    everything = [[a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)]
    found = policy.score([[1, 5, 9]] * len(everything), everything)
    assert sum(map(math.exp, found)) == pytest.approx(1.0, abs=1e-10)


def test_logps_gradient_against_brute_force() -> None:
    """The gradient that training follows, in every weight of the model, against autograd through the brute force."""
    model, policy = tiny(seed=1), Policy(tiny(seed=1), words(0))
    found = torch.autograd.grad(policy.logps(batch_of([0, 4])).sum(), list(policy.model.parameters()))
    logp = torch.zeros((), dtype=torch.float64)
    for i in (0, 4):
        row = torch.tensor([[*PROMPTS[i], *COMPLETIONS[i]]])
        logp_TV = model(input_ids=row).logits[0].log_softmax(-1)
        for t, token in enumerate(COMPLETIONS[i]):
            logp = logp + logp_TV[len(PROMPTS[i]) + t - 1, token]
    for ours, theirs in zip(found, torch.autograd.grad(logp, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


# --- the head's function against autograd -----------------------------------------------------------------------------

N, H, V, C = 13, 5, 23, 7  # three full tiles and one of two entries
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "cap": {"cap": 1.5},
    "bias, scale, cap": {"bias": True, "scale": 3.0, "cap": 2.0},
}
KEPT = {"none": 0, "some": 2, "all": 100}  # tiles
TRAINED = ["hidden, head", "head", "hidden", "hidden, bias", "weight"]


class Case:
    """A head, hidden states and targets; equal arguments give equal values."""

    def __init__(
        self,
        trained: str = "hidden, head",
        *,
        bias: bool = False,
        scale: float = 1.0,
        cap: float = math.inf,
        tokens: int = N,
        width: int = H,
        entries: int = V,
        dtype: torch.dtype = torch.float64,
        spread: float = 1.0,
        head_dtype: torch.dtype | None = None,
    ) -> None:
        generator = Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = (draw(tokens, width) * spread).to(dtype).requires_grad_("hidden" in trained)
        self.weight = draw(entries, width).to(head_dtype or dtype)
        self.weight.requires_grad_("head" in trained or "weight" in trained)
        self.bias = draw(entries).to(head_dtype or dtype) if bias else None
        if self.bias is not None:
            self.bias.requires_grad_("head" in trained or "bias" in trained)
        self.head = Head(self.weight, self.bias, scale, cap)
        self.target = torch.randint(entries, (tokens,), generator=generator)
        edges = torch.tensor([0, entries - 1, C - 1, C])  # first and last entry of all, and of tiles
        self.target[: min(4, tokens)] = edges[:tokens]
        self.upstream = draw(tokens)
        if tokens > 5:
            self.upstream[5] = 0

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that require gradients."""
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def naive(self) -> Tensor:
        """The definition, in float64."""
        logits = self.hidden.double() @ self.weight.double().t()
        if self.bias is not None:
            logits = logits + self.bias.double()
        logits = logits * self.head.scale
        if self.head.cap != math.inf:
            logits = self.head.cap * torch.tanh(logits / self.head.cap)
        return logits.log_softmax(-1).gather(1, self.target.unsqueeze(-1)).squeeze(-1)

    def ours(self) -> Tensor:
        """The function under test."""
        return token_logps(self.hidden, self.head, self.target)

    def grads(self, logp: Tensor, **options: Any) -> list[Tensor]:
        """Gradients of Σ upstream · logp in the leaves."""
        return list(torch.autograd.grad((logp * self.upstream.to(logp.dtype)).sum(), self.leaves, **options))


def sizes(monkeypatch: pytest.MonkeyPatch, *, tile: int = C, kept: int = 0, rows: int = 8192) -> None:
    """Set entries per tile, kept bytes, and rows per product."""
    monkeypatch.setitem(logprobs.TILE, "cpu", tile)
    monkeypatch.setitem(logprobs.KEPT, "cpu", kept)
    monkeypatch.setattr(logprobs, "ROWS", rows)


def close(found: Sequence[Tensor], expected: Sequence[Tensor], atol: float = EXACT, rtol: float = 0.0) -> None:
    """Equal in number and value."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_against_autograd(
    form: str, kept: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, for one block of rows and for several with a short last one."""
    options: dict[str, Any] = FORMS[form] | ({"bias": True} if trained == "hidden, bias" else {})
    for rows in (8192, 5):
        sizes(monkeypatch, kept=KEPT[kept] * min(rows, N) * C * 8, rows=rows)
        case = Case(trained, **options)
        found, expected = case.ours(), case.naive()
        assert found.dtype == torch.float64
        close([found], [expected])
        close(case.grads(found), case.grads(expected))
        with torch.no_grad():
            close([case.ours()], [expected])


@pytest.mark.parametrize("trained", ["hidden, head", "hidden"])
@pytest.mark.parametrize("tile", [1, V - 1, V, V + 1, 10**6])
def test_the_size_of_a_tile_changes_nothing(tile: int, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes(monkeypatch, tile=tile, kept=10**9)
    case = Case(trained, bias=True, cap=3.0)
    close([case.ours()], [case.naive()])
    close(case.grads(case.ours()), case.grads(case.naive()))


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kept", [0, 10**9])
def test_no_completion_tokens(trained: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch of empty completions gives no values, and gradients of 0."""
    sizes(monkeypatch, kept=kept)
    case = Case(trained, bias=True, tokens=0)
    assert case.ours().shape == (0,)
    for grad, leaf in zip(case.grads(case.ours()), case.leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("trained", ["hidden, head", "hidden"])
@pytest.mark.parametrize("kept", [0, 10**9])
def test_extreme_logits(dtype: torch.dtype, trained: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of ± 10⁴: exp overflows or underflows in every tile, but no result is NaN or infinite."""
    sizes(monkeypatch, kept=kept)
    case = Case(trained, dtype=dtype, spread=5e3)
    logits = case.head.logits(case.hidden)
    assert float(logits.max()) > 1e4
    assert float(logits.min()) < -1e4
    found, expected = case.ours(), case.naive()
    close([found.double()], [expected], atol=0, rtol=1e-12 if dtype is torch.float64 else 1e-5)
    exact = dtype is torch.float64
    for one, other in zip(case.grads(found), case.grads(expected), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(
            one.double(), other.double(), rtol=1e-9 if exact else 1e-3, atol=1e-9 if exact else 1
        )


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_the_largest_logit_may_come_in_any_tile(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new maximum scales the running sums by factors from 1 down to 0."""
    sizes(monkeypatch)
    for size in (1.0, 30.0, 2000.0):
        case = Case("hidden", bias=True)
        assert case.bias is not None
        case.bias[at * C] += size
        close([case.ours()], [case.naive()], atol=1e-11)
        close(case.grads(case.ours()), case.grads(case.naive()), atol=1e-11)


def test_float32_is_near_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes(monkeypatch, tile=100)
    for trained in ("hidden, head", "hidden"):
        case = Case(trained, tokens=64, width=32, entries=999, dtype=torch.float32, bias=True)
        found = case.ours()
        assert found.dtype == torch.float32
        close([found.double()], [case.naive()], atol=3e-5)
        for one, other in zip(case.grads(found), case.grads(case.naive()), strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=3e-5)


# --- micro-batches and repetition


@pytest.mark.parametrize("trained", ["hidden, head", "hidden"])
@pytest.mark.parametrize("cap", [math.inf, 2.0])
@pytest.mark.parametrize("kept", KEPT)
def test_backward_twice_gives_the_same_bits(
    kept: str, cap: float, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``retain_graph``, although the first pass frees the kept tiles: they are made again."""
    sizes(monkeypatch, kept=KEPT[kept] * N * C * 8)
    case = Case(trained, bias=True, cap=cap)
    logp = case.ours()
    first = case.grads(logp, retain_graph=True)
    second = case.grads(logp, retain_graph=True)
    close(second, first, atol=0)
    case.upstream *= -2
    close(case.grads(logp), [-2 * x for x in first])


@pytest.mark.parametrize("kept", [0, 10**9])
def test_micro_batches_add_up_to_the_batch(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient accumulation: ``backward`` on two parts gives the same ``grad`` as on the whole."""
    sizes(monkeypatch, kept=kept)
    case = Case(bias=True)
    expected = case.grads(case.naive())
    for part in (slice(0, 4), slice(4, N)):
        logp = token_logps(case.hidden[part], case.head, case.target[part])
        (logp * case.upstream[part]).sum().backward()
    close([leaf.grad for leaf in case.leaves if leaf.grad is not None], expected)


def test_a_head_used_twice_gathers_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen and rejected in two calls, and a tied embedding with an additional gradient."""
    sizes(monkeypatch)
    case = Case()
    rows = torch.tensor([3, 3, 0, V - 1])
    found = case.ours().sum() - 2 * case.ours()[:5].sum() + case.weight[rows].square().sum()
    expected = case.naive().sum() - 2 * case.naive()[:5].sum() + case.weight[rows].square().sum()
    close(torch.autograd.grad(found, case.leaves), torch.autograd.grad(expected, case.leaves))


@pytest.mark.parametrize("trained", ["hidden, head", "hidden"])
def test_second_derivatives_are_refused(trained: str) -> None:
    """Second derivatives do not exist here; without an error half of them would be wrong."""
    case = Case(trained)
    with pytest.raises(RuntimeError):  # noqa: PT012
        (grad,) = torch.autograd.grad(case.ours().square().sum(), case.hidden, create_graph=True)
        torch.autograd.grad(grad.square().sum(), case.hidden)


# --- cost


class Outputs(TorchDispatchMode):
    """The largest tensor of any operation, and the greatest number of bytes of N × C tiles at one time."""

    def __init__(self, *tile: int) -> None:
        super().__init__()
        self.tile, self.largest, self.most = tile, 0, 0
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.numel())
                if tuple(x.shape) == self.tile:
                    self.alive.append(ref(x))
        storages = {x.untyped_storage().data_ptr(): x.nbytes for r in self.alive if (x := r()) is not None}
        self.most = max(self.most, sum(storages.values()))
        return found


def run(case: Case) -> None:
    """Forward, and backward if a parameter is trained."""
    logp = case.ours()
    if case.leaves and torch.is_grad_enabled():
        case.grads(logp)


@pytest.mark.parametrize("trained", ["hidden, head", "hidden", "nothing"])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"cap": 2.0}], ids=str)
def test_nothing_of_the_size_of_all_logits_is_made(
    trained: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor is a tile or the head's gradient; few tiles are held at once."""
    tokens, entries, tile = 64, 2000, 100
    sizes(monkeypatch, tile=tile)
    case = Case(trained, tokens=tokens, width=8, entries=entries, **options)
    with Outputs(tokens, tile) as outputs:
        run(case)
    assert tokens * entries == 128_000
    assert outputs.largest <= max(tokens * tile, 8 * entries if "head" in trained else 0)
    assert 0 < outputs.most <= (5 if "cap" in options else 3) * tokens * tile * 8


@pytest.mark.parametrize("rows", [64, 16], ids=["one block of rows", "several"])
def test_no_more_tiles_are_kept_than_fit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of blocks of rows that fit in memory."""
    tokens, tile = 64, 100
    room = 5 * tokens * tile * 8
    sizes(monkeypatch, tile=tile, kept=room, rows=rows)
    case = Case(tokens=tokens, width=8, entries=2000)
    with Outputs(rows, tile) as outputs:
        run(case)
    assert 3 * tokens * tile * 8 < outputs.most <= room + 3 * rows * tile * 8


def test_no_tile_is_kept_without_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring with a head that is also being trained."""
    tokens, tile = 64, 100
    sizes(monkeypatch, tile=tile, kept=10**9)
    case = Case(tokens=tokens, width=8, entries=2000)
    with torch.no_grad(), Outputs(tokens, tile) as outputs:
        run(case)
    assert outputs.most <= 3 * tokens * tile * 8


@pytest.mark.parametrize(
    ("trained", "kept", "products"),
    [
        ("hidden, head", 0, 4),
        ("hidden, head", 2, 3.5),
        ("hidden, head", 100, 3),
        ("hidden", 0, 2),
        ("hidden", 100, 2),
        ("head", 0, 3),
        ("head", 100, 2),
        ("nothing", 100, 1),
    ],
)
@pytest.mark.parametrize("options", [{}, {"bias": True, "cap": 2.0}], ids=str)
def test_products_per_entry_and_token(
    trained: str, kept: int, products: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product is 2 N H V; a frozen head needs no product for its gradient."""
    tokens, width, entries, tile = 32, 8, 400, 100
    sizes(monkeypatch, tile=tile, kept=kept * tokens * tile * 8)
    case = Case(trained, tokens=tokens, width=width, entries=entries, **options)
    with FlopCounterMode(display=False) as counter:
        run(case)
    assert counter.get_total_flops() == products * 2 * tokens * width * entries


# --- precision --------------------------------------------------------------------------------------------------------


def test_log_sum_exp_of_half_precision_logits_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 logits in bf16; their sum is exact to 1e-5, but a sum in bf16 has an error of hundredths."""
    sizes(monkeypatch, tile=1000)
    case = Case(tokens=64, width=16, entries=4096, dtype=torch.bfloat16, bias=True)
    head = case.head.cast(torch.device("cpu"))
    exact = torch.cat([head.tile(case.hidden.detach(), *ends) for ends in tiles(head)], 1).double()
    expected = exact.log_softmax(-1).gather(1, case.target.unsqueeze(-1)).squeeze(-1)
    found = case.ours()
    assert found.dtype == torch.float32
    close([found.double()], [expected], atol=1e-5)
    in_bf16 = exact.bfloat16().log_softmax(-1).gather(1, case.target.unsqueeze(-1)).squeeze(-1)
    assert float((in_bf16.double() - expected).abs().max()) > 0.01
    close([found.double()], [case.naive()], atol=0.1)  # the products alone are rounded


@pytest.mark.parametrize("rows", [8192, 64])
@pytest.mark.parametrize("kept", [0, 10**9])
def test_the_heads_gradient_is_summed_in_float32(rows: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of 8,192 tokens with the same sign; a sum in bf16 stops growing at 256 times its summands."""
    sizes(monkeypatch, tile=10, kept=kept, rows=rows)
    case = Case("head", tokens=8192, width=4, entries=40, head_dtype=torch.float32, dtype=torch.float32, bias=True)
    with torch.no_grad():
        case.hidden.abs_().add_(1)
        case.target.fill_(3)
    case.upstream.fill_(1)
    written: list[tuple[torch.dtype, torch.dtype]] = []
    real = logprobs.product

    def product(one: Tensor, other: Tensor, *, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        found = real(one, other, plus=plus, out=out)
        written.append((one.dtype, found.dtype))
        return found

    monkeypatch.setattr(logprobs, "product", product)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.grads(case.ours())
    assert set(written) == {(torch.bfloat16, torch.float32)}
    expected = case.grads(case.naive())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        off = (one - other).norm() / other.norm()
        assert float(off) < 0.01
    stuck = torch.zeros((), dtype=torch.bfloat16)
    for value in (case.hidden[:, 0] * (1 - case.naive().detach().exp())).bfloat16():
        stuck += value
    assert float(stuck) < 0.5 * float(expected[0][3, 0])


@pytest.mark.parametrize("kept", [0, 10**9])
@pytest.mark.parametrize("trained", ["hidden, head", "hidden"])
def test_half_precision_weights_have_the_gradient_of_their_float64_copies(
    trained: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes(monkeypatch, tile=100, kept=kept)
    case = Case(trained, tokens=2048, width=16, entries=300, dtype=torch.bfloat16, bias=True, spread=0.5)
    for one, other in zip(case.grads(case.ours()), case.grads(case.naive()), strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 0.01


@pytest.mark.parametrize("trained", ["hidden, head", "hidden"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_has_products_in_bf16_and_gradients_in_the_types_of_the_weights(
    trained: str, hidden_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values equal those of a bf16 head; forward and backward inside autocast, as in training."""
    sizes(monkeypatch, tile=100)
    case = Case(trained, tokens=64, width=16, entries=300, dtype=hidden_dtype, head_dtype=torch.float32, spread=0.5)
    half = Head(case.weight.detach().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = case.ours()
        grads = case.grads(found)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_logps(case.hidden.detach().bfloat16(), half, case.target))
    assert not torch.equal(found, case.ours().detach())
    for one, leaf, other in zip(grads, case.leaves, case.grads(case.naive()), strict=True):
        assert one.dtype == leaf.dtype
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 0.02


def test_bf16_model_sums_in_float32() -> None:
    """400 tokens of a bf16 model: the sum is exact to 1e-3 nats; the error in bf16 would exceed an early margin.

    Two such errors are shown: token values rounded to bf16 and summed exactly, and a sum in bf16.
    """
    policy = Policy(tiny(seed=2).to(torch.bfloat16), words(0))
    policy.head.weight_VH.data.mul_(0.5)  # about 3.5 nats a token
    tokens = torch.randint(3, VOCABULARY, (400,), generator=Generator().manual_seed(1)).tolist()
    batch = pack([[1, 5, 9]], [tokens])
    found = logps(policy, batch)
    with torch.no_grad():
        logits_NV = policy.head.logits(policy.hidden(batch))
    assert logits_NV.dtype == torch.float32
    logp_N = logits_NV.log_softmax(-1).gather(1, batch.target_N.unsqueeze(-1)).squeeze(-1)
    exact = math.fsum(logp_N.tolist())
    assert found.dtype == torch.float32
    assert abs(float(found) - exact) < 1e-3
    rounded_N = logp_N.bfloat16()
    assert abs(math.fsum(rounded_N.tolist()) - exact) > 0.05
    assert abs(float(sum_by_sequence(rounded_N, torch.tensor([400]))) - exact) > 0.05


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_all_logits_by_hand() -> None:
    """(1, 2)·(3, 4) + 0.5 = 11.5 and (1, 2)·(−1, 1) − 1 = 0; both doubled; and then 5 tanh of a fifth of that."""
    weight, bias = torch.tensor([[3.0, 4.0], [-1.0, 1.0]]), torch.tensor([0.5, -1.0])
    hidden = torch.tensor([[1.0, 2.0]])
    assert Head(weight).logits(hidden).tolist() == [[11.0, 1.0]]
    assert Head(weight, bias).logits(hidden).tolist() == [[11.5, 0.0]]
    assert Head(weight, bias, 2.0).logits(hidden).tolist() == [[23.0, 0.0]]
    assert Head(weight, bias, 2.0, 5.0).logits(hidden).tolist()[0] == pytest.approx([5 * math.tanh(4.6), 0.0])


def test_token_logps_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits (ln 1, ln 2, ln 5) give probabilities 1/8, 2/8, 5/8; a shift of 1000 changes nothing, no overflow."""
    sizes(monkeypatch, tile=2)
    for shift in (0.0, 1000.0, -1000.0):
        bias = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log() + shift
        head = Head(torch.zeros(3, 1, dtype=torch.float64), bias)
        found = token_logps(torch.zeros(3, 1, dtype=torch.float64), head, torch.arange(3))
        assert found.tolist() == pytest.approx([math.log(0.125), math.log(0.25), math.log(0.625)], abs=1e-9)


def test_a_frozen_head_does_not_change() -> None:
    """The reference's head is a copy: training the policy's head in place does not change it; it gets no gradient."""
    case = Case(bias=True, scale=0.5, cap=3.0)
    frozen, before = case.head.frozen(), case.ours().detach()
    with torch.no_grad():
        case.weight += 1
        assert case.bias is not None
        case.bias += torch.arange(V)
    assert (frozen.scale, frozen.cap) == (0.5, 3.0)
    logp = token_logps(case.hidden, frozen, case.target)
    assert torch.equal(logp, before)
    logp.sum().backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is None
    assert not frozen.weight_VH.requires_grad


def test_a_tally_counts_the_same_in_place() -> None:
    """There are two ways to add a tile; the second also returns exp(logits − m) and m."""
    case = Case()
    logits = case.head.logits(case.hidden)
    one, other = Tally(case.target), Tally(case.target)
    for first, end in ((0, 7), (7, 14), (14, 23)):
        one.add(logits[:, first:end], first)
        tile = logits[:, first:end].clone()
        most = other.add_(tile, first)
        torch.testing.assert_close(tile, (logits[:, first:end] - most.unsqueeze(-1)).exp())
        assert torch.equal(most, logits[:, first:end].amax(-1))
    for tally in (one, other):
        logp, lse = tally.logps()
        close([logp, lse], [case.naive(), logits.logsumexp(-1)])


@pytest.mark.parametrize("kept", [0, 10**9])
def test_rows_of_whole_pages_are_set_apart(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a tile of 1024 entries do not begin whole pages apart, and no value or gradient changes by a bit."""
    sizes(monkeypatch, tile=1024, kept=kept)
    head = Case(entries=2000).head.cast(torch.device("cpu"))
    assert head.tile(torch.zeros(3, H, dtype=torch.float64), 0, 1024).stride() == (1040, 1)
    found = []
    for apart in (16, 0):
        monkeypatch.setattr(logprobs, "APART", apart)
        case = Case(entries=2000, bias=True, dtype=torch.float32)
        logp = case.ours()
        found.append([logp, *case.grads(logp)])
    close(*found, atol=0)


def test_sum_by_sequence_by_hand() -> None:
    """Sequences without tokens have sum 0, at every place."""
    found = sum_by_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0, 2, 0]))
    assert found.tolist() == [0.0, 1.0, 0.0, 6.0, 0.0]
    assert sum_by_sequence(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert sum_by_sequence(torch.tensor([3.0]), torch.tensor([1])).dtype == torch.float32


def test_a_sum_depends_on_its_own_values_alone() -> None:
    """Bit by bit: with any other sequences, even infinite ones, at every position, and for any layout of its tokens."""
    own = torch.randn(301, generator=Generator().manual_seed(0)) * 100
    alone = sum_by_sequence(own, torch.tensor([301]))
    assert float(alone) == float(np.float32(np.cumsum(own.double().numpy())[-1]))
    for before, after in ((0, 5), (1, 0), (17, 1000), (1000, 3)):
        for other in (1e30, math.inf, math.nan, -3e-39):
            values = torch.cat([torch.full((before,), other), own, torch.full((after,), other)])
            found = sum_by_sequence(values, torch.tensor([before, 301, after]))
            assert torch.equal(found[1], alone[0])


def test_a_sum_of_float32_values_loses_no_small_value() -> None:
    """1 is below the last digit of 10⁸ in float32; the values are also summed in the given order."""
    values = torch.tensor([1e8, *[1.0] * 64, -1e8])
    assert sum_by_sequence(values, torch.tensor([66])).tolist() == [64.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_sum_reaches_its_own_sequence(dtype: torch.dtype) -> None:
    values = torch.randn(6, dtype=dtype, requires_grad=True)
    found = sum_by_sequence(values, torch.tensor([2, 0, 3, 1]))
    (grad,) = torch.autograd.grad((found * torch.tensor([2.0, 9.0, -1.0, 0.5])).sum(), values)
    assert grad.dtype == dtype
    assert grad.tolist() == [2.0, 2.0, -1.0, -1.0, -1.0, 0.5]
