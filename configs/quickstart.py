"""BASIS on the embedded model: arithmetic in words, one rollout per prompt, a laptop's CPU.

Command:   python scripts/train.py --config configs/quickstart.py
Hardware:  2 CPU cores, no accelerator, no network
"""

from basis_jax.config import (
    Config,
    DataSection,
    EstimatorSection,
    EvalSection,
    ModelSection,
    OptimSection,
    SamplingSection,
    TrainSection,
)


def config() -> Config:
    return Config(
        run_dir="runs/quickstart",
        model=ModelSection(path="embedded:quickstart"),
        data=DataSection(path="task:number_words"),
        sampling=SamplingSection(max_new_tokens=6),
        estimator=EstimatorSection(name="basis", table_samples=16),
        optim=OptimSection(lr=3e-4),
        eval=EvalSection(sets=("task:number_words",)),
        train=TrainSection(
            steps=60,
            prompts_per_step=256,
            minibatch_rollouts=256,
            microbatch_rollouts=256,
            sample_rollouts=256,
        ),
    )
