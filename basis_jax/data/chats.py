"""Read the problem of a row: a text, or a chat in one of several common formats."""

from collections.abc import Mapping, Sequence
from typing import Any

from basis_jax.data.values import check_characters, described, held_in, is_missing, shown

Messages = tuple[tuple[str, str], ...]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Names of roles in from/value chats; all chats may use them."""
ANSWERING = ("user", "tool", "function", "observation", "ipython", "environment")
KNOWN = ("system", "developer", "assistant", *ANSWERING)
KEYS = (("role", "content"), ("from", "value"))
CHAT_BEGINS = "[{ \n\t\r"
WHOLE = ("messages", "conversations", "conversation")
"""Keys under which an object holds its chat."""


def read_prompt(value: Any, wrapper: str = "") -> str | Messages:
    """The problem in a value; empty if the value is missing. A chat of one message by a user is
    that message. ``wrapper`` is removed from a text; ``{problem}`` in it stands for the problem.

    A chat is a list of messages, a single message, or a text that holds either. The assistant's
    messages at its end are left out, because they answer the problem. Raises ValueError for a value
    that is not a problem.
    """
    if isinstance(value, str) and value[:1] in CHAT_BEGINS and value.lstrip()[:1] in ("[", "{"):
        value = chat_in(value)
    if not isinstance(value, str):
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]
        if isinstance(value, list | Mapping):
            value = read_chat(value)
        if isinstance(value, tuple):
            return value
        if is_missing(value):
            return ""
    if not isinstance(value, str):
        raise ValueError(
            f"the problem is {described(value)}; give a text or a chat, or name another column "
            "with --data.problem-field"
        )
    prefix, _, suffix = wrapper.partition("{problem}")
    text = value.strip().removeprefix(prefix).removesuffix(suffix).strip()
    if not text.isascii():
        check_characters("the problem", text)
    return "" if is_missing(text) else text


def chat_in(text: str) -> Any:
    """The chat that a text holds, or the text. Raises ValueError for a text that looks like a chat
    but cannot be read, such as one printed by NumPy."""
    quoted = [f"{quote}{key[0]}{quote}" for key in KEYS for quote in "\"'"]
    if not any(mark in text for mark in quoted):
        return text
    found = held_in(text.strip())
    if isinstance(found, dict) and (is_message(found) or whole_chat(found) is not None):
        return found
    if isinstance(found, list) and found and all(map(is_message, found)):
        return found
    if found is None and text.lstrip().startswith("[{") and text.rstrip().endswith("}]"):
        raise ValueError(
            f"the problem {shown(text)} looks like a chat but is not JSON; write it as JSON"
        )
    return text


def is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(key[0] in value for key in KEYS)


def whole_chat(value: Mapping) -> list | None:
    return next((value[key] for key in WHOLE if isinstance(value.get(key), list)), None)


def read_chat(value: list | Mapping) -> str | Messages:
    """The messages of a chat, up to the last one that asks for an answer."""
    if len(value) == 1 and isinstance(value, list) and is_users(value[0]):
        return value[0]["content"]
    listed = one_by_one(value) if isinstance(value, Mapping) else value
    if not all(isinstance(message, Mapping) for message in listed):
        raise ValueError(
            f"the problem is {described(value)}; give one text, or a chat whose messages have role "
            "and content"
        )
    messages = [read_message(message, i) for i, message in enumerate(listed, start=1)]
    if not messages:
        return ""
    while messages and messages[-1][0] == "assistant":
        messages.pop()
    if not any(role == "user" for role, _ in messages):
        raise ValueError("the chat has no message of a user; the problem must be one")
    role, content = messages[-1]
    if role not in ANSWERING:
        raise ValueError(f"the chat ends with a message of the role {role}; end it with the user's")
    if is_missing(content):
        return ""
    return content if len(messages) == 1 else tuple(messages)


def one_by_one(value: Mapping) -> Sequence[Any]:
    """The messages of an object: its chat, itself, or those of its lists of roles and contents."""
    if (chat := whole_chat(value)) is not None:
        return chat
    for keys in KEYS:
        roles, contents = (value.get(key) for key in keys)
        if isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents):
            pairs = zip(roles, contents, strict=True)
            return [dict(zip(keys, pair, strict=True)) for pair in pairs]
        if isinstance(roles, str) and keys[1] in value:
            return [value]
    part = next(iter(value), "text")
    raise ValueError(
        f"the problem is {described(value)}; name one of its parts, as in --data.problem-field "
        f"problem.{part}"
    )


def is_users(message: Any) -> bool:
    """Whether it is a user's message with a text, in the usual format. A quick check, because there
    are millions of them."""
    if type(message) is not dict or message.get("role") != "user":
        return False
    return type(message.get("content")) is str


def read_message(message: Mapping, number: int) -> tuple[str, str]:
    """(role, content). Raises ValueError for an unknown role and for a content that is not text."""
    for role_key, content_key in KEYS:
        if role_key in message and content_key in message:
            role, content = message[role_key], message[content_key]
            if isinstance(role, str):
                break
    else:
        raise ValueError(
            f"message {number} of the chat is {described(message)}; a message has role and "
            "content, or from and value"
        )
    role = ROLES.get(role.strip().lower(), role.strip().lower())
    if role not in KNOWN:
        raise ValueError(
            f"message {number} of the chat has the role {shown(role)}; allowed are "
            f"{', '.join((*KNOWN, *ROLES))}"
        )
    text = content_text(content, number)
    if not text.isascii():
        check_characters("the problem", text)
    return role, text


def content_text(content: Any, number: int) -> str:
    """A message's text; several parts are joined by line breaks."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, list):
        return "\n".join(part_text(part, number) for part in content)
    if is_missing(content):
        return ""
    raise ValueError(f"message {number} of the chat has a content that is {described(content)}")


def part_text(part: Any, number: int) -> str:
    if isinstance(part, Mapping):
        kind, part = part.get("type"), part.get("text")
        if not isinstance(part, str) or "text" not in str(kind or "text"):
            raise ValueError(
                f"message {number} of the chat has a part of the type {shown(str(kind))[1:-1]}; "
                "only texts can be read"
            )
    if not isinstance(part, str):
        raise ValueError(f"message {number} of the chat has a part that is {described(part)}")
    return part
