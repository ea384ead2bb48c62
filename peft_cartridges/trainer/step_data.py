"""Where the batches of a step come from: the order of the rows, and what finishes rows that need the teacher."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler

from ..conversations import with_fast_targets
from ..conversations.rows import off_context_rows
from .batches import STATES, TOP_K, EvenRows, EvenStream, SelfStudyCollator, has_targets
from .data_checks import first_rows, without_off_context
from .live_targets import LiveTargets, LiveTeacher
from .rounds import ConversationRounds, RoundOrder
from .row_order import Arrange, SeededOrder, by_chunk, by_length, row_lengths

if TYPE_CHECKING:
    from .self_study_trainer import SelfStudyTrainer

_ORDERS = ("group_by_length", "random", "sequential")  # others are `Trainer`'s own
_NEEDED = ("input_ids", "completion_mask", STATES, *TOP_K)


class StepData:
    """What a trainer asks for its batches.

    Args:
        trainer: Whose settings, model and collator count.
    """

    def __init__(self, trainer: SelfStudyTrainer) -> None:
        self.trainer = trainer
        self.args = trainer.args

    @property
    def seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def is_live(self, dataset: Any, *, is_training: bool = True) -> bool:
        """Whether rows of the data set are finished in the step."""
        args = self.args
        if dataset is None or (is_training and (args.on_policy_fraction or args.prompt_loss_weight)):
            return dataset is not None
        if is_training and not args.needs_teacher:
            return False
        if isinstance(dataset, ConversationRounds):
            return args.teacher_targets == "live"
        columns = getattr(dataset, "column_names", None) or next(iter(first_rows(dataset, 1)), {})
        return not has_targets(columns)

    def order(self, dataset: Any) -> Sampler[int] | None:
        """The order of training; `None` where it is `Trainer`'s."""
        args, strategy = self.args, self.args.train_sampling_strategy
        if isinstance(dataset, ConversationRounds):
            return RoundOrder(dataset, self.seed)
        if not self._is_ordered(dataset):
            return None
        arrange: Arrange | None = None
        if strategy == "group_by_length" and self.is_live(dataset):
            name = "chunk_id" if "chunk_id" in dataset.column_names else "context"
            arrange = by_chunk(list(dataset[name]), args.rows_per_chunk)
        elif strategy == "group_by_length":
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            arrange = by_length(row_lengths(dataset), per_step)
        return SeededOrder(
            len(dataset),
            self.seed,
            arrange,
            shuffled=strategy != "sequential",
            off_context=off_context_rows(dataset),
            share=args.off_context_share,
        )

    def _is_ordered(self, dataset: Any) -> bool:
        return isinstance(dataset, Dataset) and self.args.train_sampling_strategy in _ORDERS

    def learned(self, dataset: Any) -> Any:
        """The rows that are trained on: without the general conversations among others where their share is 0."""
        return dataset if self.args.off_context_share else without_off_context(dataset)

    def num_off_context(self, dataset: Any) -> int | None:
        """How many general conversations there are to train on; `None` of a stream, which does not tell."""
        if isinstance(dataset, ConversationRounds):
            return dataset.num_off_context
        return len(off_context_rows(self.learned(dataset))) if isinstance(dataset, Dataset) else None

    def prepared(self, dataset: Any, batch_size: int, *, is_training: bool) -> Any:
        """The data set as its loader reads it: without columns that nobody looks at, and, to be measured, filled up to
        the same number of batches for every process and without the general conversations that are among others. A
        data set that is trained on is without them where their share is 0 and no order of ours leaves them out."""
        if not is_training:
            dataset = without_off_context(dataset)
        elif not self._is_ordered(dataset):
            dataset = self.learned(dataset)
        live = self.is_live(dataset, is_training=is_training)
        if isinstance(dataset, Dataset) and isinstance(self.trainer.data_collator, SelfStudyCollator) and not live:
            wanted = _NEEDED if self.args.needs_teacher or not is_training else _NEEDED[:2]
            dataset = dataset.select_columns([name for name in wanted if name in dataset.column_names])
        if isinstance(dataset, Dataset):
            dataset = with_fast_targets(dataset)
        if is_training:
            return dataset
        of_all = batch_size * self.args.world_size
        return EvenRows(dataset, of_all) if hasattr(dataset, "__len__") else EvenStream(dataset, of_all)

    @cached_property
    def live_targets(self) -> LiveTargets:
        """What finishes rows; made when it is first needed."""
        args, trainer = self.args, self.trainer
        return LiveTargets(
            LiveTeacher(
                cast(PeftModel, trainer.model),
                trainer.codec,
                cache_size=args.teacher_cache_size,
                bare_preamble=trainer.bare_preamble,
            ),
            on_policy_fraction=args.on_policy_fraction,
            prompt_loss_weight=args.prompt_loss_weight,
            needs_teacher=args.needs_teacher,
            max_new_tokens=args.max_answer_tokens,
            temperature=args.on_policy_temperature,
            generation_batch_size=args.generation_batch_size,
        )

    def finish(self, batches: list[Any], device: torch.device) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step whose rows come as they are, finished, and the weight of all their learned tokens."""
        trainer, args = self.trainer, self.args
        finished = []
        for number, batch in enumerate(batches):
            seed = f"{self.seed}/{trainer.state.global_step}/{args.process_index}/{number}"
            rows = self.live_targets.for_training(batch["rows"], seed)
            finished.append(trainer._prepare_inputs(trainer.data_collator(rows)))
        if not args.prompt_loss_weight:
            return finished, trainer._get_num_items_in_batch(finished, device)
        total = sum(batch["loss_weights"][:, 1:][batch["labels"][:, 1:] != -100].sum() for batch in finished)
        total = torch.as_tensor(total, device=device)
        if args.average_tokens_across_devices and args.world_size > 1:
            total = trainer.accelerator.gather(total).sum()
        return finished, total
