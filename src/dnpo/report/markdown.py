"""Render the Markdown of notes as HTML without links, images or raw HTML."""

import re
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

from dnpo.escape import SPACE, for_terminal

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

PICTURE = re.compile(r"^!\[.*\]\(.*\)$")  # the page has the pictures itself
OWN_TITLE = re.compile(r"\A### .*\n")


def render(text: str) -> Markup:
    """Render a note, without its pictures and its title, which the page shows elsewhere."""
    text = OWN_TITLE.sub("", text.strip()).replace(f" {SPACE} |", " |")  # it would be a word of each cell
    lines = (for_terminal(line) for line in text.splitlines() if not PICTURE.match(line.strip()))
    parser = _parser()
    tokens = parser.parse("\n".join(lines))
    for token in tokens:
        style = str(token.attrGet("style") or "")
        token.attrs = {"class": "n"} if "right" in style else {}
    html: str = parser.renderer.render(tokens, parser.options, {})
    return Markup(html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


@cache
def _parser() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    return parser.disable(
        ["link", "image", "autolink", "html_block", "html_inline", "reference", "heading", "lheading"]
    )
