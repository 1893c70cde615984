"""The metrics: what each number that is tracked is called, and how it is shown.

Screen, notes, figures, report and analysis choose which metrics they show and in which order; titles, units, digits,
directions and symbols come from here. A metric that is not here cannot be tracked. ``METRICS.md`` is written by
``python -m dnpo.catalogue``.

A measure of your own, wherever it lies, declares its metrics where its module is imported::

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

OPEN = re.compile(r"<(\w+)>")  # the part of a name that differs within a family
SHARES = ("%", "pp")  # units of values that are tracked as shares, 0 to 1


@dataclass(frozen=True)
class Metric:
    """One metric, or one family of them.

    Attributes:
        name: as it is tracked. ``<word>`` stands for what differs within a family, also in title and label.
        title: what it is, for headings and figures.
        label: the same in a word or two, for the columns of tables.
        unit: in which it is shown; "" for a pure number. What is shown in ``%`` or ``pp`` is tracked as a share.
        digits: shown behind the point.
        better: which way is better; "" where neither is.
        symbol: what stands for it in the paper's equations.
        needs: what to add to the command so that it is measured; "" where it always is.
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
        """The factor by which tracked values are shown."""
        return 100.0 if self.unit in SHARES else 1.0

    @property
    def heading(self) -> str:
        """Of a column of numbers: the symbol or label, and the unit where it is percent."""
        return (self.symbol or self.label) + (", %" if self.unit == "%" else "")

    @property
    def axis(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def format(self, value: float, signed: bool = False) -> str:
        """A tracked value as a number in the metric's unit, without the unit."""
        text = format(self.scale * value, f"{'+' if signed else ''}z,.{self.digits}f")  # z: no zero has a sign
        return text.replace("-", "−")

    def format_with_unit(self, value: float, signed: bool = False) -> str:
        """A tracked value as a number with its unit."""
        return f"{self.format(value, signed)} {self.unit}".rstrip()


@dataclass(frozen=True)
class Variant:
    """Another name for the metrics of a group, for the same measured elsewhere.

    Attributes:
        prefix, suffix: of the names.
        of: what stands in place of the prefix in the group's own names.
        words: where it is measured.
        label: the same, shorter.
        needs: what to add to the command so that it is measured.
    """

    prefix: str
    words: str
    label: str
    of: str = ""
    suffix: str = ""
    needs: str = ""

    def find_base(self, name: str) -> str | None:
        """The name in the group; None where ``name`` is no name of this variant."""
        if not (name.startswith(self.prefix) and name.endswith(self.suffix)):
            return None
        return self.of + name.removeprefix(self.prefix).removesuffix(self.suffix)

    def apply(self, metric: Metric, name: str) -> Metric:
        """A metric of the group under the name of this variant."""
        title, label = f"{metric.title}, {self.words}", f"{metric.label}, {self.label}"
        symbol = metric.symbol and f"{metric.symbol}, {self.label}"
        return replace(metric, name=name, title=title, label=label, symbol=symbol, needs=self.needs or metric.needs)


@dataclass(frozen=True)
class MetricGroup:
    """Metrics that are measured together, and under which other names they are tracked too."""

    title: str
    metrics: tuple[Metric, ...]
    variants: tuple[Variant, ...] = ()


SFT = Variant("sft/", "in fine-tuning", "SFT")
LIKE = Variant("like/", "in the training that npo=matched matches", "matched")
ITERATION = Variant("iteration/", "of an iteration as a whole", "iteration")
AGAINST = Variant("against/", "of the other model", "other model", needs="against=…")
SECOND = Variant("second/", "second judge", "2nd", of="eval/", needs="judge@second_judge=…")
TRAIN = Variant("judge/", "for training pairs", "training", of="eval/")
LOW = Variant("agreement/", "lower end of the 95 % interval", "low", of="agreement/", suffix="_low")
HIGH = Variant("agreement/", "upper end of the 95 % interval", "high", of="agreement/", suffix="_high")

BOARD, TEXTS, DUELS = "eval=leaderboard", "eval=texts", "against=…"

GROUPS = (
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
            Metric("leaderboard/ifeval", "IFEval", "IFEval", "%", better="higher", needs=BOARD),
            Metric("leaderboard/seconds", "Time of the benchmarks", "seconds", "s", needs=BOARD),
        ),
        (AGAINST,),
    ),
    MetricGroup(
        "New texts, and the positive samples of their prompts",
        (
            Metric("texts/bleu", "BLEU", "BLEU", "", 3, needs=TEXTS),
            Metric("texts/bleu_sentence", "BLEU, mean over texts", "BLEU of a text", "", 3, needs=TEXTS),
            Metric("texts/rouge_l", "ROUGE-L", "ROUGE-L", "", 3, needs=TEXTS),
            Metric("texts/sbert", "Sentence-BERT", "Sentence-BERT", "", 3, needs=f"{TEXTS} eval.texts.encoder=FOLDER"),
            Metric(
                "texts/distinct_<n>_within", "Distinct <n>-grams of a text", "distinct-<n> in a text", "%", needs=TEXTS
            ),
            Metric("texts/distinct_<n>", "Distinct <n>-grams of all", "distinct-<n>", "%", needs=TEXTS),
            Metric("texts/self_bleu", "BLEU of each text with the others", "self-BLEU", "", 3, needs=TEXTS),
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
            Metric("stagnation/ks_critical", "KS distance that chance exceeds in 5 %", "KS by chance", "", 3),
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
            Metric("drift/kl", "KL of the policy to its reference", "KL", "nats", 3),
            Metric("drift/kl_error", "Standard error of the KL", "KL error", "nats", 3),
            Metric("drift/kl_token", "KL of the policy to its reference, per token", "KL per token", "nats a token", 3),
            Metric(
                "drift/kl_token_error", "Standard error of the KL per token", "KL per token error", "nats a token", 3
            ),
        ),
    ),
    MetricGroup(
        "Pairs",
        (
            Metric("pairs/pairs", "Pairs", "pairs", digits=0),
            Metric("pairs/flipped", "Labels flipped, count", "flipped", digits=0),
            Metric("pairs/flips", "Labels flipped", "flips", "%"),
            Metric("pairs/identical", "Identical responses, left out", "identical", digits=0),
            Metric("pairs/unscored", "Pairs that lack a score", "pairs unscored", digits=0, better="lower"),
            Metric("labels/decided", "Pairs with one right answer", "decided", "%"),
            Metric("labels/noise", "Pairs with the wrong answer chosen", "wrong labels", "%", better="lower"),
            Metric("generated/cut", "Generated responses cut at the limit, count", "generated cut", digits=0),
        ),
    ),
    MetricGroup(
        "Training",
        (
            Metric("loss/policy", "Policy loss", "policy loss", "nats", 4, "lower"),
            Metric("loss/noise", "Noise loss", "noise loss", "nats", 4),
            Metric("loss/variance", "Variance term of the loss", "variance term", "", 4, symbol="α s²"),
            Metric("margin/clean", "Margin without noise", "margin", "", 3),
            Metric("margin/noisy", "Margin with noise", "noisy margin", "", 3),
            Metric("margin/shift", "Margin with noise less margin without", "margin shift", "", 3),
            Metric("margin/saturation", "How hard the loss still pulls", "saturation", "", 3, symbol="σ(−margin)"),
            Metric(
                "margin/saturation_clean", "How hard it would pull without noise", "saturation without noise", "", 3
            ),
            Metric("margin/saturated", "Steps in which the loss hardly pulls any more", "saturated steps", "%"),
            Metric("npo/variance", "Variance of the noise", "noise variance", "", 3, symbol="s²"),
            Metric("npo/at_bound", "Variances near their bound", "at the bound", "%"),
            Metric("npo/shift", "What noise takes off log p of rejected responses", "noise shift", "nats", 3),
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
        (SFT, LIKE, ITERATION, AGAINST),
    ),
    MetricGroup("Time", (Metric("seconds", "Time of an iteration's stages, when they were computed", "seconds", "s"),)),
    MetricGroup(
        "Duels with another model",
        (
            Metric("duels/win", "Duels won", "win", "%", better="higher", needs=DUELS),
            Metric("duels/tie", "Duels tied", "tie", "%", needs=DUELS),
            Metric("duels/lose", "Duels lost", "lose", "%", better="lower", needs=DUELS),
            Metric("duels/rate", "Win rate, ties are half", "win rate", "%", better="higher", needs=DUELS),
            Metric("duels/duels", "Duels", "duels", digits=0, needs=DUELS),
            Metric("duels/unscored", "Duels that lack a score", "unscored", digits=0, better="lower", needs=DUELS),
            Metric("duels/p", "P-value against as many wins as losses", "p", "", 3, needs=DUELS),
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
            Metric("agreement/reversals", "Reversal rate: to the other response, no tie in it", "reversals", "%"),
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

_ADDED: list[MetricGroup] = []


def add(*metrics: Metric) -> None:
    """Put metrics of a measure of your own into the catalogue; at the import of its module, before a run begins.

    Raises:
        DnpoError: another metric has the name already.
    """
    for metric in metrics:
        known = find(metric.name)
        if known == metric:
            continue  # its module was imported twice
        if known is not None:
            raise DnpoError(f"{metric.name}: the catalogue has a metric of this name already: {known.title}")
        _ADDED.append(MetricGroup("Added", (metric,), (AGAINST,)))
        _locate.cache_clear()


def find(name: str) -> Metric | None:
    """The metric with this name, or of the family or variant that the name belongs to; None where there is none."""
    found = _locate(name)
    return None if found is None else found[0]


def metric(name: str) -> Metric:
    """The metric with this name.

    Raises:
        DnpoError: there is none.
    """
    found = find(name)
    if found is None:
        raise DnpoError(_describe_unknown(name))
    return found


def check(names: Iterable[str]) -> None:
    """Refuse to track what is not in the catalogue.

    Raises:
        DnpoError: names the metric.
    """
    for name in names:
        metric(name)


def name_by_iteration(name: str) -> str:
    """Under which name a metric of an iteration is tracked; what also runs by training step has the prefix there."""
    found = _locate(name)
    return ITERATION.prefix + name if found is not None and ITERATION in found[1].variants else name


@cache
def _locate(name: str) -> tuple[Metric, MetricGroup] | None:
    """The metric with this name, and its group."""
    groups = (*GROUPS, *_ADDED)
    for finder in (_exact, _in_families, _in_variants):
        found = next(finder(groups, name), None)
        if found is not None:
            return found
    return None


def _exact(groups: Iterable[MetricGroup], name: str) -> Iterator[tuple[Metric, MetricGroup]]:
    return ((metric, group) for group in groups for metric in group.metrics if metric.name == name)


def _in_families(groups: Iterable[MetricGroup], name: str) -> Iterator[tuple[Metric, MetricGroup]]:
    for group in groups:
        for family in group.metrics:
            before, *rest = OPEN.split(family.name)
            found = re.fullmatch(f"{re.escape(before)}([^/]+){re.escape(rest[1])}", name) if rest else None
            if found:
                title, label = (text.replace(f"<{rest[0]}>", found[1]) for text in (family.title, family.label))
                yield replace(family, name=name, title=title, label=label), group


def _in_variants(groups: Iterable[MetricGroup], name: str) -> Iterator[tuple[Metric, MetricGroup]]:
    for variant in dict.fromkeys(variant for group in groups for variant in group.variants):
        base = variant.find_base(name)
        found = None if base is None else _locate(base)
        if found is not None and variant in found[1].variants:
            yield variant.apply(found[0], name), found[1]


def _describe_unknown(name: str) -> str:
    known = [metric.name for group in (*GROUPS, *_ADDED) for metric in group.metrics]
    near = difflib.get_close_matches(name, known, 1)
    return (
        f"{name}: no metric of this name is in the catalogue.{f' Did you mean {near[0]}?' if near else ''} A measure "
        "of your own declares its metrics with dnpo.catalogue.add"
    )


def write_markdown() -> str:
    """The catalogue as a page."""
    lines = [
        "# Metrics",
        "",
        "What is tracked, as screen, notes, figures, report and analysis show it; nothing else can be tracked. Shares "
        "are tracked as 0 to 1 and shown in percent. Written by `python -m dnpo.catalogue`.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.title}", ""]
        if group.variants:
            names = (f"`{each.prefix}…{each.suffix}` {each.words}" for each in group.variants)
            lines += [f"Also {'; '.join(names)}.", ""]
        lines += [
            "| metric | what it is | unit | better | symbol | measured with |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for each in group.metrics:
            needs = f"`{each.needs}`" if each.needs else ""
            title = each.title.replace("<", "&lt;")
            lines.append(f"| `{each.name}` | {title} | {each.unit} | {each.better} | {each.symbol} | {needs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(write_markdown(), end="")
