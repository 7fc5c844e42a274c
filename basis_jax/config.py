"""The whole configuration of a run: frozen dataclasses, standard library only.

``configs/<name>.py`` returns a ``Config``; the command line overrides single fields
(``--optim.lr 3e-6``). Every field is read somewhere, and says here what it means.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelSection:
    path: str = "embedded:quickstart"
    """Hugging Face folder, hub id, or a model in this package: ``embedded:quickstart`` or
    ``embedded:steps``."""
    compute_dtype: str = "float32"
    """``float32`` or ``bfloat16``; parameters and optimizer stay float32."""
    remat: str = "dots"
    """What the backward pass computes again of a layer: ``none``, ``dots`` (all but the products
    with weights: attention and elementwise work) or ``full`` (everything: the least memory, about
    1.3x the time)."""
    attention: str = "plain"
    """``plain`` (all scores of a row at once: T x T) or ``cudnn`` (NVIDIA's kernel, for long rows
    on GPUs in bfloat16)."""


@dataclass(frozen=True)
class DataSection:
    path: str = "task:number_words"
    """``task:<name>`` (made here; ``task:gym/<name>?size=1000``: by reasoning-gym), a file (.json,
    .jsonl, .csv or .parquet, also compressed by gzip), a folder, or a hub id."""
    split: str = "train"
    """Split of a hub data set or folder."""
    problem_field: str = ""
    """Column with the problem, a string or a chat's list of messages; ``a.b`` reaches inside.
    Empty: recognised, for the layouts of MATH, GSM8K, DeepScaleR and DAPO-Math-17K. The files of
    ``eval.sets`` have these columns too, where they are there."""
    answer_field: str = ""
    """Column with the answer, or with a solution that ends in a box or ``#### x``; as above. A list
    holds several accepted answers."""
    answers_wanted: str = "any"
    """Of several accepted answers: ``any`` or ``all``. A row's own column ``answers_wanted`` (or
    OlympiadBench's ``is_multiple_answer``) wins."""
    size: int = 0
    """Use this many problems (0: all)."""
    prompt_format: str = "chat"
    """``chat`` (the tokenizer's template) or ``text`` (few-shot lines, no template)."""
    system_prompt: str = ""
    """System message of the chat format (empty: none)."""
    chat_template_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What the tokenizer's template reads besides the messages, such as Qwen3's
    ``enable_thinking False``."""
    problem_wrapper: str = ""
    """Text that the source has around each problem, ``{problem}`` in it: it is taken off."""
    problem_prefix: str = ""
    """Text put before every problem, such as worked examples."""
    problem_suffix: str = ""
    """Text appended to every problem, such as how to give the answer."""
    max_prompt_tokens: int = 64
    """Longer prompts are left out and counted, never cut."""
    verifier: str = "exact"
    """``exact`` (the completion is the answer), ``math`` (equivalent answers, in a box, after
    ``####`` or in a sentence), ``math_strict`` (not in a sentence) or ``gym`` (the scorer of a
    ``task:gym/...``)."""
    answer_mode: str = ""
    """Where the verifier ``math`` looks for the answer, by what the prompt asks for: ``boxed``,
    ``hashes`` (GSM8K's ``#### x``), ``answer_line`` (DAPO's ``Answer: x``), ``answer_tags`` (R1's
    ``<answer>``), ``strict`` (boxed or hashes), ``lenient`` (all of them, else a sentence). Empty:
    ``lenient``, and ``strict`` for ``math_strict``."""


@dataclass(frozen=True)
class SamplingSection:
    temperature: float = 1.0
    """Temperature of rollouts; log-probabilities everywhere are those of this temperature."""
    top_p: float = 1.0
    """Refused for training when < 1: the gradient is that of the untruncated distribution."""
    top_k: int = 0
    """Refused for training when > 0, as ``top_p``."""
    max_new_tokens: int = 8
    """Length limit of a completion."""
    stop_tokens: tuple[str, ...] = ()
    """Extra strings that end a completion; each must be one token."""
    dtype: str = ""
    """What rollouts are decoded in, ``bfloat16`` or ``float32`` (empty: ``model.compute_dtype``).
    Where it is coarser than the trainer's, watch ``sampler/logprob_gap_mean``."""
    group_size: int = 1
    """Rollouts per prompt. BASIS needs one; group estimators need two or more."""


@dataclass(frozen=True)
class EstimatorSection:
    name: str = "basis"
    """``basis``, ``reinforce_pp``, ``grpo``, ``dr_grpo``, ``rloo``, ``spo``, ..., or your own:
    ``FILE.py:NAME`` (a path relative to the current directory) or ``package.module:NAME``."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """The estimator's keyword options."""
    table: str = ""
    """Offline reference table (.npz); empty: made in the run folder when one is needed."""
    table_samples: int = 64
    """Reference rollouts per problem of a table made here (0: none, for estimators that can start
    without a table: SPO, value_filter)."""
    features: int = 0
    """Numbers per problem from the reference policy's state at the end of the prompt, one prefill
    each, for estimators that take features: value_filter (0: none). They are kept in the table."""
    score_norms: str = "logits"
    """What weighs a completion in baselines of least noise, summed over its tokens: ``logits``, the
    squared norm of the score in the logits (plain gradient descent), or ``natural``, 1 / p - 1 for
    a token of probability p (nearer to what AdamW's scaling makes of it)."""

    measure_every: int = 4
    """Steps between measurements of the gradient, for estimators that learn from them:
    measured_mean. Each costs one more backward pass over an update's rollouts, and the memory of
    one more gradient."""


@dataclass(frozen=True)
class LossSection:
    objective: str = "ppo_clip"
    """``ppo_clip``, ``gspo`` (with ``sequence_mean`` and clips of about 3e-4), ``cispo`` or
    ``gpg``."""
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; DAPO's clip-higher: 0.2, 0.28."""
    clip_high: float = 0.2
    dual_clip: float = 0.0
    """Bound on the ratio where the advantage is negative, above 1 (0: off; often 3)."""
    tis_cap: float = 0.0
    """Each token is weighted by p_trainer / p_sampler of the policy that sampled, at most this
    (0: off; often 2): for a sampler of lower precision. Apart from the ratio that is clipped."""
    kl: str = "k3+"
    """Estimate of KL(policy || starting policy): ``k1``, ``k2``, ``k3``, or ``k3+`` (value of k3,
    gradient of k2)."""
    kl_coef: float = 0.0
    """Weight of the KL term (0: none; otherwise the starting weights stay in memory)."""
    aggregation: str = "token_mean"
    """``token_mean`` (DAPO), ``sequence_mean`` (GRPO), ``constant_length`` (Dr. GRPO)."""
    logprob_chunk: int = 512
    """Positions whose logits exist at once, of ``train.microbatch_rollouts`` rows; memory is
    rows x chunk x vocabulary, also where a microbatch has more and shorter rows."""


@dataclass(frozen=True)
class OptimSection:
    lr: float = 1e-6
    schedule: str = "constant"
    """``constant``, ``linear`` or ``cosine`` decay to zero over the run, after warm-up."""
    warmup_steps: int = 0
    """Optimizer updates of linear warm-up."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Global-norm gradient clipping (0: off)."""


@dataclass(frozen=True)
class TrainSection:
    steps: int = 100
    prompts_per_step: int = 512
    minibatch_rollouts: int = 512
    """Rollouts per optimizer update; updates a step = rollouts / this."""
    microbatch_rollouts: int = 64
    """Rollouts per forward and backward pass at full width; a pass over shorter ones takes a power
    of two times as many. Gradients are summed over the passes."""
    sample_rollouts: int = 512
    """Rollouts decoded at once; where there are more, they take the places of those that end."""
    log_samples: int = 8
    """Completions written to samples.jsonl each step."""
    patience: int = 20
    """Steps in a row whose rewards are all equal, so that the policy is not updated, after which
    the run ends: as failed where no completion was right, as solved where all were."""
    abort_on: tuple[str, ...] = ()
    """Warnings that end the run: names of fields of ``watch``."""


@dataclass(frozen=True)
class WatchSection:
    """Limits beyond which a step is warned about, once a run. Shares are fractions of 1; "of the
    first" is relative to the first update of the run."""

    zero_share: float = 0.9
    """More advantages than this share are 0."""
    invalid: float = 0.1
    """More rollouts than this share could not be graded."""
    truncated: float = 0.5
    """More completions than this share are cut at the length limit."""
    entropy: float = 0.05
    """The policy's entropy a token is below this share of the first."""
    length: float = 0.2
    """The mean length of completions is below this share of the first."""
    logprob_gap: float = 0.1
    """Sampler and trainer differ by more than this many nats a token, on average."""
    grad_norm: float = 0.01
    """The gradient's norm is below this share of the first."""


@dataclass(frozen=True)
class EvalSection:
    sets: tuple[str, ...] = ("task:number_words",)
    """Held-out problems: names of ``data.benchmarks`` (MATH-500, AIME24, ...), or paths as
    ``data.path`` (a task gives its held-out side)."""
    folder: str = ""
    """Folder whose ``<name>.jsonl`` files stand in for benchmarks on the hub."""
    size: int = 0
    """Use this many problems of every set (0: all)."""
    every: int = 0
    """Evaluate every so many steps (0: before and after only)."""
    samples: int = 1
    """Completions per held-out problem."""
    temperature: float = 1.0
    """0: greedy."""


@dataclass(frozen=True)
class MeshSection:
    data: int = -1
    """Devices along the batch; -1: all that are left."""
    fsdp: int = 1
    """Devices that share parameters and batch."""
    tensor: int = 1
    """Devices that share heads, feed-forward and vocabulary."""


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 10
    """Steps between checkpoints; the last step is always kept."""
    keep: int = 2
    """Newest checkpoints kept."""


@dataclass(frozen=True)
class Config:
    run_dir: str
    """Folder for everything the run writes; starting again with it resumes."""
    seed: int = 0
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    estimator: EstimatorSection = EstimatorSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    watch: WatchSection = WatchSection()
    eval: EvalSection = EvalSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()


def config_from(values: Mapping[str, Any]) -> Config:
    """The ``Config`` that ``dataclasses.asdict`` made ``values`` of, from a run's config.json or a
    checkpoint. Fields that it lacks keep their defaults; raises ValueError for unknown ones."""
    return _replaced(Config(run_dir=""), values)


def _replaced(section: Any, values: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(section)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"the saved config has the field {unknown[0]}, unknown to this version")
    changed = {}
    for name, value in values.items():
        before = getattr(section, name)
        if is_dataclass(before):
            value = _replaced(before, value)
        changed[name] = tuple(value) if isinstance(value, list) else value
    return replace(section, **changed)
