"""Pictures that go with a run."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLOURS = {"chosen": "#0072B2", "rejected": "#D55E00", "new": "#009E73"}  # safe for colour-blind readers
LABELS = {"chosen": "chosen", "rejected": "rejected", "new": "newly generated"}


def logprob_histogram(logprobs: Path, path: Path, title: str, note: str) -> None:
    """Where chosen, rejected and newly generated responses lie under one policy: summed and per-token log-probability.

    Args:
        logprobs: what :func:`dnpo.evaluate.evaluate` wrote.
        path: the picture to write.
        title, note: above and below the histograms.
    """
    values = np.load(logprobs)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axis, per_token in zip(panels, (False, True), strict=True):
        shown = {}
        for name in COLOURS:
            if name in values:
                lengths = np.maximum(values[f"{name}_tokens"], 1)
                shown[name] = values[name] / lengths if per_token else values[name]
        # The longest tails say little and would squeeze the rest.
        low = min(np.percentile(v, 1) for v in shown.values())
        bins = np.linspace(low, 0, 41)
        for name, found in shown.items():
            axis.hist(
                np.clip(found, low, None),
                bins=bins.tolist(),
                density=True,
                histtype="step",
                linewidth=1.6,
                color=COLOURS[name],
                label=f"{LABELS[name]} (mean {found.mean():.2f})",
            )
        axis.set_xlabel("log-probability per token, nats" if per_token else "log-probability of the response, nats")
        axis.set_ylabel("density")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=120)
