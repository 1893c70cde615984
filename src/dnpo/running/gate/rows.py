"""Check the rows: ids, repetitions, overlaps, lengths, pairs, and the prompts that the iterations use."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dnpo.data import SPLITS
from dnpo.data.curriculum.prune import Prune
from dnpo.data.duplicates import near, repeats
from dnpo.data.mix import describe_sources
from dnpo.data.unusable import list_reasons
from dnpo.errors import DnpoError
from dnpo.records import Prompt
from dnpo.running.gate.finding import Finding, refuse
from dnpo.stages.before import set_apart
from dnpo.tables import values
from dnpo.wording import percent, plural

if TYPE_CHECKING:
    from dnpo.judges.augment import Augmentation
    from dnpo.optimise.parts import Optimisation
    from dnpo.stages.plan import Plan

Rows = Mapping[str, Sequence[Prompt]]
Each = TypeVar("Each")

LIKE = 0.9  # texts with at least this Jaccard index of their three-word sequences count as nearly the same
MUCH = 0.1  # share of rows removed as duplicates that deserves a warning
FEW = 0.01  # share of near duplicates that is usual in any data
COMPARED = 5000  # evenly spaced rows that are compared for likeness, so that the check takes seconds


def evenly(rows: Sequence[Each], most: int) -> list[Each]:
    """Return at most ``most`` rows, evenly spaced."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def ids(rows: Rows) -> Finding:
    """Check that ids are unique, since responses, verdicts and pairs are joined by them."""
    for split, some in rows.items():
        twice = [name for name, count in Counter(values(some, "id")).items() if count > 1]
        if twice:
            text = f"{plural(len(twice), 'id')} in more than one {split} row, the first is {twice[0]!r}"
            return Finding("ids", "stop", text, "the ids in the data")
    return Finding("ids", "pass", f"each of {sum(map(len, rows.values())):,} rows has a unique id")


def duplicates(train: Sequence[Prompt], by_design: bool, removed: Mapping[str, int]) -> Finding:
    """Check for training rows that repeat another exactly: a row that occurs twice has twice the weight.

    Args:
        train: the training rows.
        by_design: whether the source draws its rows with replacement (``drawn_with_replacement``).
        removed: how many rows the source has left out already, by reason.
    """
    exact = len(train) - len({_hash(row, row.human) for row in train})
    share = f"({percent(exact / max(len(train), 1))})"
    what = f"{exact:,} of {len(train):,} training rows repeat{'s' * (exact == 1)} another word for word {share}"
    if not exact:
        gone = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in removed.items() if count)
        text = f"no two of {len(train):,} training rows are the same" + (f"; left out before: {gone}" if gone else "")
        return Finding("duplicates", "pass", text)
    if by_design:
        return Finding("duplicates", "pass", f"{what}: the source draws with replacement")
    return Finding("duplicates", "warn", what, "the data (remove repeated rows)")


def removed(counts: Mapping[str, int], examples: Sequence[str], left: int) -> Finding:
    """Check how many rows the source has removed as duplicates: if there are many, they may not be duplicates.

    Args:
        counts: removed rows by kind.
        examples: some of them, each with the row that it resembles.
        left: how many rows are left.
    """
    gone = sum(counts.values())
    total = gone + left
    text = f"{gone:,} of {total:,} rows are removed as duplicates ({percent(gone / max(total, 1))})"
    if examples:
        text += f"; {'; '.join(examples)}"
    many = bool(gone) and gone >= MUCH * total
    return Finding("removed rows", "warn" if many else "pass", text, "data.near_duplicates, data.columns, or the data")


def unusable(facts: Mapping[str, Mapping[str, Any]], total: int) -> Finding:
    """Check for rows that cannot be used.

    Args:
        facts: for each reason, the number of rows and the location of the first.
        total: how many rows can be used.
    """
    count = sum(some["rows"] for some in facts.values())
    if not count:
        return Finding("unusable rows", "pass", f"each of {total:,} rows can be used")
    text = f"{count:,} of {total + count:,} rows cannot be used and are left out: {'; '.join(list_reasons(facts))}"
    return Finding("unusable rows", "warn", text, "the data (data.bad_rows=fail stops at them)")


def sources(counts: Mapping[str, Mapping[str, int]]) -> Finding:
    """Report the rows of each source of a mix, by split."""
    return Finding("sources", "pass", describe_sources(counts))


def unread(columns: Sequence[str]) -> Finding:
    """Check for columns that hold text and are not read, such as Alpaca's ``input``."""
    if not columns:
        return Finding("columns", "pass", "no column that holds text is left unread")
    text = f"{', '.join(columns)}: unread text"
    setting = "data.columns, such as '{prompt: [instruction, input]}', if it belongs to a prompt or response"
    return Finding("columns", "warn", text, setting)


def pairs(train: Sequence[Prompt]) -> list[Finding]:
    """Report how many rows have pairs and ratings, and if ratings contradict pairs; no finding without pairs."""
    paired = sum(rejected is not None for rejected in values(train, "rejected"))
    rated = sum(score is not None for score in values(train, "human_score"))
    if not paired and not rated:
        return []
    text = f"{paired:,} of {len(train):,} training rows have a pair, {rated:,} a rating of the human response"
    found = [Finding("pairs", "pass", text)]
    above = {
        row.id: row.human_score - row.rejected_score
        for row in train
        if row.rejected is not None and row.human_score is not None and row.rejected_score is not None
    }
    if above:
        against = [name for name, gap in above.items() if gap < 0]
        equal = sum(not gap for gap in above.values())
        text = f"of {len(above):,} pairs with two ratings {equal:,} have equal ones, and in {len(against):,} "
        text += f"({percent(len(against) / len(above))}) the rejected response has the higher one"
        such = f"; the first is {against[0]}" if against else ""
        setting = "data.columns if these are no ratings of the responses, or the data"
        found.append(Finding("ratings", "warn" if against else "pass", text + such, setting))
    return found


def used(plans: "Sequence[Plan]", train: Sequence[Prompt]) -> list[Finding]:
    """Check that every iteration has prompts, and pairs if it trains on pairs of the data; report the numbers."""
    found, sizes = [], []
    for plan in plans:
        try:
            some = plan.prompts(train, plan.k)
        except DnpoError as error:
            return [refuse("prompts", error, "prompts=…, or the data")]
        if not some:
            text = f"iteration {plan.k} has none of {len(train):,} training prompts"
            return [Finding("prompts", "stop", text, "prompts=…, or the data")]
        if not plan.rollout.generates and not any(row.rejected is not None for row in some):
            text = (
                f"iteration {plan.k} trains on the data's own pairs, but none of its {len(some):,} rows has a "
                "rejected response"
            )
            found.append(Finding("given pairs", "stop", text, "data.columns, other data, or rollout=ahead"))
        sizes.append(len(some))
    if set(sizes) <= {len(train)}:  # also if there is no iteration, as in an evaluation
        return found
    *most, last = (f"{size:,}" for size in sizes)
    text = f"of {len(train):,} training prompts, iteration {plans[0].k} uses {last}"
    if most:
        which = f"{plans[0].k} {'and' if len(most) == 1 else 'to'} {plans[-1].k}"
        text = f"of {len(train):,} training prompts, iterations {which} use {', '.join(most)} and {last}"
    few = [plan.k for plan, size in zip(plans, sizes, strict=True) if size < plan.trainer.batch_size]
    if few:
        text += f"; in iteration {', '.join(map(str, few))} the prompts do not fill one policy step"
    setting = "prompts.shares; pairs=share and seed_pairs=share if nearly all rows have pairs; or the data"
    return [*found, Finding("prompts", "warn" if few else "pass", text, setting)]


def apart(train: Sequence[Prompt], count: int) -> tuple[Rows, list[Finding]]:
    """The rows for fine-tuning (``sft``) and for the iterations (``train``); a finding if the latter get none.

    Args:
        count: the setting ``sft_rows``; 0: both use all rows.
    """
    both = {"sft": train, "train": train}
    try:
        return (set_apart(train, count) if count else both), []
    except DnpoError as error:
        return both, [refuse("sft_rows", error, "sft_rows, or the data")]


def held_out(trainings: "Iterable[tuple[str, Optimisation, Sequence[Prompt]]]") -> list[Finding]:
    """Check that trainings which hold rows out have some to measure, and some to train on.

    Args:
        trainings: the settings' name and the settings of each, and the prompts of its rows or more.
    """
    found = [_held_out(f"{name}.holdout", how, list(values(prompts, "id"))) for name, how, prompts in trainings]
    stops = [each for each in found if each is not None and each.level == "stop"]
    return stops[:1] or list({each.name: each for each in found if each is not None}.values())


def _held_out(setting: str, how: "Optimisation", ids: Sequence[str]) -> Finding | None:
    if not how.measures:
        return None
    from dnpo.optimise.held import divide  # brings torch, which a plan does not need

    try:
        _, held = divide(lambda: ids, range(len(ids)), how, setting.partition(".")[0])
    except DnpoError as error:
        return refuse(setting, error, f"{setting}, or the data")
    text = f"holds out {len(held):,} of {plural(len(ids), 'prompt')}"
    return Finding(setting, "pass", text)


def clusters(plan: "Plan", prompts: int) -> list[Finding]:
    """Check that a curriculum which clusters pairs can have as many as it needs.

    Args:
        prompts: number of the iteration's prompts; every response to one of them may be the chosen one of a pair.
    """
    if isinstance(plan.curriculum, Prune):
        try:
            plan.curriculum.check_pairs(prompts * (plan.rollout.samples + 1))
        except DnpoError as error:
            return [refuse("curriculum", error, "curriculum.clusters, or the data")]
    return []


def lessons(augment: "Augmentation", train: Sequence[Prompt]) -> Finding:
    """Check that the data have what a judge is to be taught from."""
    try:
        augment.check(train)
    except DnpoError as error:
        return refuse("augment", error, "augment.labels, or the data")
    return Finding("augment", "pass", f"the data have what augment.labels={augment.labels} needs")


def near_duplicates(train: Sequence[Prompt], by_design: bool) -> Finding:
    """Check for training rows that nearly repeat another. Rows that are exactly equal count as one row.

    Args:
        train, by_design: as in :func:`duplicates`.
    """
    distinct = list({_hash(row, row.human): number for number, row in enumerate(train)}.values())
    some = [train[number] for number in evenly(distinct, COMPARED)]
    found = repeats([f"{_text(row)}\n{row.human}" for row in some], LIKE)
    of = _of(len(some), len(distinct), "distinct training rows")
    if not found:
        return Finding("near duplicates", "pass", f"none of {of} nearly repeats another (likeness {LIKE} or more)")
    i, j, likeness = found[0]
    text = (
        f"{len(found):,} of {of} nearly repeat another (likeness {LIKE} or more), as {some[i].id} and {some[j].id} "
        f"({likeness:.2f})"
    )
    # Any data have a few; only many are worth a warning.
    many = len(found) > FEW * len(some) and not by_design
    return Finding("near duplicates", "warn" if many else "pass", text, "data.near_duplicates, or the data")


def overlap(rows: Rows) -> list[Finding]:
    """Check for prompts in more than one split: an evaluation on training prompts would measure memory."""
    conversations = {split: {_hash(row) for row in rows[split]} for split in SPLITS}
    findings = []
    for held in ("validation", "test"):
        name = f"overlap with {held}"
        same = sum(_hash(row) in conversations["train"] for row in rows[held])
        if same:
            text = f"{same:,} of {len(rows[held]):,} {held} prompts are training prompts too"
            findings.append(Finding(name, "stop", text, "data=…: its splits must not share prompts"))
            continue
        train, some = evenly(rows["train"], COMPARED), evenly(rows[held], COMPARED)
        found = near([_text(row) for row in some], [_text(row) for row in train], LIKE)
        like = {i for i, _, _ in found}
        against = _of(len(train), len(rows["train"]), "training ones")
        of = f"{_of(len(some), len(rows[held]), f'{held} prompts')} against {against}"
        if like:
            i, j, likeness = max(found, key=lambda pair: pair[2])
            text = (
                f"{len(like):,} of {of} are nearly the same (likeness {LIKE} or more), as {some[i].id} and "
                f"{train[j].id} ({likeness:.2f})"
            )
            findings.append(Finding(name, "warn", text, "data.near_duplicates, or the data"))
        else:
            findings.append(Finding(name, "pass", f"none of {of} is the same or nearly so (likeness {LIKE} or more)"))
    both = len(conversations["validation"] & conversations["test"])
    if both:
        text = (
            f"{plural(both, 'prompt')} in both validation and test: settings would be chosen on prompts that are "
            "reported"
        )
        findings.append(Finding("validation and test", "warn", text, "the data"))
    else:
        findings.append(Finding("validation and test", "pass", "validation and test share no prompt"))
    return findings


def room(asked: int, context: int | None, limit: int, chosen: bool = False) -> Finding:
    """Check that the model's context leaves room for prompts.

    Args:
        asked: maximum tokens of a prompt in the settings.
        context: tokens that the model reads at most; None if its configuration names none.
        limit: maximum tokens of a response.
        chosen: whether the context is a setting, as that of a model made from scratch is.
    """
    if context is None:
        return Finding("context", "pass", "the model's configuration has no maximum length")
    if limit >= context:
        model = f"model.context={context} to {asked + limit}" if chosen else "the model"
        setting = f"data.max_response_tokens={limit} to less than {context:,}, or {model}"
        text = f"the model's context of {context:,} tokens leaves none for prompts if responses have {limit:,} tokens"
        return Finding("context", "stop", text, setting)
    text = f"prompts of up to {min(asked, context - limit):,} and responses of up to {limit:,} tokens fit into "
    return Finding("context", "pass", f"{text}the model's context of {context:,}")


def lengths(
    split: str, total: int, tokens: Sequence[tuple[int, int]], longest: int, limit: int, drop: bool, why: str = ""
) -> Finding:
    """Check what the length limits drop and cut.

    Args:
        split: name of the split.
        total: number of rows of the split.
        tokens: tokens of prompt and response, for some or all of the rows.
        longest, limit: maximum tokens of a prompt and of a response.
        drop: whether rows with longer responses are dropped; otherwise the responses are cut.
        why: where the limit for prompts comes from.
    """
    name, count = f"lengths of {split}", len(tokens)
    setting = "data.max_prompt_tokens and data.max_response_tokens (together within the model's context)"
    if not total:
        return Finding(name, "stop", f"there are no {split} prompts", "data=…")
    too_long = sum(prompt > longest for prompt, _ in tokens)
    over = sum(response > limit for prompt, response in tokens if prompt <= longest)
    if too_long == count:
        shortest = min(prompt for prompt, _ in tokens)
        within = f"{longest:,} token{'' if longest == 1 else 's'}"
        text = f"none of the {total:,} {split} prompts fits into {within}{why}: the shortest has {shortest:,}"
        return Finding(name, "stop", text, setting)
    if drop and too_long + over == count:
        text = f"none of the {total:,} {split} rows fits into {longest:,} and {limit:,} tokens: all would be dropped"
        return Finding(name, "stop", text, f"{setting}, or data.long_responses=cut")
    most = [max(column) for column in zip(*tokens, strict=True)]
    of = _of(count, total, f"{split} rows")
    about = f"the longest prompt has {most[0]:,} tokens of {longest:,}, the longest response {most[1]:,} of {limit:,}"
    if too_long or over:
        text = (
            f"{too_long:,} of {of} have too long a prompt and are dropped ({percent(too_long / count)}); {over:,} have "
            f"too long a response and are {'dropped' if drop else 'cut'} ({percent(over / count)}); {about}"
        )
        return Finding(name, "warn", text, setting)
    return Finding(name, "pass", f"nothing of {of} is dropped or cut; {about}")


def _of(some: int, total: int, what: str) -> str:
    return f"{total:,} {what}" if some == total else f"{some:,} of {total:,} {what}"


def _hash(prompt: Prompt, *texts: str) -> bytes:
    """A hash of a conversation and of further texts, which takes less memory than the texts."""
    found = [text for turn in prompt.messages for text in (turn["role"], turn["content"])]
    return hashlib.blake2b(repr([*found, *texts]).encode(errors="surrogatepass"), digest_size=16).digest()


def _text(prompt: Prompt) -> str:
    """Join the turns without system turns: a shared system turn would make all rows similar."""
    return "\n".join(turn["content"] for turn in prompt.messages if turn["role"] != "system")
