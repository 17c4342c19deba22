"""Several processes, started by torchrun: ranks, collectives, and errors that end all of them with one message.

    torchrun --nproc-per-node 4 train.py --tag baseline

Processes communicate by NCCL between GPUs and by gloo between CPUs. Without torchrun there is one process, and nothing
here does anything. All processes must see the same files.
"""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support.errors import InputError


def rank():
    """Index of this process among those that torchrun started, over all machines."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def local_rank():
    """Index of this process among those on its machine: the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_torchelastic_launched() else 0


def world_size():
    """Number of processes over all machines."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_main():
    """Whether this is the process that shows progress and writes tables and charts."""
    return rank() == 0


def start():
    """Initialise the process group, once."""
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # a process may wait for the others for hours; if one dies, torchrun ends the rest
        dist.init_process_group(backend, timeout=timedelta(days=1))


@contextlib.contextmanager
def guard():
    """A phase that all processes complete, or at whose end all of them exit; the main process raises the first error.

    Yields:
        dict in which a process puts what must be equal in all of them, by name; compared at the end of the phase.

    Raises:
        InputError: wrong input or an OSError in any process, or values that differ; in the main process.
        SystemExit: the same, in the others.
    """
    same = {}
    if world_size() == 1:
        yield same
        return
    message = None
    try:
        yield same
    except (InputError, OSError) as error:
        message = str(error)
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, (message, same))
    messages = [text for text, _ in gathered if text is not None] or [
        f"process {process} of {len(gathered)} has another {name} than process 0: {values[name]} instead of {expected};"
        " all processes must see the same files"
        for process, (_, values) in enumerate(gathered)
        for name, expected in gathered[0][1].items()
        if values[name] != expected
    ]
    if messages:
        raise InputError(messages[0]) if is_main() else SystemExit(2)


def shard(items):
    """This process's part of a sequence that all N processes have: items rank, rank + N, rank + 2 N, ..."""
    return items[rank() :: world_size()]


def broadcast(value):
    """The main process's value, in all processes; anything that can be pickled."""
    if world_size() > 1:
        values = [value]
        dist.broadcast_object_list(values)
        (value,) = values
    return value


def all_reduce(tensor):
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_process(flag):
    """Whether a flag is true in any process. Reduced between the CPUs, so that no GPU is synchronised."""
    return all_reduce(torch.tensor(int(flag))).item() > 0


def barrier():
    """Wait for all processes: what they wrote before can be read after."""
    any_process(False)


# --- training --------------------------------------------------------------------------------------------------------


def data_parallel(model, device):
    """A placed model that all processes train together, each on its part of a batch.

    Weights start as the main process's. Batch norm takes its statistics over the whole batch, as one process does, and
    gradients are averaged. Parts may differ in size, or be empty.

    Returns:
        a callable like the model.
    """
    if world_size() == 1:
        return model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm2d  # same parameters and buffers, another forward
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes.

    ``nn.SyncBatchNorm`` supports neither CPUs nor, in bfloat16, processes without an image.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        features = x.to(torch.promote_types(x.dtype, torch.float32))
        count = torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        count = all_reduce(count).to(features.dtype)
        mean = AllReduce.apply(features.sum((0, 2, 3))) / count
        centred = features - mean[:, None, None]
        variance = AllReduce.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class AllReduce(torch.autograd.Function):
    """Sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, tensor):
        return all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient.clone())
