"""`SelfStudyConfig`: TRL's trainer settings with defaults that fit cartridges, and the synthesis settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.base_config import _BaseConfig

from ..initialization import check_options, list_strategies
from ..objectives import check_objective
from ..self_study import SynthesisConfig
from .run_size import parse_budget

INITIALIZE_FROM_NOTHING = "none"
VLLM_MODES = ("colocate", "server")


@dataclass
class SelfStudyConfig(SynthesisConfig, _BaseConfig):
    """Settings of `SelfStudyTrainer`: all of `TrainingArguments`, all of `SynthesisConfig`, and those below.

    Defaults that differ from TRL's: a learning rate that would wreck weights but that a KV cache needs, Adam's betas as
    in the paper, no weight decay (it would pull keys and values to zero), batches of rows of like length, and neither
    gradient checkpointing nor mixed precision, which pay where weights are trained. "Paper" is arXiv 2506.06266.

    Raises:
        ValueError: a value is out of its range, or two do not go together; the message names them.
    """

    _argument_group_name = "training (of `TrainingArguments`) and synthesis"
    _VALID_DICT_FIELDS = [  # noqa: RUF012 (as in the base)
        *_BaseConfig._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "engine_options",
        "initialization_kwargs",
    ]

    # -- the model and its cartridge -----------------------------------------------------------------------------------

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained`, where `model` is given by name."},
    )
    shard_model: bool = field(
        default=False,
        metadata={
            "help": "Split the base model's weights over the processes (FSDP 2), for a model larger than one device: "
            "each process reads only its share. Needs `model` by name, several processes (`accelerate launch`) and "
            "written conversations, because writing in process needs the whole model."
        },
    )
    initialization: str = field(
        default="auto",
        metadata={
            "help": "How a new cartridge is initialized from the corpus (or, where that is not known, from the "
            "conversations' `context`). `most_attended`: each head's tokens that receive "
            "the most attention when the model recites the corpus. `attention_matching`: such, fitted to what the heads "
            "give with the whole text. `first_tokens` (paper): its first tokens. `auto`: the first that the model allows, "
            "the fitted ones before the others, because they take far fewer steps to the same quality. `none` leaves the "
            "cartridge as it is. `docs/training.md` lists the others."
        },
    )
    initialization_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Options of the initialization, as JSON: `{"cartridge": "user/name"}` of `pretrained` (a folder, or a '
            'name on the Hub), `{"chunk_tokens": 128}` of `sampled_chunks`.'
        },
    )

    # -- what is minimized ---------------------------------------------------------------------------------------------

    loss_type: str = field(
        default="forward_kl",
        metadata={
            "help": "`forward_kl` (paper): the cartridge is to cover all that the teacher would say. `reverse_kl`: it is "
            "to say nothing that the teacher would not. `jsd`: between the two, see `jsd_beta`. `cross_entropy`: learn "
            "the written tokens alone; needs no targets of the teacher, and is the paper's weaker baseline."
        },
    )
    jsd_beta: float = field(
        default=0.5,
        metadata={"help": "Weight of the teacher in the mixture of `loss_type=jsd`; 0 is forward, 1 reverse KL."},
    )
    loss_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the logits of student and teacher in the loss (paper: 1). Above 1, unlikely tokens count "
            "for more. Needs `teacher_hidden_states`: top-k targets do not tell how the rest would change."
        },
    )
    prompt_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the questions' tokens in the loss, beside the answers' 1 (paper: 0). Stored targets cover "
            "answers only, so above 0 the teacher scores each batch anew, which costs about a forward pass."
        },
    )
    loss_chunk_size: int = field(
        default=128,
        metadata={"help": "Positions whose logits exist at a time while the loss over the vocabulary is computed."},
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={"help": "Use Liger's fused loss (and its kernels in the model). Needs a CUDA device."},
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Lay the rows of a batch end to end instead of padding them to the longest. Saves memory and time "
            "where lengths differ and the attention implementation knows packed rows (flash attention does)."
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Compute activations again in the backward pass instead of keeping them: less memory, about a third "
            "more time."
        },
    )
    bf16: bool | None = field(
        default=False,
        metadata={
            "help": "Mixed precision. The frozen model computes in the type that its weights are stored in anyway "
            "(`dtype=auto`), and the cartridge is kept in float32, so this gains little."
        },
    )

    # -- on-policy -----------------------------------------------------------------------------------------------------

    on_policy_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of each batch whose answers the model with the current cartridge writes itself, scored by the "
            "teacher with the chunk in context, in process (paper: 0). Costs decoding in every step."
        },
    )
    on_policy_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of on-policy answers; 1 is the student as it is."}
    )
    teacher_cache_size: int = field(
        default=16,
        metadata={"help": "Chunks whose prefix is kept for the teacher in process (memory: that of so many chunks)."},
    )
    rows_per_chunk: int = field(
        default=4,
        metadata={
            "help": "With live targets (conversations without stored ones), how many rows of a chunk stand together in "
            "the order of training: its text is read once for them."
        },
    )

    # -- the engine that writes conversations (names as in TRL) --------------------------------------------------------

    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Write conversations with vLLM instead of the model in process: sets `engine` (and `base_url`)."
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "`colocate`: vLLM in this process, on the same device (`engine=vllm`; `engine_options` go to it, such as "
            '`{"gpu_memory_utilization": 0.3}`: it otherwise takes nearly all of a GPU). '
            "`server`: one that is running (`engine=openai`). The model in process scores in either case."
        },
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "Of a server, e.g. `http://localhost:8000/v1`; instead of host and port."},
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the server (`vllm serve`)."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the server (`vllm serve`)."})

    # -- data ----------------------------------------------------------------------------------------------------------

    resample_every: int = field(
        default=0,
        metadata={
            "help": "Steps after which new conversations are written, so that each is used once, as in the paper; needs "
            "a corpus and `max_steps`. 0 writes `num_conversations` once and passes over them `num_train_epochs` times, "
            "which is cheaper where writing costs more than training."
        },
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Conversations per step and device (paper: 64 in all)."}
    )
    max_steps: int = field(
        default=-1,
        metadata={
            "aliases": ["--steps"],
            "help": "Optimizer steps; -1 passes over the conversations `num_train_epochs` times. 0 only "
            "initializes the cartridge.",
        },
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Time that the run may take, e.g. `5m`: it measures its own speed first, writes as many conversations and "
            "makes as many steps as fit (no more than without a budget), and stops when time is up. What is given "
            "(`num_conversations`, `max_steps`) stands. Loading the model by name counts, evaluating and saving do not."
        },
    )
    num_eval_conversations: int = field(
        default=0,
        metadata={
            "help": "Held-out conversations to evaluate on, written when training starts, where `train_dataset` is a "
            "corpus and there is no `eval_dataset`."
        },
    )
    num_train_epochs: float = field(
        default=3.0,
        metadata={"help": "Passes over the conversations (the paper uses each once, and makes many more)."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "`group_by_length`: rows of like length share a batch, so little is padded. Also `random`, "
            "`sequential`."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator picks the columns itself."})

    # -- optimization --------------------------------------------------------------------------------------------------

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Peak learning rate. Keys and values need far more than weights do (paper: 2e-2). By default 4e-2 for a "
            "tenth of the text and more, growing to 8e-2 for a twentieth and less."
        },
    )
    key_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the keys, if it is not to be `learning_rate`."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the values, if it is not to be `learning_rate`."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second beta (paper: 0.95)."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay (paper: 0): it would pull keys and values to zero."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule; a short run ends better when it ends low."}
    )
    warmup_steps: float = field(default=10, metadata={"help": "Steps of linear warm-up (below 1: a share of all)."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Largest norm of the gradient, beyond which it is scaled down; 0 never does."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of an exponential moving average of the cartridge, which is then what is evaluated and saved "
            "(paper: none). 0 keeps none; 0.98 averages over about the last 50 steps."
        },
    )

    # -- what is shown -------------------------------------------------------------------------------------------------

    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    # HfArgumentParser wants `None` first.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers to report to, as in Trainer: trackio, tensorboard, wandb, …"}
    )
    plot: bool = field(
        default=True,
        metadata={
            "help": "Draw `training_curve.png` in `output_dir` at the end, and `memory.png` beside the model card, if "
            "matplotlib is installed."
        },
    )

    gate: bool = field(
        default=True,
        metadata={
            "help": "Save a gate beside the cartridge, which tells requests about the text from others by their words; made of "
            "the text in a second."
        },
    )

    # -- the model card (names as in `Trainer.create_model_card`) ------------------------------------------------------

    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the cartridge, as the Hub writes it (`cc-by-4.0`): it holds what the corpus says. By "
            "default the card states none."
        },
    )
    language: list[str] | None = field(default=None, metadata={"help": "Languages of the corpus (`en`)."})
    finetuned_from: str | None = field(
        default=None,
        metadata={
            "help": "The base model's name on the Hub, where it is loaded from a folder: `push_to_hub` needs one that "
            "others can load."
        },
    )

    def __post_init__(self) -> None:
        if self.vllm_mode not in VLLM_MODES:
            raise ValueError(f"`vllm_mode` must be one of {', '.join(VLLM_MODES)}, got {self.vllm_mode!r}.")
        if self.use_vllm and self.vllm_mode == "colocate":
            self.engine = "vllm"
        elif self.use_vllm:
            own = f"http://{self.vllm_server_host}:{self.vllm_server_port}/v1"
            self.engine, self.base_url = "openai", self.base_url or [self.vllm_server_base_url or own]
        SynthesisConfig.__post_init__(self)
        _BaseConfig.__post_init__(self)
        if isinstance(self.language, str):  # `language: en` in YAML
            self.language = [self.language]
        check_objective(self.loss_type, use_liger=self.use_liger_kernel)
        if self.initialization not in (known := [*list_strategies(), INITIALIZE_FROM_NOTHING]):
            raise ValueError(f"`initialization` must be one of {', '.join(known)}, got {self.initialization!r}.")
        options = self.initialization_kwargs or {}  # JSON has become a mapping
        if not isinstance(options, dict):
            raise ValueError(f"`initialization_kwargs` must be a mapping (a JSON object), got {options!r}.")
        if self.initialization != INITIALIZE_FROM_NOTHING:
            check_options(self.initialization, options)
        elif options:
            raise ValueError(
                "`initialization_kwargs` are options of an initialization, and `initialization` is `none`."
            )
        for name in ("loss_chunk_size", "teacher_cache_size", "rows_per_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("jsd_beta", "on_policy_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        for name in ("prompt_loss_weight", "resample_every", "on_policy_temperature", "num_eval_conversations"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}.")
        if self.loss_temperature <= 0:
            raise ValueError(f"`loss_temperature` must be above 0, got {self.loss_temperature}.")
        if self.on_policy_fraction and not self.needs_teacher:
            raise ValueError(
                f"`on_policy_fraction` does not go with `loss_type={self.loss_type}`, which would teach the model its "
                "own answers: choose one of the divergences, or set it to 0."
            )
        if self.budget is not None:
            parse_budget(self.budget)
        if self.budget is not None and self.max_steps == 0:
            raise ValueError(
                "`budget` does not go with `max_steps=0` (`--steps 0`), which only initializes the cartridge: leave one out."
            )
        if self.budget is not None and self.resample_every:
            raise ValueError(
                "`budget` does not go with `resample_every`: set how many steps there are with `max_steps`."
            )
        if self.resample_every and self.max_steps < 1:
            raise ValueError("`resample_every` needs `max_steps`: how many steps there are tells how many rounds.")
        if self.resample_every and self.dataloader_num_workers:
            raise ValueError("`resample_every` needs `dataloader_num_workers=0`: the model writes in this process.")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with the teacher; otherwise it learns the written tokens."""
        return check_objective(self.loss_type).needs_teacher
