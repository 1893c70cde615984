"""Embeddings of pairs, each of its prompt with the chosen response."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dnpo.data.curriculum import Embed
from dnpo.records import Pair
from dnpo.store import Report

if TYPE_CHECKING:
    import numpy as np

    from dnpo.policy.model import Policy


def text_of(pair: Pair) -> str:
    """The contents of the prompt's turns and the chosen response, one below the other."""
    return "\n".join([*(turn["content"] for turn in pair.messages), pair.chosen])


def embed_by_encoder(pairs: Sequence[Pair], path: str, device: str) -> "np.ndarray":
    """Embed texts with the sentence encoder in a folder; pairs × width.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    import numpy as np

    from dnpo.policy.encoder import SentenceBert
    from dnpo.policy.model import device_of

    encoder = SentenceBert(path, str(device_of(device)), name="curriculum.encoder")
    return np.asarray(encoder([text_of(pair) for pair in pairs]).numpy())


def embed_by_policy(policy: "Policy", report: Report | None = None) -> Embed:
    """Embed by the mean of a policy's last hidden states over all tokens of prompt and chosen response.

    Args:
        report: receives the progress.
    """

    def embed(pairs: Sequence[Pair]) -> "np.ndarray":
        from dataclasses import replace

        import numpy as np
        import torch

        from dnpo.policy.model import by_length
        from dnpo.policy.packing import pack

        rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        embedding_NH = np.empty((len(rows), policy.head.weight_VH.shape[1]), np.float32)
        if report is not None:
            report.begin(len(rows), "embeddings")
        with torch.no_grad(), policy.evaluating():
            for some in by_length([len(prompt) + len(chosen) for prompt, chosen in rows]):
                batch = pack([rows[i][0] for i in some], [rows[i][1] for i in some])
                every = replace(batch, predict_N=torch.arange(len(batch.ids_T)))  # the prompts' tokens too
                hidden_TH = policy.hidden(every.to(policy.device)).float()
                for i, own_TH in zip(some, torch.split(hidden_TH, list(batch.lengths)), strict=True):
                    embedding_NH[i] = own_TH.mean(0).cpu().numpy()
                if report is not None:
                    report.advance(len(some))
        return embedding_NH

    return embed
