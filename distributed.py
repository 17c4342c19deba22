"""Several processes on one or more machines, as torchrun starts them: who does what, and how they agree.

    torchrun --nproc-per-node 4 train.py --tag baseline

Between CPUs they talk by gloo, between GPUs by NCCL. A process that was not started by torchrun is alone: then all of
this does nothing. What processes read and write together lies in folders that all of them see.
"""

import contextlib
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from command import InputError, is_main, rank, world_size


def start():
    """Meet the other processes, unless that is done."""
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # the first to be ready may wait for hours; when one dies, torchrun ends all
        dist.init_process_group(backend, timeout=timedelta(days=1))


def share(items):
    """Of a sequence that all N processes have, this process's part: the first takes items 0, N, 2 N, ..."""
    return items[rank() :: world_size()]


def agree(value):
    """The first process's value, in all of them; any that can be pickled."""
    if world_size() > 1:
        values = [value]
        dist.broadcast_object_list(values)
        (value,) = values
    return value


def check_same(**values):
    """Raise InputError unless all processes have the same values; inside ``together``, as its first statement."""
    for name, expected in agree(values).items():
        if values[name] != expected:
            raise InputError(
                f"process {rank()} of {world_size()} finds another {name.replace('_', ' ')} than the first, "
                f"{values[name]} instead of {expected}; all need to see the same files"
            )


def add(tensor):
    """Add up a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_of(flag):
    """Whether a flag is true in any process. It travels between the CPUs: no GPU is waited for."""
    return add(torch.tensor(int(flag))).item() > 0


def wait():
    """Go on when all processes have come here: what they wrote before can be read."""
    any_of(False)


@contextlib.contextmanager
def together():
    """All processes get through this block, or all end, the first with the first one's error.

    Raises:
        InputError: wrong input, or an OSError, in one of the processes.
        SystemExit: the same, in all but the first, which tells of it.
    """
    if world_size() == 1:
        yield
        return
    message = None
    try:
        yield
    except (InputError, OSError) as error:
        message = str(error)
    messages = [None] * world_size()
    dist.all_gather_object(messages, message)
    for message in messages:
        if message is not None:
            raise InputError(message) if is_main() else SystemExit(2)


# --- training --------------------------------------------------------------------------------------------------------


def share_training(model, device):
    """A placed model whose processes train it together, each on its part of a batch.

    They begin with the first one's weights. Batch norm takes its mean and variance over the whole batch, as a single
    process does, and the gradient is the mean of the processes' gradients. Parts may differ in size, or be empty.

    Returns:
        a callable like the model.
    """
    if world_size() == 1:
        return model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm2d  # the same parameters and buffers, another forward
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes.

    ``nn.SyncBatchNorm`` does not know CPUs, nor, in bfloat16, processes without an image.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        features = x.to(torch.promote_types(x.dtype, torch.float32))
        count = add(torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)).to(features.dtype)
        mean = Add.apply(features.sum((0, 2, 3))) / count
        centred = features - mean[:, None, None]
        variance = Add.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class Add(torch.autograd.Function):
    """Sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, tensor):
        return add(tensor.clone())

    @staticmethod
    def backward(ctx, gradient):
        return add(gradient.clone())
