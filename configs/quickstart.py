"""BASIS on the embedded model: arithmetic in words, one rollout per prompt, a laptop's CPU.

Command:   python scripts/train.py --config configs/quickstart.py
Hardware:  2 CPU cores, no accelerator, no network
Wall time: 2 to 4 minutes, the reference table's 16,480 rollouts included
Result:    held-out accuracy at temperature 1 from 47.1-48.9 % to 76.0-83.1 %, greedy from 60.1 %
           to 85.2-90.4 % (5 seeds, commits d7621c2 and 6d9c955; seed 0: 83.1 %, greedy 90.4 %);
           with --estimator.name measured_mean --estimator.table-samples 0 to 85.2-86.2 %, greedy
           89.4-90.2 % (seeds 0 to 2, commit d8c30da)
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
        run_dir="runs/quickstart",
        model=ModelSection(path="embedded:quickstart"),
        data=DataSection(path="task:number_words", max_prompt_tokens=24),
        sampling=SamplingSection(max_new_tokens=5),
        estimator=EstimatorSection(name="basis", table_samples=16),
        optim=OptimSection(lr=7e-4, schedule="linear"),
        train=TrainSection(
            steps=80,
            prompts_per_step=512,
            minibatch_rollouts=256,
            microbatch_rollouts=256,
            sample_rollouts=512,
        ),
        eval=EvalSection(sets=("task:number_words",), samples=4, every=10),
        checkpoint=CheckpointSection(every=10),
    )
