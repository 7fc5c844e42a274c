"""The whole configuration of a run: frozen dataclasses, standard library only.

``configs/<name>.py`` returns a ``Config``; the command line overrides single fields
(``--optim.lr 3e-6``). The text below each field describes it.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class ModelSection:
    path: str = "embedded:quickstart"
    """Hugging Face folder, hub id, or a model in this package: ``embedded:quickstart`` or
    ``embedded:steps``."""
    compute_dtype: str = "float32"
    """``float32`` or ``bfloat16``; parameters and optimizer stay float32."""
    remat: str = "dots"
    """What the backward pass recomputes of a layer: ``none``, ``dots`` (everything except products
    with weights) or ``full`` (everything: the least memory, about 1.3x the time)."""
    attention: str = "auto"
    """``plain`` (holds all scores of a row at once: T x T), or a kernel that does not: ``splash``
    (TPUs) or ``cudnn`` (NVIDIA GPUs, in bfloat16, heads of up to 128). ``auto``: the kernel if
    there is one for the device."""
    decode_layers: str = "auto"
    """The layers of a decode step: ``scanned`` (a loop: compile time does not grow with the number
    of layers, and prefills use the sampler's weights) or ``unrolled`` (faster on CPUs). ``auto``:
    scanned on TPUs, unrolled elsewhere."""
    lora_rank: int = 0
    """Train only low-rank adapters of this rank, W x + (lora_alpha / lora_rank) B A x (0: train all
    weights). The model's own weights are frozen and stored in ``compute_dtype``. A and B are
    float32, and only they have gradients and moments and are saved in checkpoints."""
    lora_alpha: float = 32.0
    """Weight of the adapters, divided by their rank."""
    lora_targets: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Projections that have an adapter in every layer."""


@dataclass(frozen=True)
class DataSection:
    path: str = "task:number_words"
    """``task:<name>`` (a task of this package) or ``task:gym/<name>?size=1000`` (one of
    reasoning-gym), a file (.json, .jsonl, .csv or .parquet, also compressed by gzip), a folder, or
    a hub id."""
    more_sets: dict[str, float] = field(default_factory=dict)
    """Further training sets: path and weight; ``data.path`` has weight 1. A step has prompts of all
    sets in proportion to their weights. Columns have the names configured for ``data.path`` if a
    set has them, and are recognised otherwise. ``size`` applies to each set, ``problem_wrapper``
    only to the first."""
    split: str = "train"
    """Split of a hub data set or folder."""
    problem_field: str = ""
    """Column with the problem, a string or a chat's list of messages; ``a.b`` is field b of column
    a. Empty: recognised, for the layouts of MATH, GSM8K, DeepScaleR, DAPO-Math-17K, OlympiadBench
    and chats. It is also used for the files of ``eval.sets`` that have this column."""
    answer_field: str = ""
    """Column with the answer, or with a solution that ends in a box or ``#### x``. It is
    given like ``data.problem_field``. A list holds several accepted answers."""
    answers_wanted: str = "any"
    """Whether a completion must give ``any`` or ``all`` of several accepted answers. A row's own
    column ``answers_wanted`` (or OlympiadBench's ``is_multiple_answer``) takes precedence."""
    size: int = 0
    """Use this many problems (0: all)."""
    prompt_format: str = "chat"
    """``chat`` (the tokenizer's template) or ``text`` (few-shot lines, no template)."""
    system_prompt: str = ""
    """System message of the chat format (empty: none)."""
    chat_template_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of the tokenizer's chat template, such as Qwen3's
    ``enable_thinking False``."""
    problem_wrapper: str = ""
    """Text around each problem in the source, with ``{problem}`` in it. It is removed."""
    problem_prefix: str = ""
    """Text put before every problem, such as worked examples."""
    problem_suffix: str = ""
    """Text appended to every problem, such as how to give the answer."""
    max_prompt_tokens: int = 64
    """Longer prompts are left out and counted, never cut."""
    verifier: str = "exact"
    """``exact`` (the completion is the answer), ``math`` (equivalent answers, in a box, after
    ``####`` or in a sentence), ``math_strict`` (as ``math``, but not in a sentence), ``gym`` (the
    scorer of a ``task:gym/...``), or your own reward function: ``FILE.py:NAME`` (a path relative to
    the current directory) or ``package.module:NAME``. A reward above 0.5 counts as right."""
    answer_mode: str = ""
    """Where the verifier ``math`` looks for the answer, by what the prompt asks for: ``boxed``,
    ``hashes`` (GSM8K's ``#### x``), ``answer_line`` (DAPO's ``Answer: x``), ``answer_tags`` (R1's
    ``<answer>``), ``strict`` (boxed or hashes), ``lenient`` (all of them, else a sentence). Empty:
    ``lenient``, and ``strict`` for ``math_strict``."""
    verifier_weight: float = 1.0
    """Weight of the verifier's reward in training."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Rewards added to the verifier's in training, with weights: ``format``, ``overlong``, other
    verifiers, own functions. Held-out sets are graded by the verifier alone."""
    normalise_rewards: bool = False
    """Divide each reward by its standard deviation over the step before they are added, for
    estimators without a memory."""
    reward_workers: int = 0
    """Confined processes in which own reward functions are called, with one completion at a time
    (0: in this process, with all completions of a step)."""
    reward_seconds: float = 0.0
    """Limit of a call of an own reward function (0: 600 s, or 10 s of CPU time in a worker)."""
    format_pattern: str = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"
    """Regular expression for the whole completion: the reward ``format`` is 1 if it matches."""
    overlong_limit: int = 0
    """Tokens at which the reward ``overlong`` has fallen to its floor of -1 (0:
    ``sampling.max_new_tokens``)."""
    overlong_buffer: int = 0
    """The reward ``overlong`` falls from 0 to -1 over this many tokens before ``overlong_limit``
    (0: a fifth of the limit)."""


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
    """The dtype of decoding, ``bfloat16`` or ``float32`` (empty: ``model.compute_dtype``). If it is
    less precise than the trainer's, watch ``sampler/logprob_gap_mean``."""
    group_size: int = 1
    """Rollouts per prompt. BASIS needs one; group estimators need two or more. With a plan that
    asks for groups of unequal size, this is the largest."""
    plan: str = "uniform"
    """Which problems a step samples, and how often: ``uniform``, ``weighted``, ``sticky``,
    ``greedy_beside``, ``sequential``, ``branch``, or your own: ``FILE.py:NAME`` (a path relative to
    the current directory) or ``package.module:NAME``."""
    plan_options: dict[str, bool | int | float | str] = field(default_factory=dict, hash=False)
    """The plan's options."""


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
    """Reference rollouts per problem, if the run makes the table itself (0: no table, for all
    estimators but basis, a_star_po and v05)."""
    features: int = 0
    """Numbers per problem from the reference policy's state at the end of the prompt, at the cost
    of one prefill per problem (0: none). They are for estimators that take features, such as
    value_filter, and are kept in the table."""
    score_norms: str = "logits"
    """Weight of a completion in baselines of least noise, summed over its tokens: ``logits``, the
    squared norm of the score in the logits (right for plain gradient descent), or ``natural``,
    1 / p - 1 for a token of probability p (closer to AdamW's scaling)."""
    measure_every: int = 8
    """Steps between measurements of the gradient, for estimators that learn from them:
    measured_mean. Each costs two more backward passes over an update's rollouts, and the memory of
    one more gradient."""


@dataclass(frozen=True)
class LossSection:
    objective: str = "ppo_clip"
    """``ppo_clip``, ``gspo`` (clips of about 3e-4), ``cispo``, ``gpg``, or a regression:
    ``a_star_po``, ``rebel``, ``tbrm``. ``gspo`` and the regressions need ``sequence_mean``;
    ``a_star_po`` and ``tbrm`` keep the starting weights in memory."""
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; DAPO's clip-higher: 0.2, 0.28."""
    clip_high: float = 0.2
    """See ``clip_low``."""
    dual_clip: float = 0.0
    """Upper bound, above 1, on the ratio of tokens with negative advantage (0: off; often 3)."""
    beta: float = 1e-3
    """Of the regressions: the larger, the closer to the starting policy (``rebel``: to the policy
    that sampled, with the paper's eta = 1 / beta)."""
    sampler_correction: str = "none"
    """Correct for a sampler of lower precision by p_trainer / p_sampler: ``tis`` (weight of a token
    up to ``sampler_cap``), ``sequence_tis`` (of a completion), ``icepop`` (tokens outside
    ``sampler_floor`` to ``sampler_cap`` weigh 0), ``mask`` (completions whose geometric mean is
    outside are left out), ``ais`` (TIS, with a strength that is computed for the whole update).
    ``mask`` and ``ais`` cost a forward pass if a step has one update."""
    sampler_cap: float = 2.0
    """Largest p_trainer / p_sampler. Published: 2 (TIS), 5 (IcePop, AIS), 1.001 (mask)."""
    sampler_floor: float = 0.5
    """Smallest p_trainer / p_sampler, of ``icepop`` and ``mask``. Published: 0.5 and 0.999."""
    ais_mismatch: float = 0.02
    """Mean difference in nats per token at which ``ais`` corrects in full."""
    ais_variance: float = 1.2
    """Growth of the advantages' standard deviation above which ``ais`` corrects less."""
    ais_beta: float = 1.0
    """How much less ``ais`` then corrects. The paper does not print its value; 0 leaves the term
    out."""
    kl: str = "k3+"
    """Estimate of KL(policy || starting policy): ``k1``, ``k2``, ``k3``, or ``k3+`` (value of k3,
    gradient of k2)."""
    kl_coef: float = 0.0
    """Weight of the KL term (0: none; otherwise the starting weights stay in memory)."""
    aggregation: str = "token_mean"
    """``token_mean`` (DAPO), ``sequence_mean`` (GRPO), ``constant_length`` (Dr. GRPO)."""
    logprob_chunk: int = 512
    """Positions whose logits exist at once, of ``train.microbatch_rollouts`` rows a device; memory
    is rows x chunk x vocabulary, also where a microbatch has more and shorter rows."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses the log-probabilities of the starting policy."""
        return self.kl_coef > 0 or self.objective in ("a_star_po", "tbrm")


@dataclass(frozen=True)
class CriticSection:
    """Of ``estimator.name gae``: a linear value head on the policy's final states."""

    lr: float = 3e-3
    """Adam's learning rate of the head, whose states have length 1."""
    warmup_steps: int = 0
    """First steps in which only the critic is updated."""
    clip: float = 0.5
    """PPO's value clipping: values gain nothing by moving further than this in a step (0: off)."""
    discount: float = 1.0
    """GAE's gamma."""
    trace_decay: float = 1.0
    """GAE's lambda; at 1 an advantage is the reward minus the token's value."""
    whiten: bool = True
    """Whether advantages are whitened over the tokens of the step."""


@dataclass(frozen=True)
class OptimSection:
    lr: float = 1e-6
    """AdamW's learning rate, after warm-up and before decay."""
    schedule: str = "constant"
    """``constant``, ``linear`` or ``cosine`` decay to zero over the run, after warm-up."""
    warmup_steps: int = 0
    """Optimizer updates of linear warm-up."""
    b1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    b2: float = 0.999
    """AdamW's decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square in AdamW's division."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    moments_dtype: str = "float32"
    """The dtype of AdamW's two moments: ``float32``, or ``bfloat16`` with half the memory, rounded
    stochastically. The noise of rounding is at most 2^-8 / sqrt(1 - b^2) of a moment: 0.9 % of the
    first at b1 = 0.9, 8.7 % of the second at b2 = 0.999."""
    max_grad_norm: float = 1.0
    """Global-norm gradient clipping (0: off)."""


@dataclass(frozen=True)
class TrainSection:
    steps: int = 100
    """Training steps of the whole run, those done before a resume included."""
    prompts_per_step: int = 512
    """Problems of a step, all different; each has ``sampling.group_size`` rollouts."""
    minibatch_rollouts: int = 512
    """Rollouts per optimizer update. A step has rollouts / this number of updates."""
    microbatch_rollouts: int = 64
    """Rollouts per forward and backward pass at full width, on each of the devices that the batch
    is split over (``mesh.data`` x ``mesh.fsdp``); a pass over shorter ones takes a power of two
    times as many. Gradients are summed over the passes. ``auto`` (or 0): the most that fit the
    devices' memory, printed and kept in the run folder."""
    sample_rollouts: int = 512
    """Rollouts decoded at once, on all devices together. Further rollouts take the slots of those
    that end. ``auto`` (or 0): the most that fit the devices' memory."""
    log_samples: int = 8
    """Completions written to samples.jsonl each step."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``,
    your own (``FILE.py:NAME`` or ``package.module:NAME``); several at once, or none."""
    patience: int = 20
    """The run ends after so many successive steps without an update, because all rewards of the
    step were equal. It has failed if no completion was right, and has solved the problems if all
    were."""
    abort_on: tuple[str, ...] = ()
    """Warnings that end the run: names of fields of ``watch``."""


@dataclass(frozen=True)
class WatchSection:
    """Limits for warnings; each warning is given once per run. Shares are fractions of 1. "Of the
    first" is relative to the first update of the run."""

    zero_share: float = 0.9
    """More advantages than this share are 0."""
    invalid: float = 0.1
    """More rollouts than this share could not be graded."""
    truncated: float = 0.5
    """More completions than this share are cut at the length limit."""
    entropy: float = 0.05
    """The policy's entropy per token is below this share of the first."""
    length: float = 0.2
    """The mean length of completions is below this share of the first."""
    logprob_gap: float = 0.1
    """Sampler and trainer differ by more than this many nats per token, on average."""
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
    """Temperature of the completions (0: greedy)."""
    set_samples: dict[str, int] = field(default_factory=dict)
    """Sets with another number of completions, as in ``AIME24 32``."""
    set_temperatures: dict[str, float] = field(default_factory=dict)
    """Sets with another temperature; one at 0 has one completion per problem."""
    set_verifiers: dict[str, str] = field(default_factory=dict)
    """Sets with another verifier than ``data.verifier``."""

    def samples_of(self, name: str) -> int:
        greedy = self.set_temperatures.get(name) == 0
        return self.set_samples.get(name, 1 if greedy else self.samples)

    def temperature_of(self, name: str) -> float:
        return self.set_temperatures.get(name, self.temperature)


@dataclass(frozen=True)
class MeshSection:
    data: int = -1
    """Devices along the batch; -1: all that are left."""
    fsdp: int = 1
    """Devices that share parameters and batch."""
    tensor: int = 1
    """Devices that share heads, feed-forward and vocabulary."""
    sample_tensor: int = 0
    """The size of ``tensor`` while sampling (0: the same). The sampler's copy of the weights, which
    is not split over ``fsdp``, is split over so many devices, and rows over the others."""


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 10
    """Steps between checkpoints; the last step is always kept."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 0
    """Number of checkpoints with the highest held-out accuracy that are kept too. Only evaluated
    steps count (``eval.every``)."""


@dataclass(frozen=True)
class Config:
    run_dir: str
    """Folder for everything the run writes; starting again with it resumes."""
    seed: int = 0
    """Sampling and the order of problems follow from it; the same seed gives the same run."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    estimator: EstimatorSection = EstimatorSection()
    loss: LossSection = LossSection()
    critic: CriticSection = CriticSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    watch: WatchSection = WatchSection()
    eval: EvalSection = EvalSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()

    def held_out_data(self, name: str) -> DataSection:
        """How the problems of a set of ``eval.sets`` are read and graded."""
        verifier = self.eval.set_verifiers.get(name, self.data.verifier)
        mode = self.data.answer_mode if verifier == self.data.verifier else ""
        return replace(self.data, verifier=verifier, answer_mode=mode, rewards={})
