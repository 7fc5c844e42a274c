"""Every test runs with strict shapes and types, on four virtual CPU devices, without a network."""

import importlib.util
import json
import os
import random

# Read when JAX starts its backend, and by the scripts that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",  # tests compile more than they compute:
        "--xla_llvm_disable_expensive_passes=true",  # with these two, 40 % less CPU time
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BASIS_JAX_KEEP_COMPILED", "no")

import jax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() == "cpu":
        pytest.skip("needs an accelerator (JAX_PLATFORMS=cuda)")
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch")


def pytest_collection_modifyitems(config, items):
    """``nightly`` tests run only where they are asked for: ``-m nightly``."""
    if "nightly" not in config.option.markexpr:
        chosen = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(scope="session", autouse=True)
def parameters_made_outside_any_mesh():
    """They are shared by all tests, so the first to ask must not lay them out for its own mesh."""
    tiny.params()


@pytest.fixture(scope="module", autouse=True)
def no_program_outlives_its_file():
    """A process that keeps the programs of all tests runs out of memory mappings and is aborted."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder with random weights, and a tokenizer of single characters."""
    return tiny.write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def dapo_file(tmp_path_factory):
    """Problems in DAPO-Math-17K's columns."""
    path = tmp_path_factory.mktemp("data") / "dapo.jsonl"
    rng = random.Random(0)
    rows = []
    for _ in range(60):
        a, b = rng.randrange(10), rng.randrange(10)
        chat = [{"role": "user", "content": f"what is {a} + {b}?"}]
        rows.append({"prompt": chat, "reward_model": {"ground_truth": str((a + b) % 10)}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
