"""Tables of docs/scaling.md: memory and least time of a step, by model, chips, batch and length.

    python -m studies.scaling            # print them
    python -m studies.scaling --write    # put them into docs/scaling.md

The figures come from formulas, as in ``--dry-run``: no chip is needed and nothing is compiled.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from basis_jax import command_line
from basis_jax.commands.dry_run import read_target, shape_on
from basis_jax.model.roofline import token_bound
from basis_jax.model.sharding import abstract_mesh
from basis_jax.opening import plan
from basis_jax.opening.forecast import step_bounds
from basis_jax.opening.plan import Request

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python -m studies.scaling --write -->\n", "<!-- end of tables -->\n"
MODELS = ("Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B", "Qwen3-32B")
HARDWARE = ("rtx4090", "h100", "h100:8", "v5e:4x4", "v5p:2x2x4", "v6e:4x4")
MEAN = 4  # a mean row is assumed to be a quarter of the longest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = "\n".join([*by_hardware(), "", *by_batch(), "", *by_devices(), ""])
    if not options.write:
        print(text)
        return
    document = DOCUMENT.read_text()
    before, rest = document.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])
    print(DOCUMENT)


def request_for(model: str, hardware: str, **changes: int) -> Request:
    """The flagship's config with another model on other hardware."""
    config = command_line.load_config("qwen_math")
    path = dataclasses.replace(config.model, path=f"Qwen/{model}")
    config = dataclasses.replace(config, model=path)
    target = read_target(hardware)
    request = Request(
        config,
        shape_on(config, target, lambda text: None),
        prompt_width=config.data.max_prompt_tokens,
        rows=config.train.prompts_per_step,
        available=target.available,
    )
    return request.with_changes(changes)


def row_of(cells: Mapping[str, str]) -> str:
    return "| " + " | ".join(cells.values()) + " |"


def table(rows: Iterator[Mapping[str, str]]) -> Iterator[str]:
    """Markdown lines; the first row's keys are the header."""
    for i, cells in enumerate(rows):
        if i == 0:
            yield "| " + " | ".join(cells) + " |"
            yield "|" + "---|" * len(cells)
        yield row_of(cells)


def by_hardware() -> Iterator[str]:
    yield "### By model and hardware"
    yield ""
    yield from table(fitted(model, where) for model in MODELS for where in HARDWARE)


def fitted(model: str, hardware: str) -> dict[str, str]:
    """The fitting plan nearest to the flagship's, or the smallest slice that fits one."""
    request, target = request_for(model, hardware), read_target(hardware).topology
    changes = plan.nearest_plan(request, target.devices)
    head = {"model": model, "on": str(target)}
    if changes is None:
        found = plan.smallest_topology(request, target)
        return head | {
            "mesh (data x fsdp x tensor)": "does not fit",
            "slots": "",
            "microbatch": "",
            "GB a device, sampling": "",
            "update": "",
            "step, mean rows": f"smallest: {found[0]}" if found else "no slice fits",
            "step, longest rows": "",
        }
    return head | planned(request.with_changes(changes), hardware)


def planned(request: Request, hardware: str) -> dict[str, str]:
    chip, config = read_target(hardware).topology, request.config
    mesh = abstract_mesh(chip.devices, **plan.axis_sizes(config))
    *sampling, update = request.needs(mesh)
    most = max(need.total for need in sampling)
    seconds = [step_seconds(request, hardware, part) for part in (MEAN, 1)]
    return {
        "mesh (data x fsdp x tensor)": " x ".join(map(str, mesh.shape.values())),
        "slots": str(config.train.sample_rollouts),
        "microbatch": str(config.train.microbatch_rollouts),
        "GB a device, sampling": f"{most / 1e9:.1f}",
        "update": f"{update.total / 1e9:.1f}",
        "step, mean rows": f"{seconds[0]:.0f} s",
        "step, longest rows": f"{seconds[1]:.0f} s",
    }


def step_seconds(request: Request, hardware: str, part: int) -> float:
    topology, config = read_target(hardware).topology, request.config
    mesh = abstract_mesh(topology.devices, **plan.axis_sizes(config))
    prompt, new = request.prompt_width // part, config.sampling.max_new_tokens // part
    bounds = step_bounds(config, request.model_config, mesh, topology.chip, prompt=prompt, new=new)
    return bounds.seconds


def by_batch() -> Iterator[str]:
    yield "### By length and rollouts decoded at once: Qwen3-4B on h100:8"
    yield ""
    lengths, slots = (1024, 4096, 8192, 16_384), (64, 128, 256, 512)
    yield from table(of_length("Qwen3-4B", "h100:8", new, slots) for new in lengths)


def of_length(model: str, hardware: str, new: int, slots: tuple[int, ...]) -> dict[str, str]:
    cells = {"completions up to": f"{new:,}"}
    topology = read_target(hardware).topology
    for count in slots:
        changes = {"sampling.max_new_tokens": new, "train.sample_rollouts": count}
        request = request_for(model, hardware, **changes)
        mesh = abstract_mesh(topology.devices, **plan.axis_sizes(request.config))
        most = max(need.total for need in request.needs(mesh))
        fits = f"{step_seconds(request, hardware, 1):.0f} s" if request.fits(mesh) else "no"
        cells[f"{count} slots"] = f"{most / 1e9:.0f} GB, {fits}"
    return cells


def by_devices() -> Iterator[str]:
    yield "### By devices: one token of Qwen3-4B in 512 slots of 2,560 positions"
    yield ""
    yield from table(of_devices(count) for count in (1, 2, 4, 8, 16, 32, 64, 128, 256))


def of_devices(count: int) -> dict[str, str]:
    """The least time of a token with the weights whole on every device, and split over 8."""
    cells = {"devices": str(count)}
    for hardware in ("h100", "v5e"):
        request = request_for("Qwen3-4B", hardware)
        for tensor in (1, 8):
            if count % tensor:
                cells[f"{hardware}, tensor {tensor}"] = ""
                continue
            mesh = abstract_mesh(count, data=1, fsdp=-1, tensor=tensor)
            chip = read_target(hardware).topology.chip
            bound = token_bound(request.model_config, mesh, chip, slots=512, context=2560)
            cells[f"{hardware}, tensor {tensor}"] = f"{1e3 * bound.seconds:.2f} ms ({bound.by})"
    return cells


if __name__ == "__main__":
    command_line.run(main)
