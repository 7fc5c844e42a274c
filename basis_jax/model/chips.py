"""Accelerators by name: memory, bandwidth, peak FLOPs and interconnect, for plans without the chip.

The sources are public data sheets: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and
"TPU v6e" (docs.cloud.google.com/tpu/docs); NVIDIA's data sheets of the A100 80GB SXM, H100 SXM,
H200 SXM and L4; and the white paper "NVIDIA Ada GPU architecture" for the GeForce RTX 4090. FLOPs
are for bfloat16 with float32 sums, without sparsity. The interconnect is given per direction: half
of a figure that counts both. It is that of ICI or NVLink, or of PCIe 4.0 x16 for chips without
NVLink. It is valid inside a slice or a node; between nodes it is less.
"""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str
    memory: int  # bytes of one chip
    bandwidth: float  # bytes per second between chip and its memory
    flops: float  # per second
    interconnect: float  # bytes per second out of one chip
    tpu: bool = False


def _tpu(name: str, gib: int, bandwidth: int, flops: int, interconnect: int) -> Chip:
    return Chip(name, gib * 2**30, bandwidth * 1e9, flops * 1e12, interconnect * 1e9, tpu=True)


def _gpu(name: str, gigabytes: int, bandwidth: int, flops: int, interconnect: int) -> Chip:
    return Chip(name, gigabytes * 10**9, bandwidth * 1e9, flops * 1e12, interconnect * 1e9)


CHIPS = {
    chip.name: chip
    for chip in (  # GiB or GB, GB/s, TFLOP/s, GB/s
        _tpu("v4", 32, 1200, 275, 300),
        _tpu("v5e", 16, 819, 197, 200),
        _tpu("v5p", 95, 2765, 459, 600),
        _tpu("v6e", 32, 1638, 918, 400),
        _gpu("a100", 80, 2039, 312, 300),
        _gpu("h100", 80, 3350, 989, 450),
        _gpu("h200", 141, 4800, 989, 450),
        _gpu("l4", 24, 300, 121, 32),
        _gpu("rtx4090", 24, 1008, 165, 32),
    )
}
TPU_RESERVED = 2**28
"""Bytes of a TPU's memory that programs cannot use. The compiler reports "15.75G hbm" for the
16 GiB of a v5e."""


@dataclass(frozen=True)
class Topology:
    """A number of chips of one kind. ``shape`` is the arrangement of a TPU slice's chips."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def read_topology(text: str) -> Topology:
    """Read ``v5e:4x4``, ``h100:8`` or ``l4`` (one chip). Raises ValueError for anything else."""
    name, colon, sizes = text.lower().partition(":")
    written = re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", sizes) or not colon
    if name not in CHIPS or not written:
        raise ValueError(
            f"unknown topology {text!r}; give a chip and how many there are, such as v5e:4x4, "
            f"v5p:2x2x2 or h100:8, with one of the chips {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[name], tuple(int(size) for size in sizes.split("x") if size) or (1,)
    if not chip.tpu and len(shape) > 1:
        raise ValueError(f"topology {text!r}: GPUs have one number, such as {name}:8")
    return Topology(chip, shape)


def slice_shape(chip: Chip, devices: int) -> tuple[int, ...]:
    """The shape nearest to a square or a cube for a number of devices that is a power of two.

    v4 and v5p have three dimensions, v5e and v6e two, GPUs one.
    """
    dimensions = (3 if chip.name in ("v4", "v5p") else 2) if chip.tpu else 1
    exponent = int(math.log2(devices))
    parts = [(exponent + i) // dimensions for i in range(dimensions)]
    return tuple(2**part for part in parts)


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this name in JAX, such as "TPU v5 lite". None if it is not in the table."""
    words = device_kind.lower().replace(" lite", "e").replace("rtx ", "rtx")
    found = [{"v5": "v5p"}.get(word, word) for word in re.split(r"[^a-z0-9]+", words)]
    return next((CHIPS[word] for word in found if word in CHIPS), None)
