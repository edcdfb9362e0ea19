"""Which poems, stories and jokes become prompts for creative writing, and what is asked with each?

The paper names its sources (poems of PoemHunter to be continued, stories of BookMIA, jokes of r/DadJokes; 300 prompts)
and not the wording of its prompts. The wording here is ours:

    poem    Continue this poem: and its first POEM_LINES lines
    story   Write a story that begins so: and its first sentences, up to STORY_WORDS words and half of the text
    joke    Finish this joke: and its first sentence, which comes before the punchline

A row is left out for the first of these reasons that holds:

    no_text      no text in it
    too_short    nothing is left to write after the beginning: a poem of POEM_LINES lines, a joke of one sentence
    leaked       an evaluation set holds the beginning
    duplicate    an earlier row had the same beginning

The rows that remain are cut to so many of each kind. Their content decides which ones stay, so that the order of the
files does not matter.

Left out: reading and writing files (`prepare.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_powerflow.data.overlap import Overlap
from megatron_powerflow.data.preparation import content_key, judge_question
from megatron_powerflow.data.text_fields import text_of
from megatron_powerflow.errors import UserError

POEM_LINES = 4
STORY_WORDS = 60
INSTRUCTIONS = {
    "poem": "Continue this poem:\n\n{}",
    "story": "Write a story that begins so: {}",
    "joke": "Finish this joke: {}",
}
# the columns of published files that hold the text; of a joke, first those that end before the punchline
COLUMNS = {
    "poem": ("poem", "content", "text"),
    "story": ("story", "snippet", "text"),
    "joke": ("setup", "title", "joke", "text"),
}
PUNCHLINES = ("punchline", "selftext", "body")  # columns that hold the punchline of a joke
_SENTENCE = re.compile(r".*?[.!?…][\"'”’)]*(?=\s|$)", re.DOTALL)


@dataclass
class CreativePreparation:
    """Judges rows of one kind.

    against: beginnings that no prompt may have. seen: keys of the beginnings so far, shared by the kinds of a set.
    """

    task: str
    against: Overlap
    seen: set[bytes] = field(default_factory=set)

    def judge(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Returns ("kept", "") or (the reason why the row is left out, a detail)."""
        try:
            text, start = self._text(row), self._start(row)
        except UserError as error:
            return "unreadable", str(error)
        if text is None:
            return "no_text", f"none of {', '.join(COLUMNS[self.task])} holds a text"
        if not start:
            return "too_short", text[:80]
        return judge_question(self._question(row), self.against, self.seen)

    def prepared_row(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Returns the prompt that a kept row becomes: id, task, question."""
        question = self._question(row)
        return {"id": content_key(question).hex(), "task": self.task, "question": question}

    def _question(self, row: Mapping[str, Any]) -> str:
        return INSTRUCTIONS[self.task].format(self._start(row))

    def _text(self, row: Mapping[str, Any]) -> str | None:
        texts = (text_of(row.get(name), name) for name in COLUMNS[self.task])
        return next((text.strip() for text in texts if text is not None and text.strip()), None)

    def _start(self, row: Mapping[str, Any]) -> str:
        """Returns the beginning that the prompt shows, or "" where nothing is left to write after it."""
        text = self._text(row) or ""
        if self.task == "poem":
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return "\n".join(lines[:POEM_LINES]) if len(lines) > POEM_LINES else ""
        if self.task == "story":
            start = _sentences(text, min(STORY_WORDS, len(text.split()) // 2))
            return start if len(start) < len(text) else ""
        if any(text_of(row.get(name), name) for name in PUNCHLINES):
            return text
        start = _sentences(text, 1)
        return start if len(start) < len(text) else ""


def _sentences(text: str, num_words: int) -> str:
    """Returns whole sentences from the start: the first in any case, then those that keep within num_words."""
    taken, words = 0, 0
    for match in _SENTENCE.finditer(text):
        words += len(match.group().split())
        if taken and words > num_words:
            break
        taken = match.end()
    return " ".join(text[:taken].split())
