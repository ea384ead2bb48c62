"""A whole self-study: this package against the recipe of PEFT's own example, on stock PEFT.

    python -m benchmarks.self_study --conversations 256 --recipe-sample 4

The same document, number of conversations, answer length, cartridge length and number of gradient steps over them (each
conversation once). The recipe, written here from the description in PEFT's `examples/cartridge_self_study`: questions
and answers are generated one at a time with the whole document in the prompt; in training, the teacher reads the document
again for every sample, the student is stock PEFT's CARTRIDGE, and the loss is the KL on the teacher's 20 likeliest
tokens. It does the same for every sample, so `--recipe-sample` of them are timed and the time is multiplied.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from benchmarks.harness import (
    Settings,
    base_parser,
    load_model,
    median,
    print_table,
    run_in_turns,
    save,
    serve_worker,
    spread,
    worker_settings,
)


def ours(settings: Settings) -> dict[str, Any]:
    from datasets import Dataset

    from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudyTrainer

    folder = tempfile.TemporaryDirectory()  # of its own: conversations of an earlier run would be taken up
    args = SelfStudyConfig(
        output_dir=folder.name,
        num_conversations=settings["conversations"],
        max_question_tokens=settings["answer_tokens"],
        max_answer_tokens=settings["answer_tokens"],
        recitation_share=settings["recitation_share"],
        initialization="first_tokens",  # which costs next to nothing: the recipe starts from noise
        num_train_epochs=1,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=settings["device"] == "cpu",
    )
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    start = time.perf_counter()
    trainer = SelfStudyTrainer(
        model=load_model(settings),
        args=args,
        train_dataset=Dataset.from_dict({"text": [_document(settings, tokenizer)]}),
        processing_class=tokenizer,
        peft_config=CartridgeConfig(num_tokens=settings["num_tokens"]),
    )
    synthesized = time.perf_counter()
    trainer.train()
    end = time.perf_counter()
    folder.cleanup()
    return {
        "seconds": end - start,
        "synthesis_seconds": synthesized - start,
        "training_seconds": end - synthesized,
        "conversations": len(trainer.train_dataset),
        "learned_tokens": sum(sum(row) for row in trainer.train_dataset["completion_mask"]),
    }


def peft_recipe(settings: Settings) -> dict[str, Any]:
    from peft_cartridges.self_study.prompts import PAPER_TYPES, draw_seed_prompt

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    document = _document(settings, tokenizer)
    config = peft.CartridgeConfig(num_virtual_tokens=settings["num_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(settings), config)
    base = model.get_base_model()
    rng = random.Random(0)
    system = {"role": "system", "content": document}

    def encode(*messages: dict[str, str]) -> torch.Tensor:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=False
        ).to(settings["device"])

    def generate(prompt: torch.Tensor, sample: bool) -> torch.Tensor:
        options: dict[str, Any] = {"do_sample": True, "temperature": 0.7} if sample else {"do_sample": False}
        output = base.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=settings["answer_tokens"],
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        return output[:, prompt.shape[1] :]

    start = time.perf_counter()
    samples = []
    with model.disable_adapter():
        for number in range(settings["recipe_sample"]):
            seed = draw_seed_prompt(PAPER_TYPES[number % len(PAPER_TYPES)], rng)
            asked = generate(encode(system, {"role": "user", "content": seed}), sample=True)
            question = {"role": "user", "content": tokenizer.decode(asked[0], skip_special_tokens=True)}
            answer = generate(encode(system, question), sample=False)
            samples.append([torch.cat([encode(*turns, question), answer], dim=1) for turns in ([system], [])])
    synthesized = time.perf_counter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for teacher_ids, student_ids in samples:
        with torch.no_grad(), model.disable_adapter():
            teacher = base(teacher_ids).logits[:, teacher_ids.shape[1] - student_ids.shape[1] :]
        student = model(input_ids=student_ids, attention_mask=torch.ones_like(student_ids)).logits
        weights, tokens = teacher.float().softmax(-1).topk(20)
        (-(weights * student.float().log_softmax(-1).gather(-1, tokens)).sum(-1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    end = time.perf_counter()
    scale = settings["conversations"] / settings["recipe_sample"]
    return {
        "seconds": (end - start) * scale,
        "synthesis_seconds": (synthesized - start) * scale,
        "training_seconds": (end - synthesized) * scale,
        "conversations": settings["conversations"],
    }


WORKERS = {"ours": ours, "peft_recipe": peft_recipe}


def _document(settings: Settings, tokenizer: Any) -> str:
    """The corpora of the examples, one after the other, cut at the wanted number of tokens."""
    texts = [path.read_text() for path in sorted(Path("examples/data").glob("*.md"))]
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"][: settings["document_tokens"]]
    return tokenizer.decode(ids)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--document-tokens", type=int, default=4000)
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--num-tokens", type=int, default=256, help="length of the cartridge")
    parser.add_argument("--answer-tokens", type=int, default=64, help="longest question and longest answer")
    parser.add_argument(
        "--recitation-share", type=float, default=0.0, help="0: every conversation is generated, as in the recipe"
    )
    parser.add_argument("--recipe-sample", type=int, default=4, help="samples of the recipe that are timed")


def main() -> None:
    parser = base_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    if serve_worker(args, WORKERS):
        return
    measured = run_in_turns("benchmarks.self_study", list(WORKERS), worker_settings(args), args.rounds)
    slow = median(measured["peft_recipe"], "seconds")
    rows = []
    for system in WORKERS:
        seconds = median(measured[system], "seconds")
        parts = [median(measured[system], f"{part}_seconds") for part in ("synthesis", "training")]
        ratio = slow / seconds if slow and seconds else None
        rows.append([system, *parts, seconds, ratio, spread(measured[system], "seconds")])
    print_table(["system", "synthesis, s", "training, s", "in all, s", "faster than the recipe by", "spread"], rows)
    save(args, "self_study", measured)


if __name__ == "__main__":
    main()
