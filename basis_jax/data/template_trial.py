"""Try a chat template in a process of its own, with limits on time, memory and output.

A template is a program. Its sandbox keeps it from files and from Python's classes, but not from
endless loops and from texts that fill the memory, and neither can be stopped inside the trainer's
process. So another process renders every chat first. It takes .1 ms a chat: two minutes for a
million prompts.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

Chat = Sequence[Mapping[str, str]]

SECONDS = 5  # of CPU time for a chat; templates take less than a millisecond
MEGABYTES = 1024
LARGEST, LONGER = 1_000_000, 10  # a template may write so many characters + 10 a character given
CHATS, CHARACTERS = 10_000, 10_000_000  # that one process renders
PATIENCE = 20  # wall-clock limit, in units of the CPU time: other processes compute too
TOKENS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tag
NO_MEMORY, TOO_LONG = 3, 4  # exit codes


def trouble(template: str, options: Mapping[str, Any], chats: Sequence[Chat]) -> str:
    """Why a template must not render these chats in this process, or "". Errors that it raises are
    not reported here, but where it is rendered."""
    for part in parts(chats):
        if found := trouble_with(template, options, part):
            return found
    return ""


def parts(chats: Sequence[Chat]) -> Iterator[list[Chat]]:
    """The chats in runs that one process renders."""
    part: list[Chat] = []
    characters = 0
    for chat in chats:
        more = length(chat)
        if part and (len(part) == CHATS or characters + more > CHARACTERS):
            yield part
            part, characters = [], 0
        part.append(chat)
        characters += more
    if part:
        yield part


def length(chat: Chat) -> int:
    return sum(len(message["content"]) for message in chat)


def trouble_with(template: str, options: Mapping[str, Any], chats: Sequence[Chat]) -> str:
    asked = json.dumps([template, options, [list(map(dict, chat)) for chat in chats]]).encode()
    command = [sys.executable, "-P", __file__, str(SECONDS)]
    allowed = SECONDS * PATIENCE + len(chats) // 10
    with tempfile.TemporaryFile() as begun:  # one byte a chat
        try:
            done = subprocess.run(
                command, input=asked, stdout=begun, stderr=subprocess.DEVNULL, timeout=allowed
            )
        except subprocess.TimeoutExpired:
            done = None
        last = max(begun.seek(0, 2) - 1, 0)
    if done is None:
        what = f"does not end within {allowed} s"
    elif done.returncode in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL):
        what = f"does not end within {SECONDS} s"
    elif done.returncode == TOO_LONG:
        what = f"writes more than {LARGEST:,} characters"
    elif done.returncode == NO_MEMORY:
        what = f"needs more than {MEGABYTES} MiB of memory"
    elif done.returncode:
        what = f"ends its process with the exit code {done.returncode}"
    else:
        return ""
    return f"{what} for the problem {chats[last][-1]['content'][:80]!r}"


def main() -> None:
    """Render the chats in the standard input; the exit code says how it went."""
    seconds = int(sys.argv[1])
    limit_memory()
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # imported within the limits

    try:
        template, options, chats = json.load(sys.stdin)
    except MemoryError:
        sys.exit(NO_MEMORY)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, *_, **__: json.dumps(value)
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = refuse
    compiled = None
    for chat in chats:
        os.write(1, b".")
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU time; its signal ends this process
        try:
            compiled = compiled or environment.from_string(GENERATION.sub("", template))
            values = TOKENS | {"messages": chat, "tools": None, "documents": None} | options
            written = sum(map(len, compiled.generate(add_generation_prompt=True, **values)))
        except MemoryError:
            sys.exit(NO_MEMORY)
        except Exception:  # raised again, and reported, where the template is used
            continue
        if written > LARGEST + LONGER * length(chat):
            sys.exit(TOO_LONG)


def limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere address space is not counted like this
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES * 2**20,) * 2)


def refuse(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    main()
