"""Convert a copy of a policy with llama.cpp's converter to GGUF, the format of llama.cpp and programs built on it."""

import re
import shutil
import subprocess
from pathlib import Path

from dnpo.errors import SettingsError
from dnpo.running.export import CARD

CONVERTER = "convert_hf_to_gguf.py"
WEIGHTS = "model.gguf"


def find_converter() -> str:
    """The path of llama.cpp's converter.

    Raises:
        SettingsError: it is not on the PATH.
    """
    found = shutil.which(CONVERTER)
    if found is None:
        raise SettingsError(
            f"format=gguf: needs llama.cpp's {CONVERTER}, which is not on the PATH (or cannot be executed); clone "
            "llama.cpp, install its requirements, and add its folder to the PATH"
        )
    return found


def convert(converter: str, copy: Path, to: Path) -> None:
    """Write ``model.gguf`` and a card into a new folder.

    Args:
        converter: the path of llama.cpp's converter.
        copy: a policy that :func:`dnpo.running.export.export` wrote.
        to: the folder.

    Raises:
        SettingsError: the converter fails, for instance because it does not support the architecture.
    """
    to.mkdir(parents=True, exist_ok=True)
    command = [converter, str(copy), "--outfile", str(to / WEIGHTS), "--outtype", "auto"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise SettingsError(f"format=gguf: {converter} cannot be executed ({error.strerror})") from error
    if done.returncode or not (to / WEIGHTS).is_file():
        (to / WEIGHTS).unlink(missing_ok=True)
        told = (done.stderr or done.stdout).strip().splitlines()
        raise SettingsError(f"format=gguf: {CONVERTER} failed ({told[-1] if told else f'status {done.returncode}'})")
    card = (copy / CARD).read_text(encoding="utf-8")
    loading = (
        f"## How to load it\n\nThe weights and the tokenizer are in `{WEIGHTS}`.\n\n    llama-cli -m {WEIGHTS}\n\n"
    )
    text = re.sub(r"## How to load it\n.*?(?=^## Numbers)", lambda _: loading, card, flags=re.DOTALL | re.MULTILINE)
    (to / CARD).write_text(text.replace("library_name: transformers", "library_name: gguf"), encoding="utf-8")
