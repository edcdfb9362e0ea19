"""Text to token ids and back, by the tokenizer in the model's own folder.

tokenizer.json where there is one, by the library that defines it; its older parts by way of transformers; a folder with
only a `tokenizer.model` by sentencepiece itself. Token ids travel between all parts; text is only for people,
for psi and for answers.

Left out: how a conversation is written (`chat_template.py`, `prompt_format.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_powerflow.data.chat_template import Conversation, render, template_refusals
from megatron_powerflow.data.prompt_format import plain_text
from megatron_powerflow.errors import UserError

FAST_NAME = "tokenizer.json"
NO_TEMPLATE = "the model has no chat template: conversations are written as Question: ... Answer:"
PROBE = "a"  # a text, to see which special tokens come around one
T = TypeVar("T")


class Tokenizer(Protocol):
    """notices: what a user should know of the folder, a sentence each."""

    eos_token_id: int | None
    notices: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Ids as the model expects a raw prompt: with BOS where its tokenizer adds one."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone, no special tokens: a response."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant is to answer: by the model's template, or in the plain form
        of `prompt_format.py` where it has none. Raises UserError where the template refuses it."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. Ids beyond the tokenizer's vocabulary (padding rows) decode to nothing."""
        ...


def load_tokenizer(folder: str | Path, how: Conversation | None = None) -> Tokenizer:
    """Raises UserError when the folder holds no tokenizer, one that cannot be read, or two that differ.

    how: conversations are written; None: by the folder's template, on this day.
    """
    folder, how = Path(folder), how or Conversation()
    if (folder / FAST_NAME).is_file() or (folder / "vocab.json").is_file():
        return _HfTokenizer(folder, how)
    if (folder / "tokenizer.model").is_file():
        return _SentencePieceTokenizer(folder / "tokenizer.model")
    raise UserError(
        f"{folder}: no tokenizer (tokenizer.json, vocab.json or tokenizer.model); copy it beside the weights"
    )


class _HfTokenizer:
    """tokenizer.json says which ids a text has; transformers, what is special and how a conversation is written.

    transformers 5 builds its own normalizer or pre-tokenizer for some model types, whatever tokenizer.json says. The
    model was trained on the file's ids, so these count; what differs is said in `notices`.
    """

    def __init__(self, folder: Path, how: Conversation) -> None:
        if how.template is None and (refusals := template_refusals(folder)):
            raise UserError(refusals)
        self._folder, self._how = folder, how
        self._transformers = _guarded(folder, lambda: _from_transformers(folder))
        self._tokenizer = self._transformers.backend_tokenizer
        self.notices: tuple[str, ...] = ()
        if (folder / FAST_NAME).is_file():
            self._tokenizer = _guarded(folder, lambda: _from_file(folder / FAST_NAME))
            self.notices = _compare(folder, self._tokenizer, self._transformers)
        self.eos_token_id = self._transformers.eos_token_id
        self._has_template = bool(how.template or self._transformers.chat_template)
        if not self._has_template:
            self.notices += (NO_TEMPLATE,)

    def encode(self, text: str) -> list[int]:
        return self._ids(text, with_special=True)

    def encode_plain(self, text: str) -> list[int]:
        return self._ids(text, with_special=False)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self._has_template:
            return self.encode(plain_text(messages))
        text = render(self._transformers, list(messages), self._how)
        return self.encode_plain(text)  # the template writes every special token itself

    def decode(self, token_ids: Sequence[int]) -> str:
        size = self._tokenizer.get_vocab_size()
        known = [token for token in token_ids if token < size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def _ids(self, text: str, *, with_special: bool) -> list[int]:
        return _guarded(self._folder, lambda: self._tokenizer.encode(text, add_special_tokens=with_special).ids)


def _guarded(folder: Path, call: Callable[[], T]) -> T:
    """What foreign code makes of foreign files. Raises UserError for whatever it raises: the tokenizers library has
    exceptions of no class of its own, and panics that are no Exception at all."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from None


def _from_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # limits that a file may hold are not the run's
    tokenizer.no_padding()
    return tokenizer


def _compare(folder: Path, ours: Any, theirs: Any) -> tuple[str, ...]:
    """What transformers builds otherwise than tokenizer.json says. Raises UserError where its tokens have other ids or
    it puts other special tokens around a text: of these neither source can be taken in silence."""
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        return ()
    written, built = json.loads(ours.to_str()), json.loads(backend.to_str())
    own, other = ours.get_vocab(with_added_tokens=True), theirs.get_vocab()
    # of a token that tokenizer.json lacks only these count: they stop a response, or stand before a text
    boundaries = {theirs.bos_token, theirs.eos_token}
    moved = sorted(
        token for token, place in other.items() if own.get(token) != place and (token in own or token in boundaries)
    )
    if moved:
        raise UserError(
            f"{folder}: {len(moved)} tokens have other ids by tokenizer_config.json than in tokenizer.json "
            f"({moved[0]!r:.40}: {other[moved[0]]} and {own.get(moved[0])}); save the tokenizer again"
        )
    more = sorted(other.keys() - own.keys())
    notices = (_more_tokens(more),) if more else ()
    around, expected = (_around(encode) for encode in (_plain(ours), _through(theirs)))
    if around != expected:
        raise UserError(
            f"{folder}: tokenizer.json puts the ids {around} around a text, transformers by tokenizer_config.json "
            f"{expected}; make them agree (add_bos_token, add_eos_token, or the post_processor of tokenizer.json)"
        )
    parts = [part for part in ("normalizer", "pre_tokenizer", "decoder") if written.get(part) != built.get(part)]
    if not parts:
        return notices
    import transformers

    return (
        *notices,
        f"tokenizer.json is followed. transformers {transformers.__version__} builds another {' and '.join(parts)} for "
        f"this folder: what loads the tokenizer through it, a server for one, may give a text other ids",
    )


def _more_tokens(more: Sequence[str]) -> str:
    return (
        f"tokenizer.json is followed. transformers adds {len(more)} tokens that it does not hold, such as "
        f"{more[0]!r:.40}: what loads the tokenizer through it gives a text with these words other ids"
    )


def _plain(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    return lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids


def _through(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    return lambda text, special: tokenizer(text, add_special_tokens=special)["input_ids"]


def _around(encode: Callable[[str, bool], list[int]]) -> tuple[list[int], list[int]]:
    """The special ids before and after a text."""
    bare, whole = encode(PROBE, False), encode(PROBE, True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []


class _SentencePieceTokenizer:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a sentencepiece model: {error}") from None
        self._path = path
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self._bos = [bos] if bos >= 0 else []
        self.eos_token_id = eos if eos >= 0 else None
        self.notices: tuple[str, ...] = (NO_TEMPLATE,)

    def encode(self, text: str) -> list[int]:
        return self._bos + self._processor.encode(text)

    def encode_plain(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode(plain_text(messages))

    def decode(self, token_ids: Sequence[int]) -> str:
        size = self._processor.get_piece_size()
        return self._processor.decode([token for token in token_ids if token < size])
