"""Which template writes a conversation, and what may it do? The template of the model's folder, within a time limit.

A folder can hold its template in three files: chat_template.jinja, chat_template.json and tokenizer_config.json. Two
that differ are refused, since transformers 4 and 5 and vLLM do not all take the same one.

A template is somebody else's program. transformers renders it in Jinja's sandbox, which keeps it from code and files,
but not from looping for ever, nor from filling the memory; so it has RENDER_SECONDS and RENDER_BYTES, and
MAX_CHARACTERS to write. A template that asks for today's date gets the date that the
caller gives, so that a run has one date however often it is started.

Left out: which conversations are prompts (`conversation.py`).
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError

RENDER_SECONDS = 10.0
AGAIN_SECONDS = 1.0  # until the alarm rings once more, should somebody's code have swallowed it
RENDER_BYTES = 2**30  # of address space, beyond what the process has when the template begins
MAX_CHARACTERS = 10**7
JINJA_NAME, JSON_NAME, CONFIG_NAME = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"


def template_refusals(folder: Path) -> list[str]:
    """Returns why the folder's templates cannot be used: two files hold different ones. Empty where all is well."""
    templates = {name: text for name in (JINJA_NAME, JSON_NAME, CONFIG_NAME) if (text := _template_in(folder / name))}
    if len({text.strip() for text in templates.values()}) < 2:
        return []
    first, second = list(templates)[:2]
    return [
        f"{folder}: {first} and {second} hold different chat templates; transformers and vLLM do not all take the same "
        "one: take away the one that the model was not trained with"
    ]


def _template_in(path: Path) -> str | None:
    """Returns the default template in a file; None where it holds none, or cannot be read (its reader will say so)."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None
    if text is None or path.name == JINJA_NAME:
        return text
    try:
        template = json.loads(text).get("chat_template")
    except (ValueError, RecursionError, AttributeError):
        return None
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


@dataclass(frozen=True)
class ConversationSettings:
    """Says how a run writes conversations.

    template: the text of one that replaces the folder's, or None. arguments: variables of the template. today: the date
    for a template that asks for it.
    """

    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)


def render(tokenizer: Any, messages: list[dict[str, str]], settings: ConversationSettings) -> str:
    """Returns the conversation as the template writes it, up to where the assistant is to answer.

    Raises UserError where the template refuses the messages, fails, or takes too long.
    """
    today = datetime(settings.today.year, settings.today.month, settings.today.day)
    try:
        with _at_most(RENDER_SECONDS), _no_more_memory(RENDER_BYTES):
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                chat_template=settings.template,
                strftime_now=today.strftime,
                **settings.arguments,
            )
    except _TooLongError:
        raise UserError(
            f"the chat template has not written this conversation in {RENDER_SECONDS:.0f} s; it may never: give the "
            "model's folder its right template"
        ) from None
    except MemoryError:
        raise UserError(
            f"the chat template asks for over {RENDER_BYTES / 2**30:.0f} GiB of memory to write this conversation: "
            "give the model's folder its right template"
        ) from None
    except Exception as error:  # somebody else's program: whatever it raises
        raise UserError(f"the chat template refuses these messages: {_one_line(error)}") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"the chat template writes {len(text):,} characters for this conversation, over {MAX_CHARACTERS:,}: give "
            "the model's folder its right template"
        )
    return text


class _TooLongError(BaseException):
    """No Exception: Jinja's optimizer swallows those, and the template would go on."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises _TooLongError in the block after so many seconds.

    It does so in the main thread only, where alone Python delivers signals; other threads have no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, ring)
    pending, interval = signal.setitimer(
        signal.ITIMER_REAL, seconds, AGAIN_SECONDS
    )  # somebody else's alarm goes on afterwards
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, pending, interval)


@contextlib.contextmanager
def _no_more_memory(num_bytes: int) -> Iterator[None]:
    """Raises MemoryError in the block once the process asks for so many bytes more than it has.

    It counts address space, of all threads together. Where the system does not say how much there is, or the process
    has a lower limit already, nothing is changed.
    """
    try:
        taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([taken + num_bytes, *limits]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
