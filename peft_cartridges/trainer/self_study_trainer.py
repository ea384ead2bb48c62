"""`SelfStudyTrainer`: distills what a model says with a text in context into a cartridge."""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from ..chat import get_tokenizer
from ..hidden_states import OutputHead, forward_hidden_states
from ..initialization import initialize_cartridge
from ..self_study import SelfStudySynthesizer
from ..self_study.chunking import as_documents
from ..tuner import CartridgeConfig, CartridgeModel
from .data_collator import SelfStudyCollator
from .losses import chunked_loss, forward_kl
from .self_study_config import SelfStudyConfig

_TRAINING_COLUMNS = ("input_ids", "completion_mask", "teacher_hidden_states")


class SelfStudyTrainer(Trainer):
    """Trains a cartridge by self-study and context distillation (arXiv 2506.06266): the model with a chunk of the
    corpus in context is the teacher, the same model with the cartridge is the student.

    Args:
        model: A causal LM, its name or path, or a PEFT model with a cartridge.
        args: Settings.
        train_dataset: A corpus (a column `text`, one row a document), which is synthesized first; or what
            `SelfStudySynthesizer` made.
        eval_dataset: Held-out conversations, as `SelfStudySynthesizer` makes them.
        processing_class: Tokenizer or processor of the model; loaded with it where the model is given by name.
        peft_config: The cartridge to make, where the model has none. It is initialized from the corpus, if
            `train_dataset` is one.
        callbacks, optimizers: As in `Trainer`.

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
        ValueError: the model has no cartridge and none is configured, or a data set lacks its columns.
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
    ) -> None:
        args = SelfStudyConfig(output_dir="self-study") if args is None else args
        if isinstance(model, str):
            init_kwargs = args.model_init_kwargs or {}
            init_kwargs = json.loads(init_kwargs) if isinstance(init_kwargs, str) else init_kwargs
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **init_kwargs})
        if processing_class is None:
            raise ValueError("`processing_class` is missing: pass the tokenizer of the model.")
        is_new = not isinstance(model, PeftModel)
        model = _with_cartridge(model, peft_config)
        # Trainer moves the model to its device later than the synthesis needs it there.
        model.to(args.device) if getattr(model, "hf_device_map", None) is None else None
        train_dataset = self._prepare_train_dataset(model, args, train_dataset, processing_class, is_new)
        for name, dataset in _named(eval_dataset):
            _check_columns(dataset, name)
        tokenizer = get_tokenizer(processing_class)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=SelfStudyCollator(tokenizer.pad_token_id or 0),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is a mean over the learned tokens of all accumulated batches, which Trainer counts in `labels`.
        self.model_accepts_loss_kwargs = True
        self._head = OutputHead(model)

    @staticmethod
    def _prepare_train_dataset(
        model: PeftModel, args: SelfStudyConfig, dataset: Dataset | None, processing_class: Any, is_new: bool
    ) -> Dataset | None:
        if dataset is None or "text" not in dataset.column_names:
            if dataset is not None:
                _check_columns(dataset, "train_dataset")
            return dataset
        documents = as_documents(dataset)
        if is_new and args.initialization != "none":
            corpus = "\n\n".join(document.text for document in documents)
            initialize_cartridge(model, processing_class, text=corpus, strategy=args.initialization)
        return SelfStudySynthesizer(model, processing_class, args).synthesize(documents)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean KL(teacher || student), in nats, over the learned tokens."""
        hidden = forward_hidden_states(model, input_ids=inputs["input_ids"])
        learned = inputs["labels"][:, 1:] != -100
        student = hidden[:, :-1][learned]
        loss = chunked_loss(
            student,
            inputs["teacher_hidden_states"],
            self._head,
            forward_kl,
            chunk_size=self.args.loss_chunk_size,
        )
        if num_items_in_batch is None:
            loss = loss / len(student)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss


def _with_cartridge(model: Any, peft_config: CartridgeConfig | None) -> PeftModel:
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, CartridgeModel):
            raise ValueError(
                f"`model` is a PEFT model without a cartridge (its tuner is a {type(model.base_model).__name__}): pass "
                "the base model and `peft_config=CartridgeConfig(num_tokens=…)`."
            )
        if peft_config is not None:
            raise ValueError("`model` has a cartridge already: leave `peft_config` out, or pass the base model.")
        return model
    if peft_config is None:
        raise ValueError("`peft_config` is missing: pass `CartridgeConfig(num_tokens=…)`, or a model with a cartridge.")
    return get_peft_model(model, peft_config)


def _named(dataset: Dataset | dict[str, Dataset] | None) -> list[tuple[str, Dataset]]:
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return [(f"eval_dataset[{name!r}]", part) for name, part in dataset.items()]
    return [("eval_dataset", dataset)]


def _check_columns(dataset: Dataset, name: str) -> None:
    if missing := [column for column in _TRAINING_COLUMNS if column not in dataset.column_names]:
        raise ValueError(
            f"`{name}` lacks the columns {', '.join(missing)} (it has {', '.join(dataset.column_names)}): pass a "
            "corpus with a `text` column, or what `SelfStudySynthesizer.synthesize` gives."
        )
