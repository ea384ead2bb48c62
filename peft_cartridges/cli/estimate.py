"""`cartridges estimate`: what a project takes, before anything is loaded. Without options: the paper's setting."""

from __future__ import annotations

import argparse

from transformers import AutoConfig

from ..conversations.targets import TARGETS
from ..model_cost import LLAMA_8B, ModelShape
from ..self_study import SynthesisConfig
from ..self_study.scale import estimate_scale
from .machine_options import add_machine_arguments, machine_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    project = parser.add_argument_group("project")
    project.add_argument("--corpus-tokens", type=int, default=484_000, help="length of the corpus (default 484,000)")
    project.add_argument("--num-conversations", type=int, default=65_536, help="conversations (default 65,536)")
    project.add_argument("--num-tokens", type=int, default=8_192, help="length of the cartridge (default 8,192)")
    project.add_argument("--min-chunk-tokens", type=int, default=512)
    project.add_argument("--max-chunk-tokens", type=int, default=4096)
    project.add_argument("--conversations-per-chunk", type=int, default=32)
    project.add_argument("--max-question-tokens", type=int, default=48)
    project.add_argument("--max-answer-tokens", type=int, default=96)
    project.add_argument("--recitation-share", type=float, default=0.0)
    project.add_argument("--off-context-share", type=float, default=0.0)
    project.add_argument("--teacher-targets", choices=list(TARGETS), default="hidden_states")
    project.add_argument("--train-batch-size", type=int, default=32, help="of all devices together")
    project.add_argument("--epochs", type=float, default=1.0)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", help="read its shape from this model's configuration, without its weights (default: Llama 3.1 8B's)"
    )
    group = add_machine_arguments(parser, devices=8)
    group.add_argument("--rows", type=int, default=256, help="conversations that a device decodes together")


def run(args: argparse.Namespace) -> None:
    settings = SynthesisConfig(
        num_conversations=args.num_conversations,
        min_chunk_tokens=args.min_chunk_tokens,
        max_chunk_tokens=args.max_chunk_tokens,
        conversations_per_chunk=args.conversations_per_chunk,
        max_question_tokens=args.max_question_tokens,
        max_answer_tokens=args.max_answer_tokens,
        recitation_share=args.recitation_share,
        off_context_share=args.off_context_share,
        teacher_targets=args.teacher_targets,
    )
    estimate = estimate_scale(
        settings,
        corpus_tokens=args.corpus_tokens,
        num_tokens=args.num_tokens,
        model=ModelShape.of(AutoConfig.from_pretrained(args.model)) if args.model else LLAMA_8B,
        machine=machine_from(args),
        rows=args.rows,
        train_batch_size=args.train_batch_size,
        epochs=args.epochs,
    )
    print(estimate)
