"""Check the code that runs on a GPU against its definitions, computed in float64 without packing or tiles.

Each check yields its value and the limit that it must not exceed. Shapes as in ``dnpo.policy.logprobs``.
"""

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks import harness
from benchmarks.harness import Facts
from benchmarks.problem import Shape, model
from benchmarks.variant import Skip

SMALL = Shape(hidden=512, layers=4, mlp=1024, heads=8, kv_heads=2, vocabulary=32_000)
TINY = Shape(hidden=32, layers=2, mlp=64, heads=4, kv_heads=2, vocabulary=96)
FULL, HALF = torch.float32, torch.bfloat16
NATS = {FULL: 1e-3, HALF: 0.5}  # of a sequence: the tolerances of dnpo's check before the first update
RELATIVE = {FULL: 1e-3, HALF: 5e-2}  # of a gradient, in the norm
TOKEN = {FULL: 1e-4, HALF: 2e-2}  # nats of a token
BETA = 0.1


def _result(check: str, value: float, limit: float) -> Facts:
    return {"check": check, "value": value, "limit": limit, "ok": bool(math.isfinite(value) and value <= limit)}


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double().cpu() - expected.detach().double().cpu()).abs().max())


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference of two gradients, relative to the norm of the second."""
    error = sum(
        float((a.double().cpu() - b.double().cpu()).square().sum()) for a, b in zip(found, expected, strict=True)
    )
    return math.sqrt(error / sum(float(b.double().square().sum()) for b in expected))


# --- log-probabilities and noise


def _tokens(tiny: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and targets."""
    count, shape = (40, TINY) if tiny else (1500, SMALL)
    torch.manual_seed(0)
    device = harness.default_device()
    hidden_NH = torch.randn(count, shape.hidden, device=device).to(dtype)
    weight_VH = (2 * torch.randn(shape.vocabulary, shape.hidden, device=device) / math.sqrt(shape.hidden)).to(dtype)
    return hidden_NH, weight_VH, torch.randint(shape.vocabulary, (count,), device=device)


def check_logprobs(tiny: bool) -> Iterator[Facts]:
    """log softmax(h Wᵀ)[target], and its gradients in h and W."""
    from dnpo.policy.logprobs import Head, token_logps

    for dtype in (FULL, HALF):
        hidden_NH, weight_VH, target_N = _tokens(tiny, dtype)
        factor_N = torch.linspace(-1, 1, len(target_N), device=target_N.device)
        own = hidden_NH.requires_grad_(), weight_VH.requires_grad_()
        found_N = token_logps(hidden_NH, Head(weight_VH), target_N)
        gradients = torch.autograd.grad((found_N * factor_N).sum(), own)
        exact = [t.detach().double().requires_grad_() for t in own]
        expected_N = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, target_N[:, None])[:, 0]
        expected = torch.autograd.grad((expected_N * factor_N).sum(), exact)
        yield _result(f"log-probability of a token, {_label(dtype)}", _difference(found_N, expected_N), TOKEN[dtype])
        for name, one, other in zip(("hidden states", "head"), gradients, expected, strict=True):
            error = _relative([one], [other])
            yield _result(f"its gradient in the {name}, {_label(dtype)}", error, RELATIVE[dtype])


def check_noise(tiny: bool) -> Iterator[Facts]:
    """Both noisy log-probabilities, mean(s²) and the gradients of the noise, with the same ε."""
    from dnpo.optimise.npo import Rejected, TrainableModule
    from dnpo.policy.logprobs import Head, sum_by_sequence

    bound, alpha = 0.8, 0.1
    for dtype in (FULL, HALF):
        hidden_NH, weight_VH, target_N = _tokens(tiny, dtype)
        vocabulary, width = weight_VH.shape
        lengths = [len(target_N) // 4, len(target_N) - len(target_N) // 4]
        noise = TrainableModule(width, vocabulary, max_variance=bound).to(hidden_NH.device)
        with torch.no_grad():
            noise.weight_VH.normal_(0, 0.5 / math.sqrt(width))
        rejected = Rejected(hidden_NH, Head(weight_VH), target_N, lengths, (1, 2))
        found, _ = noise(torch.zeros(2, device=hidden_NH.device), rejected)
        loss = (found.noise_B * torch.tensor([0.5, -1.0], device=hidden_NH.device)).sum() + alpha * found.variance
        gradients = torch.autograd.grad(loss, list(noise.parameters()))

        own = [p.detach().double().requires_grad_() for p in noise.parameters()]
        products = own[0].to(dtype).double() if dtype == HALF else own[0]  # bf16 products read a bf16 copy of W
        share_NV = torch.sigmoid(2 * (hidden_NH.double() @ products.t() + own[1]) - math.log(bound))
        logits_NV = hidden_NH.double() @ weight_VH.double().t()
        lengths_B = torch.tensor(lengths, device=hidden_NH.device)

        terms = []
        for term in range(2):
            noisy_NV = logits_NV + share_NV.sqrt() * _draw_all(rejected, bound, term).double()
            logp_N = noisy_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]
            terms.append(sum_by_sequence(logp_N, lengths_B))
        (policy_B, noise_B), variance = terms, bound * share_NV.mean()
        loss = (noise_B * torch.tensor([0.5, -1.0], device=hidden_NH.device).double()).sum() + alpha * variance
        expected = torch.autograd.grad(loss, own)
        limit = TOKEN[dtype] * max(lengths)
        for name, one, other in (("policy", found.policy_B, policy_B), ("noise", found.noise_B, noise_B)):
            yield _result(f"noisy log-probability, {name} term, {_label(dtype)}", _difference(one, other), limit)
        yield _result(f"mean(s²), {_label(dtype)}", _difference(found.variance, variance), RELATIVE[dtype])
        error = _relative(list(gradients), list(expected))
        yield _result(f"gradient of the noise, {_label(dtype)}", error, RELATIVE[dtype])


def _draw_all(rejected: Any, variance: float, term: int) -> Tensor:
    """ε of all tokens and entries, which training draws tile by tile; shape N × V."""
    from dnpo.optimise.npo import _Draw
    from dnpo.policy.logprobs import tiles

    draw, count = _Draw(rejected, math.sqrt(variance)), len(rejected.target_N)
    device = rejected.hidden_NH.device
    return torch.cat(
        [draw(torch.empty(count, end - first, device=device), first, term) for first, end in tiles(rejected.head)], 1
    )


# --- the whole model


def _pairs(shape: Shape, tiny: bool) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Prompts, chosen and rejected responses of different lengths."""
    draw = Random(1)
    longest = 12 if tiny else 200

    def some(least: int) -> list[list[int]]:
        return [[draw.randrange(3, shape.vocabulary) for _ in range(draw.randint(least, longest))] for _ in range(6)]

    return some(2), some(1), some(1)


def _policy(shape: Shape, dtype: torch.dtype, quantization: str | None = None, lora: int = 0) -> Any:
    """A model whose weights are large enough for its tokens to differ."""
    from benchmarks.generate import NoText
    from dnpo.policy.model import Policy

    found: Any = model(shape, torch.device("cpu"), FULL)
    with torch.no_grad():
        for p in found.parameters():
            if p.dim() == 2:
                p.mul_(4)
    found = found.to(harness.default_device(), dtype)
    if quantization:
        from benchmarks.problem import quantise

        quantise(found, quantization)
    tokenizer: Any = NoText()
    return Policy(found, tokenizer)


def _plain(policy: Any) -> Any:
    """The same model in float64, with transformers' own attention."""
    found = copy.deepcopy(policy.causal_lm).double()
    found.set_attn_implementation(policy.own_attention)
    return found


def _score_plainly(plain: Any, prompt: list[int], completion: list[int]) -> Tensor:
    logits = plain(input_ids=torch.tensor([prompt + completion], device=plain.device)).logits[0]
    logits = logits.float() if logits.dtype == HALF else logits
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(1, torch.tensor(completion, device=plain.device)[:, None]).sum()


@torch.no_grad()
def _own_error(policy: Any, prompts: list[list[int]], completions: list[list[int]], exact: Tensor) -> float:
    """The error, in nats, of transformers' forward pass of single sequences, because every layer rounds."""
    policy.causal_lm.set_attn_implementation(policy.own_attention)
    rows = zip(prompts, completions, strict=True)
    found = [_score_plainly(policy.causal_lm, prompt, completion) for prompt, completion in rows]
    policy.causal_lm.set_attn_implementation("packed")
    return _difference(torch.stack(found), exact) + 0.05


def _loss(chosen_B: Tensor, rejected_B: Tensor, start_B: Tensor) -> Tensor:
    """The loss of DPO against a reference with these log-ratios."""
    return -logsigmoid(BETA * (chosen_B - rejected_B - start_B.to(chosen_B))).mean()


def check_model(tiny: bool) -> Iterator[Facts]:
    """Packed log-probabilities and the gradient of a DPO loss in all weights, against one sequence at a time."""
    from dnpo.policy.packing import pack

    shape = TINY if tiny else SMALL
    prompts, chosen, rejected = _pairs(shape, tiny)
    start_B = torch.linspace(-3, 3, len(prompts))
    for dtype in (FULL, HALF):
        policy = _policy(shape, dtype)
        plain = _plain(policy)
        packed = pack(prompts * 2, chosen + rejected, share_prompt=True).to(policy.device)
        chosen_B, rejected_B = policy.logps(packed).chunk(2)
        found = torch.autograd.grad(_loss(chosen_B, rejected_B, start_B), list(policy.model.parameters()))
        both = [torch.stack([_score_plainly(plain, p, c) for p, c in zip(prompts, some, strict=True)])
                for some in (chosen, rejected)]  # fmt: skip
        expected = torch.autograd.grad(_loss(both[0], both[1], start_B), list(plain.parameters()))
        error = _difference(torch.cat([chosen_B, rejected_B]), torch.cat(both))
        limit = (
            NATS[dtype] if dtype == FULL else 2 * _own_error(policy, prompts * 2, chosen + rejected, torch.cat(both))
        )
        yield _result(f"log-probability of a packed response, {_label(dtype)}", error, limit)
        # in bf16 every layer rounds, but the definition does not
        limit = RELATIVE[dtype] if dtype == FULL else 0.3
        yield _result(
            f"gradient of a DPO loss in all weights, {_label(dtype)}", _relative([*found], [*expected]), limit
        )
        alone = torch.tensor(policy.score(prompts * 2, chosen + rejected))
        error = _difference(torch.cat([chosen_B, rejected_B]), alone)
        yield _result(f"shared prompt against batches of another shape, {_label(dtype)}", error, NATS[dtype])


def check_generation(tiny: bool) -> Iterator[Facts]:
    """Greedy tokens of all rows, against transformers' ``generate`` on one prompt at a time."""
    from transformers import GenerationConfig

    from dnpo.generate import Sampling
    from dnpo.generate.hf import complete

    shape, limit = (TINY, 8) if tiny else (SMALL, 64)
    policy = _policy(shape, FULL)
    policy.model.eval()
    policy.__class__ = type("Stopping", (type(policy),), {"pad_id": 0, "stop_ids": [1]})
    prompts, _, _ = _pairs(shape, tiny)
    for copies in (1, 8):
        rows = [ids for ids in prompts for _ in range(copies)]
        how = Sampling(temperature=0.0, batch_size=4 if copies == 1 else 16)
        found = complete(policy, rows, how, limit, list(range(len(rows))), None)
        policy.causal_lm.set_attn_implementation(policy.own_attention)
        config = GenerationConfig(max_new_tokens=limit, do_sample=False, pad_token_id=0, eos_token_id=[1])
        expected = []
        for ids in prompts:
            row = torch.tensor([ids], device=policy.device)
            out = policy.causal_lm.generate(
                input_ids=row, attention_mask=torch.ones_like(row), generation_config=config
            )
            expected.append(out[0, len(ids) :].tolist())
        policy.causal_lm.set_attn_implementation("packed")
        wrong = sum(completion != expected[number // copies] for number, completion in enumerate(found))
        yield _result(f"rows with other greedy tokens, {copies} a prompt, of {len(rows)}", wrong, 0)


def check_quantised(tiny: bool) -> Iterator[Facts]:
    """Log-probabilities on quantised weights against the dequantised ones, and gradients after an evaluation."""
    from importlib.util import find_spec

    from dnpo.policy.lora import Lora
    from dnpo.policy.packing import pack

    if find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    from bitsandbytes.functional import dequantize_4bit

    shape = TINY if tiny else SMALL
    prompts, chosen, _ = _pairs(shape, tiny)
    for kind in ("nf4", "int8"):
        policy, plain = _policy(shape, FULL, kind), _policy(shape, FULL).causal_lm
        for name, layer in policy.causal_lm.named_modules():
            kind_of_layer = type(layer).__name__
            if kind_of_layer == "Linear4bit":
                plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            elif kind_of_layer == "Linear8bitLt":
                scale = (layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB)[:, None] / 127
                plain.get_submodule(name).weight.data = layer.weight.data.float() * scale
        plain = plain.double()
        plain.set_attn_implementation(policy.own_attention)
        with policy.evaluating():
            evaluated = torch.tensor(policy.score(prompts, chosen))
        expected = [_score_plainly(plain, p, c).detach() for p, c in zip(prompts, chosen, strict=True)]
        error = _difference(evaluated, torch.stack(expected))
        yield _result(f"log-probability on {kind} weights", error, NATS[FULL])
        policy.model.train()
        trained = torch.tensor(policy.score(prompts, chosen))
        yield _result(f"training against evaluation mode, {kind}", _difference(trained, evaluated), NATS[FULL])
        policy.model = Lora(rank=4).on(policy.model, 0)
        policy.logps(pack(prompts, chosen).to(policy.device)).sum().backward()
        gradients = [p.grad for name, p in policy.model.named_parameters() if ".lora_B." in name]
        still = sum(grad is None or not bool(grad.any()) for grad in gradients)
        yield _result(f"adapters without a gradient on {kind} weights", still, 0)


# --- two devices


def check_two_processes(tiny: bool) -> Iterator[Facts]:
    """The gradient of a batch, summed over two processes, against one process."""
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and devices < 2:
        raise Skip(f"needs two devices, and there {'is one' if devices == 1 else 'is none'}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_train_half, (tiny, folder), nprocs=2)
        whole = _gradient(tiny, slice(None), harness.default_device())
        found = torch.load(Path(folder) / "sum.pt")
    yield _result("gradient of two processes against one, float32", _relative(found, whole), RELATIVE[FULL])


def _gradient(tiny: bool, rows: slice, device: torch.device) -> list[Tensor]:
    """The gradient of some rows' part of the mean loss."""
    from dnpo.policy.packing import pack

    shape = TINY if tiny else SMALL
    prompts, chosen, rejected = (some[rows] for some in _pairs(shape, tiny))
    total = len(_pairs(shape, tiny)[0])
    start_B = torch.linspace(-3, 3, total)[rows]
    policy = _policy(shape, FULL)
    policy.model.to(device)
    packed = pack(prompts * 2, chosen + rejected, share_prompt=True).to(device)
    loss = _loss(*policy.logps(packed).chunk(2), start_B) * len(prompts) / total
    return [gradient.cpu() for gradient in torch.autograd.grad(loss, list(policy.model.parameters()))]


def _train_half(rank: int, tiny: bool, folder: str) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{os.path.join(folder, 'meet')}", rank=rank, world_size=2
    )
    gradients = [gradient.to(device) for gradient in _gradient(tiny, slice(rank, None, 2), device)]
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    if rank == 0:
        torch.save([gradient.cpu() for gradient in gradients], Path(folder) / "sum.pt")
    torch.distributed.destroy_process_group()


CHECKS: tuple[Callable[[bool], Iterator[Facts]], ...] = (
    check_logprobs,
    check_noise,
    check_model,
    check_generation,
    check_quantised,
    check_two_processes,
)
