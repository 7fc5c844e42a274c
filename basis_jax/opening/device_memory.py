"""How much of a device's memory JAX may use."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

SHARE = 0.75
"""Of a GPU, where the environment says nothing else: JAX takes it when it starts."""
VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the newer name first
ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"


def memory_share(environment: Mapping[str, str]) -> float:
    """The share of a GPU's memory that JAX may use.

    It is the same limit with ``XLA_PYTHON_CLIENT_PREALLOCATE=false``, where memory is taken as it
    is needed; only the allocator "platform" knows none.
    """
    if environment.get(ALLOCATOR, "").lower() == "platform":
        return 1.0
    return float(next(filter(None, map(environment.get, VARIABLES)), SHARE))


def usable_memory(device_bytes: int, environment: Mapping[str, str]) -> int:
    """Bytes that JAX may use of a GPU that has ``device_bytes``."""
    return int(device_bytes * memory_share(environment))


def share_advice(environment: Mapping[str, str]) -> str:
    return f"{memory_share(environment):.0%} of the GPU; {VARIABLES[0]}=0.95 raises it"


def device_memory(devices: Sequence) -> int:
    """Bytes that JAX may use of one of these devices. GPUs and TPUs report their limit, which is a
    share already; a GPU that reports none is asked for its size, and nothing is refused where it
    does not tell. A CPU's is an equal share of the machine's memory."""
    stats = devices[0].memory_stats() or {}
    if stats.get("bytes_limit"):
        return stats["bytes_limit"]
    if devices[0].platform == "gpu":
        return usable_memory(gpu_bytes() or sys.maxsize, os.environ)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)


def gpu_bytes() -> int:
    """The memory of the smallest NVIDIA GPU of this machine; 0 where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return min(int(line) for line in found.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
