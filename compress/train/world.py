"""The processes that train one model together: a value, and one process is the ordinary case.

``torchrun --nproc-per-node N -m compress.cli ...`` starts N. The first leads: it does what a single
one would do, and the others wait to be told of a training to join (``compress/run/joining.py``). In
a training weights, gradients and moments are shards (FSDP2): of every layer each process of a node
has a part, nodes have copies, and a layer is whole only while it computes. Gradients add up, so
that the step is the one that a single process takes, to rounding.
"""

import copy
import functools
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from compress.core.errors import InputError
from compress.train.recipes import OptimizerName

# How long the others wait for the first to come to a training: searches take days.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """One process among ``size``; the default is alone."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    talk: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes, in place; the tensor itself alone."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, *flags: bool) -> list[bool]:
        """Whether any process says so, of every flag."""
        return [bool(flag) for flag in self.sum(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def told(self, value: Any) -> Any:
        """The first process's value in all; JSON goes between them."""
        if self.size == 1:
            return value
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0, group=self.talk)
        if not self.leads:
            text = torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self.talk)
        return json.loads(bytes(text.tolist()))

    def share(self, index: Tensor) -> Tensor:
        """The part of a batch's rows that is this process's."""
        return index[self.rank :: self.size]

    def require(self, rows: int, optimizer: OptimizerName) -> None:
        """InputError where a batch of so many rows, or an optimizer, does not divide."""
        if rows % self.size:
            raise InputError(
                f"a batch of {rows} rows does not divide among {self.size} processes; make it a "
                f"multiple of {self.size} rows"
            )
        if self.size > 1 and optimizer != "adamw":
            raise InputError(
                f"optimizer {optimizer} is of one process; {self.size} share weights and moments "
                "among them with adamw"
            )


ALONE = World()


@functools.cache
def world() -> World:
    """The world that ``torchrun`` has put this process in; it is joined when first asked for."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    # What this process starts is alone.
    del os.environ["WORLD_SIZE"]
    nodes = {} if local == size else {"replicate": size // local}
    axes = {**nodes, "shard": local}
    device = "cuda" if cuda else "cpu"
    mesh = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
    return World(dist.get_rank(), size, mesh, dist.new_group(backend="gloo", timeout=PATIENCE))


def sharded(module: nn.Module, world: World) -> nn.Module:
    """What trains in the module's place: itself alone, else a copy of which each has its part.

    The whole module waits where it is; a copy, because nothing takes a sharded one apart again.
    """
    if world.size == 1:
        return module
    device = next(module.parameters()).device
    module.cpu()
    found = copy.deepcopy(module)
    own: Any = fully_shard
    for layer in layers_of(found):
        own(layer.to(device), mesh=world.mesh)
    own(found.to(device), mesh=world.mesh)
    for part in found.modules():
        if isinstance(part, FSDPModule):
            # Processes have parts of one mean: their gradients are summed, not averaged.
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
    return found


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of the model in a module, those with weights."""
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "layers":
            return [layer for layer in part if any(True for _ in layer.parameters())]
    return []


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its being sharded; all processes ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as another of its shape; itself where that is not so."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    mesh = like.device_mesh
    plain = tensor.to(mesh.device_type)
    return distribute_tensor(plain, mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def give_back(trained: nn.Module, module: nn.Module) -> None:
    """Fill a module with what its sharded copy has learned; nothing to do where it is itself."""
    if trained is module:
        return
    found = tensors_of(trained)
    for name, tensor in tensors_of(module).items():
        tensor.copy_(whole(found[name]))
    module.to(next(trained.parameters()).device)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    # First: it makes shards again of what a forward pass without a backward one has left whole.
    kept = module.state_dict()
    parameters = dict(module.named_parameters())
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return parameters | {name: tensor for name, tensor in kept.items() if name not in every}
