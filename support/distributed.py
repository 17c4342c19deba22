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

DAY = timedelta(days=1)  # a process may wait for the others for hours; if one dies, torchrun ends the rest


def launched(name, default):
    """A whole number that torchrun gives its processes in the environment; ``default`` without torchrun."""
    return int(os.environ[name]) if dist.is_torchelastic_launched() else default


def rank():
    """Index of this process among those that torchrun started, over all machines."""
    return launched("RANK", 0)


def world_size():
    """Number of processes over all machines."""
    return launched("WORLD_SIZE", 1)


def is_main():
    """Whether this is the process that shows progress and writes tables and charts."""
    return rank() == 0


def start():
    """Initialise the process group, once."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=DAY)


@contextlib.contextmanager
def guard():
    """A phase that all processes complete, or at whose end all of them exit.

    Raises:
        InputError: the first wrong input or OSError of any process; in the main process.
        SystemExit: the same, in the others.
    """
    message = None
    try:
        yield
    except (InputError, OSError) as error:
        message = str(error)
    end_all([text for text in gather(message) if text is not None])


def require_equal(**values):
    """End all processes, as ``guard`` does, unless each of them has the same values."""
    first, *others = gather(values)
    end_all(
        f"process {process} of {world_size()} has another {name} than process 0: {found[name]} instead of {expected}; "
        "all processes must see the same files"
        for process, found in enumerate(others, 1)
        for name, expected in first.items()
        if found[name] != expected
    )


def on_main(function, *args):
    """What a function returns in the main process, in all of them; its errors end all, as those of a ``guard``.

    All processes wait for each other first, so that the function can read what they wrote.
    """
    any_process(False)
    with guard():
        result = function(*args) if is_main() else None
    return broadcast(result)


@contextlib.contextmanager
def held_by_main(context):
    """A context that the main process enters and leaves, for all of them; its errors end all."""
    with contextlib.ExitStack() as stack:
        on_main(stack.enter_context, context)
        yield


def gather(value):
    """The value of each process, in all of them; anything that can be pickled."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def end_all(messages):
    """Raise the first message, if any, in the main process; the others exit with it."""
    for message in messages:
        raise InputError(message) if is_main() else SystemExit(2)


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
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    network.broadcast_buffers = False  # copied once; then all processes change them alike
    return network


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes.

    ``nn.SyncBatchNorm`` supports neither CPUs nor, in bfloat16, processes without an image.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        features = x.to(torch.promote_types(x.dtype, torch.float32))
        count = features.new_full((1,), x.numel() // x.shape[1])
        total, count = AllReduce.apply(torch.cat([features.sum((0, 2, 3)), count])).split([x.shape[1], 1])
        mean = total / count
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
