"""Compare generated texts with the positive samples that a policy was trained on, and measure their diversity.

Similarity, row by row, as in Table 5 of the DNPO paper: BLEU, ROUGE-L and Sentence-BERT similarity. All are fractions,
as in the paper; sacrebleu's 0-100 is divided by 100. The paper does not state which BLEU it uses, so both corpus BLEU
and the mean of sentence BLEU are computed. BERTScore is left out: the paper does not use it, and it would need another
large encoder for much the same information as Sentence-BERT.

Diversity of one set of texts: distinct-n, self-BLEU, lengths. ``items`` has numbers for each text; ``metrics`` has
their means under the same names, and numbers for the whole set.

sacrebleu and rouge-score come with the extra ``eval``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from dnpo.errors import DataError, SettingsError
from dnpo.policy.weights import Weights
from dnpo.seeding import derive
from dnpo.settings import Count, place

if TYPE_CHECKING:
    from dnpo.policy.encoder import SentenceBert

PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}
SAMPLE = 100  # texts that self-BLEU compares with each other

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Measured:
    """The results of a measurement.

    Attributes:
        metrics: numbers by name.
        items: a number for each text by name, in the order of the texts, for paired comparisons.
        signatures: the variant that was computed, for metrics that have variants.
    """

    metrics: Mapping[str, float]
    items: Mapping[str, Sequence[float]]
    signatures: Mapping[str, str]


def available() -> None:
    """Raise if a package is missing.

    Raises:
        SettingsError: names the package and how to install it.
    """
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise SettingsError(f'text metrics need {" and ".join(missing)}, not installed here: pip install "dnpo[eval]"')


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The measurement of newly generated texts, configured by ``eval.texts``.

    Args:
        rows: number of new texts that are compared with the positive samples of their prompts: the first of those whose
            log-probabilities are kept.
        encoder: a folder with a sentence encoder, for Sentence-BERT similarity; None leaves that out.

    Raises:
        SettingsError: a package is missing.
        ModelError: there is no such folder.
    """

    rows: Count = 400
    encoder: str | None = place(None)

    def __post_init__(self) -> None:
        available()
        if self.encoder is not None:
            Weights(self.encoder, None, None, "eval.texts.encoder")

    @cached_property
    def _weights(self) -> Weights | None:
        return None if self.encoder is None else Weights(self.encoder, None, None, "eval.texts.encoder")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the results, with contents in place of paths."""
        return {"rows": self.rows, "encoder": None if self._weights is None else self._weights.identity}

    def check(self) -> None:
        """Check the encoder's files, if there is one.

        Raises:
            ModelError: they cannot be used, or they define another kind of embedding.
        """
        if self.encoder is not None:
            from dnpo.policy.encoder import check_encoder

            check_encoder(self.encoder)

    def measure(self, generated: Sequence[str], positive: Sequence[str], device: str, seed: int) -> "Measured":
        """Compute :func:`similarity` of both, and :func:`diversity` of the generated texts."""
        from dnpo.policy.encoder import SentenceBert

        encoder = None if self.encoder is None else SentenceBert(self.encoder, device)
        near, differ = similarity(generated, positive, encoder), diversity(generated, seed=seed)
        return Measured(
            {**near.metrics, **differ.metrics}, {**near.items, **differ.items}, {**near.signatures, **differ.signatures}
        )


def similarity(generated: Sequence[str], positive: Sequence[str], encoder: "SentenceBert | None" = None) -> Measured:
    """Measure the similarity of each generated text to the positive sample of its row.

    ``bleu``: corpus BLEU-4 (Papineni et al. 2002), with counts summed over all rows, by sacrebleu. It is 0 if no
    text has four words.

    ``bleu_sentence``: BLEU of each row, over the n-gram orders that the text has. Both variants smooth precisions of 0
    to 1/2, 1/4, … of a match, unless all are 0. Example: for "the cat sat on the mat" against "the cat is on the mat"
    it is (5/6 · 3/5 · 1/4 · 1/6)^¼ = 0.380.

    ``rouge_l``: F of the longest common subsequence of words (Lin 2004), by rouge-score without stemming; in the same
    example 5 of 6 words, 0.833. It sees only words of a-z and 0-9; text in other scripts counts as empty.

    ``sbert``: cosine of both embeddings (Reimers and Gurevych 2019), −1 to 1; only with an encoder.

    An empty text scores 0 in the first three, even against an empty text.

    Args:
        generated: texts of the policy.
        positive: the chosen responses that the policy was trained on, to the same prompts in the same order.
        encoder: encoder for Sentence-BERT.

    Raises:
        DataError: there are no rows, or the two lists have different lengths.
        SettingsError: a package is missing.
    """
    available()
    if len(generated) != len(positive):
        raise DataError(
            f"{len(generated)} generated texts and {len(positive)} positive samples; expected as many of both"
        )
    _some(generated)
    # force: no warning about texts that look tokenized already; the numbers are the same
    corpus, sentence = _bleu(force=True), _bleu(effective_order=True)
    whole = corpus.corpus_score(list(generated), [list(positive)]).score / 100
    rouge = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rows = list(zip(generated, positive, strict=True))
    items = {
        "bleu_sentence": [sentence.sentence_score(text, [other]).score / 100 for text, other in rows],
        "rouge_l": [float(rouge.score(other, text)["rougeL"].fmeasure) for text, other in rows],
    }
    signatures = {
        "bleu": str(corpus.get_signature()),
        "bleu_sentence": str(sentence.get_signature()),
        "rouge_l": "rougeL|F1|stem:no",
    }
    if encoder is not None:
        embedded = encoder([*generated, *positive])
        cosines = (embedded[: len(rows)] * embedded[len(rows) :]).sum(-1)
        items["sbert"] = cast(list[float], cosines.tolist())
        signatures["sbert"] = encoder.label
    return Measured({"bleu": whole} | _means(items), items, signatures)


def diversity(texts: Sequence[str], *, seed: int = 0, sample: int = SAMPLE) -> Measured:
    """Measure the diversity of texts, between texts and within each text, and their lengths.

    ``distinct_1``, ``distinct_2``: share of distinct n-grams of words over the whole set (Li et al. 2016). They fall as
    texts are added, so compare only sets of equal size. "a b a" and "a b c" have 3 distinct words of 6, and 3 distinct
    pairs (a b, b a, b c) of 4. ``distinct_1_within``, ``distinct_2_within``: the same share within one text, low if the
    text repeats words; 1 if it has no n-gram.

    ``self_bleu``: mean BLEU of each text with the others as references (Zhu et al. 2018, Texygen), high if texts are
    alike. It grows with the number of references, so it is computed on ``sample`` texts drawn at random;
    ``self_bleu_texts`` is their number. It is left out for a single text.

    ``words`` and ``characters``: lengths. Words are runs of letters and digits, in lower case; every other character
    that is not white space is a word too.

    Args:
        texts: the set of texts.
        seed: seed of the draw for self-BLEU.
        sample: number of texts drawn; time grows with its square.

    Raises:
        DataError: there are no texts, or ``sample`` is under 2.
        SettingsError: sacrebleu is missing.
    """
    available()
    _some(texts)
    if sample < 2:
        raise DataError(f"sample={sample}: self-BLEU compares texts with each other; expected 2 or more")
    words = [_WORD.findall(text.lower()) for text in texts]
    pairs = [list(pairwise(one)) for one in words]
    items = {
        "words": [float(len(one)) for one in words],
        "characters": [float(len(text)) for text in texts],
        "distinct_1_within": [_distinct([one]) for one in words],
        "distinct_2_within": [_distinct([one]) for one in pairs],
    }
    metrics = {"distinct_1": _distinct(words), "distinct_2": _distinct(pairs)} | _means(items)
    if len(texts) == 1:
        return Measured(metrics, items, {})
    import numpy as np

    draw = np.random.default_rng(derive(seed, "self-BLEU"))
    drawn = [texts[i] for i in sorted(draw.permutation(len(texts))[:sample].tolist())]
    value, signature = _self_bleu(drawn)
    return Measured(metrics | {"self_bleu": value, "self_bleu_texts": len(drawn)}, items, {"self_bleu": signature})


def _bleu(**options: bool) -> Any:
    # By name, so that types can be checked without the package.
    return import_module("sacrebleu.metrics.bleu").BLEU(**options)


def _self_bleu(texts: Sequence[str]) -> tuple[float, str]:
    bleu = _bleu(effective_order=True)
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores) / 100, str(bleu.get_signature())


def _distinct(texts: Sequence[Sequence[Any]]) -> float:
    """The share of distinct elements; 1 if there are none, since nothing repeats."""
    every = [one for text in texts for one in text]
    return len(set(every)) / len(every) if every else 1.0


def _means(items: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in items.items()}


def _some(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("there are no texts to measure; expected one or more")
