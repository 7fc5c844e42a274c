"""Compile the two largest programs of a run, also for devices that are not present.

The compiled programs show how many bytes they hold on a device and how many a device sends. Only
shapes are needed, no arrays. This works for the devices that are present and for a TPU slice
described by ``jax.experimental.topologies``.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from basis_jax.config import Config
from basis_jax.model import decoder, decoding
from basis_jax.model.chips import Topology
from basis_jax.model.collectives import collectives, sent_bytes
from basis_jax.model.decoder import ModelConfig
from basis_jax.model.sharding import batch_shards, make_mesh, named, regrouped
from basis_jax.opening.plan import axis_sizes, rollouts_per_pass
from basis_jax.sampling import refill
from basis_jax.training import update
from basis_jax.training.microbatches import updates_per_step
from basis_jax.types import Batch


def lower_decoding(
    config: Config, model_config: ModelConfig, mesh: Mesh, *, length: int
) -> jax.stages.Lowered:
    """Lower one call of ``refill.advance`` with all slots at their full ``length``."""
    model_config = decoder.computed_in(model_config, config.sampling.dtype)
    mesh = regrouped(mesh, config.mesh.sample_tensor)
    slots = jax.eval_shape(
        lambda: refill.empty_slots(
            model_config,
            rows=config.train.sample_rollouts,
            length=length,
            cache_length=length,
        )
    )
    weights = jax.eval_shape(
        lambda params: decoding.decode_weights(params, model_config),
        decoder.param_shapes(model_config),
    )
    with jax.set_mesh(mesh):
        return refill.advance.lower(
            laid_out(mesh, weights, weight_axes(model_config)),
            laid_out(mesh, slots, slot_axes),
            jax.ShapeDtypeStruct((), jnp.int32),
            model_config=model_config,
            sampling=config.sampling,
            eos_ids=(0,),
        )


def weight_axes(model_config: ModelConfig) -> Any:
    """Function from (path, shape) of a leaf of ``DecodeWeights`` to its logical axes."""
    stacked = decoder.param_axes(model_config)["layers"]

    def axes(path, x):
        name = path[-1].key if path[0].name == "layers" else path[0].name
        if name in ("embedding", "output"):
            return ("vocab", "activation_embed")
        if model_config.scan_decode and name in stacked:
            return tuple(decoding.UNSPLIT.get(axis, axis) for axis in stacked[name])
        return decoding.OUT_FIRST.get(name, (None,) * x.ndim)

    return axes


def slot_axes(path: Any, x: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
    """Logical axes of a leaf of ``Slots``, the same as in ``refill.constrain_slots``."""
    if path[0].name == "cache":
        stacked = x.ndim != 4
        return decoding.STACKED_AXES if stacked else decoding.CACHE_AXES[path[1].name]
    return ("batch",) + (None,) * (x.ndim - 1)


def laid_out(mesh: Mesh, tree: PyTree, axes: Any) -> PyTree:
    """The tree of shapes, each with the sharding for its logical axes ``axes(path, shape)``."""

    def place(path, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named(mesh, axes(path, x)))

    return jax.tree.map_with_path(place, tree)


def lower_update(
    config: Config, model_config: ModelConfig, mesh: Mesh, *, width: int, microbatches: int
) -> jax.stages.Lowered:
    """Lower an update over ``microbatches`` microbatches at full width, as one program."""
    optimizer = update.make_optimizer(config.optim, updates=config.train.steps)
    rows = rollouts_per_pass(config.train, batch_shards(mesh))
    update_params = update.make_update(
        model_config,
        optimizer,
        optim=config.optim,
        loss=config.loss,
        temperature=config.sampling.temperature,
        microbatch=rows,
    )
    state = update.abstract_state(optimizer, {}, model_config=model_config, mesh=mesh)

    numbers = np.zeros((rows, width), np.float32)
    batch = Batch(
        tokens=numbers.astype(np.int32),
        completion_mask=numbers > 0,
        loss_weights=numbers,
        advantages=numbers[:, 0],
        old_logprobs=numbers if updates_per_step(config) > 1 else None,
        sampler_logprobs=numbers,
        ref_logprobs=numbers if config.loss.needs_reference else None,
    )
    batch = laid_out(mesh, batch, lambda path, x: ("batch",))
    with jax.set_mesh(mesh):
        return jax.jit(update_params, donate_argnums=0).lower(state, [batch] * microbatches)


def held_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of arguments, results and temporaries on one device; donated buffers count once."""
    plan = compiled.memory_analysis()
    if plan is None:
        raise ValueError("XLA plans no memory for these devices; leave --compile out")
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return total - plan.alias_size_in_bytes


def programs(
    config: Config, model_config: ModelConfig, mesh: Mesh, *, prompt_width: int
) -> dict[str, dict[str, Any]]:
    """Compile both programs and return their bytes on one device.

    ``held`` is the memory of a device. The bytes that a device sends are given by kind: ``once``
    per call, and per iteration of a loop of unknown length in ``each_loop`` (in decoding one
    iteration is one token). The update has one microbatch. Bytes sent are missing where the
    compiler does not show its program.
    """
    length = prompt_width + config.sampling.max_new_tokens
    lowered = {
        "decoding": lower_decoding(config, model_config, mesh, length=length),
        "update": lower_update(config, model_config, mesh, width=length, microbatches=1),
    }
    return {name: described(program.compile()) for name, program in lowered.items()}


def described(compiled: jax.stages.Compiled) -> dict[str, Any]:
    found: dict[str, Any] = {"held": held_bytes(compiled)}
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # large TPU programs: their text exceeds a limit
        text = None
    if text:
        sent = collectives(text)
        found["once"] = sent_bytes(sent, looped=False)
        found["each_loop"] = sent_bytes(sent, looped=True)
    return found


def compile_for(
    topology: Topology, config: Config, model_config: ModelConfig, *, prompt_width: int
) -> dict[str, dict[str, Any]]:
    """``programs`` for a TPU slice that is not present.

    It runs in a process of its own, because libtpu prints messages and looks for chips. Raises
    ValueError if libtpu is missing or cannot compile a program.
    """
    library = find_libtpu()
    asked = pickle.dumps((str(topology), config, model_config, prompt_width))
    accelerator = f"{topology.chip.name}-{topology.devices}".replace("v5e", "v5litepod")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LIBRARY_PATH": str(library),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so two plans may run at once
        "XLA_FLAGS": "",  # the flags of this process are for its own backend
    }
    command = [sys.executable, "-m", "basis_jax.training.compiled_plan"]
    done = subprocess.run(command, input=asked, env=environment, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing was printed"]
        raise ValueError(f"the TPU compiler refused the plan for {topology}: {said[-1][:400]}")
    return json.loads(done.stdout.splitlines()[-1])


def find_libtpu() -> Path:
    """Path of libtpu.so: ``TPU_LIBRARY_PATH``, or the installed package. Raises ValueError if there
    is none."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    spec = importlib.util.find_spec("libtpu")
    folders = spec.submodule_search_locations if spec else None
    library = Path(named) if named else Path(folders[0], "libtpu.so") if folders else None
    if library is None or not library.is_file():
        raise ValueError(
            "--compile for a TPU topology needs libtpu; install the extra tpu-aot, or set "
            "TPU_LIBRARY_PATH to the libtpu.so of another environment"
        )
    return library


def main() -> None:
    """The process of ``compile_for``: a request on stdin; the last line of stdout is the answer."""
    from jax.experimental import topologies

    name, config, model_config, prompt_width = pickle.load(sys.stdin.buffer)
    described_devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = make_mesh(devices=described_devices, **axis_sizes(config))
    found = programs(config, model_config, mesh, prompt_width=prompt_width)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
