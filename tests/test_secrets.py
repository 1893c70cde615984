"""Settings that hold a secret are refused before any file is written."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dnpo.running.secrets import find_secrets
from tests.commands import run_command

PLANTED = "planted9planted9planted9"
SECRETS = [
    ("judge.base_url", f"https://me:{PLANTED}@host/v1"),
    ("judge.same_as", f"https://me:{PLANTED}@host/v1"),
    ("tracking.uri", f"postgresql+psycopg2://me:{PLANTED}@host/db"),
    ("judge.base_url", f"https://host/v1?api-key={PLANTED}"),
    ("judge.base_url", f"https://host/v1?v=2&access_token={PLANTED}"),
    ("judge.key_from", f"sk-proj-{PLANTED}"),
    ("judge.members.a.key_from", "two words"),
    ("judge.model", f"hf_{PLANTED}"),
    ("judge.headers.Authorization", f"Bearer {PLANTED}"),
    ("judge.extra_body.api_key", PLANTED),
    ("judge.base_url", f"https://host/keys/sk-proj-{PLANTED}/v1"),
    ("data.path", f"s3://me:{PLANTED}@bucket/rows.jsonl"),
]
HARMLESS = [
    ("judge.base_url", "https://host:8000/v1"),
    ("judge.key_from", "MY_KEY"),
    ("judge.key_from", "ONE_KEY,OTHER_KEY"),
    ("tracking.uri", "postgresql://me:${oc.env:PASSWORD}@host/db"),
    ("tracking.uri", "sqlite:///mlflow.db"),
    ("data.path", "/data/sk-learn-datasets-of-mine/me@home/x.jsonl"),
    ("model.name", "someone/disk-sharded-model-with-a-long-name"),
    ("judge.template", "Grade the answer: time is 10:30, mail a@b.c, key=value?"),
    ("judge.headers.X-Key", "VARIABLE"),
    ("judge.headers.Authorization", "VARIABLE"),
    ("data.max_prompt_tokens", "48"),
]


def found(name: str, value: str, override: str = "") -> list[str]:
    config = OmegaConf.create({"hydra": {"overrides": {"task": [override] if override else []}}})
    if not override:
        OmegaConf.update(config, name, value)
    return list(find_secrets(config))


@pytest.mark.parametrize(("name", "value"), SECRETS)
def test_a_secret_is_found_and_not_repeated(name: str, value: str) -> None:
    """In the settings and among the values of a sweep."""
    for messages in (found(name, value), found(name, value, f"{name}=plain,{value}"), found(name, [value])):  # type: ignore[arg-type]
        assert len(messages) == 1
        assert messages[0].startswith(f"{name}: ")
        assert PLANTED not in messages[0]


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_values_without_a_secret_pass(name: str, value: str) -> None:
    assert found(name, value) == []
    assert found(name, value, f"++{name}={value}") == []


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("dnpo.train", ["judge=openai", "judge.model=m", f"judge.base_url=https://me:{PLANTED}@host/v1"]),
        ("dnpo.train", ["judge=openai", "judge.model=m", f"judge.key_from=sk-{PLANTED}", "plan=true"]),
        ("dnpo.train", ["-m", f"tracking.uri=sqlite:///a.db,postgresql://me:{PLANTED}@host/db"]),
        ("dnpo.commands.evaluate", [f"tracking.uri=postgresql://me:{PLANTED}@host/db", "model.path=x"]),
        ("dnpo.commands.agreement", ["judge=openai", "judge.model=m", f"judge.key_from=sk-{PLANTED}", "data=x"]),
        ("dnpo.commands.leaderboard", [f"tracking.uri=postgresql://me:{PLANTED}@host/db"]),
    ],
)
def test_no_command_writes_a_secret(module: str, arguments: list[str], tmp_path: Path) -> None:
    done = run_command(tmp_path, module, *arguments)
    assert done.returncode == 1
    assert "written into files of the run" in done.stderr
    assert PLANTED not in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.*")), "nothing is written"
