"""Confine a grading process, once it has loaded what it needs.

The kernel limits additional memory, writing to files, and core dumps (rlimits). On Linux on x86-64
or aarch64 it also refuses new processes and threads, sockets, signals to other processes, opening
files for writing, and changes of the file system (seccomp). Elsewhere only RLIMIT_NPROC, which does
not bind root, and the audit hook do this.

The audit hook (PEP 578) refuses the same to Python code that tries it in the usual ways. It also
refuses compiling, and reading files other than Python's modules. It cannot stop native code that a
hostile answer might manage to run. The kernel's limits still hold then, but they do not cover
reading files that the user may read.
"""

import ctypes
import os
import platform
import resource
import sys

REFUSED = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "urllib.", "pty.", "resource.setrlimit",
    "resource.prlimit", "signal.pthread_kill", "_thread.start_new_thread",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = ("os.listdir", "os.scandir")
MODULES = (".py", ".pyc", ".so")

SYSCALLS = {  # (x86-64, aarch64); None if the machine has no such call
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "io_uring_setup": (425, 425), "openat2": (437, 437), "creat": (85, None),
    "truncate": (76, 45), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None), "mknodat": (259, 33),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "mount": (165, 40), "bpf": (321, 280), "keyctl": (250, 219), "setrlimit": (160, 164),
}  # fmt: skip
OPENING = {"open": (2, None, 1), "openat": (257, 56, 2)}  # third: which argument has the flags
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, audit architecture
ALLOW, DENY = 0x7FFF0000, 0x00050001  # and EPERM
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def confine(megabytes: int, readable: str = "") -> list[str]:
    """Allow this process only ``megabytes`` of additional memory and reading files in the folder
    ``readable``; it can no longer compile or run code, or start a process. Returns a list to which
    the audit hook adds whatever it refuses."""
    if sys.platform == "linux":  # elsewhere address space is not counted like this
        resource.setrlimit(resource.RLIMIT_AS, (used_memory() + megabytes * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    forbid_syscalls()
    refusals: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if not is_allowed(event, arguments, readable):
            refusals.append(event)
            raise PermissionError(f"a grading process does no {event}")

    sys.addaudithook(hook)
    return refusals


def used_memory() -> int:
    """Bytes of address space (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def is_allowed(event: str, arguments: tuple, readable: str) -> bool:
    """Whether an audit event (PEP 578) is allowed. sympy may import its modules late, and compile
    functions that multiply monomials; their source contains nothing of the answer."""
    if event == "open":
        path, mode, flags = arguments
        known = isinstance(path, str) and path.endswith(MODULES)
        if readable and isinstance(path, str | os.PathLike):
            known = known or os.path.realpath(path).startswith(readable + os.sep)
        return known and mode in ("r", "rb", None) and not flags & WRITING
    if event == "compile":
        source, name = arguments
        head = source[:13] if isinstance(source, str | bytes) else None
        return str(name).endswith(".py") or head in ("def monomial_", b"def monomial_")
    return not event.startswith(REFUSED) or event in HARMLESS


class Instruction(ctypes.Structure):
    """An instruction of classic BPF. A test of the loaded value skips ``then`` or ``otherwise``
    instructions."""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("then", ctypes.c_uint8),
        ("otherwise", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]


def forbid_syscalls() -> bool:
    """Make the kernel answer EPERM to the calls of ``SYSCALLS`` and to opening files for writing,
    from now on in this thread. False if it cannot (another system or machine, or an old kernel)."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return False
    instructions = seccomp_filter(*MACHINES[platform.machine()])
    array = (Instruction * len(instructions))(*instructions)
    program = Program(len(instructions), array)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0):
        return False
    return libc.prctl(seccomp, by_filter, ctypes.byref(program), 0, 0) == 0


def seccomp_filter(column: int, architecture: int) -> list[Instruction]:
    """The filter. ``seccomp_data``: number at byte 0, architecture at 4, arguments from 16."""
    deny = Instruction(RETURN, 0, 0, DENY)
    program = [
        Instruction(LOAD, 0, 0, 4),
        Instruction(EQUAL, 1, 0, architecture),
        deny,
        Instruction(LOAD, 0, 0, 0),
        Instruction(AT_LEAST, 0, 1, 0x40000000),  # the x32 calls of x86-64
        deny,
    ]
    for numbers in SYSCALLS.values():
        if numbers[column] is not None:
            program += [Instruction(EQUAL, 0, 1, numbers[column]), deny]
    for *opening, argument in OPENING.values():
        if opening[column] is not None:
            program += [
                Instruction(EQUAL, 0, 4, opening[column]),
                Instruction(LOAD, 0, 0, 16 + 8 * argument),
                Instruction(ANY_BIT, 0, 1, WRITING),
                deny,
                Instruction(RETURN, 0, 0, ALLOW),
            ]
    return [*program, Instruction(RETURN, 0, 0, ALLOW)]
