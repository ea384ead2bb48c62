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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api
from trl.trainer.base_trainer import _BaseTrainer

from ..hub import push_cartridge
from ..hub.pull import CARTRIDGE_FILES, IMAGE_FILE
from ..hub.push import find_base_name, refuse_public
from ..hub_errors import hub_errors
from .run_card import write_run_card
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


class CartridgePusher(TrainerCallback):
    """Pushes a trainer's cartridge and its card, and no more; while it trains, with every checkpoint (`hub_strategy`).

    Args:
        trainer: Whose cartridge it is.
    """

    def __init__(self, trainer: SelfStudyTrainer) -> None:
        self.trainer = trainer

    def push(
        self,
        folder: Path,
        *,
        base_model: str,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """Uploads the cartridge in a folder, with its card, its figures and the tokenizer; see `push_cartridge`."""
        args = self.trainer.args
        return push_cartridge(
            folder,
            cast(str, self.trainer.hub_model_id),
            base_model=base_model,
            include=[name for name in self._tokenizer_files() if (folder / name).is_file()],
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision if revision is None else revision,
            commit_message=commit_message,
            token=args.hub_token if token is None else token,
        ).commit

    def push_now(
        self,
        commit_message: str,
        *,
        blocking: bool,
        token: str | None,
        revision: str | None,
        private: bool | None,
        card: dict[str, Any],
    ) -> Any:
        """Saves the cartridge and its card and uploads them; see `SelfStudyTrainer.push_to_hub`."""
        trainer, args = self.trainer, self.trainer.args
        model = trainer.accelerator.unwrap_model(trainer.model)
        base_model = check_base_name(model, args, card.get("finetuned_from"))
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, private=private)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        trainer.create_model_card(**card)
        trainer._finish_current_push()
        push = functools.partial(
            self.push,
            Path(args.output_dir or "."),
            base_model=base_model,
            commit_message=commit_message,
            token=token,
            revision=revision,
            private=private,
        )
        return push() if blocking else hf_api().run_as_future(push)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The cartridge of a checkpoint with its card, in the background; with `hub_strategy` `checkpoint` or
        `all_checkpoints` the checkpoint too, but for the pickled arguments."""
        trainer = self.trainer
        if not args.push_to_hub or not state.is_world_process_zero or args.hub_strategy == HubStrategy.END:
            return
        current = trainer.push_in_progress
        if current is not None and not current.is_done() and not args.hub_always_push:
            return
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        trainer.callback_handler.on_push_begin(args, state, control)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        progress = f"step {state.global_step}" if by_steps else f"epoch {int(state.epoch or 0)}"
        message = f"Training in progress, {progress}"
        write_run_card(trainer, str(folder))
        base_model = check_base_name(trainer.accelerator.unwrap_model(trainer.model), trainer.args)
        push = functools.partial(self.push, base_model=base_model, commit_message=message)
        jobs: list[Any] = [hf_api().run_as_future(_push_copy, self._copy_of_cartridge(folder), push)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                hf_api().upload_folder(
                    repo_id=cast(str, trainer.hub_model_id),
                    folder_path=folder,
                    path_in_repo="last-checkpoint" if last else folder.name,
                    commit_message=f"{message}, checkpoint",
                    token=args.hub_token,
                    run_as_future=True,
                    ignore_patterns=[TRAINING_ARGS_NAME],
                    revision=args.hub_revision,
                )
            )
        if current is None or current.is_done():
            trainer.push_in_progress = PushInProgress(cast(Any, jobs))
        else:
            current.jobs.extend(jobs)

    def _tokenizer_files(self) -> list[str]:
        """What the tokenizer or processor saves itself in: only it knows."""
        with tempfile.TemporaryDirectory() as folder:
            cast(Any, self.trainer.processing_class).save_pretrained(folder)
            return sorted(os.listdir(folder))

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


class PushingTrainer(_BaseTrainer):
    """What a `Trainer` does about the Hub, for a trainer with a `CartridgePusher`."""

    args: SelfStudyConfig
    pusher: CartridgePusher
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer.init_hf_repo`.

        Raises:
            HubError: the Hub refuses it, or the repository was to be private and is public already.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir or ".").absolute().name
        held = self.args.hub_private_repo
        self.args.hub_private_repo = held if private is None else private
        try:
            with hub_errors(name, None):
                super().init_hf_repo(token=token)  # transformers 5.22 takes no `private`
                if self.is_world_process_zero() and self.args.hub_private_repo:
                    refuse_public(cast(str, self.hub_model_id), HfApi(token=token or self.args.hub_token))
        finally:
            self.args.hub_private_repo = held

    def create_model_card(  # type: ignore[override]
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        dataset_name: str | list[str] | None = None,
    ) -> None:
        """Writes the cartridge's model card into `output_dir`.

        Args:
            language, license, finetuned_from: Instead of those in `args`.
            tags: Further tags.
            model_name: The card's heading.
            dataset, dataset_name: Data sets on the Hub that it was made from (the names of `Trainer` and of TRL).
        """
        facts = {"language": language, "tags": tags, "datasets": dataset or dataset_name}
        changes: dict[str, Any] = {name: [value] if isinstance(value, str) else value for name, value in facts.items()}
        changes |= {"license": license, "title": model_name, "base_model": finetuned_from}
        write_run_card(
            cast("SelfStudyTrainer", self),
            self.args.output_dir or ".",
            **{name: value for name, value in changes.items() if value},
        )

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
        return self.pusher.push_now(
            commit_message or "End of training",
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
            card=kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """`CartridgePusher.on_save` does it, when the checkpoint is complete."""
