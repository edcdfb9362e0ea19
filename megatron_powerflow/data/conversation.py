"""Which conversations are prompts? Those that wait for the assistant's answer.

A chat template writes what it is given: a conversation that ends with the answer becomes a prompt that holds it, with a
second answer asked for behind it. Prefilling, that is continuing an answer that has begun, is not supported.

Left out: what a model's own template refuses (`tokenizer.py`), such as a system message where it knows none.
"""

from __future__ import annotations

from collections.abc import Sequence

ROLES = ("system", "user", "assistant")
# the roles, and what ShareGPT and others call them
ROLE_ALIASES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "model": "assistant"}


def conversation_violation(messages: Sequence[dict[str, object]]) -> str | None:
    """Returns why these messages are no prompt, and what to do; None when they are one.

    messages: each with texts under "role" and "content". A prompt has known roles only, no empty message, at most one
    message of the system, which comes first, and ends with the user's.
    """
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], str(message["content"])
        if role not in ROLES:
            other = ROLE_ALIASES.get(str(role).lower())
            hint = f"; call it {other}" if other else "; take it out"
            return f"message {number} of messages has role {role!r:.40}; known are {', '.join(ROLES)}{hint}"
        if not content.strip():
            return f"message {number} of messages, the {role}'s, is empty; fill it or take it out"
        if message.get("tool_calls") or message.get("function_call"):
            return f"message {number} of messages calls tools, which are not supported; take it out"
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        return f"message {number} of messages is the system's; there may be one, and it comes first"
    if "user" not in roles:
        return "messages hold no turn of the user, so nothing is asked; add it"
    if roles[-1] == "assistant":
        return (
            "the last of messages is the assistant's: the prompt would hold its answer. Drop that message, and set "
            "`answer` to the final answer in it if there is one; to continue an answer that has begun is not supported"
        )
    return None
