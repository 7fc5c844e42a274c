"""The paper's recipe: Qwen3-4B on DAPO-Math-17K, 512 prompts x 1 rollout (arXiv 2605.27293, 4).

Command:   python scripts/train.py --config configs/qwen_math.py
           python scripts/train.py --config configs/qwen_math.py --model.path DIR --data.path FILE
Hardware:  the paper used 4 GPUs and 8.3 hours for 150 steps; not yet run by us at this size
Expected:  average over the seven sets .473 after 150 steps (published; GRPO with 8 rollouts: .471)

Offline: 17,398 problems x 64 reference rollouts = 1.11 M completions, 14.5 times the 76,800 of the
run itself. Make the table once with scripts/reference_stats.py and give it as --estimator.table.

Held-out sets as in the paper: avg@32 on AIME24, AIME25, AMC23 and HMMT25, at the training
temperature, and one greedy completion a problem on MATH-500, Minerva and OlympiadBench. That is
5,606 completions, as many as 11 steps sample (and 130 greedy ones for eval/greedy_accuracy).

DAPO's own prompt asks for a last line "Answer: x". It is removed, and the new prompt asks for a box
as in the held-out sets, so data.answer_mode stays empty. If you keep DAPO's prompt, set it to
answer_line.
"""

from basis_jax.config import (
    CheckpointSection,
    Config,
    DataSection,
    EstimatorSection,
    EvalSection,
    LossSection,
    MeshSection,
    ModelSection,
    OptimSection,
    SamplingSection,
    TrainSection,
)


def config() -> Config:
    return Config(
        run_dir="runs/qwen_math",
        model=ModelSection(path="Qwen/Qwen3-4B", compute_dtype="bfloat16", remat="full"),
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
        sampling=SamplingSection(temperature=1.0, max_new_tokens=4096),
        estimator=EstimatorSection(name="basis", table_samples=64),
        loss=LossSection(clip_low=0.2, clip_high=0.2),
        optim=OptimSection(lr=1e-6),
        train=TrainSection(
            steps=150,
            prompts_per_step=512,
            minibatch_rollouts=256,
            microbatch_rollouts=2,  # on each device: 8 on the paper's 4
            sample_rollouts=128,
        ),
        eval=EvalSection(
            sets=("AIME24", "AIME25", "AMC23", "HMMT25", "MATH-500", "Minerva", "OlympiadBench"),
            every=50,
            set_samples={"AIME24": 32, "AIME25": 32, "AMC23": 32, "HMMT25": 32},
            set_temperatures={"MATH-500": 0.0, "Minerva": 0.0, "OlympiadBench": 0.0},
        ),
        mesh=MeshSection(data=1, fsdp=-1),
        checkpoint=CheckpointSection(every=10),
    )
