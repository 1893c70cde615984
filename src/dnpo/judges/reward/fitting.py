"""Fit a reward model to preferences (Bradley and Terry): the chosen response should get the higher reward.

The loss of a pair is −log σ(r⁺ − r⁻). The fitted model is measured on held-out conversations, together with the
simplest judge, which prefers the longer response.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from dnpo.data.seen import hash_conversation
from dnpo.errors import DataError, ModelError
from dnpo.escape import say, tell
from dnpo.judges.reward.facts import FACTS, SEEN, Kind
from dnpo.judges.reward.models import Embedding, Rewards, start_classifier
from dnpo.judges.reward.preferences import Preference, Preferences
from dnpo.optimise.parts import Optimisation
from dnpo.optimise.steps import Batches, Slice, arrange
from dnpo.optimise.training import Training
from dnpo.optimise.training import fit as train
from dnpo.policy.encoder import Encoder, Ids
from dnpo.policy.model import device_of
from dnpo.policy.weights import Weights
from dnpo.seeding import derive
from dnpo.settings import Bound, Count, Natural, NonNegative, Positive
from dnpo.wording import fixed, percent, plural

WARMUP, CLIP, RESAMPLES = 0.05, 1.0, 2000
Row = tuple[list[Ids], list[Ids]]  # the chosen and the rejected response, each with its conversation


def fit(
    data: Preferences,
    *,
    base: str,
    out: str,
    revision: str | None = None,
    kind: Kind = "model",
    hidden: Count = 64,
    epochs: Count = 3,
    batch_size: Count = 16,
    lr: Positive = 1e-4,
    weight_decay: NonNegative = 0.01,
    template_date: str | None = None,
    max_tokens: Count | None = None,
    seed: Natural = 0,
    device: str = "auto",
    threads: Count = 1,
) -> dict[str, Any]:
    """Fit a reward model, measure it, and write it for ``judge=reward``.

    Args:
        data: the preferences.
        base: a folder of transformers, or a name on the hub.
        out: a folder that does not exist yet, or is empty.
        revision: a commit, branch or tag on the hub.
        kind: ``model`` trains all weights of ``base``, with one output; ``embedding`` trains only a head on the frozen
            ``base`` as encoder.
        hidden: number of hidden units of that head.
        epochs: passes over the training pairs.
        batch_size: pairs in a step.
        lr: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        template_date: the current date for a chat template that reads the clock; it is saved with the tokenizer.
        max_tokens: pairs with a longer row are left out; None: the maximum that the base can read.
        seed: seed of the output's initial weights and of the order of the pairs.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: number of torch's CPU threads.

    Returns:
        The content of ``reward.json``.

    Raises:
        DnpoError: the rows, the base model or the folder cannot be used, or the loss is not finite.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"out={out}: exists already; expected a new folder, or an empty one")
    known, held = data.read()
    torch.set_num_threads(threads)
    torch.manual_seed(derive(seed, "reward", "weights"))
    weights = Weights(base, None, None, "base") if Path(base).is_dir() else Weights(None, base, revision, "base")
    if kind != "model" and template_date is not None:
        raise ModelError(f"template_date={template_date}: kind={kind} has no chat template")
    where = device_of(device)
    model: Rewards = (
        start_classifier(weights, where, max_tokens, template_date)
        if kind == "model"
        else Embedding(Encoder(weights, device=where), hidden, max_tokens)
    )
    rows, left_out = _encode(model, known)
    held_rows, held_left_out = _encode(model, held)
    kept = [pair for pair in held if not any(model.too_long(row) for row in _pair(model, pair))]
    if not rows or not held_rows:
        raise DataError(
            f"max_tokens={max_tokens}: no pair is left whose rows have at most {model.limit} tokens; raise it, or take "
            "another base"
        )
    say(f"{plural(len(rows), 'pair')} to train on, {len(held_rows):,} held out by conversation")
    how = Optimisation(
        Bound("torch.optim.AdamW", {"lr": lr, "weight_decay": weight_decay}),
        epochs=epochs,
        batch_size=batch_size,
        warmup=WARMUP,
        clip=CLIP,
    )
    _train(model, rows, how, derive(seed, "reward"))
    model.model.to(where)  # Lightning moved it to the CPU
    chosen, rejected = _rewards(model, held_rows)
    center, scale = spread([*chosen, *rejected])
    facts: dict[str, Any] = {
        "kind": kind,
        "center": center,
        "scale": scale,
        **({"hidden": hidden} if kind == "embedding" else {}),
        "fit": {
            "base": weights.identity,
            **{"epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed},
            **{"pairs": len(rows), "held_out": len(held_rows), "too_long": left_out + held_left_out},
            **measure(kept, chosen, rejected, derive(seed, "reward", "bootstrap")),
            "training_accuracy": float(np.mean(_wins(*_rewards(model, rows)))),
        },
    }
    _write(model, facts, [hash_conversation(pair.messages) for pair in known], folder)
    tell(_describe(facts))
    return facts


def measure(
    pairs: Sequence[Preference], chosen: Sequence[float], rejected: Sequence[float], seed: int
) -> dict[str, Any]:
    """The share of pairs whose chosen response has the higher reward, and the share whose chosen response is longer.

    Ties count half. The 95 % intervals are bootstrapped over conversations.
    """
    longer = _wins([len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs])
    names = list(dict.fromkeys(p.conversation for p in pairs))
    number = {name: i for i, name in enumerate(names)}
    group = np.array([number[p.conversation] for p in pairs])
    draws = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    sizes = np.bincount(group, minlength=len(names))[draws].sum(1)

    def share(wins: Sequence[float]) -> tuple[float, list[float]]:
        sums = np.bincount(group, weights=np.array(wins), minlength=len(names))[draws].sum(1)
        return float(np.mean(wins)), [float(x) for x in np.quantile(sums / sizes, [0.025, 0.975])]

    accuracy, interval = share(_wins(chosen, rejected))
    by_length, length_interval = share(longer)
    return {
        "accuracy": accuracy,
        "accuracy_95": interval,
        "longer_is_chosen": by_length,
        "longer_is_chosen_95": length_interval,
    }


def spread(rewards: Sequence[float]) -> tuple[float, float]:
    """The center and scale that map the quartiles of rewards to 25 and 75 points.

    σ(±ln 3) is 0.75 and 0.25, so the center is the mean of the quartiles, and the scale is half their distance divided
    by ln 3.

    Raises:
        ModelError: the quartiles are equal.
    """
    low, high = (float(q) for q in np.quantile(np.array(rewards, dtype=np.float64), [0.25, 0.75]))
    if not high > low:
        raise ModelError("the fitted model gives all responses the same reward; train longer (epochs), or raise lr")
    return (low + high) / 2, (high - low) / (2 * math.log(3))


def _pair(model: Rewards, pair: Preference) -> Row:
    return model.encode(pair.messages, pair.chosen), model.encode(pair.messages, pair.rejected)


def _encode(model: Rewards, pairs: Sequence[Preference]) -> tuple[list[Row], int]:
    """Encode the pairs that are short enough, and count the others."""
    rows = [_pair(model, pair) for pair in pairs]
    fits = [row for row in rows if not any(map(model.too_long, row))]
    return fits, len(rows) - len(fits)


@dataclass(frozen=True)
class PreferenceBatch:
    """A micro-batch of B preferences.

    Attributes:
        rows: their token sequences.
        ids: their numbers among the training pairs.
        share: the weight of its mean loss in its step.
    """

    rows: tuple[Row, ...]
    ids: tuple[str, ...]
    share: float

    @property
    def tokens(self) -> int:
        """The number of tokens that go through the model."""
        return sum(len(ids) for row in self.rows for side in row for ids in side)

    def to(self, device: torch.device) -> Self:
        """Return the batch unchanged; the model moves the token ids to its device."""
        return self


class BradleyTerry(Training):
    """Trains rewards r so that the chosen response has the higher one: −log σ(r⁺ − r⁻) (Bradley and Terry 1952)."""

    policy: Rewards
    remedy: ClassVar[str] = "lower lr, or look at these pairs"

    def terms(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the pairs of the micro-batch."""
        rewards_2B = self.policy([row[0] for row in batch.rows] + [row[1] for row in batch.rows])
        chosen_B, rejected_B = rewards_2B.chunk(2)
        loss = softplus(rejected_B - chosen_B).mean()
        return loss, {"loss": loss}

    def advise(self, short: str, fits: int) -> str:
        """The error message for a step that does not fit into memory."""
        way = f"batch_size={fits} fits" if fits else "not even one pair fits; give max_tokens=… or a smaller base"
        return f"step {self.policy_step}: out of memory with {self.optimisation.batch_size} pairs ({short}); {way}"


class _Epochs:
    """Prints the mean loss of every epoch.

    Args:
        every: steps in an epoch.
    """

    def __init__(self, every: int) -> None:
        self.every, self.losses, self.epoch = every, list[float](), 0

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Print nothing."""

    def advance(self, amount: int = 1) -> None:
        """Print nothing."""

    def note(self, text: str) -> None:
        """Print it."""
        say(text)

    def status(self, text: str) -> None:
        """Print nothing."""

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Print a line at the end of an epoch."""
        for row in rows:
            self.losses.append(row["loss"])
            if len(self.losses) == self.every:
                self.epoch += 1
                say(f"  epoch {self.epoch}: loss {sum(self.losses) / self.every:.4f}")
                self.losses.clear()


def _train(model: Rewards, rows: Sequence[Row], how: Optimisation, seed: int) -> None:
    """Fit the model in place.

    Args:
        seed: seed of the order of the rows.
    """

    def collate(piece: Slice[tuple[int, Row]]) -> PreferenceBatch:
        return PreferenceBatch(tuple(row for _, row in piece.rows), tuple(str(i) for i, _ in piece.rows), piece.share)

    groups = arrange(how, len(rows), seed)
    training = BradleyTerry(model, how, len(groups), _Epochs(max(len(groups) // how.epochs, 1)))
    with TemporaryDirectory(
        prefix="dnpo-reward-"
    ) as folder:  # a fit takes minutes, so an interrupted one is not continued
        train(training, Batches(list(enumerate(rows)), groups, how.rows_at_once, collate), Path(folder))


@torch.no_grad()
def _rewards(model: Rewards, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    rewards = [model([*row]).tolist() for row in rows]
    return [pair[0] for pair in rewards], [pair[1] for pair in rewards]


def _wins(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(first, second, strict=True)]


def _write(model: Rewards, facts: dict[str, Any], seen: Sequence[str], folder: Path) -> None:
    """Write the folder; if that fails, nothing is left."""
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        model.save(aside)
        (aside / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        # hashes, so that a run can check whether its evaluation has prompts that its judge was fitted on
        (aside / SEEN).write_text("".join(f"{name}\n" for name in sorted(set(seen))), encoding="utf-8")
        aside.replace(folder)
    except OSError as error:
        raise ModelError(f"out={folder}: cannot be written ({error.strerror or error})") from error


def _describe(facts: dict[str, Any]) -> str:
    fitted = facts["fit"]

    def share(name: str) -> str:
        low, high = fitted[f"{name}_95"]
        return f"{percent(fitted[name])} (95 % interval {fixed(100 * low, 1)} to {fixed(100 * high, 1)})"

    lines = [
        f"held-out accuracy      {share('accuracy')}, training {percent(fitted['training_accuracy'])}",
        f"longer response chosen {share('longer_is_chosen')}, the judge by length",
        f"center {facts['center']:.4g}, scale {facts['scale']:.4g}: the middle half of held-out rewards spreads over "
        "25-75 points",
    ]
    if fitted["too_long"]:
        lines.append(f"left out as too long   {plural(fitted['too_long'], 'pair')}")
    return "\n".join(lines)
