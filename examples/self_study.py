"""Train a cartridge of your texts, from the command line or a YAML file, on one device or many.

    python examples/self_study.py --config examples/configs/self_study.yaml
    python examples/self_study.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --corpus examples/data/lighthouse_handbook.md --num_tokens 256 --output_dir outputs/handbook
    accelerate launch --multi_gpu --num_processes 2 examples/self_study.py --config examples/configs/self_study.yaml

Two processes on a CPU: the last command with `--use_cpu` at its end.

What stands on the command line goes before the YAML file. The same command again carries on where a run was killed:
finished conversations and the last whole checkpoint in `output_dir` are used. All settings: `--help`; what they mean:
docs/training.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudySynthesizer, SelfStudyTrainer, SynthesisConfig
from peft_cartridges.corpus import load_corpus


@dataclass
class ScriptArguments:
    """What is trained on what."""

    model_name_or_path: str = field(metadata={"help": "Base model: a name on the Hub, or a folder."})
    corpus: list[str] = field(
        default_factory=list, metadata={"help": "Files, folders, globs or `hf://datasets/OWNER/NAME`."}
    )
    conversations: str | None = field(
        default=None,
        metadata={"help": "Instead of writing conversations: a folder with some, made by `Dataset.save_to_disk`."},
    )
    gold_questions: str | None = field(
        default=None, metadata={"help": "A JSON lines file of `question` and `answer`, measured and never trained on."}
    )
    num_eval_conversations: int = field(
        default=0, metadata={"help": "Held-out conversations to measure the KL on; written with another seed."}
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after so many evaluations without a better `metric_for_best_model`; 0 never does."},
    )
    dtype: str = field(default="auto", metadata={"help": "Of the base model: auto, float32, bfloat16, float16."})


@dataclass
class CartridgeArguments:
    """The cartridge that is made."""

    num_tokens: int = field(default=512, metadata={"help": "Length of the cartridge in tokens."})
    num_frozen_tokens: int = field(
        default=1, metadata={"help": "First tokens that are not trained: an attention sink (paper: 1)."}
    )


def main() -> None:
    script, args, cartridge = TrlParser((ScriptArguments, SelfStudyConfig, CartridgeArguments)).parse_args_and_config()
    if not script.corpus and not script.conversations:
        raise SystemExit("Give --corpus (texts to write conversations about) or --conversations (written ones).")
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=dtype).to(args.device)

    documents = load_corpus(script.corpus) if script.corpus else []
    texts = Dataset.from_list([dataclasses.asdict(document) for document in documents]) if documents else None
    held_out = None
    if script.num_eval_conversations and documents:
        settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(SynthesisConfig)}
        settings |= {"num_conversations": script.num_eval_conversations, "seed": args.seed + 1}
        held_out = SelfStudySynthesizer(model, tokenizer, SynthesisConfig(**settings)).synthesize(documents)
    questions = None
    if script.gold_questions:
        lines = Path(script.gold_questions).read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines if line.strip()]

    trainer = SelfStudyTrainer(
        model=model,
        args=args,
        train_dataset=load_from_disk(script.conversations) if script.conversations else texts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=CartridgeConfig(num_tokens=cartridge.num_tokens, num_frozen_tokens=cartridge.num_frozen_tokens),
        callbacks=[EarlyStoppingCallback(script.early_stopping_patience)] if script.early_stopping_patience else None,
        gold_questions=questions,
        corpus="\n\n".join(document.text for document in documents) if script.conversations and documents else None,
    )
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last)
    if held_out is not None or questions:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            print(json.dumps({name: round(value, 4) for name, value in metrics.items()}, indent=2))
    trainer.save_model()  # and, with --push_to_hub, pushes


if __name__ == "__main__":
    main()
