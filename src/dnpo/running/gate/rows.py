"""Checks of the rows: ids, repeats, overlaps, lengths."""

from collections import Counter
from collections.abc import Mapping, Sequence

from dnpo.data import SPLITS
from dnpo.data.duplicates import near, repeats
from dnpo.records import Prompt
from dnpo.running.gate.finding import Finding

Rows = Mapping[str, Sequence[Prompt]]

LIKE = 0.9  # from this Jaccard index of three-word shingles on, two texts count as nearly the same
FEW = 0.01  # of the rows
COMPARED = 5000  # training rows, evenly spaced, that are compared with others for likeness: seconds, whatever the data


def evenly(rows: Sequence[Prompt], most: int) -> list[Prompt]:
    """So many rows at most, evenly spaced."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def ids(rows: Rows) -> Finding:
    """Whether an id stands for one row: responses, verdicts and pairs are joined by it."""
    for split, some in rows.items():
        twice = [name for name, count in Counter(row.id for row in some).items() if count > 1]
        if twice:
            text = f"{len(twice):,} ids stand for more than one {split} row, the first is {twice[0]!r}"
            return Finding("ids", "stop", text, "the ids in the data")
    return Finding("ids", "pass", f"each of {sum(map(len, rows.values())):,} rows has an id of its own")


def duplicates(train: Sequence[Prompt], by_design: bool, removed: Mapping[str, int]) -> Finding:
    """Whether training rows repeat others, prompt and response: what stands twice is learnt twice as much.

    Args:
        removed: how many rows the source has left out already, by reason.
        by_design: the source draws its rows with replacement, and says so (``drawn_with_replacement``).
    """
    exact = len(train) - len({(_conversation(row), row.human) for row in train})
    what = f"{exact:,} of {len(train):,} training rows repeat another word for word ({exact / max(len(train), 1):.1%})"
    if not exact:
        gone = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in removed.items() if count)
        text = f"no two of {len(train):,} training rows are the same" + (f"; left out before: {gone}" if gone else "")
        return Finding("duplicates", "pass", text)
    if by_design:
        return Finding("duplicates", "pass", f"{what}: the source draws with replacement")
    return Finding("duplicates", "warn", what, "the data (remove repeated rows)")


def near_duplicates(train: Sequence[Prompt], by_design: bool) -> Finding:
    """Whether training rows nearly repeat others; those that do so word for word count once here.

    Args:
        by_design: see :func:`duplicates`.
    """
    distinct = list({(_conversation(row), row.human): row for row in train}.values())
    some = evenly(distinct, COMPARED)
    found = repeats([f"{_text(row)}\n{row.human}" for row in some], LIKE)
    of = _of(len(some), len(distinct), "distinct training rows")
    if not found:
        return Finding("near duplicates", "pass", f"none of {of} is nearly another (likeness {LIKE} or more)")
    i, j, likeness = found[0]
    text = (
        f"{len(found):,} of {of} are nearly another (likeness {LIKE} or more), as {some[i].id} and {some[j].id} "
        f"({likeness:.2f})"
    )
    # A few are in any data; of many one should know.
    many = len(found) > FEW * len(some) and not by_design
    return Finding("near duplicates", "warn" if many else "pass", text, "data.near_duplicates, or the data")


def overlap(rows: Rows) -> list[Finding]:
    """Whether prompts of one split stand in another: what is measured on them would be memory."""
    said = {split: {_conversation(row) for row in rows[split]} for split in SPLITS}
    findings = []
    for held in ("validation", "test"):
        name = f"overlap with {held}"
        same = sum(_conversation(row) in said["train"] for row in rows[held])
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
    both = len(said["validation"] & said["test"])
    if both:
        text = f"{both:,} prompts are in validation and in test: settings are chosen on what is reported"
        findings.append(Finding("validation and test", "warn", text, "the data"))
    else:
        findings.append(Finding("validation and test", "pass", "validation and test share no prompt"))
    return findings


def lengths(split: str, total: int, tokens: Sequence[tuple[int, int]], longest: int, limit: int, drop: bool) -> Finding:
    """What the length limits drop and cut.

    Args:
        total: rows of the split.
        tokens: of prompt and response, of some or all of them.
        longest, limit: tokens of a prompt and of a response at most.
        drop: rows with longer responses are dropped; else the responses are cut.
    """
    name, count = f"lengths of {split}", len(tokens)
    setting = "data.max_prompt_tokens and data.max_response_tokens (together within the model's context)"
    if not total:
        return Finding(name, "stop", f"there are no {split} prompts", "data=…")
    too_long = sum(prompt > longest for prompt, _ in tokens)
    over = sum(response > limit for prompt, response in tokens if prompt <= longest)
    if too_long == count:
        shortest = min(prompt for prompt, _ in tokens)
        text = f"none of the {total:,} {split} prompts fits into {longest:,} tokens: the shortest has {shortest:,}"
        return Finding(name, "stop", text, setting)
    if drop and too_long + over == count:
        text = f"none of the {total:,} {split} rows fits into {longest:,} and {limit:,} tokens: all would be dropped"
        return Finding(name, "stop", text, f"{setting}, or data.long_responses=cut")
    most = [max(column) for column in zip(*tokens, strict=True)]
    of = _of(count, total, f"{split} rows")
    about = f"the longest prompt has {most[0]:,} tokens of {longest:,}, the longest response {most[1]:,} of {limit:,}"
    if too_long or over:
        text = (
            f"of {of} {too_long:,} have too long a prompt and are dropped ({too_long / count:.1%}); {over:,} have too "
            f"long a response and are {'dropped' if drop else 'cut'} ({over / count:.1%}); {about}"
        )
        return Finding(name, "warn", text, setting)
    return Finding(name, "pass", f"nothing of {of} is dropped or cut; {about}")


def _of(some: int, total: int, what: str) -> str:
    return f"{total:,} {what}" if some == total else f"{some:,} of {total:,} {what}"


def _conversation(prompt: Prompt) -> tuple[str, ...]:
    return tuple(text for turn in prompt.messages for text in (turn["role"], turn["content"]))


def _text(prompt: Prompt) -> str:
    """What was asked; a system turn that all rows share would make all of them alike."""
    return "\n".join(turn["content"] for turn in prompt.messages if turn["role"] != "system")
