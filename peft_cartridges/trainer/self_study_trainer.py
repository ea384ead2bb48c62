"""`SelfStudyTrainer`: distills what a model says with a text in context into a cartridge."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput, get_last_checkpoint

from ..chat import ChatCodec, get_tokenizer, with_cartridge_chat_template
from ..evaluation.gold_answers import check_questions
from ..hidden_states import OutputHead, forward_hidden_states
from ..hub.base_model import identify_base_model
from ..initialization import initialize_cartridge, needs_text
from ..objectives import Objective
from ..tuner import CartridgeConfig
from .batches import SelfStudyCollator, keep_rows, source_of
from .budget import RunBudget
from .cartridge_parameters import MovingAverage, parameter_groups, sample_values
from .checkpoints import CheckpointingTrainer
from .corpus_study import CorpusStudy, count_tokens, find_hub_datasets, text_of_contexts
from .data_checks import check_data, check_kind, is_corpus
from .gap_evaluation import GapEvaluation
from .model_preparation import (
    add_cartridge,
    check_distribution,
    check_packing,
    check_settings,
    is_sharded,
    load_base_model,
)
from .pushing import CartridgePusher, PushingTrainer, check_base_name
from .run_card import write_run_card
from .run_gate import RunGate
from .run_identity import check_run, keep_run
from .run_size import default_learning_rate
from .self_study_config import INITIALIZE_FROM_NOTHING, SelfStudyConfig
from .step_data import StepData
from .throughput import Throughput, memory_gib
from .training_curve import TrainingCurveCallback

AnyDataset: TypeAlias = Dataset | IterableDataset


class SelfStudyTrainer(CheckpointingTrainer, PushingTrainer):
    """Trains a cartridge by self-study and context distillation (arXiv 2506.06266): the model with a chunk of the
    corpus in context is the teacher, the same model with the cartridge is the student.

    Args:
        model: A causal LM, its name or path, or a PEFT model with a cartridge.
        args: Settings.
        train_dataset: A corpus (a column `text`, one row a document), about which conversations are written when
            training starts; or conversations, as `SelfStudySynthesizer` makes them. Conversations without the teacher's
            targets but with their `context` are scored in the training step.
        eval_dataset: Held-out conversations. Evaluation always measures the mean forward KL from the teacher on answers,
            whatever is trained, so that runs can be compared, and `eval_conversation_gap_closed`, the share of the KL
            without context that is gone.
        processing_class: Tokenizer or processor of the model; loaded with it where the model is given by name.
            `trainer.processing_class`, which is saved with the cartridge, is a copy with the chat template for
            conversations behind it (`cartridge_chat_template`), unless `args.default_system_prompt` is set.
        peft_config: The cartridge to make, where the model has none. It is initialized when training starts, from the
            corpus or, where that is not known, from the conversations' `context`.
        data_collator: Instead of `SelfStudyCollator`, whose docstring says what a batch is.
        compute_metrics, preprocess_logits_for_metrics: As in `Trainer`: given the logits `[batch, q_len, vocab_size]` of
            evaluated conversations and labels `[batch, q_len]`, -100 where nothing is learned.
        callbacks, optimizers: As in `Trainer`.
        gold_questions: Pairs with `question` and `answer` (a list, or a data set with these columns) that training
            does not see: evaluation gives `eval_gold_nll` and, where the corpus is known, `eval_gold_gap_closed`.
        corpus: The text that the cartridge stands in for, where `train_dataset` is conversations.
        quantization_config: As `from_pretrained` takes it, where the model is given by name.
        off_context_dataset: General conversations or prompts, a `datasets.Dataset`, to be mixed into those that are written
            about a corpus, instead of what `args.off_context_dataset` names.

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
        TypeError: `train_dataset` is a text or several data sets.
        ValueError: the model has no cartridge and none is configured; a data set lacks its columns or was made with
            another model or tokenizer; settings do not go together; or the base model has no name on the Hub, with
            `push_to_hub=True`.
    """

    _tag_names = ["cartridge", "self-study"]  # noqa: RUF012 (as in the base)
    _name = "Self-study"
    _paper = {  # noqa: RUF012 (as in the base)
        "title": "Cartridges: Lightweight and general-purpose long context representations via self-study",
        "id": "2506.06266",
    }
    # The loss is a mean over the learned tokens of all accumulated batches, see `get_batch_samples`.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    args: SelfStudyConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SelfStudyConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: Any = None,
        peft_config: CartridgeConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        *,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        gold_questions: Dataset | Sequence[dict[str, str]] | None = None,
        corpus: str | None = None,
        quantization_config: Any = None,
        off_context_dataset: Any = None,
    ) -> None:
        # A copy: what is chosen here for one corpus stays out of the settings of the next.
        args = SelfStudyConfig(output_dir="self-study") if args is None else copy.copy(args)
        self.budget = None if args.budget is None else RunBudget(self, args)
        check_distribution(args)
        if isinstance(model, str):
            model, processing_class = load_base_model(model, args, quantization_config, processing_class)
        elif quantization_config is not None or args.shard_model:
            name = "quantization_config" if quantization_config is not None else "shard_model"
            raise ValueError(f"`{name}` counts while a model is loaded: pass `model` by name or path, or leave it out.")
        if processing_class is None:
            raise ValueError("`processing_class` is missing: pass the tokenizer of the model.")
        plain_processing_class = processing_class
        if not args.default_system_prompt:
            processing_class = with_cartridge_chat_template(processing_class)

        check_kind(train_dataset)
        if gold_questions is not None:
            gold_questions = [dict(pair) for pair in gold_questions]
            check_questions(gold_questions, "gold_questions")
        self.has_gold_questions = bool(gold_questions)
        self.study = None
        if is_corpus(train_dataset):
            self.study = CorpusStudy(train_dataset, args, plain_processing_class, off_context_dataset)
        elif off_context_dataset is not None or args.off_context_dataset is not None:
            raise ValueError(
                "`off_context_dataset` needs a corpus as `train_dataset`: conversations that are written already have "
                "theirs among them. Give it to `SelfStudySynthesizer` (`cartridges synthesize`), or leave it out."
            )
        self.corpus = self.study.text if self.study is not None else corpus
        self.hub_datasets = find_hub_datasets(train_dataset)
        is_new = not isinstance(model, PeftModel)
        # Read now, because what begins at random is not frozen.
        self._first_text = self.corpus or (None if train_dataset is None else text_of_contexts(train_dataset))
        self._initializes = args.initialization != INITIALIZE_FROM_NOTHING and (
            self._first_text is not None or not needs_text(args.initialization)
        )
        peft_model = add_cartridge(model, args, peft_config, begins_at_random=not self._initializes)
        if args.push_to_hub:  # not only when all is done
            check_base_name(peft_model, args)
        check_data(train_dataset, eval_dataset, args, peft_model, processing_class)
        if args.learning_rate is None:
            length = count_tokens(self.study, corpus, train_dataset, processing_class)
            args.learning_rate = default_learning_rate(length, peft_model.active_peft_config.num_tokens)

        # Gathered by all processes; the card is written by one.
        self.base_identity = identify_base_model(peft_model) if is_sharded(peft_model) else None
        # While it holds these values, nothing has been put into the cartridge.
        self._noise = sample_values(peft_model) if is_new else None
        self.average = MovingAverage(peft_model, args.ema_decay)
        self.pusher = CartridgePusher(self)
        self.run_gate = RunGate(self)
        # A stream's batches are of unequal size, so accelerate cannot cut one apart for several processes.
        cast(Any, args.accelerator_config).dispatch_batches = False
        evaluates_later = bool(gold_questions or (self.study is not None and args.num_eval_conversations))
        super().__init__(
            model=peft_model,
            args=args,
            train_dataset=train_dataset,
            # Trainer refuses to evaluate without a data set; gold questions are enough, see `evaluate`.
            eval_dataset=[] if eval_dataset is None and evaluates_later else eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator
            or SelfStudyCollator(get_tokenizer(processing_class).pad_token_id or 0, padding_free=args.padding_free),
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=[
                self.average,
                self.pusher,
                *([self.budget] if self.budget is not None else []),
                *([TrainingCurveCallback()] if args.plot else []),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        # Trainer counts the learned tokens of a step only for a loss that takes their number.
        self.model_accepts_loss_kwargs = True
        head = OutputHead(peft_model)
        self._objective = Objective(
            head,
            args.loss_type,
            beta=args.jsd_beta,
            temperature=args.loss_temperature,
            chunk_size=args.loss_chunk_size,
            use_liger=args.use_liger_kernel,
        )
        self._measure = Objective(head, "forward_kl", chunk_size=args.loss_chunk_size)
        self._gap = GapEvaluation(
            peft_model,
            processing_class,
            gold_questions,
            self.corpus,
            batch_size=args.per_device_eval_batch_size,
            without_context=plain_processing_class,
        )
        self.codec = ChatCodec(peft_model, processing_class, args.chat_template_kwargs, thoughts=args.thoughts)
        bare = ChatCodec(peft_model, plain_processing_class, args.chat_template_kwargs, thoughts=args.thoughts)
        self.bare_preamble = bare.preamble if bare.has_template else []
        self._data = StepData(self)
        check_settings(self)
        self._throughput = Throughput()
        self._measured = torch.zeros(2, dtype=torch.float64, device=args.device)  # sum of KL, number of tokens

    def _send_telemetry(self) -> None:
        """TRL counts the uses of its own trainers; this one is none of them."""

    # -- before training -------------------------------------------------------------------------------------------------

    def initialize_cartridge(self) -> None:
        """Puts keys and values of the text into a new cartridge, unless something has been put there already. `train`,
        `evaluate` and `save_model` do it first; call it to look at the cartridge before."""
        noise, self._noise = self._noise, None
        if not self._initializes or noise is None or noise != sample_values(cast(nn.Module, self.model)):
            return
        self._place_model()
        self._say(f"Initializing the cartridge ({self.args.initialization}) …")
        initialize_cartridge(
            cast(PeftModel, self.model),
            self.codec,
            text=self._first_text,
            strategy=self.args.initialization,
            **cast(dict[str, Any], self.args.initialization_kwargs or {}),
        )
        self.average.restart()

    def write_conversations(self) -> None:
        """Writes the conversations about a corpus, once, or takes up what is there of them; `train` does it first. What
        came of it goes to the callbacks and trackers as `synthesis/…`."""
        if self.study is None or self.study.is_written:
            return
        self._place_model()
        self._write_held_out()
        if self.budget is not None:
            self.budget.size_conversations()
        start = time.perf_counter()
        self.train_dataset = self.study.write(cast(PeftModel, self.model))
        if isinstance(self.train_dataset, Dataset):
            seconds = time.perf_counter() - start
            self.log({"synthesis/conversations": len(self.train_dataset), "synthesis/seconds": round(seconds, 1)})

    def _write_held_out(self) -> None:
        if self.study is not None and self.args.num_eval_conversations and not self.eval_dataset:
            self._place_model()
            self.eval_dataset = self.study.write_held_out(cast(PeftModel, self.model))

    def _place_model(self) -> None:
        """`Trainer` leaves the placing to DeepSpeed, which does it only when training is on."""
        if self.is_deepspeed_enabled:
            cast(Any, self.model).to(self.args.device)

    def _say(self, message: str) -> None:
        if not self.args.disable_tqdm and self.is_world_process_zero():
            print(message, file=sys.stderr, flush=True)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, with the initialization of the cartridge and the writing of conversations first; with
        `ema_decay` the model holds the average afterwards. With `max_steps=0` the cartridge is only initialized, and a
        checkpoint that has all of its steps is only loaded.

        Raises:
            ValueError: `output_dir` holds checkpoints of a run of something else, see `check_run`; or a run without steps
                is to be carried on.
            TrainingDivergedError: the loss or a gradient is NaN or infinite.
        """
        if self.args.max_steps == 0:
            if resume_from_checkpoint:
                raise ValueError("`max_steps=0` only initializes a cartridge: leave `resume_from_checkpoint` out.")
            self.initialize_cartridge()
            self._write_held_out()
            return TrainOutput(0, 0.0, {})
        if self.study is not None and not self.study.is_written:
            self.study.check(cast(PeftModel, self.model))
        folder = self.args.output_dir or "."
        if resume_from_checkpoint or (os.path.isdir(folder) and get_last_checkpoint(folder)):
            check_run(self)
        if resume_from_checkpoint:  # it brings its cartridge along
            self._noise = None
        self.initialize_cartridge()
        if self.args.padding_free:
            check_packing(self.model)
        self.write_conversations()
        keep_run(self)
        if self.budget is not None:
            self.budget.size_steps(resumed=bool(resume_from_checkpoint))
        if self.args.off_context_share and self._data.num_off_context(self.train_dataset) == 0:
            self._say(
                f"`off_context_share` is {self.args.off_context_share:g}, but there are no general conversations in "
                "`train_dataset`: none are mixed in."
            )
        self._throughput.restart()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.study is not None:
            self.study.drop_round()
        self.average.apply()
        return output

    # -- batches -----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order = self._data.order(self.train_dataset)  # whole: what a loader reads has no columns that nobody learns
        return super()._get_train_sampler(train_dataset) if order is None else order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """As `Trainer._get_dataloader`, for training, evaluation and prediction alike. Rows that need the teacher come as
        they are; see `get_batch_samples` and `prediction_step`."""
        collator = self.data_collator
        live = self._data.is_live(dataset, is_training=is_training)
        dataset = self._data.prepared(dataset, batch_size, is_training=is_training)
        self.data_collator = keep_rows if live else collator
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step, finished, and the weight of all their learned tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._data.finish(batches, device) if batches and "rows" in batches[0] else (batches, count)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of `loss_type` (in evaluation: of the KL from the teacher) over the learned tokens, in nats."""
        given = {name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask") if name in inputs}
        hidden = forward_hidden_states(model, **given)
        loss = (self._objective if model.training else self._measure)(hidden, inputs)
        learned = inputs["labels"][:, 1:] != -100
        if model.training:
            self._throughput.add(inputs["labels"])
        else:
            self._measured += torch.stack([loss.detach().double(), learned.sum()])
        if num_items_in_batch is None:
            loss = loss / learned.sum().clamp_min(1)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss, "hidden_states": hidden}) if return_outputs else loss

    # -- optimization ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with learning rates for keys and values apart where they are given."""
        args = self.args
        if self.optimizer is None and (args.key_learning_rate is not None or args.value_learning_rate is not None):
            trained: Any = self.model if model is None else model
            rates = {"kv_prefix_key": args.key_learning_rate, "kv_prefix_value": args.value_learning_rate}
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, trained)
            groups = parameter_groups(trained, rates, weight_decay=args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, with the shares of the gap closed; works with `gold_questions` alone too. Held-out
        conversations (`num_eval_conversations`) are written first, if they are not there.

        Raises:
            ValueError: there is nothing to measure on.
        """
        self.initialize_cartridge()
        if eval_dataset is None:
            self._write_held_out()
            if not (self.eval_dataset or self.has_gold_questions):
                raise ValueError(
                    "There is nothing to measure on: pass an `eval_dataset`, `gold_questions`, or a corpus with "
                    "`num_eval_conversations`."
                )
        with self.average.applied():
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
        loop = super().evaluation_loop

        def measure(loss_only: bool | None) -> tuple[EvalLoopOutput, float]:
            self._measured.zero_()
            output = loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
            total, count = self.accelerator.reduce(self._measured).tolist()
            return output, total / count

        output, kl = measure(prediction_loss_only)
        # Trainer's loss is a mean of means over batches; a mean over tokens does not depend on who shares a batch.
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": kl}
        found = self._gap.of_conversations(source_of(dataloader.dataset), kl, lambda: measure(True)[1])
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics=self._with_gap(metrics, metric_key_prefix))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mean KL of a batch and, if they are wanted, its logits `[batch, q_len, vocab_size]` and labels."""
        if "rows" in inputs:
            inputs = self.data_collator(self._data.live_targets.for_evaluation(inputs["rows"]))
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss, None, None
            return loss, self._measure.head(outputs["hidden_states"]), inputs["labels"]

    def _with_gap(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """With what gold answers say, and the one share that a run goes by."""
        found = {f"{prefix}_{name}": value for name, value in self._gap.of_gold_answers().items()}
        metrics = {**metrics, **found}
        for name in ("gold_gap_closed", "conversation_gap_closed"):
            if f"{prefix}_{name}" in metrics:
                metrics.setdefault(f"{prefix}_gap_closed", metrics[f"{prefix}_{name}"])
        return metrics

    # -- what is shown and saved ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training steps also with tokens per second (all processes), memory and, where it is what is
        minimized, the KL by its name."""
        if "loss" in logs:
            logs["tokens_per_second"] = self._throughput.take() * self.args.world_size
            logs["memory_gib"] = memory_gib(self.args.device)
            if self.args.loss_type == "forward_kl" and self.args.loss_temperature == 1:
                logs["kl"] = logs["loss"]
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the cartridge's model card."""
        self.initialize_cartridge()
        super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            write_run_card(self, output_dir or self.args.output_dir or ".")
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
