"""One step's loss and gradients with the model sharded over the processes (FSDP 2), against the whole model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from peft_cartridges import CartridgeConfig
from peft_cartridges.hidden_states import OutputHead, forward_hidden_states
from peft_cartridges.trainer.objective import Objective
from tests.tiny_models import tiny_model, token_ids


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), CartridgeConfig(num_tokens=6, num_frozen_tokens=2))


def step(model: nn.Module, head: OutputHead, rank: int) -> Tensor:
    ids = token_ids(2, 9, seed=rank)
    labels = ids.clone()
    labels[:, :5] = -100
    batch = {
        "labels": labels,
        "teacher_hidden_states": torch.randn(8, 32, generator=torch.Generator().manual_seed(rank)),
    }
    return Objective(head, chunk_size=3)(forward_hidden_states(model, input_ids=ids), batch)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = make_model()
    losses = [step(whole, OutputHead(whole), number) for number in range(world)]
    (sum(losses) / world).backward()

    sharded = make_model()
    head = OutputHead(sharded)
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    loss = step(sharded, head, rank)
    loss.backward()
    torch.testing.assert_close(loss, losses[rank].detach(), atol=1e-5, rtol=1e-5)
    expected = dict(whole.named_parameters())
    checked = 0
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name].grad, atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked == 4, checked
    print("sharded step agrees")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
