"""How is a row's prompt written for the model? As given, as a conversation or as bare text, with the texts around it.

A conversation is written by the model's chat template. A base model has none, and gets the plain form

    Question: {what the user says}

    Answer:

with the system's words, if any, as a paragraph before it, and earlier turns above, each with its answer (ours: the
paper's base models are Qwen2.5's, which have a template).

Left out: what a row holds (`prompt_rows.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_powerflow.errors import UserError

PromptStyle = Literal["given", "chat", "text"]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Says in which form a run's prompts are written.

    style: "chat" makes a text the user's one message, "text" makes a lone message of the user a text, "given" changes
    neither. system: the first message of every conversation. suffix: appended to the user's last message, or the text.
    """

    style: PromptStyle = "given"
    system: str | None = None
    suffix: str | None = None

    def apply(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Returns a prompt of `prompt_rows.prompt_of` in this form. Raises UserError, without the row's location."""
        if "prompt_token_ids" in prompt:
            if self != PromptFormat():
                raise UserError(
                    "prompt_token_ids cannot be written otherwise (prompts.as, system, suffix); give a text"
                )
            return prompt
        if "prompt" in prompt and self.style != "chat":
            if self.system is not None:
                raise UserError("prompts.system needs a conversation, and this prompt is a text; set prompts.as=chat")
            return {"prompt": self._ended(prompt["prompt"])}
        messages = list(prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}])
        if self.style == "text":
            if len(messages) != 1:
                raise UserError(
                    f"prompts.as=text takes a lone message of the user's; this conversation has {len(messages)}"
                )
            return {"prompt": self._ended(messages[0]["content"])}
        return {"messages": self._with_system([*messages[:-1], self._last(messages[-1])])}

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            if messages[0]["content"] != self.system:
                raise UserError("the conversation has a system message of its own and prompts.system is another one")
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _last(self, message: dict[str, Any]) -> dict[str, Any]:
        return {**message, "content": self._ended(message["content"])}

    def _ended(self, text: str) -> str:
        if not self.suffix:
            return text
        return text + (self.suffix if text[-1:].isspace() else f" {self.suffix}")


def plain_text(messages: Sequence[dict[str, str]]) -> str:
    """Returns a conversation in the plain form, for a model without a chat template; the answer is to follow it."""
    forms = {"system": "{}", "user": "Question: {}", "assistant": "Answer: {}"}
    return "\n\n".join(
        [*(forms[message["role"]].format(message["content"].strip()) for message in messages), "Answer:"]
    )
