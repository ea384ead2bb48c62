"""One training step of a cartridge: this package against stock PEFT's CARTRIDGE.

    python -m benchmarks.train_step --num-tokens 512 2048 --batch-size 8 --length 128 --dtype bfloat16

Both do the same work: `batch-size` rows of `length` tokens, the KL to a stored teacher over the whole vocabulary at the
second half of each row's tokens, the gradient of every key and value but the first token's, and an Adam step. With `--labels`
the loss is the model's own, `model(input_ids=…, labels=…)`, at all tokens. Time is the median of some steps after a warm-up; memory is the peak above the loaded model with its adapter. With another
`--dtype` than float32, stock PEFT is measured in float32 too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import get_peft_model

from benchmarks.harness import (
    PeakMemory,
    Settings,
    base_parser,
    load_model,
    median,
    print_table,
    run_in_turns,
    save,
    serve_worker,
    spread,
    timed,
    worker_settings,
)


def ours(settings: Settings) -> dict[str, Any]:
    from peft_cartridges import CartridgeConfig
    from peft_cartridges.hidden_states import OutputHead, forward_hidden_states
    from peft_cartridges.objectives import Objective

    model = get_peft_model(load_model(settings), CartridgeConfig(num_tokens=settings["num_tokens"]))
    head = OutputHead(model)
    objective = Objective(head, chunk_size=128)
    input_ids, learned, teacher = _batch(model, settings)
    if settings["labels"]:
        return _measure(model, settings, _own_loss(model, input_ids))
    labels = torch.nn.functional.pad(learned.long() - 1, (1, 0), value=-1)  # 0 where a token is learned
    batch = {"labels": torch.where(labels == 0, 0, -100), "teacher_hidden_states": teacher}

    def loss() -> torch.Tensor:
        return objective(forward_hidden_states(model, input_ids=input_ids), batch) / len(teacher)

    return _measure(model, settings, loss)


def stock_peft(settings: Settings) -> dict[str, Any]:
    config = peft.CartridgeConfig(num_virtual_tokens=settings["num_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(settings), config)
    input_ids, learned, teacher = _batch(model, settings)
    if settings["labels"]:
        return _measure(model, settings, _own_loss(model, input_ids))
    output_embeddings = model.get_base_model().get_output_embeddings()

    def loss() -> torch.Tensor:
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, :-1][learned]
        with torch.no_grad():
            target = output_embeddings(teacher).float().log_softmax(-1)
        return (target.exp() * (target - logits.float().log_softmax(-1))).sum() / len(teacher)

    return _measure(model, settings, loss)


def stock_peft_float32(settings: Settings) -> dict[str, Any]:
    return stock_peft({**settings, "dtype": "float32"})


WORKERS = {"ours": ours, "stock_peft": stock_peft, "stock_peft_float32": stock_peft_float32}


def _batch(model: torch.nn.Module, settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (settings["batch_size"], settings["length"])
    device = settings["device"]
    input_ids = torch.randint(100, 10_000, shape, device=device)
    learned = torch.zeros(shape[0], shape[1] - 1, dtype=torch.bool, device=device)
    learned[:, shape[1] // 2 :] = True
    hidden_size = model.get_base_model().config.hidden_size
    dtype = getattr(torch, settings["dtype"])
    return input_ids, learned, torch.randn(int(learned.sum()), hidden_size, dtype=dtype, device=device)


def _own_loss(model: torch.nn.Module, input_ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    mask = torch.ones_like(input_ids)
    return lambda: model(input_ids=input_ids, attention_mask=mask, labels=input_ids).loss


def _measure(model: torch.nn.Module, settings: Settings, loss: Any) -> dict[str, Any]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():  # what is imported and loaded on first use is not this system's memory
        model(input_ids=torch.ones(1, 8, dtype=torch.long, device=settings["device"]))
    with PeakMemory(settings) as memory:
        seconds = timed(settings, step, settings["steps"])
    return {"seconds": seconds, "memory_mb": memory.bytes / 2**20}


def main() -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--labels", action="store_true", help="the model's own loss at all tokens")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if serve_worker(args, WORKERS):
        return
    systems = [name for name in WORKERS if name != "stock_peft_float32" or args.dtype != "float32"]
    rows, results = [], {}
    for num_tokens in args.num_tokens:
        settings = worker_settings(args, num_tokens=num_tokens)
        results[num_tokens] = measured = run_in_turns("benchmarks.train_step", systems, settings, args.rounds)
        for system in systems:
            row: list[Any] = [num_tokens, system]
            for key in ("seconds", "memory_mb"):
                value, mine = median(measured[system], key), median(measured["ours"], key)
                row += [value, value / mine if value and mine else None]
            rows.append([*row, spread(measured[system], "seconds")])
    print_table(["cartridge tokens", "system", "s", "times ours", "MB", "times ours", "spread"], rows)
    save(args, "train_step", results)


if __name__ == "__main__":
    main()
