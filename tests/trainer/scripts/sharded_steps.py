"""Two steps with the model sharded over the processes (FSDP 2), against the whole model: losses, gradients and what
becomes of the cartridge."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from peft_cartridges import CartridgeConfig
from peft_cartridges.hidden_states import OutputHead, forward_hidden_states
from peft_cartridges.objectives import Objective
from tests.tiny_models import tiny_model, token_ids


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), CartridgeConfig(num_tokens=6, num_frozen_tokens=2))


def step(model: nn.Module, head: OutputHead, seed: int) -> Tensor:
    ids = token_ids(2, 9, seed=seed)
    labels = ids.clone()
    labels[:, :5] = -100
    batch = {
        "labels": labels,
        "teacher_hidden_states": torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)),
    }
    return Objective(head, chunk_size=3)(forward_hidden_states(model, input_ids=ids), batch)


def compare(sharded: nn.Module, whole: nn.Module, what: Callable[[nn.Parameter], Tensor]) -> None:
    expected = dict(whole.named_parameters())
    trained = [(name, parameter) for name, parameter in sharded.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4, len(trained)
    for name, parameter in trained:
        torch.testing.assert_close(what(parameter).full_tensor(), what(expected[name]), atol=1e-5, rtol=1e-4)


def check() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, sharded = make_model(), make_model()
    whole_head, head = OutputHead(whole), OutputHead(sharded)
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    # SGD, whose steps are as close as the gradients are; Adam's first step makes a sign of them.
    optimizers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=1.0) for m in (whole, sharded)]
    for number in range(2):
        seeds = [number * world + rank for rank in range(world)]
        losses = [step(whole, whole_head, seed) for seed in seeds]
        (sum(losses) / world).backward()
        loss = step(sharded, head, seeds[rank])
        loss.backward()
        torch.testing.assert_close(loss, losses[rank].detach(), atol=1e-5, rtol=1e-5)
        compare(sharded, whole, lambda parameter: parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        compare(sharded, whole, lambda parameter: parameter.detach())
    print("sharded steps agree")


def main() -> None:
    dist.init_process_group("gloo")
    check()
    gc.collect()  # the sharded model holds the process group, whose threads must not outlive it
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
