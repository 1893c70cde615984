"""Figures and tables as LaTeX floats with caption and label, for papers that load array, booktabs and graphicx."""

from collections.abc import Sequence

from dnpo.escape import for_latex

# shrinks only what is wider than the text
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def figure(name: str, title: str, explained: str, *, wide: bool) -> str:
    """A figure that includes ``NAME.pdf``.

    Args:
        title: also the entry in the list of figures.
        explained: what follows the title in the caption.
        wide: whether it is wider than a column, in a paper that has two.
    """
    return _float(
        "figure" + "*" * wide, f"fig:{name}", title, explained, f"\\includegraphics{{{name}.pdf}}", after=True
    )


def table(name: str, title: str, explained: str, tabular: str, notes: Sequence[str], words: str = "") -> str:
    """A table, with its notes below; it may be as wide as the page.

    Args:
        title: also the entry in the list of tables.
        explained: what follows the title in the caption.
        words: a further tabular, with text, which becomes a table of its own.
    """
    below = "\n\n".join(for_latex(note) for note in notes)
    explaining = ["", r"\smallskip", r"\begin{minipage}{\linewidth}", r"\footnotesize", below, r"\end{minipage}"]
    # tall enough for two ends of an interval
    body = "\n".join(
        [r"\smallskip\small\renewcommand{\arraystretch}{1.25}", FIT, f"{tabular}}}", *explaining * bool(below)]
    )
    found = _float("table*", f"tab:{name}", title, explained, body, after=False)
    if words:
        body = f"\\smallskip\\scriptsize\n{words}"
        found += "\n" + _float("table*", f"tab:{name}_words", f"{title}, in words", "", body, after=False)
    return found


def _float(kind: str, label: str, title: str, explained: str, body: str, *, after: bool) -> str:
    """A float with its caption above or, if ``after``, below."""
    caption = f"\\caption[{for_latex(title)}]{{{for_latex(f'{title}. {explained}'.rstrip())}}}\n\\label{{{label}}}"
    inside = (body, caption) if after else (caption, body)
    return "\n".join([f"\\begin{{{kind}}}", r"\centering", *inside, f"\\end{{{kind}}}", ""])
