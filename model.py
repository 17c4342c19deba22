"""The victim: a multi-task U-Net with a VGG19 encoder, the encoding of landmarks as maps, their decoding, and the loss.

Maps are (B, 3, K, H, W) for B images and K landmarks: a heatmap, an x-offset and a y-offset for each landmark.
Positions are (B, K, 2) as x, y in px of the network input; (0, 0) is the centre of the top left pixel. All follows the
method section of "Miss the Point" (MICCAI 2020).
"""

import contextlib
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from container import Sequential
from support.checkpoints import checked, load_tensors
from support.errors import InputError, check_tensors
from support.files import read_config

MIN_SIZE = 32  # px: five poolings leave one pixel
MAX_SIZE = 2**14  # px
LARGEST = 1e6  # number in the maps of a network of any use
SIZE_2020 = (800, 640)  # (H, W) px of the 2020 code's input
LAMBDA = 2.0  # weight of the heatmap's cross-entropy against the offsets' L1
OUTPUTS = {"voting": 3, "heatmap": 1, "coordinates": 1}  # maps of the head for each landmark
SUBPIXEL = 0.1  # in units of R: the distance from the pixel with most votes within which votes are averaged


# --- network ---------------------------------------------------------------------------------------------------------


class ImageConv2d(nn.Conv2d):
    """The first convolution, of an image in [-1, 1] in all its precision, also under autocast and on a GPU.

    bfloat16 has a spacing of 1/256 just below 1, which is the step of an attack with epsilon = 20; TF32 has 1/2048.
    """

    def forward(self, image):
        if not (torch.is_autocast_enabled(image.device.type) or image.is_cuda):
            return super().forward(image)
        weight = F.pad(self.weight.repeat(1, 2, 1, 1), (0, 0, 0, 0, 0, 2))
        return F.conv2d(in_parts(image), weight, self.bias, padding=1)


def in_parts(image):
    """A high part of the image that bfloat16 holds, the rest, which it holds to 2^-17, and channels to make eight.

    The gradient is that of the rest, which is the image's. Eight channels are aligned for the kernels of GPUs.
    """
    high = (image.detach() * 128).round() / 128
    return torch.cat([high, image - high, high[:, :2]], dim=1)


def upsample(x):
    """Bilinear interpolation to twice the height and width, corners aligned: (B, C, h, w) to (B, C, 2 h, 2 w)."""
    if x.is_cuda:  # there, that of PyTorch adds gradients in random order and refuses 2^31 elements
        return upsample_by_products(x)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def upsample_by_products(x):
    """``upsample`` as two products with matrices, which are rounded so that bfloat16 holds them and rows sum to 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    lines, columns = (interpolation(n, dtype, x.device) for n in x.shape[-2:])
    if x.dtype == torch.bfloat16:
        lines, columns = (lines * 256).round() / 256, (columns * 256).round() / 256
    wide = columns.to(x.dtype) @ x.movedim(1, -1)  # (B, h, 2 w, C)
    return (lines.to(x.dtype) @ wide.flatten(2)).unflatten(2, wide.shape[2:]).movedim(-1, 1)


def interpolation(n, dtype, device):
    """The matrix (2 n, n) of linear interpolation between n samples, the first and the last kept."""
    target, sample = (torch.arange(count, dtype=dtype, device=device) for count in (2 * n, n))
    return (1 - (target[:, None] * ((n - 1) / (2 * n - 1)) - sample).abs()).clamp(min=0)


def product(conv, x):
    """A 1 x 1 convolution as a product of matrices: (B, C, H, W) to (B, C', H, W), at least float32.

    Each map is contiguous, without the copy that a convolution in channels last would need.
    """
    rows = x.movedim(1, -1).flatten(0, 2)  # (B H W, C), in channels last a view
    maps = (conv.weight.flatten(1) @ rows.T).unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
    return maps + conv.bias.to(torch.promote_types(maps.dtype, torch.float32))[:, None, None]


def convolution(in_channels, out_channels):
    """The modules of a 3x3 convolution with batch norm."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


class Up(nn.Module):
    """Decoder block: bilinear x2, pad to the given size, concatenate the skip connection, two 3x3 convolutions."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Sequential(*convolution(in_channels, out_channels), *convolution(out_channels, out_channels))

    def forward(self, x, size, skip=None):
        """Upsample x (B, C, h, w) to ``size`` (H, W) = (2h or 2h + 1, 2w or 2w + 1), after ``skip`` (B, C', H, W)."""
        x = upsample(x)
        if x.shape[-2:] != size:  # padding by zero would still copy
            x = F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))
        return self.conv(x if skip is None else torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """Multi-task U-Net: the convolutions of VGG19, then five ``Up`` blocks back to the input's size.

    Args:
        num_landmarks: K.
        encoder_weights: "none" (He initialisation), "imagenet" (torchvision's, from its cache or downloaded) or the
            path of a torchvision VGG19 state dict.
        encoder_batch_norm: batch norm after each convolution of the encoder; the paper's encoder has none.
        output: one of OUTPUTS: "voting", the paper's maps; "heatmap", one map for each landmark; "coordinates", the
            expectation of a distribution that such a map describes (DSNT, Nibali et al., arXiv 1801.07372).

    Raises:
        InputError: the encoder's weights are not available.
    """

    def __init__(self, num_landmarks=19, encoder_weights="none", encoder_batch_norm=False, output="voting"):
        from torchvision.models.vgg import cfgs, make_layers  # slow to import, and --help does without

        super().__init__()
        self.num_landmarks, self.output = num_landmarks, output
        self.bf16 = False  # forward under autocast; this and the next are set by ``place``
        self.memory_format = torch.channels_last
        # torchvision.models.vgg19().features, without allocating the 123.6 M weights of its classifier
        _, *layers = make_layers(cfgs["E"], encoder_batch_norm)
        self.encoder = Sequential(ImageConv2d(3, 64, 3, padding=1), *layers)
        self.up1 = Up(512 + 512, 256)
        self.up2 = Up(256 + 256, 128)
        self.up3 = Up(128 + 128, 64)
        self.up4 = Up(64 + 64, 128)
        self.up5 = Up(128, 64)
        self.head = nn.Conv2d(64, OUTPUTS[output] * num_landmarks, 1)
        if output == "voting":
            # heatmaps are almost empty; starting so saves the first hundred steps ("Focal Loss", Lin et al. 2017, 3.3)
            nn.init.constant_(self.head.bias[:num_landmarks], math.log(0.01))
        if encoder_weights == "none":
            for layer in self.encoder:
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                    nn.init.zeros_(layer.bias)
        else:
            load_encoder(self.encoder, encoder_weights, "VGG19_BN" if encoder_batch_norm else "VGG19")

    def forward(self, image):
        """Predict the maps of an image.

        Args:
            image: (B, 3, H, W) float in [-1, 1], H and W at least 32.

        Returns:
            (B, 3, K, H, W), float32 also under autocast: heatmap logits (their sigmoid is the heatmap), x-offset,
            y-offset; offsets in units of R. Logits keep the cross-entropy exact where the sigmoid saturates. By
            "heatmap" (B, K, H, W), logits of a distribution over the pixels; by "coordinates" (B, K, 2) px.
        """
        if min(image.shape[-2:]) < MIN_SIZE:
            raise ValueError(f"image of {tuple(image.shape[-2:])} px: at least {MIN_SIZE} x {MIN_SIZE} needed")
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.bf16):
            image = image.contiguous(memory_format=self.memory_format)
            _, (f1, f2, f3, f4, f5) = self.encoder(image, get_features=True)
            x = self.up1(f5, f4.shape[-2:], f4)
            x = self.up2(x, f3.shape[-2:], f3)
            x = self.up3(x, f2.shape[-2:], f2)
            x = self.up4(x, f1.shape[-2:], f1)
            x = self.up5(x, image.shape[-2:])
            maps = product(self.head, x)
        if self.output == "coordinates":
            return expected_pixel(maps, maps.shape[-2:])
        return maps.unflatten(1, (3, self.num_landmarks)) if self.output == "voting" else maps


def place(model, device, precision="fp32", training=False):
    """Move a ``UNet`` to a device, in the memory layout in which its convolutions are fastest.

    That is channels last, except for float32 weight gradients on a CPU.

    Args:
        precision: "fp32", or "bf16" for autocast.
        training: whether weight gradients are wanted; the model is put into training or evaluation mode.

    Returns:
        the model itself.
    """
    model.bf16 = precision == "bf16"
    slow = training and precision == "fp32" and torch.device(device).type == "cpu"
    model.memory_format = torch.contiguous_format if slow else torch.channels_last
    return model.to(device, memory_format=model.memory_format).train(training)


def freeze(model, batch_statistics=False):
    """Prepare a placed ``UNet`` for test and attack: evaluation mode, no weight gradients, batch norm folded.

    Under bf16 the weights are cast once instead of in every pass. The maps stay the same up to rounding.

    Args:
        batch_statistics: batch norms use the statistics of each image by itself, as in the 2020 code, which never calls
            ``eval`` and takes one image at a time.

    Returns:
        the model itself; it can no longer be trained or loaded.
    """
    model.eval().requires_grad_(False)
    for sequence in (model.encoder, *(up.conv for up in (model.up1, model.up2, model.up3, model.up4, model.up5))):
        for i, module in enumerate(sequence):
            if isinstance(module, nn.BatchNorm2d) and batch_statistics:
                sequence[i] = instance_norm(module)
            elif isinstance(module, nn.BatchNorm2d):
                sequence[i - 1], sequence[i] = fuse_conv_bn_eval(sequence[i - 1], module), nn.Identity()
        for module in sequence:
            if model.bf16 and isinstance(module, nn.Conv2d) and not isinstance(module, ImageConv2d):
                module.to(torch.bfloat16)
    return model


def instance_norm(batch_norm):
    """What a frozen batch norm computes in training mode on a batch of one image, for batches of any size."""
    norm = nn.InstanceNorm2d(batch_norm.num_features, batch_norm.eps, affine=True).to(batch_norm.weight)
    norm.load_state_dict({"weight": batch_norm.weight, "bias": batch_norm.bias})
    return norm.eval().requires_grad_(False)


def compile_network(model, image):
    """``torch.compile`` a placed ``UNet``; if that fails, warn and return the model.

    Args:
        image: (B, 3, H, W), a typical input; other shapes are compiled when they occur.

    Returns:
        a callable like ``model``, tested on ``image`` forward and backward.
    """
    compiled = torch.compile(model, dynamic=False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    image = image.detach().requires_grad_(not weights)
    statistics = [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.enable_grad():
            torch.autograd.grad(compiled(image).sum(), weights or image)
    except Exception as error:  # no compiler, no triton, no memory, an unsupported operation: a dozen types
        reason = str(error).strip().partition("\n")[0][:200]
        warnings.warn(f"--compile: continuing without ({type(error).__name__}: {reason})", stacklevel=2)
        return model
    finally:
        for buffer, before in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(before)
    return compiled


def load_encoder(encoder, source, name):
    """Load weights of VGG19 or VGG19_BN (``name``) into the encoder.

    Args:
        source: "imagenet", torchvision's, or the path of a state dict.
    """
    if source == "imagenet":
        from torchvision.models import get_model_weights

        weights = get_model_weights(name.lower()).IMAGENET1K_V1
        try:
            with contextlib.redirect_stderr(sys.stdout):  # the progress of the download
                state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        except Exception as error:  # URLError offline, or a dozen types from a damaged file in the cache
            file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[-1])
            raise InputError(
                f"--encoder-weights imagenet: neither downloaded from {weights.url} nor found intact as {file} "
                f"({type(error).__name__}: {error}); put it there, or use --encoder-weights PATH to a state dict of "
                f"torchvision's {name.lower()}, such as scripts/encoder_from_hed.py makes, or none for random weights"
            ) from None
    else:
        state = load_tensors(source)
    state = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    expected = encoder.state_dict()
    counters = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}  # not published
    try:
        encoder.load_state_dict(checked(source, counters | state, expected))
    except InputError as error:
        text = f"not the state dict of torchvision's {name.lower()}"
        raise InputError(f"--encoder-weights {source}: {text} ({error})") from None


def load_weights(model, path):
    """Load a ``UNet`` checkpoint into the model.

    Raises:
        InputError: unreadable, for another number of landmarks, or see ``checkpoints.checked``.
    """
    state = names_from_2020(load_tensors(path))
    expected = model.state_dict()
    if expected.keys() == state.keys() and state["head.bias"].shape != expected["head.bias"].shape:
        found = state["head.bias"].numel() / OUTPUTS[model.output]
        raise InputError(f"{path}: weights for {found:g} landmarks, {model.num_landmarks} are needed")
    model.load_state_dict(checked(path, state, expected))


def names_from_2020(state):
    """A state dict of the 2020 code with the names of ``UNet``, without its unused classifier; any other as it is."""
    if "final.bias" not in state:
        return state
    changes = {"vgg.features.": "encoder.", ".double_conv.": ".", "final.": "head."}
    for old, new in changes.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return {name: value for name, value in state.items() if not name.startswith("vgg.")}


def read_architecture(folder):
    """Of a run's detector: the input's size (H, W) px, whether its encoder has batch norm, and its output."""
    path = folder / "config.json"
    if not path.exists() and path.with_suffix(".yaml").exists():
        text = "its own test used the statistics of each image, as --batch-statistics does"
        warnings.warn(f"{folder}: a run of the 2020 code, {SIZE_2020[0]} x {SIZE_2020[1]} px; {text}", stacklevel=3)
        return SIZE_2020, False, "voting"
    config = {"encoder_batch_norm": False, "output": "voting"} | read_config(path)  # older runs do not say them
    size, encoder_batch_norm, output = (config.get(name) for name in ("size", "encoder_batch_norm", "output"))
    whole = isinstance(size, list) and [type(n) for n in size] == [int, int]
    sized = whole and all(MIN_SIZE <= n <= MAX_SIZE for n in size)
    if not sized or not isinstance(encoder_batch_norm, bool) or output not in [*OUTPUTS]:
        needed = f"size (two numbers of px), encoder_batch_norm (true or false), output ({', '.join(OUTPUTS)})"
        raise InputError(f"{path}: not the configuration of a run, which needs {needed}")
    return tuple(size), encoder_batch_norm, output


# --- landmarks to maps and back --------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """The maps that a loss compares the network's maps with.

    Offsets count only near a landmark, so they are stored for P pixels of each image and landmark instead of H W.
    """

    heatmap: torch.Tensor  # (B, K, H, W) in [0, 1]
    pixels: torch.Tensor  # (B, K, P) int64, y W + x of the pixels of the mask, padded with others
    offset: torch.Tensor  # (B, 2, K, P) x and y at these pixels, in units of the radius
    weight: torch.Tensor  # (B, K, P) 1 / n at the n pixels of the mask, 0 at the others


def radius_of(size):
    """R in px for an input of ``size`` = (H, W): int(5 % of the longer side), 40 at 800 x 640; at least 1."""
    return max(1, int(0.05 * max(size)))


def encode(points, size):
    """Landmarks as maps: a disc of radius R around each (paper, method section).

    With d = |q - p| for landmark p and pixel q: mask = d < R; in it heatmap = exp(-d^2 / (2 R^2)) and
    offset = (p - q) / R, outside it the heatmap is zero.

    Args:
        points: (B, K, 2) float x, y in px, not necessarily whole numbers.
        size: (H, W) px.

    Returns:
        Goal, on the device of ``points``, heatmap and offset of their dtype, with P = (2 R + 1)^2.
    """
    height, width = size
    radius = radius_of(size)
    window = torch.arange(-radius, radius + 1, device=points.device)
    x, y = (points.round().long()[..., None] + window).unbind(-2)  # (B, K, 2 R + 1) each
    dx, dy = (points[..., 0, None] - x) / radius, (points[..., 1, None] - y) / radius
    squared = (dy.square()[..., :, None] + dx.square()[..., None, :]).flatten(-2)
    inside = ((y >= 0) & (y < height))[..., :, None] & ((x >= 0) & (x < width))[..., None, :]
    mask = inside.flatten(-2) & (squared < 1)
    pixels = torch.where(mask, (y[..., :, None] * width + x[..., None, :]).flatten(-2), 0)
    offset = torch.stack([dx[..., None, :].expand_as(inside), dy[..., :, None].expand_as(inside)], dim=1).flatten(-2)
    heatmap = points.new_zeros(*points.shape[:2], height * width)
    heatmap.scatter_add_(-1, pixels, torch.exp(squared / -2) * mask)
    return Goal(heatmap.unflatten(-1, (height, width)), pixels, offset, mean_weights(mask))


def pixel_positions(pixels, width):
    """Positions (B, 2, K, P) x, y of pixels (B, K, P), given as y W + x."""
    return torch.stack([pixels % width, pixels // width], dim=1)


def offsets_at(pixels, offset):
    """Values (B, 2, K, P) of offset maps (B, 2, K, H * W) at pixels (B, K, P)."""
    return offset.gather(-1, pixels[:, None].expand(-1, 2, -1, -1))


def mean_weights(mask):
    """Weights (B, K, P) that make a sum over P the mean over a mask (B, K, P) bool; zero where the mask is empty."""
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


def decode(maps, subpixel=False):
    """Maps to landmarks, by voting (paper, method section).

    The int(3.14 R^2) highest pixels q of each heatmap vote for pixel q + R * offset(q), rounded; votes outside the
    image are dropped; the pixel with most votes is the landmark. Ties are broken by the heatmap's highest pixel, which
    also wins if no vote is left, then by reading order.

    Args:
        maps: (B, 3, K, H, W), heatmap (logits or probabilities: only their order counts) and offsets.
        subpixel: return the mean of the unrounded votes around that pixel instead. Not in the paper.

    Returns:
        (B, K, 2) float32 x, y in px, whole numbers unless ``subpixel``.
    """
    check_tensors(maps=(maps, "B3KHW", "float"))
    height, width = maps.shape[-2:]
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # half precision cannot hold pixel numbers
    _, votes = cast_votes(maps)
    x, y = votes.round().unbind(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    candidates = torch.where(inside, y.long() * width + x.long(), 0)
    heatmap = maps[:, 0].flatten(-2)
    counts = torch.zeros_like(heatmap).scatter_add_(-1, candidates, inside.to(maps.dtype))
    peak = heatmap.argmax(-1, keepdim=True)
    winner = counts.scatter_add_(-1, peak, torch.full_like(peak, 0.5, dtype=maps.dtype)).argmax(-1)
    found = torch.stack([winner % width, winner // width], dim=-1).float()
    if not subpixel:
        return found
    near = (near_votes(votes, found, (height, width)) & inside)[..., None]
    mean = (votes.movedim(1, -1) * near).sum(-2) / near.sum(-2)
    return torch.where(near.any(-2), mean, found)  # the peak may have won without a vote


def cast_votes(maps):
    """The votes of the int(3.14 R^2) highest pixels of each heatmap.

    Args:
        maps: (B, 3, K, H, W), at least float32.

    Returns:
        heatmap (B, K, n) at these pixels, and their votes (B, 2, K, n) x, y in px, not rounded.
    """
    size = maps.shape[-2:]
    radius = radius_of(size)
    heatmap, offset = maps.flatten(-2).split([1, 2], dim=1)  # (B, 1 or 2, K, H * W)
    highest, voters = heatmap[:, 0].topk(min(int(3.14 * radius**2), size.numel()), sorted=False)
    return highest, pixel_positions(voters, size[1]) + radius * offsets_at(voters, offset)


def near_votes(votes, points, size):
    """Which votes (B, 2, K, n) lie within SUBPIXEL R, at least a pixel, of points (B, K, 2) px: (B, K, n) bool."""
    squared = (votes - points.movedim(-1, 1)[..., None]).square().sum(1)
    return squared <= max(1, SUBPIXEL * radius_of(size)) ** 2


def confidence(maps, points):
    """How sure the decoder is of each landmark.

    Args:
        maps: (B, 3, K, H, W), heatmap logits and offsets.
        points: (B, K, 2) px, their ``decode``.

    Returns:
        {"heatmap_peak": (B, K), the heatmap's maximum, in [0, 1],
        "vote_share": (B, K), the fraction of the voters whose votes lie within 0.1 R, at least a pixel, of the point}.
    """
    highest, votes = cast_votes(maps.to(torch.promote_types(maps.dtype, torch.float32)))
    share = near_votes(votes, points, maps.shape[-2:]).float().mean(-1)
    return {"heatmap_peak": highest.amax(-1).sigmoid(), "vote_share": share}


def log_distribution(maps):
    """Logarithm of the distribution over the pixels of maps (B, K, h, w): (B, K, h w)."""
    check_tensors(maps=(maps, "BKHW", "float"))
    return maps.flatten(-2).log_softmax(-1, dtype=torch.promote_types(maps.dtype, torch.float32))


def axes(maps, size):
    """The rows and columns of maps (B, K, h, w) as y (h,) and x (w,) in px of an input of ``size`` (H, W)."""
    counts = zip(maps.shape[-2:], size, strict=True)
    return [(torch.arange(n, device=maps.device) + 0.5) * total / n - 0.5 for n, total in counts]


def centres(maps, size):
    """The pixels of maps (B, K, h, w) as positions (h w, 2) x, y in px of an input of ``size`` (H, W)."""
    return torch.cartesian_prod(*axes(maps, size)).flip(-1)


def highest_pixel(maps, size):
    check_tensors(maps=(maps, "BKHW", "float"))
    return centres(maps, size)[maps.flatten(-2).argmax(-1)]


def expected_pixel(maps, size):
    (y, x), distribution = axes(maps, size), log_distribution(maps).exp().view_as(maps)
    return torch.stack([(distribution.sum(-2) * x).sum(-1), (distribution.sum(-1) * y).sum(-1)], dim=-1)


# --- loss ------------------------------------------------------------------------------------------------------------


def loss_terms(maps, goal):
    """The three terms of the multi-task loss for every image and landmark.

    Args:
        maps: (B, 3, K, H, W), output of the network, heatmaps as logits.
        goal: Goal of the same B, K, H, W.

    Returns:
        (3, B, K): cross-entropy of the heatmap, mean over all pixels; L1 of the x- and of the y-offset, mean over the
        mask (0 for an empty mask).
    """
    heatmap, offset = maps.flatten(-2).split([1, 2], dim=1)
    goal_heatmap = goal.heatmap[:, None].flatten(-2)
    cross_entropy = F.binary_cross_entropy_with_logits(heatmap, goal_heatmap, reduction="none").mean(-1)
    difference = offsets_at(goal.pixels, offset) - goal.offset
    l1 = (difference.abs() * goal.weight[:, None]).sum(-1)
    return torch.cat([cross_entropy, l1], dim=1).transpose(0, 1)


def landmark_loss(maps, goal):
    """L_k = lambda * BCE_k + L1_k(x) + L1_k(y) of each image and landmark: (B, K). Lambda = 2."""
    return total(loss_terms(maps, goal))


def total(terms):
    """The loss from its terms, along their first axis: three of maps for voting, else one."""
    return LAMBDA * terms[0] + terms[1] + terms[2] if len(terms) == 3 else terms[0]
