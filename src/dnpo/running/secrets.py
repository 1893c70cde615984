"""Refuse settings that contain a secret before anything is written: Hydra copies all settings into files of the run."""

import re
import sys
from collections.abc import Iterator
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dnpo.escape import say

ADVICE = (
    "settings are written into files of the run, so give it in the environment, "
    "such as '${oc.env:NAME}', or in the variable that judge.key_from or judge.headers names"
)
PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@'\"]*:[^/\s@'\"]+@", re.IGNORECASE)
QUERY = re.compile(r"[?&][^=&\s]*(?:key|token|secret|passw|signature)[^=&\s]*=[^&\s]", re.IGNORECASE)
KEY = re.compile(
    r"\bsk-(?=[\w-]*\d)[\w-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bAIza[\w-]{20,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bxox[abprs]-[\w-]{10,}|\bAKIA[A-Z0-9]{12,}|\bgsk_[A-Za-z0-9]{16,}|\bBearer\s+\S{8,}"
)
SECRET_NAME = re.compile(
    r"(?:x-)?(?:(?:api|access|auth|secret)[-_]?)?(?:key|token)|secret|passw(?:or)?d|authorization", re.IGNORECASE
)
VARIABLE = re.compile(r"[A-Za-z_]\w*")
INTERPOLATION = re.compile(r"\$\{[^{}]*\}")


class RefuseSecrets(Callback):
    """If a setting contains a secret, ends the command with status 1 before Hydra makes a folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the settings of a run."""
        refuse(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the settings of a sweep, including all values that it will try."""
        refuse(config)


def refuse(config: DictConfig) -> None:
    """Print the problems and exit. (Hydra turns exceptions of a callback into warnings, but not an exit.)"""
    found = dict.fromkeys(find_secrets(config))
    for message in found:
        say(f"error: {message}", error=True)
    if found:
        sys.exit(1)


def find_secrets(config: DictConfig) -> Iterator[str]:
    """Yield a message for each setting that contains a secret. The message does not contain the secret.

    Args:
        config: the tree including Hydra's own node, which has the overrides of a sweep as they were given.
    """
    given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    for override in given:
        name, _, value = str(override).lstrip("+~").partition("=")
        yield from _look(name, value.strip("'\""))
    tree: Any = OmegaConf.to_container(config, resolve=False)
    for name, value in _leaves({key: node for key, node in tree.items() if key != "hydra"}, ""):
        yield from _look(name, value)


def _leaves(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, name)
    elif isinstance(node, str):
        yield name, node


def _look(name: str, text: str) -> Iterator[str]:
    plain = INTERPOLATION.sub("", text)
    if name.rpartition(".")[2] == "key_from":
        if not all(VARIABLE.fullmatch(part.strip("'\" ")) for part in plain.split(",") if part):
            yield f"{name}: expected the name of an environment variable, not the key itself; {ADVICE}"
    elif PASSWORD.search(plain):
        yield f"{name}: has a password in its address; {ADVICE}"
    elif QUERY.search(plain):
        yield f"{name}: has a key or token in its address; {ADVICE}"
    elif KEY.search(plain):
        yield f"{name}: looks like a key; {ADVICE}"
    elif SECRET_NAME.fullmatch(name.rpartition(".")[2]) and plain and not re.search(r"\.headers\.[^.]*$", name):
        yield f"{name}: is named like a secret; {ADVICE}"
