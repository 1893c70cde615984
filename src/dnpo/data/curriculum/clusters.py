"""Cluster embeddings, and choose rows to leave out by the clusters.

Shapes: N rows, H width of an embedding, C clusters.
"""

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]
    Whole = npt.NDArray[np.int64]

BLOCK = 1024  # rows compared with others at once


class Clusters(NamedTuple):
    """Rows in clusters.

    Attributes:
        label_N: the cluster of each row.
        distance_N: its Euclidean distance to the centre of this cluster.
        size_N: the number of rows of this cluster.
    """

    label_N: "Whole"
    distance_N: "Array"
    size_N: "Whole"


def unit_length(embedding_NH: "np.ndarray") -> "Array":
    """Embeddings scaled to length 1, so that products are cosines; 0 stays 0."""
    import numpy as np

    rows_NH = np.asarray(embedding_NH, np.float32)
    length_N = np.linalg.norm(rows_NH, axis=1, keepdims=True)
    return np.divide(rows_NH, np.where(length_N > 0, length_N, 1), dtype=np.float32)


def find_centres(embedding_NH: "Array", count: int, rounds: int, seed: int) -> "Array":
    """The centres of k-means (Lloyd's algorithm from k-means++, by scikit-learn); shape C × H.

    It runs on one thread, so that the same rows always have exactly the same centres.
    """
    import numpy as np

    cluster, threads = import_module("sklearn.cluster"), import_module("threadpoolctl")
    means = cluster.KMeans(count, n_init=1, max_iter=rounds, random_state=seed % 2**32)
    with threads.threadpool_limits(1), warnings.catch_warnings():
        # with fewer different rows than clusters, some clusters are empty, which is harmless
        warnings.simplefilter("ignore", import_module("sklearn.exceptions").ConvergenceWarning)
        means.fit(embedding_NH)
    return np.asarray(means.cluster_centers_, np.float32)


def assign(embedding_NH: "Array", centre_CH: "Array") -> Clusters:
    """Put every row into the cluster of the nearest centre.

    The rows may differ from the rows that the centres were found on.
    """
    import numpy as np

    square_C = (centre_CH**2).sum(1)
    label_N = np.empty(len(embedding_NH), np.int64)
    distance_N = np.empty(len(embedding_NH), np.float32)
    for start in range(0, len(embedding_NH), BLOCK):
        some = slice(start, start + BLOCK)
        label_N[some] = (square_C - 2 * embedding_NH[some] @ centre_CH.T).argmin(1)
        distance_N[some] = np.linalg.norm(embedding_NH[some] - centre_CH[label_N[some]], axis=1)
    return Clusters(label_N, distance_N, np.bincount(label_N, minlength=len(centre_CH))[label_N])


def outlying(clusters: Clusters, first: int, then: int) -> "Whole":
    """Rows of the smallest clusters, then the rows farthest from their centres (SCIP, section 2.2).

    Clusters are left out one by one, the smallest first. If only a part of the last one is needed, its farthest rows
    are left out.

    Args:
        first: number of rows to leave out by the size of their cluster.
        then: number of other rows to leave out by their distance.
    """
    import numpy as np

    by_size = np.lexsort((-clusters.distance_N, clusters.label_N, clusters.size_N))
    small, others = by_size[:first], np.sort(by_size[first:])
    far = others[np.argsort(-clusters.distance_N[others], kind="stable")[:then]]
    return np.concatenate([small, far])


def typical(clusters: Clusters, count: int) -> "Whole":
    """The rows nearest to the centres of their clusters (SSL prototypes: Sorscher et al. 2022, section 6)."""
    import numpy as np

    return np.argsort(clusters.distance_N, kind="stable")[:count]


def alike(embedding_NH: "Array", clusters: Clusters, count: int) -> "Whole":
    """The rows most similar to a row of their cluster that is farther from its centre (SemDeDup: Abbas et al. 2023).

    This is algorithm A of the paper: the other row may itself be left out.
    The paper leaves out the rows above a threshold of similarity; here the threshold follows from ``count``.
    """
    import numpy as np

    return np.argsort(-likeness(embedding_NH, clusters), kind="stable")[:count]


def likeness(embedding_NH: "Array", clusters: Clusters) -> "Array":
    """The largest cosine of each row with the rows of its cluster that are farther from the centre; shape N.

    The farthest row has −1. Of rows at the same distance, the earlier one counts as farther. Example: three rows at
    distances .3, .2 and .1 have the cosines .9 (first, second), .5 (first, third) and .8 (second, third). Then the
    first row has −1, the second .9 and the third .8.
    """
    import numpy as np

    likeness_N = np.full(len(embedding_NH), -1, np.float32)
    order = np.lexsort((-clusters.distance_N, clusters.label_N))  # stable
    ends = np.flatnonzero(np.diff(clusters.label_N[order])) + 1
    for rows in np.split(order, ends):
        own_NH = unit_length(embedding_NH[rows])
        for start in range(0, len(rows), BLOCK):
            stop = min(start + BLOCK, len(rows))
            cosine = own_NH[start:stop] @ own_NH[:stop].T
            cosine[np.triu_indices(stop - start, start, stop)] = -1  # itself, and rows nearer to the centre
            likeness_N[rows[start:stop]] = cosine.max(1)
    return likeness_N


def without(count: int, gone: "Whole | Sequence[int]") -> "Whole":
    """The numbers of the remaining rows, in order."""
    import numpy as np

    left = np.ones(count, bool)
    left[np.asarray(gone, np.int64)] = False
    return np.flatnonzero(left)
