"""Every trainer of TRL takes `peft_config=CartridgeConfig(...)` and trains the cartridge, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import assert_close, pad
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

pytest.importorskip("trl")

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 0.1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
}
QUESTIONS = ["what is the old ship", "who tells about the light", "when is the sea red", "where is the captain"]
ANSWERS = ["the captain says yes", "the keeper tells seven nights", "the new harbor is blue", "no . this is the sky"]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _sft(folder: Path, **common: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [{"messages": _user(q) + _assistant(a)} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return SFTTrainer(
        args=SFTConfig(folder, max_length=64, **ARGUMENTS), train_dataset=Dataset.from_list(rows), **common
    )


def _sft_packed(folder: Path, **common: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": f"{q} ? {a} ."} for q, a in zip(QUESTIONS, ANSWERS, strict=True)] * 4
    arguments = {**ARGUMENTS, "packing": True, "padding_free": True, "per_device_train_batch_size": 1}
    return SFTTrainer(
        args=SFTConfig(folder, max_length=32, **arguments), train_dataset=Dataset.from_list(rows), **common
    )


def _dpo(folder: Path, **common: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": _user(q), "chosen": _assistant(a), "rejected": _assistant(b)}
        for q, a, b in zip(QUESTIONS, ANSWERS, ANSWERS[::-1], strict=True)
    ]
    return DPOTrainer(
        args=DPOConfig(folder, max_length=64, **ARGUMENTS), train_dataset=Dataset.from_list(rows), **common
    )


def _kto(folder: Path, **common: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": _user(q), "completion": _assistant(a), "label": index % 2 == 0}
        for index, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    return KTOTrainer(
        args=KTOConfig(folder, max_length=64, **ARGUMENTS), train_dataset=Dataset.from_list(rows), **common
    )


def _reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(index) for index, _ in enumerate(completions)]


def _grpo(folder: Path, **common: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": _user(question)} for question in QUESTIONS]
    args = GRPOConfig(folder, num_generations=2, max_completion_length=6, beta=0.1, **ARGUMENTS)
    return GRPOTrainer(args=args, reward_funcs=_reward, train_dataset=Dataset.from_list(rows), **common)


def _rloo(folder: Path, **common: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    rows = [{"prompt": _user(question)} for question in QUESTIONS]
    args = RLOOConfig(folder, num_generations=2, max_completion_length=6, **ARGUMENTS)
    return RLOOTrainer(args=args, reward_funcs=_reward, train_dataset=Dataset.from_list(rows), **common)


def _distillation(folder: Path, **common: Any) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    rows = [{"prompt": _user(question)} for question in QUESTIONS]
    args = DistillationConfig(folder, max_completion_length=6, **ARGUMENTS)
    return DistillationTrainer(
        args=args, teacher_model=tiny_model("llama", seed=1), train_dataset=Dataset.from_list(rows), **common
    )


def _sdft(folder: Path, **common: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    rows = [
        {"prompt": _user(q), "privileged_context": f"the answer is {a}"}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    args = SDFTConfig(folder, max_completion_length=6, num_generations=2, **ARGUMENTS)
    return SDFTTrainer(args=args, train_dataset=Dataset.from_list(rows), **common)


def _gkd(folder: Path, **common: Any) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = [{"messages": _user(q) + _assistant(a)} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    args = GKDConfig(folder, max_length=64, max_new_tokens=6, **ARGUMENTS)
    return GKDTrainer(
        args=args, teacher_model=tiny_model("llama", seed=1), train_dataset=Dataset.from_list(rows), **common
    )


def _online_dpo(folder: Path, **common: Any) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    rows = [{"prompt": _user(question)} for question in QUESTIONS]
    args = OnlineDPOConfig(folder, max_new_tokens=6, max_length=64, **ARGUMENTS)
    return OnlineDPOTrainer(args=args, reward_funcs=_reward, train_dataset=Dataset.from_list(rows), **common)


TRAINERS = {
    "SFTTrainer": _sft,
    "SFTTrainer, packed": _sft_packed,
    "DPOTrainer": _dpo,
    "KTOTrainer": _kto,
    "GRPOTrainer": _grpo,
    "RLOOTrainer": _rloo,
    "DistillationTrainer": _distillation,
    "SDFTTrainer (trl.experimental)": _sdft,
    "GKDTrainer (trl.experimental)": _gkd,
    "OnlineDPOTrainer (trl.experimental)": _online_dpo,
}


@pytest.mark.supports("Training", "trainers of TRL", on="{name}")
@pytest.mark.parametrize("name", TRAINERS)
def test_two_steps(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = TRAINERS[name](
        tmp_path, model=model, processing_class=tiny_tokenizer(),
        peft_config=CartridgeConfig(num_tokens=8, num_frozen_tokens=2),
    )  # fmt: skip
    assert isinstance(trainer.model, PeftModel)
    before = trainer.model.base_model.get_kv_prefix()
    trainer.train()
    assert trainer.state.global_step == 2
    after = trainer.model.base_model.get_kv_prefix()
    for old, new in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
        assert torch.equal(old[:, :2], new[:, :2]), "a frozen token moved"
        assert (old[:, 2:] - new[:, 2:]).abs().max() > 1e-3, "the cartridge was not trained"
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    ids = token_ids(1, 5)
    trainer.model.eval()
    with torch.no_grad():
        assert_close(again(input_ids=ids).logits, trainer.model(input_ids=ids).logits, 1e-5)
    for key, tensor in trainer.model.unload().state_dict().items():
        assert torch.equal(tensor, base[key]), f"the base model's {key} moved"


def _score(trainer: Any, batch: dict[str, Tensor], answers: Tensor) -> Tensor:
    """The log-probabilities of answers, as the trainer takes them."""
    answer_mask = torch.ones_like(answers)
    if hasattr(trainer, "_get_per_token_logps_and_entropies"):
        ids = torch.cat([batch["input_ids"], answers], 1)
        mask = torch.cat([batch["attention_mask"], answer_mask], 1)
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, answers.shape[1])
        return found[0]
    return trainer._forward(trainer.model, batch["input_ids"], batch["attention_mask"], answers, answer_mask)


@pytest.mark.supports("Training", "rollout and scoring agree", on="{name}")
@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer (trl.experimental)"])
def test_rollout_and_scoring_agree(name: str, tmp_path: Path) -> None:
    """Left-padded prompts; the trainers score with an attention mask and no positions."""
    model = tiny_model("llama")
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    trainer = TRAINERS[name](
        tmp_path, model=model, processing_class=tiny_tokenizer(), peft_config=CartridgeConfig(num_tokens=12)
    )
    trainer.model.base_model.set_kv_prefix(prefix)
    trainer.model.eval()
    batch = pad([token_ids(length, seed=length) for length in (3, 11)], "left")
    del batch["position_ids"]
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    output = trainer.model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    answers = output.sequences[:, 11:]
    rollout = torch.stack(output.logits, 1).log_softmax(-1).gather(2, answers[..., None])[..., 0]
    with torch.no_grad():
        scored = _score(trainer, batch, answers)
    assert_close(scored, rollout, 1e-4)
