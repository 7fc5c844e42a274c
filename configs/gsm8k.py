"""A first run on a real model: Qwen2.5-1.5B-Instruct on GSM8K, one rollout per prompt, no table.

Command:   python scripts/train.py --config configs/gsm8k.py
           python scripts/train.py --config configs/gsm8k.py --model.path DIR --data.path FILE
           python scripts/train.py --config configs/gsm8k.py --dry-run --topology h100
Hardware:  planned for one GPU of 80 GB, or more devices; it fits by the dry run
Expected:  not run by us, on any hardware

The estimator is value_filter, which learns each problem's value while it trains and needs no
reference rollouts. For the paper's estimator, whose table takes 7,473 x 8 rollouts before the first
step (as many as 117 steps of sampling): --estimator.name basis --estimator.table-samples 8.
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
        run_dir="runs/gsm8k",
        model=ModelSection(
            path="Qwen/Qwen2.5-1.5B-Instruct", compute_dtype="bfloat16", remat="full"
        ),
        data=DataSection(
            path="openai/gsm8k:main",
            problem_suffix="\nPlease reason step by step, and put your final answer in \\boxed{}.",
            max_prompt_tokens=512,
            verifier="math",
        ),
        sampling=SamplingSection(max_new_tokens=1024),
        estimator=EstimatorSection(name="value_filter", table_samples=0),
        optim=OptimSection(lr=1e-6, warmup_steps=5),
        train=TrainSection(
            steps=100,
            prompts_per_step=512,
            minibatch_rollouts=256,
            microbatch_rollouts=8,
            sample_rollouts=256,
        ),
        eval=EvalSection(sets=("GSM8K",), every=25),
        checkpoint=CheckpointSection(every=25),
    )
