"""What the tests of README and docs/ read out of Markdown: paragraphs, code blocks, commands, links."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Parsed(BaseException):
    """Raised in place of running a command whose arguments were accepted."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def blocks(text: str, language: str) -> list[str]:
    """Bodies of the code blocks in one language."""
    return [body for name, body in FENCE.findall(text) if name == language]


def commands(text: str) -> Iterator[list[str]]:
    """Every command of the shell blocks, split as a shell splits it; `&&` separates two, variables stay names."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield words
                    words = []


def prose(text: str) -> str:
    """The text without code blocks."""
    return FENCE.sub("", text)


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items of prose: no headings, tables, pictures or code."""
    found = []
    for part in re.split(r"\n\s*\n|\n(?=- )", prose(text)):
        part = part.strip()
        if part and not part.startswith(("#", "|", "![")):
            found.append(part.removeprefix("- "))
    return found


def words(paragraph: str) -> int:
    """Words as a reader sees them: a link counts by its text."""
    return len(re.sub(r"\]\([^)]*\)", "]", paragraph).split())


def links(page: Path) -> list[tuple[Path, str]]:
    """Relative links of a page: the file that each leads to, and its anchor or nothing."""
    found = []
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def reachable(start: Path, below: Path) -> set[Path]:
    """The Markdown pages in a folder that links lead to, from `start` on."""
    seen, waiting = {start}, [start]
    while waiting:
        for target, _ in links(waiting.pop()):
            if target.suffix == ".md" and target.is_relative_to(below) and target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen
