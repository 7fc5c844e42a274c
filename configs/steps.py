"""Our value filter on the embedded model of worked steps: many right completions of every prompt.

Command:   python scripts/train.py --config configs/steps.py
Hardware:  2 CPU cores, no accelerator, no network
Wall time: TODO
Result:    TODO
"""

from basis_jax.config import (
    CheckpointSection,
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
        run_dir="runs/steps",
        model=ModelSection(path="embedded:steps"),
        data=DataSection(
            path="task:steps/free",
            max_prompt_tokens=24,
            verifier="math",
            answer_mode="answer_line",
        ),
        sampling=SamplingSection(max_new_tokens=40),
        estimator=EstimatorSection(name="value_filter", table_samples=0),
        optim=OptimSection(lr=5e-4, schedule="constant"),
        train=TrainSection(
            steps=40,
            prompts_per_step=256,
            minibatch_rollouts=256,
            microbatch_rollouts=64,
            sample_rollouts=256,
        ),
        eval=EvalSection(sets=("task:steps/free",), samples=4, every=10),
        checkpoint=CheckpointSection(every=10),
    )
