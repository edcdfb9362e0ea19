"""Text to token ids and back, by the tokenizer in the model's own folder.

transformers' fast tokenizers where there is a tokenizer.json (or its older parts); a folder with only a
`tokenizer.model` is read by sentencepiece itself. Token ids travel between all parts; text is only for people,
for psi and for answers.

Left out: chat templates of our own. A folder without one refuses `messages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_powerflow.errors import UserError


class Tokenizer(Protocol):
    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids as the model expects a raw prompt: with BOS where its tokenizer adds one."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone, no special tokens: a response."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant is to answer. Raises UserError without a template."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. Ids beyond the tokenizer's vocabulary (padding rows) decode to nothing."""
        ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Raises UserError when the folder holds no tokenizer, or one that cannot be read."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return _HfTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return _SentencePieceTokenizer(folder / "tokenizer.model")
    raise UserError(
        f"{folder}: no tokenizer (tokenizer.json, vocab.json or tokenizer.model); copy it beside the weights"
    )


class _HfTokenizer:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from None
        self._folder = folder
        self._size = len(self._tokenizer)
        self.eos_token_id = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def encode_plain(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        from jinja2.exceptions import TemplateError

        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self._folder}: the tokenizer has no chat template, which a conversation needs; use `prompt`"
            )
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}") from None
        return self.encode_plain(text)  # the template writes every special token itself

    def decode(self, token_ids: Sequence[int]) -> str:
        known = [token for token in token_ids if token < self._size]
        return self._tokenizer.decode(known, skip_special_tokens=True)


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

    def encode(self, text: str) -> list[int]:
        return self._bos + self._processor.encode(text)

    def encode_plain(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        raise UserError(
            f"{self._path}: a sentencepiece model has no chat template, which a conversation needs; use `prompt`"
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        size = self._processor.get_piece_size()
        return self._processor.decode([token for token in token_ids if token < size])
