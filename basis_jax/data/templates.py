"""Chat templates and special tokens: from messages to the tokens that a model reads."""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from basis_jax.config import DataSection
from basis_jax.data.template_trial import Chat, trouble
from basis_jax.files import one_line

INSTEAD = "give --data.prompt-format text, which needs no template"
TRUTH = {"true": True, "false": False}
ANSWER = "forty-two"  # the assistant's message with which the end of a turn is found


def chat_texts(chats: Sequence[Chat], section: DataSection, tokenizer: Any) -> list[str]:
    """Each chat in the tokenizer's chat template, up to where the model's answer begins.

    Raises ValueError if there is no template, if it does not end or fills the memory
    (``template_trial``), if it refuses a chat, if it leaves out the system message or the problem,
    and for options that it does not read.
    """
    render = tried_template(chats, section, tokenizer)
    return [chat_text(chat, render) for chat in chats]


def chat_text(chat: Chat, render: Callable[..., str]) -> str:
    try:
        text = render(list(chat), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs: jinja2's errors, and Python's
        reason = one_line(str(error)) or type(error).__name__
        raise ValueError(
            f"the tokenizer's chat template refuses the problem {chat[-1]['content'][:80]!r} with "
            f"the roles {', '.join(message['role'] for message in chat)} ({reason}); change "
            f"data.system_prompt or the problem's chat, or {INSTEAD}"
        ) from error
    needed = [("system message", m) for m in chat if m["role"] == "system"]
    for what, message in (*needed, ("problem", chat[-1])):
        if message["content"].strip() not in text:
            raise ValueError(
                f"the tokenizer's chat template leaves out the {what} "
                f"{message['content'][:80]!r}; change data.system_prompt or the problem's chat, "
                f"or {INSTEAD}"
            )
    return text


def tried_template(
    chats: Sequence[Chat], section: DataSection, tokenizer: Any
) -> Callable[..., str]:
    """``tokenizer.apply_chat_template`` with the section's options. Raises ValueError where these
    chats must not be rendered in this process (``template_trial``)."""
    template, options = template_of(tokenizer), template_options(section, tokenizer)
    if found := trouble(template, options, chats):
        raise ValueError(f"the tokenizer's chat template {found}; {INSTEAD}")
    return functools.partial(tokenizer.apply_chat_template, **options)


def template_of(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name; transformers takes the default one
        template = template.get("default")
    if not template:
        raise ValueError(
            f"the tokenizer has no chat template; {INSTEAD}, or add chat_template.jinja to the "
            "model's folder"
        )
    if not isinstance(template, str):
        raise ValueError(
            f"the tokenizer's chat template is a {type(template).__name__} and no text; {INSTEAD}"
        )
    return template


def template_options(section: DataSection, tokenizer: Any) -> dict[str, bool | int | float | str]:
    """``data.chat_template_options``, with "true" and "false" as booleans. Raises ValueError for an
    option that the template does not read."""
    template = template_of(tokenizer)
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in section.chat_template_options:
        if name in own or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"data.chat_template_options has {name!r}, which the tokenizer's chat template "
                "does not read; take it out, or write it as the template does"
            )
    return {
        name: TRUTH.get(value.lower(), value) if isinstance(value, str) else value
        for name, value in section.chat_template_options.items()
    }


def turn_end(section: DataSection, tokenizer: Any) -> tuple[str, list[int]]:
    """What the template writes after an answer, without spaces around it: (text, tokens) of its
    first special token, or of all of it if it has none. Empty if nothing is written, or if the
    template has no place for an answer."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tried_template([chat], section, tokenizer)(chat, tokenize=False)
    except Exception:  # the prompts' own rendering says what is wrong with a template
        return "", []
    before, _, end = text.rpartition(ANSWER)
    if not before or not end.strip():
        return "", []
    ids = tokenizer(end.strip(), add_special_tokens=False)["input_ids"]
    special = [i for i in ids if i in tokenizer.added_tokens_decoder]
    return (tokenizer.decode(special[:1]), special[:1]) if special else (end.strip(), ids)


def token_rows(texts: Sequence[str], section: DataSection, tokenizer: Any) -> list[list[int]]:
    """The texts' tokens. A template writes its special tokens itself. Plain text gets those that
    the tokenizer puts around a text; the BOS is not added to a text that begins with it.

    Raises ValueError for a tokenizer that puts its EOS after a text: no answer follows an EOS.
    """
    plain = section.prompt_format == "text"
    rows = tokenizer(list(texts), add_special_tokens=plain)["input_ids"] if texts else []
    if not plain:
        return rows
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text, row in zip(texts, rows, strict=True):
        if eos is not None and row[-1:] == [eos] and not text.endswith(tokenizer.eos_token):
            raise ValueError(
                f"the tokenizer puts its EOS {tokenizer.eos_token!r} behind every text, and no "
                "answer follows that; set add_eos_token to false in its tokenizer_config.json"
            )
    return [row[1:] if bos is not None and row[:2] == [bos, bos] else row for row in rows]
