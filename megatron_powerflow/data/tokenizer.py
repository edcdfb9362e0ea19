"""How does text become token ids, and token ids text? By the tokenizer in the model's own folder.

A tokenizer.json is read by the library that defines it, its older parts by transformers, and a folder with only a
`tokenizer.model` by sentencepiece. Token ids travel between all parts of the package; text is only for people, for psi
and for answers.

Left out: how a conversation is written (`chat_template.py`, `prompt_format.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_powerflow.data.chat_template import ConversationSettings, render, template_refusals
from megatron_powerflow.data.prompt_format import plain_text
from megatron_powerflow.errors import UserError

FAST_NAME = "tokenizer.json"
NO_TEMPLATE = "the model has no chat template: conversations are written as Question: ... Answer:"
PROBE = "a"  # a text that shows which special tokens a tokenizer puts around one
A_TALK = [{"role": "user", "content": PROBE}]
T = TypeVar("T")


class Tokenizer(Protocol):
    """Turns text into a model's token ids and back.

    eos_token_id: None where it has none. notices: what a user should know of the folder, a sentence each.
    """

    eos_token_id: int | None
    notices: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a raw prompt, as the model expects it: with BOS where its tokenizer adds one."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Returns the ids of a response: the text alone, without special tokens."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the ids of a conversation, up to where the assistant is to answer.

        It is written by the model's template, or in the plain form of `prompt_format.py` where the model has none.
        Raises UserError where the template refuses it.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text without special tokens. Ids beyond the tokenizer's vocabulary (padding rows) give none."""
        ...


def load_tokenizer(folder: str | Path, settings: ConversationSettings | None = None) -> Tokenizer:
    """Loads the tokenizer of a model's folder.

    settings: how conversations are written; None: by the folder's template, with today's date. Raises UserError when
    the folder holds no tokenizer, one that cannot be read, or two that differ.
    """
    folder, settings = Path(folder), settings or ConversationSettings()
    if (folder / FAST_NAME).is_file() or (folder / "vocab.json").is_file():
        return _HfTokenizer(folder, settings)
    if (folder / "tokenizer.model").is_file():
        return _SentencePieceTokenizer(folder / "tokenizer.model")
    raise UserError(
        f"{folder}: no tokenizer (tokenizer.json, vocab.json or tokenizer.model); copy it beside the weights"
    )


class _HfTokenizer:
    """Reads a Hugging Face folder: tokenizer.json gives the ids, transformers the special tokens and the chat template.

    transformers 5 builds its own normalizer or pre-tokenizer for some model types, whatever tokenizer.json says. The
    model was trained on the file's ids, so these count; `notices` says what differs.
    """

    def __init__(self, folder: Path, settings: ConversationSettings) -> None:
        if settings.template is None and (refusals := template_refusals(folder)):
            raise UserError(refusals)
        self._folder, self._settings = folder, settings
        self._transformers = _guarded(folder, lambda: _from_transformers(folder))
        self._tokenizer = self._transformers.backend_tokenizer
        self.notices: tuple[str, ...] = ()
        if (folder / FAST_NAME).is_file():
            self._tokenizer = _guarded(folder, lambda: _from_file(folder / FAST_NAME))
            self.notices = _compare(folder, self._tokenizer, self._transformers)
        self.eos_token_id = self._transformers.eos_token_id
        self._has_template = bool(settings.template or self._transformers.chat_template)
        if self._has_template:
            # what transformers imports for the first conversation does not count as a template's memory
            _guarded(folder, lambda: self._transformers.apply_chat_template(A_TALK, chat_template="x", tokenize=False))
        else:
            self.notices += (NO_TEMPLATE,)

    def encode(self, text: str) -> list[int]:
        return self._ids(text, with_special=True)

    def encode_plain(self, text: str) -> list[int]:
        return self._ids(text, with_special=False)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self._has_template:
            return self.encode(plain_text(messages))
        text = render(self._transformers, list(messages), self._settings)
        return self.encode_plain(text)  # the template writes every special token itself

    def decode(self, token_ids: Sequence[int]) -> str:
        size = self._tokenizer.get_vocab_size()
        known = [token for token in token_ids if token < size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def _ids(self, text: str, *, with_special: bool) -> list[int]:
        return _guarded(self._folder, lambda: self._tokenizer.encode(text, add_special_tokens=with_special).ids)


def _guarded(folder: Path, call: Callable[[], T]) -> T:
    """Calls code of another library on a user's files. Raises UserError for whatever it raises.

    The tokenizers library has no exception class of its own, and panics that are no Exception at all.
    """
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
    """Returns notices of what transformers builds differently from tokenizer.json.

    Raises UserError where its tokens have other ids or it puts other special tokens around a text: neither of the two
    may then be taken without a word.
    """
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        return ()
    written, built = json.loads(ours.to_str()), json.loads(backend.to_str())
    our_ids, their_ids = ours.get_vocab(with_added_tokens=True), theirs.get_vocab()
    # of the tokens that tokenizer.json lacks only these matter: they stop a response, or stand before a text
    boundaries = {theirs.bos_token, theirs.eos_token}
    moved = sorted(
        token
        for token, their_id in their_ids.items()
        if our_ids.get(token) != their_id and (token in our_ids or token in boundaries)
    )
    if moved:
        raise UserError(
            f"{folder}: {len(moved)} tokens have other ids by tokenizer_config.json than in tokenizer.json "
            f"({moved[0]!r:.40}: {their_ids[moved[0]]} and {our_ids.get(moved[0])}); save the tokenizer again"
        )
    more = sorted(their_ids.keys() - our_ids.keys())
    notices = (_more_tokens(more),) if more else ()
    around, expected = (
        _special_ids_around(encode) for encode in (_encode_with_tokenizers(ours), _encode_with_transformers(theirs))
    )
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


def _encode_with_tokenizers(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    return lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids


def _encode_with_transformers(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    return lambda text, special: tokenizer(text, add_special_tokens=special)["input_ids"]


def _special_ids_around(encode: Callable[[str, bool], list[int]]) -> tuple[list[int], list[int]]:
    """Returns the special ids before and after a text."""
    bare, whole = encode(PROBE, False), encode(PROBE, True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []


class _SentencePieceTokenizer:
    """Reads a folder that has only a `tokenizer.model`."""

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
