"""Pushes of a trainer to the Hub: what `push_cartridge` uploads, and the tokenizer.

`Trainer` uploads all of `output_dir`: also `training_args.bin`, which is pickled and holds paths and the token of the
Hub, and whatever else lies there, such as the corpus.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from ..hub import push_cartridge
from ..hub.pull import CARTRIDGE_FILES, IMAGE_FILE
from ..hub.push import find_base_name, refuse_public
from ..hub_errors import hub_errors
from .checkpoints import CheckpointingTrainer
from .model_card import write_trainer_card
from .self_study_config import SelfStudyConfig

if TYPE_CHECKING:
    from .self_study_trainer import SelfStudyTrainer

logger = logging.get_logger(__name__)


def check_base_name(model: PeftModel, args: SelfStudyConfig, finetuned_from: str | None = None) -> str:
    """The base model's name on the Hub.

    Raises:
        ValueError: it is known only as a folder of this machine, so that nobody else could load the cartridge.
    """
    known = model.peft_config[model.active_adapter].base_model_name_or_path
    return find_base_name([finetuned_from, args.finetuned_from, known], "set `finetuned_from='user/name'`")


class PushingTrainer(CheckpointingTrainer):
    """A `Trainer` that pushes a cartridge and its card, and no more."""

    args: SelfStudyConfig
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer.init_hf_repo`.

        Raises:
            HubError: the Hub refuses it, or the repository was to be private and is public already.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir or ".").absolute().name
        with hub_errors(name, None):
            super().init_hf_repo(token=token, private=private)
            if self.is_world_process_zero() and (self.args.hub_private_repo if private is None else private):
                refuse_public(cast(str, self.hub_model_id), HfApi(token=token or self.args.hub_token))

    def create_model_card(  # type: ignore[override]
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
    ) -> None:
        """Writes the cartridge's model card into `output_dir`.

        Args:
            language, license, finetuned_from: Instead of those in `args`.
            tags: Further tags.
            model_name: The card's heading.
            dataset: Data sets on the Hub that it was made from.
        """
        changes = {
            "language": _as_list(language),
            "license": license,
            "tags": _as_list(tags),
            "title": model_name,
            "base_model": finetuned_from,
            "datasets": _as_list(dataset),
        }
        changes = {name: value for name, value in changes.items() if value}
        write_trainer_card(cast("SelfStudyTrainer", self), self.args.output_dir or ".", **changes)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`, but uploads only the cartridge, its card with figures, and the tokenizer.

        Args:
            commit_message, blocking, token, revision, private: As in `Trainer.push_to_hub`.
            kwargs: Of `create_model_card`.

        Returns:
            The commit; a future of it with `blocking=False`; None in processes other than the main one.

        Raises:
            ValueError: the base model has no name on the Hub.
            HubError: the Hub refuses it or cannot be reached. The cartridge is in `output_dir` then.
        """
        model = self.accelerator.unwrap_model(self.model)
        base_model = check_base_name(model, self.args, kwargs.get("finetuned_from"))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = functools.partial(
            self._push,
            Path(self.args.output_dir or "."),
            base_model=base_model,
            commit_message=commit_message or "End of training",
            token=token,
            revision=revision,
            private=private,
        )
        return push() if blocking else hf_api().run_as_future(push)

    def _push(
        self,
        folder: Path,
        base_model: str,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        return push_cartridge(
            folder,
            cast(str, self.hub_model_id),
            base_model=base_model,
            include=[name for name in self._tokenizer_files() if (folder / name).is_file()],
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision if revision is None else revision,
            commit_message=commit_message,
            token=self.args.hub_token if token is None else token,
        ).commit

    def _tokenizer_files(self) -> list[str]:
        """What the tokenizer or processor saves itself in: only it knows."""
        with tempfile.TemporaryDirectory() as folder:
            cast(Any, self.processing_class).save_pretrained(folder)
            return sorted(os.listdir(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The cartridge of a checkpoint with its card, in the background; with `hub_strategy` `checkpoint` or
        `all_checkpoints` the checkpoint too, but for the pickled arguments."""
        args = self.args
        if self._writing_checkpoint or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        current = self.push_in_progress  # of the main process alone
        if current is not None and not current.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        step, epoch = self.state.global_step, int(self.state.epoch or 0)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {f'step {step}' if by_steps else f'epoch {epoch}'}"
        write_trainer_card(cast("SelfStudyTrainer", self), checkpoint_folder)
        model = self.accelerator.unwrap_model(self.model)
        jobs: list[Any] = [
            hf_api().run_as_future(
                _push_copy,
                self._copy_of_cartridge(Path(checkpoint_folder)),
                functools.partial(self._push, base_model=check_base_name(model, args), commit_message=message),
            )
        ]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                hf_api().upload_folder(
                    repo_id=cast(str, self.hub_model_id),
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                    commit_message=f"{message}, checkpoint",
                    token=args.hub_token,
                    run_as_future=True,
                    ignore_patterns=[TRAINING_ARGS_NAME],
                    revision=args.hub_revision,
                )
            )
        if current is None or current.is_done():
            self.push_in_progress = PushInProgress(cast(Any, jobs))
        else:
            current.jobs.extend(jobs)

    def _copy_of_cartridge(self, folder: Path) -> tempfile.TemporaryDirectory[str]:
        """The checkpoint itself may be deleted (`save_total_limit`) before it is uploaded."""
        copy = tempfile.TemporaryDirectory()
        wanted = {*CARTRIDGE_FILES, *self._tokenizer_files()}
        for file in folder.iterdir():
            if file.is_file() and (file.name in wanted or IMAGE_FILE.fullmatch(file.name)):
                shutil.copyfile(file, Path(copy.name) / file.name)
        return copy


def _push_copy(copy: tempfile.TemporaryDirectory[str], push: Callable[[Path], Any]) -> None:
    """In the background: training goes on whatever the Hub says."""
    with copy as folder:
        try:
            push(Path(folder))
        except (OSError, ValueError) as error:
            logger.warning(f"A checkpoint was not pushed: {error}")


def _as_list(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value
