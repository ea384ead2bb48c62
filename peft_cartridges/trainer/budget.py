"""`budget`: a run that ends in time. It measures its own speed first, makes as much as fits, and stops when time is up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..atomic_files import write_text
from ..conversations import with_fast_targets
from ..self_study.processes import Processes
from .corpus_study import CONVERSATIONS_DIR
from .run_identity import describe_run
from .run_size import FEWEST, RunSize, fit_into, parse_budget

if TYPE_CHECKING:
    from .self_study_config import SelfStudyConfig
    from .self_study_trainer import SelfStudyTrainer

_FILE = "budget.json"


class RunBudget(TrainerCallback):
    """The time of a run, which begins when this is made.

    Settings that are given (`num_conversations`, `max_steps`) stand, and the rest is fitted to them. What was chosen is
    kept beside the conversations, so that a run that is carried on from a checkpoint keeps its steps.

    Args:
        trainer: Whose run it is.
        args: Its settings, with a `budget`.
    """

    def __init__(self, trainer: SelfStudyTrainer, args: SelfStudyConfig) -> None:
        self.trainer, self.budget = trainer, str(args.budget)
        self._end = time.perf_counter() + parse_budget(self.budget)
        self._per_conversation, self._per_step = 0.0, 0.0
        self._fixed_steps = args.max_steps if args.max_steps > 0 else None
        self._given_conversations = args.num_conversations

    def size_conversations(self) -> None:
        """Sets `args.num_conversations`, where it is not given, by the time that writing some of them takes."""
        trainer = self.trainer
        study, args = trainer.study, trainer.args
        if study is None or args.num_conversations is not None:
            return
        kept = self._kept()
        if kept is not None:
            args.num_conversations = kept.num_conversations
            return
        model = cast(PeftModel, trainer.model)
        wanted = study.default_conversations
        made = min(FEWEST, wanted)
        self._per_conversation, rows = study.measure(model, made)
        self._per_step = self._measure_step(rows)
        args.num_conversations = self._fit(wanted, made).num_conversations

    def size_steps(self, *, resumed: bool) -> None:
        """Sets `args.max_steps`, where it is not given, now that the conversations are there."""
        trainer, args = self.trainer, self.trainer.args
        rows = trainer.train_dataset
        kept = self._kept() if resumed else None
        if self._fixed_steps is None and kept is not None:
            args.max_steps = kept.max_steps
        elif self._fixed_steps is None and isinstance(rows, Dataset):
            self._per_step = self._per_step or self._measure_step(rows)
            order = trainer._data.order(rows)
            number = len(rows if order is None else cast(Any, order))  # of a pass, general conversations too
            args.max_steps = self._fit(number, number, written=True).max_steps
        speeds = [(self._per_conversation, "a conversation"), (self._per_step, "a step")]
        measured = ", ".join(f"{seconds:.2f} s {of}" for seconds, of in speeds if seconds)
        written = f"{args.num_conversations} conversations, " if trainer.study is not None else ""
        trainer._say(
            f"Budget {self.budget}: {written}{args.max_steps} steps" + (f" (measured: {measured})" if measured else "")
        )
        if trainer.is_world_process_zero():
            chosen = {"num_conversations": args.num_conversations, "max_steps": args.max_steps}
            write_text(self._path, json.dumps({"of": self._of(), **chosen}))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        late = Processes().same(lambda: time.perf_counter() > self._end)
        if late and state.global_step < state.max_steps:
            self.trainer._say(
                f"The budget ({self.budget}) is spent after {state.global_step} of {state.max_steps} steps."
            )
            control.should_training_stop = True
        return control

    # -- measuring -----------------------------------------------------------------------------------------------------

    @property
    def _rows_per_step(self) -> int:
        args = self.trainer.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _fit(self, wanted: int, made: int, *, written: bool = False) -> RunSize:
        args = self.trainer.args
        return Processes().same(
            lambda: fit_into(
                self._end - time.perf_counter(),
                per_conversation=self._per_conversation,
                per_step=self._per_step,
                conversations=wanted,
                rows_per_step=self._rows_per_step,
                off_context_share=0.0 if written else args.off_context_share,
                epochs=args.num_train_epochs,
                made=made,
                fixed_conversations=written,
                fixed_steps=self._fixed_steps,
            )
        )

    def _measure_step(self, dataset: Dataset) -> float:
        """Seconds that an optimizer step on rows from all over a data set takes, without the optimizer; the second of two,
        as the first warms up."""
        trainer, args = self.trainer, self.trainer.args
        model: Any = trainer.model
        each, count = args.train_batch_size, args.gradient_accumulation_steps
        fast = with_fast_targets(dataset)
        places = [place * len(fast) // (each * count) for place in range(each * count)]
        chosen = [fast[place] for place in places]
        groups = [chosen[first : first + each] for first in range(0, len(chosen), each)]
        live = trainer._data.is_live(dataset)
        seconds = 0.0
        model.train()
        with torch.random.fork_rng():
            for _ in range(2):
                start = time.perf_counter()
                batches: list[Any] = [{"rows": group} for group in groups]
                batches = (
                    trainer._data.finish(batches, args.device)[0] if live else list(map(trainer.data_collator, groups))
                )
                for batch in batches:
                    with trainer.accelerator.autocast():  # which training puts around the model's forward
                        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
                    loss.backward()
                seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    # -- what was chosen -------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return Path(self.trainer.args.output_dir or ".") / CONVERSATIONS_DIR / _FILE

    def _of(self) -> dict[str, Any]:
        """What the choice holds for: what the run is of, and what decides how much of that fits. The machine's speed is no part
        of it, so that a run which moves keeps its steps."""
        trainer, args = self.trainer, self.trainer.args
        rows: Any = trainer.train_dataset
        return {
            **describe_run(trainer)["decided_by"],
            "budget": self.budget,
            "num_conversations": self._given_conversations,
            "max_steps": self._fixed_steps,
            "rows": len(rows) if trainer.study is None and isinstance(rows, Dataset) else None,
            "rows_per_step": self._rows_per_step,
            "num_train_epochs": args.num_train_epochs,
            "teacher_targets": args.teacher_targets,
        }

    def _kept(self) -> RunSize | None:
        try:
            found = json.loads(self._path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return RunSize(found["num_conversations"], found["max_steps"]) if found.get("of") == self._of() else None
