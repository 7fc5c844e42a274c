"""Try a chat template in a process of its own, with limits on time, memory and output.

A template is a program. Its sandbox keeps it from files and from Python's classes, but not from
endless loops and from texts that fill the memory, and neither can be stopped inside the trainer's
process. So each template first renders short chats in another process.
"""

import functools
import json
import re
import signal
import subprocess
import sys
from datetime import datetime

SECONDS = 5  # of CPU time; templates take milliseconds
MEGABYTES = 1024
LARGEST = 1_000_000  # characters that a template may write for a short chat
PATIENCE = 20  # wall-clock limit, in units of the CPU time: other processes compute too
CHATS = (
    [{"role": "user", "content": "2 + 2 = ?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2 = ?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3 + 3 = ?"},
    ],
)
TOKENS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tag
NO_MEMORY, TOO_LONG = 3, 4  # exit codes


@functools.lru_cache(maxsize=8)
def trouble(template: str, options: str) -> str:
    """Why a template must not be rendered in this process, or "". ``options`` are its options as
    JSON. Errors that it raises are not reported here, but where it is rendered."""
    asked = json.dumps([template, json.loads(options)]).encode()
    command = [sys.executable, "-P", __file__, str(SECONDS)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=SECONDS * PATIENCE)
    except subprocess.TimeoutExpired:
        return f"does not end within {SECONDS * PATIENCE} s"
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"does not end within {SECONDS} s"
    if done.returncode == TOO_LONG:
        return f"writes more than {LARGEST:,} characters for a short chat"
    return f"needs more than {MEGABYTES} MiB of memory" if done.returncode == NO_MEMORY else ""


def main() -> None:
    """Render the template in the standard input; the exit code says how it went."""
    limit(int(sys.argv[1]))
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # imported within the limits

    template, options = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, *_, **__: json.dumps(value)
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["raise_exception"] = refuse
    for chat in CHATS:
        try:
            values = TOKENS | {"messages": chat, "tools": None, "documents": None} | options
            compiled = environment.from_string(GENERATION.sub("", template))
            written = sum(map(len, compiled.generate(add_generation_prompt=True, **values)))
        except MemoryError:
            sys.exit(NO_MEMORY)
        except Exception:  # raised again, and reported, where the template is used
            continue
        if written > LARGEST:
            sys.exit(TOO_LONG)


def limit(seconds: int) -> None:
    """Let the kernel end this process after so much CPU time, and refuse it memory."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere address space is not counted like this
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES * 2**20,) * 2)


def refuse(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    main()
