"""Locate and identify models that run on this machine, other than the policy."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from dnpo.errors import ModelError
from dnpo.policy.folder import check_folder, check_name, explain_missing, find_files, read_quantisation
from dnpo.store import content_hash

WHOLE = ("base", "eval.texts.encoder", "curriculum.encoder")  # these settings are paths or names themselves


class Weights:
    """A model's files, in a folder in the format of transformers or on the Hugging Face hub.

    Args:
        path: the folder. Give either this or ``name``.
        name: name on the hub, with ``revision``: a commit, branch or tag; None takes the newest.
        setting: dotted name of the settings, such as ``judge``.
        marker: a file that the folder must have.

    Raises:
        ModelError: both or neither are given, or there is no such folder.
    """

    def __init__(
        self,
        path: str | None,
        name: str | None,
        revision: str | None,
        setting: str = "judge",
        marker: str = "config.json",
    ) -> None:
        if (path is None) == (name is None):
            raise ModelError(f"{setting}: give either {setting}.path (a folder) or {setting}.name (on the hub)")
        self.folder = Path(path).absolute() if path is not None else None
        self.path, self.name, self.revision, self.setting = path, name, revision, setting
        if self.folder is not None and not (self.folder / marker).is_file():
            raise ModelError(f"{self.description}: {explain_missing(self.folder, marker)}")
        if name is not None:
            check_name(name, self.description)

    @staticmethod
    def has(path: str, file: str) -> bool:
        """Whether a folder has this file."""
        return (Path(path) / file).is_file()

    @property
    def description(self) -> str:
        """The setting that names the model, for messages."""
        if self.setting in WHOLE:
            return f"{self.setting}={self.path or self.name}"
        return f"{self.setting}.path={self.path}" if self.path is not None else f"{self.setting}.name={self.name}"

    @cached_property
    def identity(self) -> str:
        """The values that determine the weights: a hash of the folder's contents, or name and commit on the hub."""
        return content_hash(self.folder) if self.folder is not None else f"{self.name}@{self._commit}"

    @property
    def label(self) -> str:
        """A short identity for people: the kind of model, and the beginning of its hash or commit.

        Raises:
            ModelError: ``config.json`` cannot be read.
        """
        if self.folder is None:
            # a tag is not cut, since two tags can begin with the same letters
            commit = self._commit[:12] if re.fullmatch("[0-9a-f]{40}", self._commit) else self._commit
            return f"{self.name}@{commit}"
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            kind = (config.get("architectures") or [config.get("model_type")])[0]
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{self.description}: its config.json cannot be read ({error})") from error
        return f"{kind}@{self.identity[:12]}"

    @cached_property
    def _commit(self) -> str:
        """The commit that the revision points to now."""
        from httpx2 import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return str(HfApi().model_info(str(self.name), revision=self.revision).sha)
        except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:  # ValueError: not a valid name on the hub
            if self.revision is not None:  # offline with a given revision: the cache is sufficient
                return self.revision
            prefix = "" if self.setting == "base" else f"{self.setting}."
            raise ModelError(
                f"{self.description}: there is no such folder, and the hub does not answer for it "
                f"({type(error).__name__}); give a folder, or {prefix}revision=… to use a downloaded copy"
            ) from error

    @property
    def _place(self) -> tuple[str, str | None]:
        """Folder or name, and revision, as arguments for transformers."""
        return (str(self.name), self._commit) if self.folder is None else (str(self.folder), None)

    def load(self, kind: Any) -> Any:
        """Load a tokenizer with one of transformers' Auto classes.

        Raises:
            ModelError: it cannot.
        """
        from dnpo.policy.complete import explain

        where, revision = self._place
        if self.folder is not None:
            check_folder(self.folder, self.description)
        try:
            return kind.from_pretrained(where, revision=revision)
        except Exception as error:  # a tokenizer's code can raise any error if it does not expect a value
            raise ModelError(f"{self.description}: cannot be loaded: {explain(error)}") from error

    def load_model(self, kind: Any, **options: Any) -> Any:
        """Load the model by ``complete.load_complete``, with one of transformers' Auto classes.

        Raises:
            ModelError: it cannot.
        """
        from dnpo.policy.complete import load_complete

        where, revision = self._place
        return load_complete(kind, where, self.description, revision=revision, **options)

    def outline(self, kind: Any, **options: Any) -> Any:
        """Check all files, including the tokenizer's, and load the model without its weights (``outline_complete``).

        Returns:
            The model on the ``meta`` device; None if the files are not downloaded yet or the weights are quantised.

        Raises:
            ModelError: the files do not belong to such a model, or their quantisation cannot run here.
        """
        from transformers import AutoTokenizer

        from dnpo.policy.complete import check_fit, check_quantisation, outline_complete

        where, revision = self._place
        files = find_files(where, revision)
        if files is None:
            return None
        tokenizer = self.load(AutoTokenizer)
        check_folder(files, self.description)
        if read_quantisation(files) is not None:
            check_quantisation(files, self.description)
            return None
        model = outline_complete(kind, where, self.description, files=files, revision=revision, **options)
        check_fit(model, tokenizer, self.description)
        return model

    def object_to(self, kind: Any, **options: Any) -> str | None:
        """Why the model's files cannot be used; None if they can."""
        try:
            self.outline(kind, **options)
        except ModelError as error:
            return str(error)
        return None


def context_of(model: Any, tokenizer: Any) -> int | None:
    """The maximum number of tokens that a model can read; None if unknown."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    # a tokenizer without a limit reports an astronomical number
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 30), default=None)
