"""Checkpoints that are there as a whole or not at all, and that never hold a cartridge that has gone to NaN."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

PARTIAL_DIR = "_partial"  # Trainer's pushes to the Hub leave out what begins with an underscore
_STATE_FILE = "trainer_state.json"


class TrainingDivergedError(RuntimeError):
    """The loss, a gradient or the cartridge is NaN or infinite; the message names the last good checkpoint."""


class CheckpointingTrainer(Trainer):
    """A `Trainer` that writes a checkpoint in `_partial/` and moves it to its place when it is complete.

    `Trainer` itself writes file after file into `checkpoint-<step>`, so a run that is killed meanwhile leaves one that
    a resumed run takes for complete.
    """

    _writing_checkpoint = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL_DIR) if self._writing_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_cartridge()
        run_dir = self._get_output_dir(trial)
        partial_dir = os.path.join(run_dir, PARTIAL_DIR)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # what a killed run left
            shutil.rmtree(partial_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            self._save_more(os.path.join(partial_dir, name))
        finally:
            self._writing_checkpoint = False
        self.accelerator.wait_for_everyone()
        final_dir = os.path.join(run_dir, name)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = final_dir
        if self.args.should_save:
            self.state.save_to_json(os.path.join(partial_dir, name, _STATE_FILE))
            shutil.rmtree(final_dir, ignore_errors=True)
            os.rename(os.path.join(partial_dir, name), final_dir)
            shutil.rmtree(partial_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final_dir)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_more(self, folder: str) -> None:
        """For subclasses: further files of a checkpoint."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)

    # -- divergence --------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
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

    def _check_cartridge(self) -> None:
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise self._diverged(f"`{name}` holds NaN or infinite values")

    def _diverged(self, what: str) -> TrainingDivergedError:
        folder = self.args.output_dir or "."
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        kept = (
            f"The last good checkpoint is {last}: resume with `train(resume_from_checkpoint={last!r})`"
            if last
            else "There is no checkpoint yet: start again"
        )
        return TrainingDivergedError(
            f"Training has diverged: {what} at step {self.state.global_step + 1}. {kept} and a lower `learning_rate` "
            f"(now {self.args.learning_rate:g}), more `warmup_steps` (now {self.args.warmup_steps:g}) or a lower "
            f"`max_grad_norm` (now {self.args.max_grad_norm:g}). If that does not help, compute in bfloat16 or float32 "
            "instead of float16."
        )
