"""What a trainer does about checkpoints: they are there as a whole or not at all, hold the moving average, and a run that
diverges stops at the last good one."""

from __future__ import annotations

import os
import shutil
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from trl.trainer.base_trainer import _BaseTrainer

from .cartridge_parameters import MovingAverage, find_broken_parameter
from .model_preparation import adapter_state
from .run_gate import RunGate
from .self_study_config import SelfStudyConfig

PARTIAL_DIR = "_partial"  # Trainer's pushes to the Hub leave out what begins with an underscore
_STATE_FILE = "trainer_state.json"


class TrainingDivergedError(RuntimeError):
    """The loss, a gradient or the cartridge is NaN or infinite; the message names the last good checkpoint."""


class CheckpointingTrainer(_BaseTrainer):
    """A `Trainer` that has a checkpoint written in `_partial/` and moves it to its place when it is complete.

    `Trainer` itself writes file after file into `checkpoint-<step>`, so a run that is killed meanwhile leaves one that a
    resumed run takes for complete.
    """

    args: SelfStudyConfig
    average: MovingAverage
    run_gate: RunGate
    _writes_checkpoint = False

    # -- whole or not at all, of the average ---------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL_DIR) if self._writes_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if broken := find_broken_parameter(cast(nn.Module, self.model)):
            raise self._diverged(f"`{broken}` holds NaN or infinite values")
        args, state, folder = self.args, self.state, self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        partial, final = os.path.join(folder, PARTIAL_DIR, name), os.path.join(folder, name)
        if args.should_save:  # what a killed run left
            shutil.rmtree(os.path.dirname(partial), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writes_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            if args.should_save:
                self.average.save(partial)
        finally:
            self._writes_checkpoint = False
        self.accelerator.wait_for_everyone()
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = final
        if args.should_save:
            state.save_to_json(os.path.join(partial, _STATE_FILE))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            shutil.rmtree(os.path.dirname(partial), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self.average.applied():
            super()._save(output_dir, state_dict or adapter_state(self.model))
        self.run_gate.save(output_dir or self.args.output_dir or ".")

    # -- taken up again ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.average.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.average.restart()

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any
    ) -> tuple[int, int]:
        # transformers 5.23 begins the pass that a checkpoint stopped in, and makes a step before it looks for the end.
        where = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, *args)
        return (num_epochs, 0) if self.state.global_step >= max_steps else where

    # -- a run that has gone astray ------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer.training_step`.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            raise self._diverged(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16, the gradient scaler skips such a step and goes on with a smaller scale.
        if norm is not None and self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)).all():
            raise self._diverged(f"the norm of the gradient is {float(norm)}")
        return norm

    def _diverged(self, what: str) -> TrainingDivergedError:
        """The error, with what is left of the run and what helps."""
        args = self.args
        folder = args.output_dir or "."
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        kept = (
            f"The last good checkpoint is {last}: resume with `train(resume_from_checkpoint={last!r})`"
            if last
            else "There is no checkpoint yet: start again"
        )
        return TrainingDivergedError(
            f"Training has diverged: {what} at step {self.state.global_step + 1}. {kept} and a lower "
            f"`learning_rate` (now {args.learning_rate:g}), more `warmup_steps` (now {args.warmup_steps:g}) or a lower "
            f"`max_grad_norm` (now {args.max_grad_norm:g}). If that does not help, compute in bfloat16 or float32 "
            "instead of float16."
        )
