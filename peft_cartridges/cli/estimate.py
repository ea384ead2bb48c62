"""`cartridges estimate`: what a project takes, before anything is loaded. Without options: the paper's setting."""

from __future__ import annotations

import argparse

from ..conversations.targets import TARGETS
from ..self_study import SynthesisConfig
from ..self_study.scale import Hardware, ModelShape, estimate_scale


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

    model = parser.add_argument_group("model (default: Llama 3.1 8B)")
    model.add_argument("--model", help="read the shape from this model's configuration; its weights are not loaded")
    for name in ("hidden-size", "num-layers", "num-attention-heads", "num-key-value-heads", "head-dim"):
        model.add_argument(f"--{name}", type=int)
    model.add_argument("--parameters", type=float, help="numbers in the weights, e.g. 8.03e9")

    machine = parser.add_argument_group("devices (default: eight H100s)")
    machine.add_argument("--devices", type=int, default=8)
    machine.add_argument("--flops", type=float, default=989e12, help="peak of one, per second (dense bfloat16)")
    machine.add_argument("--bandwidth", type=float, default=3.35e12, help="of its memory, bytes per second")
    machine.add_argument("--memory", type=float, default=80e9, help="bytes")
    machine.add_argument("--utilization", type=float, default=0.4, help="share of the peak that is reached")
    machine.add_argument("--rows", type=int, default=256, help="conversations that a device decodes together")


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
    hardware = Hardware(args.devices, args.flops, args.bandwidth, args.memory, args.utilization, args.rows)
    estimate = estimate_scale(
        settings,
        corpus_tokens=args.corpus_tokens,
        num_tokens=args.num_tokens,
        model=_shape(args),
        hardware=hardware,
        train_batch_size=args.train_batch_size,
        epochs=args.epochs,
    )
    print(estimate)


def _shape(args: argparse.Namespace) -> ModelShape:
    names = ("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "parameters")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    shape = ModelShape()
    if args.model:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(args.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shape = ModelShape.of(config, sum(parameter.numel() for parameter in model.parameters()))
    return ModelShape(**{**vars(shape), **given})
