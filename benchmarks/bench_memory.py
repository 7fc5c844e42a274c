"""Bytes that an update needs on one device: XLA's plan, and the estimate of ``costs``.

    python -m benchmarks.bench_memory --model models/smollm2 --rows 8 32 --width 128 512

It is for one microbatch of rows x width tokens, with parameters, AdamW moments and gradients.
Programs are compiled for the device that is present; none is run, and no weights are read.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from basis_jax import command_line
from basis_jax.config import LossSection, OptimSection
from basis_jax.model import costs
from basis_jax.model.attention import KINDS
from basis_jax.model.decoder import REMAT, ModelConfig
from basis_jax.model.sharding import make_mesh
from basis_jax.training.update import abstract_state, make_optimizer, make_update
from basis_jax.types import Batch
from benchmarks import bench_models


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", default="embedded:quickstart", help=bench_models.MODEL_HELP)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="plain", choices=KINDS)
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--width", type=int, nargs="+", default=[128])
    parser.add_argument("--remat", nargs="+", default=list(REMAT), choices=list(REMAT))
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    mesh, found = make_mesh(devices=jax.devices()[:1]), []
    print(f"{'rows':>6}{'width':>7}  {'remat':6}{'XLA plans':>11}{'estimate':>10}  GB")
    for rows in options.rows:
        for width in options.width:
            for remat in options.remat:
                model_config = bench_models.named_model_config(
                    options.model,
                    compute_dtype=options.dtype,
                    attention=options.attention,
                    remat=remat,
                )
                with jax.set_mesh(mesh):
                    planned = planned_bytes(model_config, mesh, rows, width)
                parts = costs.update_memory(model_config, mesh, rows=rows, width=width, chunk=512)
                estimate = sum(parts.values())
                found.append({"rows": rows, "width": width, "remat": remat})
                found[-1] |= {"planned": planned, "estimate": estimate, "parts": parts}
                print(f"{rows:6}{width:7}  {remat:6}{planned / 1e9:11.2f}{estimate / 1e9:10.2f}")
    bench_models.write_result(options, found)


def planned_bytes(model_config: ModelConfig, mesh: Mesh, rows: int, width: int) -> int:
    """Bytes of arguments, results and temporaries; donated buffers count once."""
    optimizer = make_optimizer(OptimSection(), updates=9)
    update = make_update(
        model_config, optimizer, loss=LossSection(), temperature=1.0, microbatch=rows
    )
    state = abstract_state(optimizer, {}, model_config=model_config, mesh=mesh)

    def shape(dtype, *size):
        return jax.ShapeDtypeStruct(size, dtype)

    batch = Batch(
        tokens=shape(jnp.int32, rows, width),
        completion_mask=shape(jnp.bool_, rows, width),
        loss_weights=shape(jnp.float32, rows, width),
        advantages=shape(jnp.float32, rows),
        old_logprobs=None,
        sampler_logprobs=shape(jnp.float32, rows, width),
    )
    compiled = jax.jit(update, donate_argnums=0).lower(state, [batch, batch]).compile()
    plan = compiled.memory_analysis()
    if plan is None:
        raise SystemExit(
            f"error: XLA plans no memory for {jax.default_backend()}; take another device"
        )
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return total - plan.alias_size_in_bytes


if __name__ == "__main__":
    command_line.run(main)
