"""The catalogue of metrics: the name of every tracked number, and how it is shown.

Screen, notes, figures, report and analysis choose which metrics they show, and in which order; titles, units, digits,
directions and symbols come from here. A metric that is not here cannot be tracked. ``python -m dnpo.catalogue`` writes
``docs/metrics.md``.

Your own measure declares its metrics in its module::

    from dnpo.catalogue import Metric, add

    add(Metric("texts/rhymes", "Lines that rhyme", "rhymes", "%", better="higher"))
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from dnpo.errors import DnpoError
from dnpo.wording import fixed

OPEN = re.compile(r"<(\w+)>")  # the placeholder in the name of a family
SHARES = ("%", "pp")  # units of values that are tracked as shares, 0 to 1


@dataclass(frozen=True)
class Metric:
    """A metric, or a family of metrics.

    Attributes:
        name: the tracked name. ``<word>`` is a placeholder for the members of a family, also in title and label.
        title: its description, for headings and figures.
        label: the title in a word or two, for the columns of tables.
        unit: the unit shown; "" for a pure number. Metrics in ``%`` or ``pp`` are tracked as shares.
        digits: number of decimals shown.
        better: which direction is better; "" if neither is.
        symbol: its symbol in the paper's equations.
        needs: what to add to the command to have it measured; "" if it always is.
    """

    name: str
    title: str
    label: str
    unit: str = ""
    digits: int = 1
    better: Literal["higher", "lower", ""] = ""
    symbol: str = ""
    needs: str = ""

    @property
    def scale(self) -> float:
        """The factor that converts tracked values to the unit."""
        return 100.0 if self.unit in SHARES else 1.0

    @property
    def heading(self) -> str:
        """The heading of a column of numbers: the symbol or label, and the unit if it is percent."""
        return (self.symbol or self.label) + (", %" if self.unit == "%" else "")

    @property
    def axis(self) -> str:
        """The label of an axis: title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def format(self, value: float, signed: bool = False) -> str:
        """Format a tracked value in the metric's unit, without the unit."""
        return fixed(self.scale * value, self.digits, signed)

    def format_with_unit(self, value: float, signed: bool = False) -> str:
        """Format a tracked value with its unit."""
        return f"{self.format(value, signed)} {self.unit}".rstrip()


@dataclass(frozen=True)
class MetricVariant:
    """Further names for a group's metrics: the same quantities, measured elsewhere.

    Attributes:
        prefix, suffix: added to the names of the group.
        of: the beginning of the group's names; the prefix replaces it.
        words: where the quantities are measured.
        label: the same, shorter.
        needs: what to add to the command to have them measured.
    """

    prefix: str
    words: str
    label: str
    of: str = ""
    suffix: str = ""
    needs: str = ""

    def find_base(self, name: str) -> str | None:
        """The name in the group; None if ``name`` does not belong to this variant."""
        if not (name.startswith(self.prefix) and name.endswith(self.suffix)):
            return None
        return self.of + name.removeprefix(self.prefix).removesuffix(self.suffix)

    def apply(self, metric: Metric, name: str) -> Metric:
        """The metric under this variant's name."""
        title, label = f"{metric.title}, {self.words}", f"{metric.label}, {self.label}"
        symbol = metric.symbol and f"{metric.symbol}, {self.label}"
        return replace(metric, name=name, title=title, label=label, symbol=symbol, needs=self.needs or metric.needs)


@dataclass(frozen=True)
class MetricGroup:
    """Metrics that are measured together, and the variants under which they are tracked too.

    Attributes:
        note: what the titles' words mean, in Markdown; "" if they need no explanation.
    """

    title: str
    metrics: tuple[Metric, ...]
    variants: tuple[MetricVariant, ...] = ()
    note: str = ""


SFT = MetricVariant("sft/", "in fine-tuning", "SFT")
AUGMENT = MetricVariant("augment/", "in the training of a judge by augment=…", "lessons")
LIKE = MetricVariant("like/", "in the training with noise that npo=matched imitates", "matched")
ITERATION = MetricVariant("iteration/", "of an iteration as a whole", "iteration")
AGAINST = MetricVariant("against/", "of the model given by against=…", "other model", needs="against=…")
SECOND = MetricVariant("second/", "second judge", "2nd", of="eval/", needs="judge@second_judge=…")
TRAIN = MetricVariant("judge/", "for training pairs", "training", of="eval/")
LOW = MetricVariant("agreement/", "lower end of the 95 % interval", "low", of="agreement/", suffix="_low")
HIGH = MetricVariant("agreement/", "upper end of the 95 % interval", "high", of="agreement/", suffix="_high")

BOARD, TEXTS, DUELS, SERVER = "eval=leaderboard", "eval=texts", "against=…", "generate=server"
HELD = "trainer.keep=best or sft.keep=best"
_ENGINE: tuple[str, int, Literal["lower"]] = ("nats", 6, "lower")  # differences of log-probabilities

GROUPS: tuple[MetricGroup, ...] = (
    MetricGroup(
        "Answers to held-out prompts, by a judge",
        (
            Metric("eval/score", "Judge's score of sampled answers", "score", "points of 100", better="higher"),
            Metric("eval/score_greedy", "Judge's score of greedy answers", "greedy", "points of 100", better="higher"),
            Metric("eval/score_human", "Judge's score of human responses", "human", "points of 100"),
            Metric("eval/win", "Sampled answers with more points than the human one", "win", "%", better="higher"),
            Metric("eval/tie", "Sampled answers with as many points as the human one", "tie", "%"),
            Metric("eval/lose", "Sampled answers with fewer points than the human one", "lose", "%", better="lower"),
        ),
        (SECOND, AGAINST),
    ),
    MetricGroup(
        "Verdicts",
        (
            Metric("eval/verdicts", "Responses that were judged", "verdicts", digits=0),
            Metric("eval/unscored", "Responses without a score", "unscored", digits=0, better="lower"),
            Metric("eval/disagreement", "Judge's disagreement with itself", "disagreement", "points of 100"),
        ),
        (SECOND, TRAIN, AGAINST),
    ),
    MetricGroup(
        "Answers to held-out prompts, on their own",
        (
            Metric("eval/accuracy", "Right greedy answers", "accuracy", "%", better="higher"),
            Metric("eval/accuracy/<family>", "Right greedy answers, <family>", "<family>", "%", better="higher"),
            Metric(
                "eval/pass_at_<k>", "Prompts with a right answer among <k> samples", "pass@<k>", "%", better="higher"
            ),
            Metric("eval/majority", "Most frequent sampled answer is right", "majority", "%", better="higher"),
            Metric("eval/loss", "Held-out loss of human responses", "held-out loss", "nats a token", 3, "lower"),
            Metric("eval/tokens", "Length of sampled answers", "tokens", "tokens"),
            Metric("eval/human_tokens", "Length of human responses", "human tokens", "tokens"),
            Metric("eval/cut", "Sampled answers cut at the limit", "cut", "%", better="lower"),
            Metric(
                "eval/engine_mean",
                "Mean difference of a token's log p between engine and this process",
                "engine",
                *_ENGINE,
                needs=SERVER,
            ),
            Metric(
                "eval/engine_max",
                "Largest difference of a token's log p between engine and this process",
                "engine max",
                *_ENGINE,
                needs=SERVER,
            ),
        ),
        (AGAINST,),
    ),
    MetricGroup(
        "Benchmarks",
        (
            Metric("leaderboard/average", "Leaderboard average", "leaderboard", "%", better="higher", needs=BOARD),
            Metric("leaderboard/arc", "ARC", "ARC", "%", better="higher", needs=BOARD),
            Metric("leaderboard/truthfulqa", "TruthfulQA", "TruthfulQA", "%", better="higher", needs=BOARD),
            Metric("leaderboard/winogrande", "Winogrande", "Winogrande", "%", better="higher", needs=BOARD),
            Metric("leaderboard/gsm8k", "GSM8K", "GSM8K", "%", better="higher", needs=BOARD),
            Metric("leaderboard/hellaswag", "HellaSwag", "HellaSwag", "%", better="higher", needs=BOARD),
            Metric("leaderboard/mmlu", "MMLU", "MMLU", "%", better="higher", needs=BOARD),
            Metric(
                "leaderboard/ifeval",
                "IFEval",
                "IFEval",
                "%",
                better="higher",
                needs="eval=leaderboard eval.leaderboard.benchmarks=[ifeval]",
            ),
            Metric(
                "tasks/<task>",
                "Score of lm-eval's <task>",
                "<task>",
                "",
                3,
                needs="eval=leaderboard eval.leaderboard.tasks=…",
            ),
            Metric("leaderboard/seconds", "Time of the benchmarks", "seconds", "s", needs=BOARD),
        ),
        (AGAINST,),
    ),
    MetricGroup(
        "New texts, compared with the chosen responses to their prompts",
        (
            Metric("texts/bleu", "BLEU", "BLEU", "", 3, needs=TEXTS),
            Metric("texts/bleu_sentence", "BLEU, mean over texts", "BLEU of a text", "", 3, needs=TEXTS),
            Metric("texts/rouge_l", "ROUGE-L", "ROUGE-L", "", 3, needs=TEXTS),
            Metric("texts/sbert", "Sentence-BERT", "Sentence-BERT", "", 3, needs=f"{TEXTS} eval.texts.encoder=FOLDER"),
            Metric(
                "texts/distinct_<n>_within", "Distinct <n>-grams of a text", "distinct-<n> in a text", "%", needs=TEXTS
            ),
            Metric("texts/distinct_<n>", "Distinct <n>-grams of all", "distinct-<n>", "%", needs=TEXTS),
            Metric("texts/self_bleu", "BLEU of each text against the others", "self-BLEU", "", 3, needs=TEXTS),
            Metric("texts/self_bleu_texts", "Texts that self-BLEU compares", "self-BLEU texts", digits=0, needs=TEXTS),
            Metric("texts/words", "Length in words", "words", "words", needs=TEXTS),
            Metric("texts/characters", "Length in characters", "characters", "characters", needs=TEXTS),
        ),
        (AGAINST,),
    ),
    MetricGroup(
        "Movement of the policy",
        (
            Metric("stagnation/ks", "KS distance of rejected and new", "KS", "", 3),
            Metric("stagnation/ks_critical", "KS distance that chance exceeds in 5 % of cases", "KS by chance", "", 3),
            Metric("stagnation/ks_per_token", "KS distance of rejected and new, per token", "KS per token", "", 3),
            Metric("stagnation/wasserstein", "Wasserstein distance of rejected and new", "Wasserstein", "nats", 3),
            Metric(
                "stagnation/wasserstein_per_token",
                "Wasserstein distance of rejected and new, per token",
                "Wasserstein per token",
                "nats a token",
                3,
            ),
            Metric("stagnation/overlap", "Overlap of rejected and new", "overlap", "", 3),
            Metric(
                "stagnation/overlap_per_token", "Overlap of rejected and new, per token", "overlap per token", "", 3
            ),
            Metric("stagnation/overlap_by_chance", "Overlap by chance", "overlap by chance", "", 3),
            Metric(
                "stagnation/overlap_by_chance_per_token",
                "Overlap by chance, per token",
                "overlap by chance per token",
                "",
                3,
            ),
            Metric("drift/initial", "KL of the policy to the initial one", "KL to initial", "nats", 3),
            Metric("drift/initial_error", "Standard error of that KL", "KL to initial error", "nats", 3),
            Metric("drift/kl", "KL of the policy to its reference", "KL", "nats", 3),
            Metric("drift/kl_error", "Standard error of the KL", "KL error", "nats", 3),
            Metric("drift/kl_token", "KL of the policy to its reference, per token", "KL per token", "nats a token", 3),
            Metric(
                "drift/kl_token_error", "Standard error of the KL per token", "KL per token error", "nats a token", 3
            ),
        ),
        note="Distances and overlaps compare log-probabilities of the rejected responses in training with those of "
        "newly generated responses, all under the policy after training. *By chance*: the value for two samples of one "
        "distribution.",
    ),
    MetricGroup(
        "Pairs",
        (
            Metric("pairs/pairs", "Pairs", "pairs", digits=0),
            Metric("pairs/flipped", "Labels flipped, count", "flipped", digits=0),
            Metric("pairs/segments", "Segments of human responses regenerated", "segments", digits=0),
            Metric("pairs/redrawn", "Segments drawn again because they were unchanged", "redrawn", digits=0),
            Metric("pairs/dropped", "Segments dropped because no draw changed them", "dropped", digits=0),
            Metric("pairs/flips", "Labels flipped", "flips", "%"),
            Metric("pairs/identical", "Identical responses, left out", "identical", digits=0),
            Metric(
                "pairs/unscored", "Samples without a score to compare", "samples unscored", digits=0, better="lower"
            ),
            Metric("pairs/repeated", "Samples that repeat an earlier one, left out", "repeated", digits=0),
            Metric("pairs/tied", "Prompts whose candidates have equal scores", "tied", digits=0),
            Metric("pairs/wrong", "Prompts without a right answer", "no right answer", digits=0, better="lower"),
            Metric("pairs/pass_at_<k>", "Training prompts with a right answer among <k> samples", "pass@<k>", "%"),
            Metric("curriculum/earlier", "Pairs of earlier iterations trained on again", "earlier pairs", digits=0),
            Metric("curriculum/repeated", "Earlier pairs that a newer one repeats, left out", "repeated", digits=0),
            Metric("curriculum/short", "New pairs in place of missing earlier ones", "short", digits=0),
            Metric("curriculum/moved", "Pairs counted as harder", "moved", digits=0),
            Metric("curriculum/split", "Pairs counted as harder with part of their weight", "split", digits=0),
            Metric("curriculum/loss", "Mean loss of the pairs", "loss of pairs", "nats", 4),
            Metric("curriculum/worst_loss", "Mean loss under the worst distribution", "worst loss", "nats", 4),
            Metric("curriculum/duplicates", "Pairs that repeat another, left out", "duplicates", digits=0),
            Metric("curriculum/pruned", "Pairs pruned by the position of their embeddings", "pruned", digits=0),
            Metric("curriculum/trained", "Pairs trained on", "trained pairs", digits=0),
            Metric("pairs/strength", "Mean strength of labels", "strength", digits=3),
            Metric("labels/decided", "Pairs with one right answer", "decided", "%"),
            Metric("labels/noise", "Pairs with the wrong answer chosen", "wrong labels", "%", better="lower"),
            Metric("generated/cut", "Generated responses cut at the limit, count", "generated cut", digits=0),
            Metric("trained/tokens", "Tokens trained on, over all epochs", "trained tokens", digits=0),
            Metric("trained/flop", "Floating-point operations of training", "training FLOP", "FLOP", digits=0),
            Metric("generated/responses", "Responses generated for training", "generated", digits=0),
            Metric("generated/tokens", "Tokens generated for training", "generated tokens", digits=0),
            Metric(
                "generated/engine_mean",
                "Mean difference of a token's log p between engine and this process, training samples",
                "generated engine",
                *_ENGINE,
                needs=SERVER,
            ),
            Metric(
                "generated/engine_max",
                "Largest difference of a token's log p between engine and this process, training samples",
                "generated engine max",
                *_ENGINE,
                needs=SERVER,
            ),
        ),
        note="The *worst distribution* and the pairs *counted as harder* belong to `curriculum=robust` "
        "([Methods](methods.md#robust)).",
    ),
    MetricGroup(
        "Training",
        (
            Metric("heldout/loss", "Loss on rows held out of training", "held-out rows", "", 4, "lower", needs=HELD),
            Metric("heldout/step", "Policy step with the best loss on these rows", "best step", digits=0, needs=HELD),
            Metric("heldout/steps", "Policy steps made, if rows are held out", "steps", digits=0, needs=HELD),
            Metric("loss/policy", "Policy loss", "policy loss", "nats", 4, "lower"),
            Metric("loss/noise", "Noise loss", "noise loss", "nats", 4),
            Metric("loss/variance", "Variance term of the loss", "variance term", "", 4, symbol="α s²"),
            Metric("margin/clean", "Margin without noise", "margin", "", 3),
            Metric("margin/noisy", "Margin with noise", "noisy margin", "", 3),
            Metric("margin/shift", "Margin with noise minus margin without", "margin shift", "", 3),
            Metric("margin/saturation", "Gradient weight of the loss", "saturation", "", 3, symbol="σ(−margin)"),
            Metric("margin/saturation_clean", "Gradient weight without noise", "saturation without noise", "", 3),
            Metric("margin/saturated", "Steps with a gradient weight below 0.15", "saturated steps", "%"),
            Metric("npo/variance", "Variance of the noise", "noise variance", "", 3, symbol="s²"),
            Metric("npo/at_bound", "Variances near their bound", "at the bound", "%"),
            Metric("npo/shift", "Decrease of rejected responses' log p by noise", "noise shift", "nats", 3),
            Metric("suspects/confidence", "Confidence in labels", "confidence", "", 3),
            Metric("suspects/share", "Labels that the extrapolated policy doubts", "suspects", "%"),
            Metric("suspects/share_plain", "Labels that the policy itself doubts", "plain suspects", "%"),
            Metric("suspects/share_both", "Labels that both doubt", "common suspects", "%"),
            Metric("drift/states", "Drift of hidden states on chosen responses", "drift", "", 4, symbol="Δμ² / var"),
            Metric("rollout/reward", "Mean score of the responses of a rollout", "reward", "0–100", better="higher"),
            Metric("rollout/kl", "Divergence of rollouts from the reference", "rollout KL", "nats", 3),
            Metric("rollout/entropy", "Entropy of the policy's rollouts, per token", "entropy", "nats a token", 3),
            Metric("rollout/flips", "Flipped labels of a rollout", "flips", "%"),
            Metric("rollout/buffer", "Pairs in the buffer", "buffer", digits=0),
            Metric("rollout/stale", "Pairs of a step that are older than the last rollout", "stale", "%"),
            Metric("rollout/age", "Policy steps since the pairs of a step were made", "age", "steps", 1),
            Metric("rollout/count", "Rollouts so far", "rollouts", digits=0),
            Metric("ratio/clipped", "Tokens whose importance ratio is clipped", "clipped", "%"),
            Metric(
                "ratio/kl", "KL from the generating policy to the policy in training", "KL since", "nats a token", 5
            ),
            Metric("loss/value", "Loss of the value head", "value loss", "", 5, "lower"),
            Metric(
                "value/explained",
                "Share of the variance of later rewards that values explain",
                "explained",
                "%",
                better="higher",
            ),
            Metric("rewards/chosen", "Implicit reward of chosen responses", "reward chosen", "", 3),
            Metric("rewards/rejected", "Implicit reward of rejected responses", "reward rejected", "", 3),
            Metric("rewards/accuracy", "Pairs with a margin above 0", "reward accuracy", "%"),
            Metric("logps/chosen", "Log-probability of chosen responses", "log p chosen", "nats", 2),
            Metric("logps/rejected", "Log-probability of rejected responses", "log p rejected", "nats", 2),
            Metric("logps/new", "Log-probability of newly generated responses", "log p new", "nats", 2),
            Metric("grad_norm/first", "Gradient norm in the first tenth of the steps", "first gradients", "", 3),
            Metric("grad_norm/last", "Gradient norm in the last tenth of the steps", "last gradients", "", 3),
            Metric("grad_norm/<player>", "Gradient norm of the <player>", "<player> gradient", "", 3),
            Metric("lr/<player>", "Learning rate of the <player>", "<player> rate", "", 7),
            Metric("rows", "Rows of a training step", "rows", digits=0),
            Metric("tokens_per_second", "Speed of training", "speed", "tokens/s", 0),
        ),
        (SFT, AUGMENT, LIKE, ITERATION, AGAINST),
        note="A *player* is what an optimizer trains: `policy`, `noise` or `value` (the value head). The *extrapolated "
        "policy* belongs to `objective=refined`: its logits are (1 + λ) times the policy's minus λ times the "
        "reference's, with λ = `objective.extrapolation`.",
    ),
    MetricGroup("Time", (Metric("seconds", "Time that computing an iteration's stages took", "seconds", "s"),)),
    MetricGroup(
        "Duels with another model",
        (
            Metric("duels/win", "Duels won", "win", "%", better="higher", needs=DUELS),
            Metric("duels/tie", "Duels tied", "tie", "%", needs=DUELS),
            Metric("duels/lose", "Duels lost", "lose", "%", better="lower", needs=DUELS),
            Metric("duels/rate", "Win rate; a tie counts half", "win rate", "%", better="higher", needs=DUELS),
            Metric("duels/duels", "Duels", "duels", digits=0, needs=DUELS),
            Metric("duels/unscored", "Duels that lack a score", "unscored", digits=0, better="lower", needs=DUELS),
            Metric("duels/p", "P-value if wins and losses are equally likely", "p", "", 3, needs=DUELS),
            Metric(
                "duels/rate_same_length",
                "Win rate at the same length",
                "same length",
                "%",
                better="higher",
                needs=f"{DUELS} length_controlled=true",
            ),
            Metric(
                "duels/length",
                "Effect of length on winning",
                "length effect",
                "log-odds",
                2,
                needs=f"{DUELS} length_controlled=true",
            ),
            Metric(
                "duels/disagreement", "Judge's disagreement with itself", "disagreement", "points of 100", needs=DUELS
            ),
        ),
    ),
    MetricGroup(
        "Agreement of a judge with people",
        (
            Metric("agreement/rows", "Rows", "rows", digits=0),
            Metric("agreement/unscored", "Rows without a verdict", "unscored", digits=0),
            Metric("agreement/accuracy", "Accuracy where people prefer one; a tie counts half", "accuracy", "%"),
            Metric(
                "agreement/accuracy_strict", "Accuracy where people prefer one; a tie is wrong", "strict accuracy", "%"
            ),
            Metric("agreement/accuracy_three_way", "Accuracy over all rows, ties included", "three-way", "%"),
            Metric("agreement/ties_judge", "Ties of the judge", "judge's ties", "%"),
            Metric("agreement/ties_people", "Ties of people", "people's ties", "%"),
            Metric("agreement/kappa", "Cohen's κ: judge and people's label", "kappa", "", 2, symbol="κ"),
            Metric("agreement/kappa_persons", "Cohen's κ: judge and one person, mean", "kappa with one", "", 2),
            Metric("agreement/kappa_between_persons", "Cohen's κ: two persons, mean", "kappa of two", "", 2),
            Metric("agreement/fleiss_persons", "Fleiss' κ: all persons", "Fleiss' kappa", "", 2),
            Metric("agreement/fleiss_with_judge", "Fleiss' κ: all persons and the judge", "with the judge", "", 2),
            Metric("agreement/flips", "Flip rate: the verdict changes with the order", "flips", "%"),
            Metric("agreement/reversals", "Reversal rate: the winner changes with the order", "reversals", "%"),
            Metric("agreement/longer_judge", "The longer one wins, by the judge", "longer, judge", "%"),
            Metric("agreement/longer_people", "The longer one wins, by people", "longer, people", "%"),
            Metric("agreement/length_bias", "Length bias: the difference", "length bias", "pp"),
            Metric("agreement/accuracy_longer", "Accuracy where people prefer the longer one", "if longer", "%"),
            Metric("agreement/accuracy_shorter", "Accuracy where people prefer the shorter one", "if shorter", "%"),
            Metric("agreement/multiples_of_5", "Scores that are multiples of 5", "multiples of 5", "%"),
            Metric("agreement/multiples_of_10", "Scores that are multiples of 10", "multiples of 10", "%"),
            Metric("agreement/entropy", "Entropy of scores in whole points", "entropy", "bits", 2),
            Metric("agreement/distinct", "Different scores", "distinct", digits=0),
        ),
        (LOW, HIGH),
    ),
)

COMPARED = ("eval/score", "second/score", "eval/accuracy", "leaderboard/average", "eval/loss")  # in sweeps


def _of_sweeps() -> Iterator[Metric]:
    """The metrics of a sweep as a whole, tracked in its parent run by iteration."""
    for name in COMPARED:
        base = metric(name)
        title, label = f"{base.title}, best settings", f"{base.label}, best"
        yield replace(base, name=f"best/{name}", title=title, label=label, symbol="", needs="dnpo sweep")
        title, label = f"{base.title}, mean of <settings>", f"{base.label}, <settings>"
        yield replace(base, name=f"mean/{name}/<settings>", title=title, label=label, symbol="", needs="dnpo sweep")


_ADDED: list[MetricGroup] = []


def add(*metrics: Metric) -> None:
    """Add the metrics of a new measure to the catalogue; call this in the measure's module.

    Raises:
        DnpoError: another metric has the same name.
    """
    for metric in metrics:
        existing = find(metric.name)
        if existing == metric:
            continue  # the module was imported twice
        if existing is not None:
            raise DnpoError(f"{metric.name}: the catalogue already has a metric of this name: {existing.title}")
        _ADDED.append(MetricGroup("Added", (metric,), (AGAINST,)))
        _locate.cache_clear()


def find(name: str) -> Metric | None:
    """Find the metric with this name, also as a member of a family or a variant; None if there is none."""
    entry = _locate(name)
    return None if entry is None else entry[0]


def is_added(name: str) -> bool:
    """Whether a measure of one's own has added the metric with this name."""
    return any(name == metric.name for group in _ADDED for metric in group.metrics)


def metric(name: str) -> Metric:
    """Return the metric with this name.

    Raises:
        DnpoError: the catalogue has none.
    """
    entry = find(name)
    if entry is None:
        raise DnpoError(_describe_unknown(name))
    return entry


def check(names: Iterable[str]) -> None:
    """Refuse names that are not in the catalogue.

    Raises:
        DnpoError: a name is not in it; the message gives the name.
    """
    for name in names:
        metric(name)


def name_by_iteration(name: str) -> str:
    """The name of a metric tracked by iteration; metrics that are also tracked by training step get a prefix."""
    entry = _locate(name)
    return ITERATION.prefix + name if entry is not None and ITERATION in entry[1].variants else name


@cache
def _locate(name: str) -> tuple[Metric, MetricGroup] | None:
    """Find the metric with this name, and its group."""
    groups = (*GROUPS, *_ADDED)
    for finder in (_exact, _in_families, _in_variants):
        entry = next(finder(groups, name), None)
        if entry is not None:
            return entry
    return None


def _exact(groups: Iterable[MetricGroup], name: str) -> Iterator[tuple[Metric, MetricGroup]]:
    return ((metric, group) for group in groups for metric in group.metrics if metric.name == name)


def _in_families(groups: Iterable[MetricGroup], name: str) -> Iterator[tuple[Metric, MetricGroup]]:
    for group in groups:
        for family in group.metrics:
            before, *rest = OPEN.split(family.name)
            # a placeholder at the end may stand for a user's word with slashes, such as a family a/b
            open_part = "[^/]+" if rest and rest[1] else ".+"
            pattern = f"{re.escape(before)}({open_part}){re.escape(rest[1])}" if rest else ""
            match = re.fullmatch(pattern, name, re.DOTALL) if rest else None
            if match:
                title, label = (_fill_in(text, rest[0], match[1]) for text in (family.title, family.label))
                yield replace(family, name=name, title=title, label=label), group


def _fill_in(text: str, placeholder: str, word: str) -> str:
    """Replace ``<placeholder>`` by the word; after 1, the noun is in the singular."""
    text = re.sub(rf"(<{placeholder}> \w+)s\b", r"\1", text) if word == "1" else text
    return text.replace(f"<{placeholder}>", word)


def _in_variants(groups: Iterable[MetricGroup], name: str) -> Iterator[tuple[Metric, MetricGroup]]:
    for variant in dict.fromkeys(variant for group in groups for variant in group.variants):
        base = variant.find_base(name)
        entry = None if base is None else _locate(base)
        if entry is not None and variant in entry[1].variants:
            yield variant.apply(entry[0], name), entry[1]


def _describe_unknown(name: str) -> str:
    known = [metric.name for group in (*GROUPS, *_ADDED) for metric in group.metrics]
    near = difflib.get_close_matches(name, known, 1)
    return (
        f"{name}: no metric of this name is in the catalogue.{f' Did you mean {near[0]}?' if near else ''} Your own "
        "measure declares its metrics with dnpo.catalogue.add"
    )


GROUPS = (*GROUPS, MetricGroup("Sweeps: means over seeds, in the sweep's own run", tuple(_of_sweeps())))
_locate.cache_clear()


def write_markdown() -> str:
    """Write the catalogue as a page of Markdown."""
    lines = [
        "# Metrics",
        "",
        "All metrics that runs track. The screen, notes, figures, report and analysis show them with these titles and "
        "units. Shares are tracked as 0 to 1 and shown in percent. `python -m dnpo.catalogue` writes this page.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.title}", ""]
        if group.variants:
            names = (f"`{each.prefix}…{each.suffix}` ({each.words})" for each in group.variants)
            lines += [f"Also tracked as {', '.join(names)}.", ""]
        if group.note:
            lines += [group.note, ""]
        lines += [
            "| metric | title | unit | better | symbol | measured with |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for each in group.metrics:
            needs = " or ".join(f"`{command}`" for command in each.needs.split(" or ") if command)
            title = each.title.replace("<", "&lt;")
            lines.append(f"| `{each.name}` | {title} | {each.unit} | {each.better} | {each.symbol} | {needs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(write_markdown(), end="")
