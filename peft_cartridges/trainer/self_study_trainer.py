"""`SelfStudyTrainer`: distills what a model says with a text in context into a cartridge."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..chat import get_tokenizer, with_cartridge_chat_template
from ..hidden_states import OutputHead, forward_hidden_states
from ..initialization import initialize_cartridge
from ..tuner import CartridgeConfig
from .conversation_stream import ConversationStream, RoundSampler
from .corpus_preparation import Corpus, find_hub_datasets, make_codec, prepare_corpus
from .data_checks import check_columns, check_origin
from .data_collator import SelfStudyCollator
from .gap_evaluation import GapEvaluation
from .hub_pushes import PushingTrainer, check_base_name
from .length_grouped_sampler import LengthGroupedSampler
from .live_batch import LiveBatches, LiveTeacher
from .model_card import write_trainer_card
from .model_preparation import prepare_model
from .moving_average import MovingAverage
from .objective import Objective
from .optimizer_groups import parameter_groups
from .resources import memory_gib, num_tokens
from .self_study_config import SelfStudyConfig
from .training_curve import TrainingCurveCallback

_MIXED = "which hands parts of the model to other devices"


class SelfStudyTrainer(PushingTrainer):
    """Trains a cartridge by self-study and context distillation (arXiv 2506.06266): the model with a chunk of the
    corpus in context is the teacher, the same model with the cartridge is the student.

    Args:
        model: A causal LM, its name or path, or a PEFT model with a cartridge.
        args: Settings.
        train_dataset: A corpus (a column `text`, one row a document), which is synthesized first; or what
            `SelfStudySynthesizer` made.
        eval_dataset: Held-out conversations, as `SelfStudySynthesizer` makes them. Evaluation always measures the mean
            forward KL from the teacher on answers, whatever is trained, so that runs can be compared, and
            `eval_conversation_gap_closed`, the share of the KL without context that is gone.
        processing_class: Tokenizer or processor of the model; loaded with it where the model is given by name.
            `trainer.processing_class`, which is saved with the cartridge, is a copy with the chat template for
            conversations behind it (`cartridge_chat_template`), unless `args.default_system_prompt` is set.
        peft_config: The cartridge to make, where the model has none. It is initialized from the corpus, if it is known.
        callbacks, optimizers: As in `Trainer`.
        gold_questions: Pairs with `question` and `answer` (a list, or a data set with these columns) that training
            does not see: evaluation gives `eval_gold_nll` and, where the corpus is known, `eval_gold_gap_closed`.
        corpus: The text that the cartridge stands in for, where `train_dataset` is synthesized already.

    `eval_gap_closed` is the share on gold answers if it is known and on conversations if not; with
    `metric_for_best_model="gap_closed"` it picks the best checkpoint and stops early (`EarlyStoppingCallback`).

    Example:

    ```python
    trainer = SelfStudyTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=SelfStudyConfig(output_dir="handbook-cartridge"),
        train_dataset=Dataset.from_dict({"text": [handbook]}),
        peft_config=CartridgeConfig(num_tokens=256),
    )
    trainer.train()
    trainer.save_model()
    ```

    Raises:
        ValueError: the model has no cartridge and none is configured; a data set lacks its columns or was made with
            another model or tokenizer; settings do not go together; or the base model has no name on the Hub, with
            `push_to_hub=True`.
    """

    args: SelfStudyConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SelfStudyConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        peft_config: CartridgeConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        *,
        gold_questions: Dataset | Sequence[dict[str, str]] | None = None,
        corpus: str | None = None,
    ) -> None:
        args = SelfStudyConfig(output_dir="self-study") if args is None else args
        is_new = not isinstance(model, PeftModel)
        model, processing_class = prepare_model(model, args, processing_class, peft_config)
        without_context = processing_class
        if not args.default_system_prompt:
            processing_class = with_cartridge_chat_template(processing_class)
        if args.push_to_hub:  # not only when all is done
            check_base_name(model, args)
        live = bool(args.on_policy_fraction or args.prompt_loss_weight)
        needs_teacher = args.loss_type != "cross_entropy"
        prepared = Corpus(corpus)
        hub_datasets = find_hub_datasets(train_dataset)
        checked = _named(eval_dataset)
        if train_dataset is not None and "text" in train_dataset.column_names:
            prepared = prepare_corpus(model, args, train_dataset, processing_class, initialize=is_new)
            train_dataset = prepared.dataset
        else:
            if args.resample_every:
                raise ValueError("`resample_every` needs a corpus with a `text` column as `train_dataset`.")
            if train_dataset is not None:
                check_columns(train_dataset, "train_dataset", needs_teacher=needs_teacher, needs_context=live)
                checked.insert(0, ("train_dataset", train_dataset))
        for name, dataset in checked:
            if name != "train_dataset":
                check_columns(dataset, name)
            check_origin(dataset, name, model, processing_class)
        if is_new and corpus is not None and prepared.dataset is None and args.initialization != "none":
            initialize_cartridge(
                model, make_codec(model, processing_class, args), text=corpus, strategy=args.initialization
            )
        self._gap = GapEvaluation(
            model,
            processing_class,
            None if gold_questions is None else [dict(pair) for pair in gold_questions],
            prepared.text,
            batch_size=args.per_device_eval_batch_size,
            without_context=without_context,
        )
        self.corpus = prepared
        self.corpus.hub_datasets = hub_datasets
        tokenizer = get_tokenizer(processing_class)
        self._pad_token_id = pad_token_id = tokenizer.pad_token_id or 0
        self._average = MovingAverage(model, args.ema_decay) if args.ema_decay else None
        own: list[TrainerCallback] = [self._average] if self._average else []
        own += [TrainingCurveCallback()] if args.plot else []
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            # Trainer refuses to evaluate without a data set; gold questions are enough, see `evaluate`.
            eval_dataset=eval_dataset if eval_dataset is not None or not gold_questions else [],
            processing_class=processing_class,
            data_collator=SelfStudyCollator(pad_token_id, contexts=live, targets=needs_teacher),
            callbacks=[*own, *(callbacks or [])],
            optimizers=optimizers,
        )
        self._check_settings()
        # The loss is a mean over the learned tokens of all accumulated batches, see `get_batch_samples`.
        self.model_accepts_loss_kwargs = True
        head = OutputHead(model)
        self._objective = Objective(
            head,
            args.loss_type,
            beta=args.jsd_beta,
            temperature=args.loss_temperature,
            chunk_size=args.loss_chunk_size,
            use_liger=args.use_liger_kernel,
        )
        self._measure = Objective(head, "forward_kl", chunk_size=args.loss_chunk_size)
        self._live = None
        if live:
            self._live = LiveBatches(
                LiveTeacher(model, make_codec(model, processing_class, args), cache_size=args.teacher_cache_size),
                pad_token_id=pad_token_id,
                on_policy_fraction=args.on_policy_fraction,
                prompt_loss_weight=args.prompt_loss_weight,
                needs_teacher=needs_teacher,
                max_new_tokens=args.max_answer_tokens,
                temperature=args.on_policy_temperature,
                generation_batch_size=args.generation_batch_size,
            )
        self._tokens_since_log, self._last_log = 0, time.perf_counter()
        self._measured = torch.zeros(2, dtype=torch.float64, device=args.device)  # sum of KL, number of tokens

    def _check_settings(self) -> None:
        args, dataset = self.args, self.train_dataset
        if args.use_liger_kernel and args.device.type != "cuda":
            raise ValueError(
                f"`use_liger_kernel=True` needs a CUDA device, this is {args.device.type}: set it to False."
            )
        stored = isinstance(dataset, Dataset) and "teacher_hidden_states" not in dataset.column_names
        if stored and args.loss_temperature != 1 and args.loss_type != "cross_entropy":
            raise ValueError(
                f"`loss_temperature={args.loss_temperature}` needs `teacher_hidden_states`: what a temperature makes of "
                "top-k targets is unknown. Set it to 1, or synthesize with `teacher_targets=hidden_states`."
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for name in ("on_policy_fraction", "prompt_loss_weight", "ema_decay"):
            if sharded and getattr(args, name):
                raise ValueError(f"`{name}` does not go with FSDP or DeepSpeed, {_MIXED}: use DDP, or set it to 0.")

    # -- batches -----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, ConversationStream):
            return RoundSampler(dataset, self._data_seed)
        strategy = self.args.train_sampling_strategy
        if strategy not in ("group_by_length", "random") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        steps_batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = [len(ids) for ids in dataset["input_ids"]]
        return LengthGroupedSampler(lengths, steps_batch, self._data_seed, group=strategy == "group_by_length")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        # Evaluation wants the teacher's targets, whatever is trained, and never writes answers.
        collator, self.data_collator = self.data_collator, SelfStudyCollator(self._pad_token_id)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step, live answers written, and the weight of all their learned tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._live is None:
            return batches, count
        step, process = self.state.global_step, self.args.process_index
        seeds = [f"{self._data_seed}/{step}/{process}/{number}" for number in range(len(batches))]
        batches = [self._live(batch, seed) for batch, seed in zip(batches, seeds, strict=True)]
        if not self.args.prompt_loss_weight:
            return batches, self._get_num_items_in_batch(batches, device)
        total = sum(batch["loss_weights"][:, 1:][batch["labels"][:, 1:] != -100].sum() for batch in batches)
        total = torch.as_tensor(total, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of `loss_type` (in evaluation: of the KL from the teacher) over the learned tokens, in nats."""
        objective = self._objective if model.training else self._measure
        loss = objective(forward_hidden_states(model, input_ids=inputs["input_ids"]), inputs)
        if model.training:
            self._tokens_since_log += num_tokens(inputs["labels"])
        else:
            self._measured += torch.stack([loss.detach().double(), (inputs["labels"][:, 1:] != -100).sum()])
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"][:, 1:] != -100).sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    # -- optimization ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with learning rates for keys and values apart where they are given."""
        args = self.args
        if self.optimizer is None and (args.key_learning_rate is not None or args.value_learning_rate is not None):
            trained: Any = self.model if model is None else model
            groups = parameter_groups(
                trained,
                key_learning_rate=args.key_learning_rate,
                value_learning_rate=args.value_learning_rate,
                weight_decay=args.weight_decay,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, trained)
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; with `ema_decay` the model holds the average afterwards.

        Raises:
            TrainingDivergedError: the loss or a gradient is NaN or infinite.
        """
        self._last_log = time.perf_counter()
        output = super().train(*args, **kwargs)
        if self._average is not None:
            self._average.apply()
        return output

    # -- the average is what is evaluated and saved --------------------------------------------------------------------

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._averaged():
            super()._save(output_dir, state_dict)

    def _save_more(self, folder: str) -> None:
        if self._average is not None and self.args.should_save:
            self._average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._average is not None:
            self._average.restart()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, with the shares of the gap closed; works with `gold_questions` alone too."""
        with self._averaged():
            if eval_dataset is not None or self.eval_dataset:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics = self._with_gap({}, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        def measure() -> EvalLoopOutput:
            self._measured.zero_()
            return super(SelfStudyTrainer, self).evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

        output = measure()
        # Trainer's loss is a mean of means over batches; a mean over tokens does not depend on who shares a batch.
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": self._mean_kl()}

        def without_cartridge() -> float:
            measure()
            return self._mean_kl()

        found = self._gap.of_conversations(metric_key_prefix, metrics[f"{metric_key_prefix}_loss"], without_cartridge)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics=self._with_gap(metrics, metric_key_prefix))

    def _mean_kl(self) -> float:
        total, count = self.accelerator.reduce(self._measured).tolist()
        return total / count

    def _with_gap(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """With what gold answers say, and the one share that a run goes by."""
        found = {f"{prefix}_{name}": value for name, value in self._gap.of_gold_answers().items()}
        metrics = {**metrics, **found}
        for name in ("gold_gap_closed", "conversation_gap_closed"):
            if f"{prefix}_{name}" in metrics:
                metrics.setdefault(f"{prefix}_gap_closed", metrics[f"{prefix}_{name}"])
        return metrics

    # -- what is shown -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training steps also with tokens per second (all processes), memory and, where it is what is
        minimized, the KL by its name."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens_since_log * self.args.world_size / (now - self._last_log)
            logs["memory_gib"] = memory_gib(self.args.device)
            if self.args.loss_type == "forward_kl" and self.args.loss_temperature == 1:
                logs["kl"] = logs["loss"]
            self._tokens_since_log, self._last_log = 0, now
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the cartridge's model card."""
        super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            write_trainer_card(self, output_dir or self.args.output_dir or ".")
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def _named(dataset: Dataset | dict[str, Dataset] | None) -> list[tuple[str, Dataset]]:
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return [(f"eval_dataset[{name!r}]", part) for name, part in dataset.items()]
    return [("eval_dataset", dataset)]
