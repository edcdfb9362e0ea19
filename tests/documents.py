"""What do the pages of the documentation say that can be held against the code? Their blocks, spans, headings, links.

Left out: what is held against what (`unit/test_docs.py`), running them (`distributed/test_documented_commands.py`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

FENCE = re.compile(r"^( *)```(\w*)[^`]*$")
# what a machine may not have
NEEDS = re.compile(r"Needs [^.]*(GPU|SLURM|Kubernetes|Docker|network|vLLM|judge|folder of)")


@dataclass(frozen=True)
class Block:
    """A fenced block. needs: the line above it that says what it needs; empty: any machine can run it."""

    page: Path
    line: int
    language: str
    text: str
    needs: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, its words without comments and continuations."""

    block: Block
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def pages() -> list[Path]:
    """In the order of the navigation, which is the order in which a reader runs their commands."""
    order = re.findall(r"[\w]+\.md", (REPOSITORY / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))
    inner = [REPOSITORY / "docs" / "pages" / name for name in order]
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *inner]


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start, indent, language = None, "", ""
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if fence and start is None:
            start, indent, language = number, fence[1], fence[2]
        elif fence:
            body = "\n".join(inner.removeprefix(indent) for inner in lines[start : number - 1])
            above = next((other.strip() for other in reversed(lines[: start - 1]) if other.strip()), "")
            yield Block(page, start, language, body, above if NEEDS.search(above) else "")
            start = None
    assert start is None, f"{page}: a block that does not end"


def commands(page: Path) -> Iterator[Command]:
    """Of every shell block."""
    for block in blocks(page):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield Command(block, tuple(words))


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def spans(page: Path) -> list[str]:
    """What stands in code within the text."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and Python-Markdown make them where they agree: letters, digits, - and _."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))
