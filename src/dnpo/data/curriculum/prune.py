"""Leave out pairs by the position of their embeddings (of prompt and chosen response) among all embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from dnpo.data.curriculum import Context, Counts, Curriculum
from dnpo.errors import DataError, SettingsError
from dnpo.policy.weights import Weights
from dnpo.records import Pair
from dnpo.seeding import derive
from dnpo.settings import Count, Fraction, neutral, place

if TYPE_CHECKING:
    import numpy as np

    from dnpo.data.curriculum.clusters import Array, Clusters, Whole


@dataclass(frozen=True)
class Prune(Curriculum):
    """Leaves out a share of the pairs (SCIP).

    First, pairs whose prompt and chosen response repeat an earlier pair's token for token are left out (``duplicates``
    counts them). Then a share of the others is left out (``pruned`` counts them), by one of these rules:

    - ``outlying``: the pairs of the smallest clusters, then the pairs farthest from their centres (SCIP);
    - ``typical``: the pairs nearest to their centres (SSL prototypes);
    - ``alike``: the pairs most similar to a pair of their cluster that is farther from its centre (SemDeDup);
    - ``alike_typical``: ``alike``, then ``typical`` in new clusters of the others (D4);
    - ``random``: pairs drawn at random.

    Embeddings are clustered without scaling them to one length, since a policy's embeddings are longer for unusual
    texts. Similarity is the cosine.

    Args:
        rule: which pairs are left out.
        share: share of the pairs to leave out, duplicates not counted.
        alpha: share of the left-out pairs that the first step of ``outlying`` or ``alike_typical`` chooses.
        clusters: number of clusters; None: the square root of the number of pairs.
        rounds: maximum number of rounds of k-means.
        encoder: a folder with a sentence encoder; None: embeddings are the initial policy's mean last hidden state.
        device: where the encoder runs: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        SettingsError: ``share`` is 1, or scikit-learn is missing.
        ModelError: there is no such folder.
    """

    rule: Literal["outlying", "typical", "alike", "alike_typical", "random"] = "outlying"
    share: Fraction = 0.2
    alpha: Fraction = 0.8
    clusters: Count | None = None
    rounds: Count = 25
    encoder: str | None = place(None)
    device: str = neutral("auto")

    def __post_init__(self) -> None:
        if self.share == 1:
            raise SettingsError("share=1: expected less than 1, since nothing would be left")
        if self._clusters_rows and find_spec("sklearn") is None:
            raise SettingsError(
                f'rule={self.rule}: needs scikit-learn, which is not installed here: pip install "dnpo[prune]"'
            )
        _ = self._weights

    @cached_property
    def _weights(self) -> Weights | None:
        return None if self.encoder is None else Weights(self.encoder, None, None, "curriculum.encoder")

    @property
    def _clusters_rows(self) -> bool:
        return self.rule != "random"

    @property
    def embeds(self) -> bool:
        """Whether it needs the embeddings of the initial policy."""
        return self._clusters_rows and self.encoder is None

    def identity(self) -> Mapping[str, Any]:
        """The settings that decide the result, with contents in place of paths."""
        return {
            "prune": self.rule,
            "share": self.share,
            "alpha": self.alpha,
            "clusters": self.clusters,
            "rounds": self.rounds,
            "encoder": None if self._weights is None else self._weights.identity,
        }

    def check(self, iteration: int, iterations: int) -> None:
        """Check the encoder's files, if there is one."""
        if self.encoder is not None and self._clusters_rows:
            from dnpo.policy.encoder import check_encoder

            check_encoder(self.encoder, name="curriculum.encoder")

    def check_pairs(self, most: int) -> None:
        """Refuse more clusters than there can be pairs.

        Raises:
            SettingsError: names ``clusters``.
        """
        if self._clusters_rows and self.clusters is not None and self.clusters > most:
            raise SettingsError(
                f"curriculum.clusters={self.clusters}: there are only {most:,} different pairs to cluster; expected at "
                "most as many clusters, or null for the square root of that number"
            )

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        """The remaining pairs, in their order."""
        from dnpo.data.curriculum.clusters import without

        first: dict[tuple[tuple[int, ...], ...], Pair] = {}
        for pair in pairs:
            first.setdefault((tuple(pair.prompt_ids), tuple(pair.chosen_ids)), pair)
        rows = list(first.values())
        gone = self._choose(rows, round(self.share * len(rows)), context)
        kept = [rows[i] for i in without(len(rows), gone).tolist()]
        return kept, {"duplicates": len(pairs) - len(rows), "pruned": len(rows) - len(kept)}

    def _choose(self, rows: Sequence[Pair], count: int, context: Context) -> "Whole":
        """The numbers of ``count`` rows to leave out."""
        import numpy as np

        from dnpo.data.curriculum import clusters as rules

        seed = derive(context.seed, "prune", context.iteration)
        if not self._clusters_rows or not count:
            return np.random.default_rng(seed).permutation(len(rows))[:count]
        embedding_NH = np.asarray(self._embed(rows, context), np.float32)
        if not np.isfinite(embedding_NH).all():
            row = int(np.argmin(np.isfinite(embedding_NH).all(1)))
            raise DataError(f"curriculum.rule={self.rule}: the embedding of {rows[row].id} is not finite")
        found = self._cluster(embedding_NH, seed)
        first = round(self.alpha * count)
        if self.rule == "outlying":
            return rules.outlying(found, first, count - first)
        if self.rule == "typical":
            return rules.typical(found, count)
        if self.rule == "alike":
            return rules.alike(embedding_NH, found, count)
        twice = rules.alike(embedding_NH, found, first)
        left = rules.without(len(rows), twice)
        again = self._cluster(embedding_NH[left], derive(seed, "again"))
        return np.concatenate([twice, left[rules.typical(again, count - first)]])

    def _embed(self, rows: Sequence[Pair], context: Context) -> "np.ndarray":
        if self.encoder is None:
            return context.embed(rows)
        from dnpo.data.curriculum.embedding import embed_by_encoder

        return embed_by_encoder(rows, self.encoder, self.device)

    def _cluster(self, embedding_NH: "Array", seed: int) -> "Clusters":
        from dnpo.data.curriculum.clusters import assign, find_centres

        self.check_pairs(len(embedding_NH))
        count = self.clusters or max(round(len(embedding_NH) ** 0.5), 1)
        return assign(embedding_NH, find_centres(embedding_NH, count, self.rounds, seed))
