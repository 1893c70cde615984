"""Numbers that the DNPO paper prints (arXiv 2502.05400), as shares, each with its table or figure.

They were measured with a model of 7 billion parameters on the six benchmarks of the Open LLM Leaderboard. Figures show
them only with runs in that setting. Tables show them in a separate column.
"""

from collections.abc import Iterable

from analysis.selection import DNPO, DSL, FIXED, NPO, SPIN, Iteration
from dnpo.tracking.reading import SFT, TrackedRun

COLUMN = "paper (7B, six benchmarks): average"

# Table 1: ARC, TruthfulQA, Winogrande, GSM8K, HellaSwag, MMLU, average.
MAIN: dict[tuple[str, Iteration], tuple[float, ...]] = {
    (SPIN, SFT): (0.704, 0.340, 0.762, 0.318, 0.810, 0.588, 0.587),
    (SPIN, 0): (0.709, 0.393, 0.768, 0.289, 0.826, 0.590, 0.596),
    (SPIN, 1): (0.702, 0.362, 0.760, 0.316, 0.817, 0.585, 0.590),
    (SPIN, 2): (0.707, 0.370, 0.761, 0.276, 0.820, 0.585, 0.586),
    (SPIN, 3): (0.703, 0.383, 0.756, 0.275, 0.818, 0.579, 0.586),
    (DNPO, 1): (0.734, 0.381, 0.766, 0.334, 0.827, 0.583, 0.604),
    (DNPO, 2): (0.735, 0.397, 0.765, 0.323, 0.828, 0.587, 0.606),
    (DNPO, 3): (0.737, 0.417, 0.766, 0.336, 0.827, 0.586, 0.612),
}

# Table 2, the same columns. The paper does not state the iteration. DNPO's six average 0.598, not the printed 0.604.
RIVALS = {
    "PPO": (0.700, 0.351, 0.762, 0.282, 0.817, 0.584, 0.583),
    "α-SPIN": (0.714, 0.352, 0.754, 0.271, 0.788, 0.567, 0.574),
    DNPO: (0.735, 0.360, 0.770, 0.300, 0.830, 0.590, 0.604),
}

# Table 5: SFT, iterations 0 to 3, mean of iterations 1 to 3.
TEXTS = {
    ("bleu", SPIN): (0.128, 0.091, 0.099, 0.115, 0.088, 0.101),
    ("bleu", DNPO): (0.128, 0.091, 0.108, 0.123, 0.112, 0.114),
    ("sbert", SPIN): (0.788, 0.769, 0.764, 0.778, 0.736, 0.759),
    ("sbert", DNPO): (0.788, 0.769, 0.775, 0.787, 0.787, 0.783),
    ("rouge_l", SPIN): (0.320, 0.273, 0.274, 0.299, 0.274, 0.282),
    ("rouge_l", DNPO): (0.320, 0.273, 0.299, 0.298, 0.290, 0.296),
}

# Tables 6 and 7, the columns of table 1. The paper has no constant.
BRANCHES: dict[tuple[str, Iteration], tuple[float, ...]] = {
    (SPIN, 1): MAIN[SPIN, 1],
    (DSL, 1): (0.710, 0.377, 0.767, 0.317, 0.823, 0.586, 0.597),
    (NPO, 1): (0.728, 0.376, 0.766, 0.334, 0.824, 0.584, 0.602),
    (DNPO, 1): (0.734, 0.381, 0.766, 0.334, 0.827, 0.583, 0.604),
    (FIXED, 1): (0.709, 0.370, 0.764, 0.328, 0.821, 0.581, 0.596),
    (SPIN, 2): MAIN[SPIN, 2],
    (DSL, 2): (0.711, 0.363, 0.770, 0.325, 0.821, 0.589, 0.596),
    (NPO, 2): (0.718, 0.375, 0.762, 0.332, 0.821, 0.582, 0.598),
    (DNPO, 2): (0.719, 0.382, 0.771, 0.343, 0.822, 0.589, 0.604),
    (FIXED, 2): (0.714, 0.367, 0.765, 0.315, 0.822, 0.580, 0.594),
    (SPIN, 3): MAIN[SPIN, 3],
    (DSL, 3): (0.703, 0.378, 0.762, 0.280, 0.821, 0.582, 0.588),
    (NPO, 3): (0.707, 0.380, 0.762, 0.300, 0.821, 0.585, 0.592),
    (DNPO, 3): (0.711, 0.378, 0.769, 0.305, 0.821, 0.589, 0.595),
    (FIXED, 3): (0.701, 0.370, 0.752, 0.296, 0.819, 0.582, 0.587),
}

# Figure 7, iteration 3, as given in the text of section 5.2: share of DNPO's wins, of SPIN's wins.
DUEL = {3: (0.5751, 0.2807)}


def comparable(runs: Iterable[TrackedRun]) -> bool:
    """Whether all runs have the paper's setting, so that their numbers are comparable with the paper's."""
    return all(run.option("scale") == "7b" and run.params.get("eval.leaderboard", "None") != "None" for run in runs)
