"""A data set of the Hugging Face hub."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dnpo.data.source import RawTable, Rows
from dnpo.data.unread import columns_with_text, may_hold_text
from dnpo.errors import DataError
from dnpo.store import content_hash


@dataclass(frozen=True, kw_only=True)
class Hub(Rows):
    """A data set of the Hugging Face hub, or a local folder in the hub's layout. Its code is never run.

    Args:
        name: name on the hub, such as ``HuggingFaceH4/ultrachat_200k``; or a folder with data files.
        config: its configuration; null takes the default.
        split: the split of the data set that becomes train, validation and test here.
        revision: a commit, branch or tag; null takes the newest.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def setting(self) -> str:
        """The setting as messages name it."""
        return f"data.name={self.name}"

    @cached_property
    def folder(self) -> Path | None:
        """The folder, if the name is one."""
        return Path(self.name).absolute() if os.path.isdir(self.name) else None

    def _contents(self) -> Mapping[str, Any]:
        part = {"config": self.config, "split": self.split}
        if self.folder is not None:
            return {"content": content_hash(self.folder), **part}
        return {"name": self.name, "revision": self._commit or "unpinned", **part}

    @cached_property
    def _commit(self) -> str | None:
        """The commit that is read. Offline: the given revision, or None for any commit in the cache."""
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.name, revision=self.revision, timeout=10).sha
        except Exception:  # loading the rows raises the same error again, and reports it
            return self.revision

    def _table(self) -> RawTable:
        rows = self._load()

        def some(drawn: Sequence[int]) -> Iterable[tuple[str, Any]]:
            wanted = rows.select_columns(self._choose_columns(rows.column_names)).select(drawn)
            return zip((f"{self.name}[{self.split}] row {i}" for i in drawn), wanted, strict=True)

        def texts(names: Collection[str]) -> list[str]:
            strings = may_hold_text(rows.features.arrow_schema, names)
            return columns_with_text(rows.select_columns(strings).with_format("arrow")[:]) if strings else []

        return RawTable(rows.column_names, len(rows), some, texts)

    def _load(self) -> Any:
        from datasets import load_dataset

        where, revision = (str(self.folder), None) if self.folder is not None else (self.name, self._commit)
        try:
            rows = load_dataset(where, self.config, split=self.split, revision=revision)
        except Exception as error:
            raise DataError(self._explain(error)) from error
        # Without the hub the library takes any commit in its cache, even if another one is requested.
        cached = {Path(file["filename"]).parent.name for file in rows.cache_files}
        for commit in cached - {revision}:
            if revision is not None and len(commit) == 40:
                raise DataError(
                    f"data.revision={revision}: cannot be loaded from the hub, but the cache has another commit of "
                    f"{self.name}; connect, or give data.revision={commit}"
                )
        return rows

    def _explain(self, error: Exception) -> str:
        """The error message. For an unknown split or config it has the library's text, which lists the known ones."""
        text = f"({type(error).__name__}: {error})"
        marks = {
            f"data.config={self.config}": ("BuilderConfig", "Config name is missing"),
            f"data.split={self.split}": ("Unknown split", "Split name", "Unrecognized instruction"),
        }
        for setting, phrases in marks.items():
            if any(phrase in text for phrase in phrases):
                return f"{setting}: cannot be read from {self.name} {text}"
        if self.folder is not None:
            return f"{self.setting}: this folder cannot be read {text}"
        return (
            f"{self.setting}: cannot be loaded from the hub {text}; without the hub, give a local folder in its layout "
            "(data.name=…), files (data=jsonl data.path=…, or parquet, csv, arrow), or a cache that has it (HF_HOME)"
        )
