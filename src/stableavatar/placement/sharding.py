"""Parameters, gradients and optimizer states spread over processes (FSDP2), applied from outside to a model.

What `accelerate` makes of its own FSDP settings needs a GPU; this is the same of PyTorch's `fully_shard` on
any device.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stableavatar.errors import InputError


def shard_module(module: nn.Module, device: torch.device) -> None:
    """Spread a module over all processes: every block of its models on its own, then the rest.

    Parameters become DTensors. While a block runs, its own parameters alone are whole. All processes must run
    the same parts in every step: they wait for each other at each of them.

    The first process's module may be the only one with values: where another's has parameters without memory
    (on the device "meta"), all get the first's, a tensor at a time, so that one process of all has to hold a
    whole model. What a state dict leaves out (buffers that are not persistent) such a module must not have.

    Raises:
        InputError: there is no group of processes.
        ValueError: a module without values has buffers that a state dict leaves out.
    """
    if not dist.is_initialized():
        raise InputError(
            "sharding spreads a model over several processes: start them with torchrun or accelerate launch"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    empty = any(parameter.is_meta for parameter in module.parameters())
    if empty and any(part._non_persistent_buffers_set for part in module.modules()):
        raise ValueError("a module without values has buffers that no state dict holds")
    any_empty = torch.tensor(empty, dtype=torch.int32, device=device)
    dist.all_reduce(any_empty, op=dist.ReduceOp.MAX)
    whole = module.state_dict() if any_empty and not empty else {}
    blocks = repeated_blocks(module)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    for part in module.modules():  # models that are called by themselves too, as a sampler does
        if part is not module and part not in blocks and getattr(part, "_repeated_blocks", None):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if empty:
        module.to_empty(device=device)
    if any_empty:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, whole, options=options)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of the models within a module, as these name them (`_repeated_blocks`)."""
    names = {name for part in module.modules() for name in getattr(part, "_repeated_blocks", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names]
