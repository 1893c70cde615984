"""Prices of judges by API, from a table that users can edit."""

import re
from dataclasses import dataclass
from pathlib import Path

from dnpo.errors import SettingsError
from dnpo.judges.asked.ledger import Question

SHIPPED = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True)
class Price:
    """US dollars per input and per output token, and the batch API's price as a fraction of these."""

    input: float
    output: float
    batch: float

    def of(self, tokens_in: float, tokens_out: float, batch: bool) -> float:
        """The cost of tokens in US dollars."""
        return (tokens_in * self.input + tokens_out * self.output) * (self.batch if batch else 1.0)


def price_of(model: str, path: str | None) -> Price | None:
    """The price of a model or, for a dated version, of the undated model; None if the table has neither.

    Raises:
        SettingsError: the table cannot be read.
    """
    import yaml
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

    class Entry(BaseModel):
        model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
        input: float = Field(ge=0)
        output: float = Field(ge=0)
        batch: float = Field(default=1.0, ge=0, le=1)

    file = Path(path) if path else SHIPPED
    try:
        table = TypeAdapter(dict[str, Entry]).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem: object = error
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise SettingsError(
            f"judge.prices={file}: {problem}; expected lines such as `model: {{input: 0.4, output: 1.6, batch: 0.5}}`, "
            "in US dollars for a million tokens"
        ) from error
    entry = table.get(model) or table.get(re.sub(r"-20\d\d-?\d\d-?\d\d$", "", model))
    return None if entry is None else Price(entry.input / 1e6, entry.output / 1e6, entry.batch)


def tokens_about(question: Question) -> int:
    """A generous estimate of the tokens of a question: one for every three bytes, and a few for every turn."""
    return sum(len(turn["content"].encode()) // 3 + 8 for turn in question.messages)
