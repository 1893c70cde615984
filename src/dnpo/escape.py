"""Escape users' text (names, rows, answers, errors) where some characters are special: one function for each place.

HTML is escaped by the report's template, and by ``for_markdown`` where Markdown may contain HTML.
"""

import hashlib
import re
import shutil
import sys
import textwrap
import unicodedata
from typing import Any

# Visible replacements of characters that are invisible, end a text, control a terminal or change the writing direction.
HIDDEN = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: "␡",
    **{
        code: f"⟨U+{code:04X}⟩"
        for code in (
            *range(0x80, 0xA0),
            0x061C,
            *(0x200B, 0x200E, 0x200F, 0x2028, 0x2029),
            *range(0x202A, 0x202F),
            *range(0x2060, 0x2070),
            *(0xFEFF, 0xFFFE, 0xFFFF),
        )
    },
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # lone surrogates, which UTF-8 cannot encode
}
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "−": r"$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    **{
        sign: f"$\\{unicodedata.name(sign).split()[-1].lower().replace('lamda', 'lambda')}$"
        for sign in "αβγδεζηθικλμνξπρστυφχψω"
    },
    "′": "$'$",
    "→": r"$\to$",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "∞": r"$\infty$",
    "†": r"$\dagger$",
    "⟨": r"$\langle$",
    "⟩": r"$\rangle$",
    "…": r"\dots{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
ERROR = "error: "  # the beginning of a message; its further lines are indented as far
UNBREAKABLE = "\u00a0"  # a space at which no line ends
SPACE = "&emsp;"  # ends the cells of tables in notes, since MLflow's page has no space between columns
WHOLE = re.compile(r"\d (?:%|s in all\b)")  # the end of a stage's line: 8.3 s in all
LONGEST_KEY = 250  # maximum number of characters of a name in MLflow


def for_terminal(text: Any) -> str:
    """Make control characters visible, except line breaks and tabs."""
    return str(text).replace("\r\n", "\n").translate(HIDDEN)


def say(text: Any = "", *, error: bool = False) -> None:
    """Print a text, with its control characters visible, on the standard output, or an error on the standard error."""
    if error:
        tell(text, error=True)
    else:
        print(for_terminal(text), flush=True)


def announce(what: str) -> None:
    """Print on the standard error what a command begins, at once, since imports and loading take seconds."""
    from dnpo import __version__

    tell(f"dnpo {__version__}: {what}", error=True)


def tell(text: Any, *, error: bool = False, hang: int = 0) -> None:
    """Print sentences; on a terminal, lines end between words, and further lines begin after ``hang`` spaces."""
    stream = sys.stderr if error else sys.stdout
    if stream.isatty():
        text = fold(str(text), shutil.get_terminal_size().columns, hang)
    print(for_terminal(text), file=stream, flush=True)


def fold(text: str, width: int, hang: int = 0) -> str:
    """Break lines that are longer than a terminal's width between words; paths and commands stay whole.

    Args:
        hang: spaces before further lines; 0: as many as before the first one.
    """
    return "\n".join(_fold_line(line, width, hang) if len(line) >= width else line for line in text.split("\n"))


def _fold_line(line: str, width: int, hang: int) -> str:
    indent = " " * (hang or (len(ERROR) if line.startswith(ERROR) else len(line) - len(line.lstrip(" "))))
    line = WHOLE.sub(lambda found: found[0].replace(" ", UNBREAKABLE), line)
    folded = textwrap.fill(line, width - 1, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return folded.replace(UNBREAKABLE, " ")


def for_mlflow(name: str) -> str:
    """Return a name of a metric, setting or tag that MLflow accepts: ``C++`` as ``C:2B::2B:``; long names are cut.

    Different names stay different.
    """
    marked = re.sub(r":(?=[0-9A-F]*:)|[^\w./\- :]", lambda sign: f":{ord(sign[0]):X}:", name)
    parts = [part.replace(".", ":2E:") if part in (".", "..") else part or "::" for part in marked.split("/")]
    key = "/".join(parts)
    if len(key) <= LONGEST_KEY:
        return key
    return f"{key[: LONGEST_KEY - 17]}:{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def for_database(text: str) -> str:
    """Replace what databases cannot keep: lone surrogates and U+0000."""
    return text.encode("utf-8", "replace").decode().replace("\0", "␀")


def for_markdown(text: Any) -> str:
    """Escape a text so that Markdown and HTML show it literally, on one line, also in a table."""
    one_line = re.sub(r"\s+", " ", str(text).strip()).translate(HIDDEN)
    shown = one_line.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", shown)


def for_markdown_code(text: Any) -> str:
    """Return a text as code within a line of Markdown, also in a table."""
    one_line = re.sub(r"\s+", " ", str(text)).translate(HIDDEN).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", one_line)), default=0))
    room = " " if one_line.startswith("`") or one_line.endswith("`") else ""
    return f"{fence}{room}{one_line}{room}{fence}"


def for_latex(text: Any) -> str:
    """Escape a text for LaTeX, on one line."""
    return "".join(LATEX.get(sign, sign) for sign in re.sub(r"\s+", " ", str(text)).translate(HIDDEN))


def for_csv(value: Any) -> Any:
    """Keep a spreadsheet from reading a text as a formula; numbers are unchanged."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")) or _is_number(value):
        return value
    return f"'{value}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
