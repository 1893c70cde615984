"""GGUF by llama.cpp's converter: a script on the PATH replaces it, since llama.cpp is not a dependency."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dnpo.commands.export import main

from .test_export import left

__all__ = ["left"]  # a fixture

CONVERTER = """#!/bin/sh
printf '%s\\n' "$@" > "{told}"
ls "$1" > "{seen}"
{end}
"""
WRITES = 'echo GGUF > "$3"'


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, end: str = WRITES) -> None:
    """Put a converter on the PATH that records its arguments and the files it was given."""
    script = folder / "bin" / "convert_hf_to_gguf.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(CONVERTER.format(told=folder / "told", seen=folder / "seen", end=end))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")


def test_the_converter_is_called_on_a_whole_copy(
    left: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch)
    to = tmp_path / "made"
    main([str(left(rank=2).run), "format=gguf", f"to={to}"])
    assert f"is in {to}" in capsys.readouterr().out
    copy, *others = (tmp_path / "told").read_text().splitlines()
    assert others == ["--outfile", str(to / "model.gguf"), "--outtype", "auto"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set((tmp_path / "seen").read_text().split())
    assert not Path(copy).exists()  # it was temporary
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "model.gguf"]
    card = ModelCard.load(to / "README.md")
    assert card.data.to_dict()["library_name"] == "gguf"
    assert "llama-cli -m model.gguf" in card.text
    assert "AutoModelForCausalLM" not in card.text
    assert "## Numbers" in card.text


def test_errors_name_what_went_wrong(
    left: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, to = str(left().run), tmp_path / "made"

    def told() -> str:
        with pytest.raises(SystemExit) as stopped:
            main([run, "format=gguf", f"to={to}"])
        assert stopped.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert told().startswith("error: format=gguf: needs llama.cpp's convert_hf_to_gguf.py, which is not on the PATH")
    assert not to.exists()
    install(tmp_path, monkeypatch, "echo 'Model Other is not supported' >&2; exit 1")
    assert "format=gguf: convert_hf_to_gguf.py failed (Model Other is not supported)" in told()
    install(tmp_path, monkeypatch, "exit 0")
    assert "convert_hf_to_gguf.py failed (status 0)" in told()  # it wrote nothing
    install(tmp_path, monkeypatch)
    (to / "precious").mkdir(parents=True)
    (tmp_path / "told").unlink()
    assert f"to={to}: exists already" in told()
    assert not (tmp_path / "told").exists()


def test_an_unknown_format_is_refused(left: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(left().run), "format=ggml", "to=x"])
    assert "ggml" in capsys.readouterr().err
