"""configs/qwen_math.py for one GPU: Qwen3-1.7B on DAPO-Math-17K, 256 prompts a step, no table.

Command:   python scripts/train.py --config configs/qwen_math_1gpu.py
           (with --model.path DIR --data.path FILE: without the hub)
           python scripts/train.py --config configs/qwen_math_1gpu.py --dry-run --topology h100
Hardware:  planned for one GPU of 80 GB, of which JAX takes 60; it fits by the dry run
Expected:  not run by us, on any hardware

A table of 64 rollouts a problem would take 1.11 M rollouts before the first step, as many as 4,350
steps of sampling here. value_filter starts without one; for the paper's estimator, with a small
table (544 steps of sampling): --estimator.name basis --estimator.table-samples 8.

Held-out sets as in configs/qwen_math.py: 5,606 completions, as many as 22 steps sample here.
"""

from basis_jax.config import (
    CheckpointSection,
    Config,
    DataSection,
    EstimatorSection,
    EvalSection,
    LossSection,
    ModelSection,
    OptimSection,
    SamplingSection,
    TrainSection,
)


def config() -> Config:
    return Config(
        run_dir="runs/qwen_math_1gpu",
        model=ModelSection(path="Qwen/Qwen3-1.7B", compute_dtype="bfloat16", remat="full"),
        data=DataSection(
            path="BytedTsinghua-SIA/DAPO-Math-17k",
            problem_wrapper=(
                "Solve the following math problem step by step. The last line of your response "
                "should be of the form Answer: $Answer (without quotes) where $Answer is the "
                "answer to the problem.\n\n{problem}\n\nRemember to put your answer on its own "
                'line after "Answer:".'
            ),
            problem_suffix="\nPlease reason step by step, and put your final answer in \\boxed{}.",
            max_prompt_tokens=1024,
            verifier="math",
        ),
        sampling=SamplingSection(temperature=1.0, max_new_tokens=3072),
        estimator=EstimatorSection(name="value_filter", table_samples=0),
        loss=LossSection(clip_low=0.2, clip_high=0.2),
        optim=OptimSection(lr=1e-6),
        train=TrainSection(
            steps=150,
            prompts_per_step=256,
            minibatch_rollouts=128,
            microbatch_rollouts=2,
            sample_rollouts=48,
        ),
        eval=EvalSection(
            sets=("AIME24", "AIME25", "AMC23", "HMMT25", "MATH-500", "Minerva", "OlympiadBench"),
            every=50,
            set_samples={"AIME24": 32, "AIME25": 32, "AMC23": 32, "HMMT25": 32},
            set_temperatures={"MATH-500": 0.0, "Minerva": 0.0, "OlympiadBench": 0.0},
        ),
        checkpoint=CheckpointSection(every=10),
    )
