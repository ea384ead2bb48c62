"""Checkpoints that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

if TYPE_CHECKING:
    from transformers import Trainer

PARTIAL_DIR = "_partial"  # Trainer's pushes to the Hub leave out what begins with an underscore
_STATE_FILE = "trainer_state.json"


class TrainingDivergedError(RuntimeError):
    """The loss, a gradient or the cartridge is NaN or infinite; the message names the last good checkpoint."""


class CheckpointWriter:
    """Has a checkpoint written in `_partial/` and moves it to its place when it is complete.

    `Trainer` itself writes file after file into `checkpoint-<step>`, so a run that is killed meanwhile leaves one that a
    resumed run takes for complete.

    Args:
        trainer: Whose `_get_output_dir` goes through `folder`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._writing = False

    def folder(self, run_dir: str) -> str:
        """Where `Trainer` is to put `checkpoint-<step>` at the moment."""
        return os.path.join(run_dir, PARTIAL_DIR) if self._writing else run_dir

    def write(self, run_dir: str, save: Callable[[], None], add_files: Callable[[str], None]) -> None:
        """Writes the checkpoint of this step.

        Args:
            run_dir: The folder of all checkpoints.
            save: `Trainer`'s own saving.
            add_files: Given the checkpoint's folder, puts further files there.
        """
        trainer = self.trainer
        args, state = trainer.args, trainer.state
        partial_dir = os.path.join(run_dir, PARTIAL_DIR)
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save:  # what a killed run left
            shutil.rmtree(partial_dir, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        self._writing = True
        try:
            save()
            if args.should_save:
                add_files(os.path.join(partial_dir, name))
        finally:
            self._writing = False
        trainer.accelerator.wait_for_everyone()
        final_dir = os.path.join(run_dir, name)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = final_dir
        if args.should_save:
            state.save_to_json(os.path.join(partial_dir, name, _STATE_FILE))
            shutil.rmtree(final_dir, ignore_errors=True)
            os.rename(os.path.join(partial_dir, name), final_dir)
            shutil.rmtree(partial_dir, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )

    def diverged(self, what: str) -> TrainingDivergedError:
        """The error for a run that has gone astray, with what is left of it and what helps."""
        args = self.trainer.args
        folder = args.output_dir or "."
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        kept = (
            f"The last good checkpoint is {last}: resume with `train(resume_from_checkpoint={last!r})`"
            if last
            else "There is no checkpoint yet: start again"
        )
        return TrainingDivergedError(
            f"Training has diverged: {what} at step {self.trainer.state.global_step + 1}. {kept} and a lower "
            f"`learning_rate` (now {args.learning_rate:g}), more `warmup_steps` (now {args.warmup_steps:g}) or a lower "
            f"`max_grad_norm` (now {args.max_grad_norm:g}). If that does not help, compute in bfloat16 or float32 "
            "instead of float16."
        )
