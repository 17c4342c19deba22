"""Defences that need no training: transformations of the input, and a score that tells attacked images from clean ones.

    defended = defend(detector, "jpeg:75")    # to test, and to attack by whoever knows the defence

A defence that an attack overcomes which knows it is no defence (Athalye et al., "Obfuscated gradients give a false
sense of security", arXiv 1802.00420), so every transformation has a gradient: its own or, where it rounds, that of the
identity ("straight through"); an attack on a random one takes the mean of several draws.
"""

import functools
import io
import json
import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from eval import SUCCESS_MM, errors_on, metrics, summarize
from readers.plausibility import SHAPE
from readers.spacing import MM_PER_PX0
from readers.tables import number
from support.errors import InputError
from support.files import load_table, write_table

DRAWS = 4  # of a random defence, in each pass of an attack on it


# --- transformations of the input ------------------------------------------------------------------------------------
# Each maps images (B, 3, H, W) float in [-1, 1] to such images, and has one parameter.


def jpeg(image, quality):
    """Stored as JPEG of a quality from 1 to 100, chroma at half resolution, and read again; straight through."""
    levels = ((image.detach() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    stored = []
    for pixels in levels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
        stored.append(np.array(Image.open(file)))
    read = torch.from_numpy(np.stack(stored)).to(image).permute(0, 3, 1, 2)
    return straight_through(image, read / 127.5 - 1)


def bits(image, number):
    """Rounded to 2^number equidistant levels; straight through. Feature squeezing (Xu et al., arXiv 1704.01155)."""
    steps = (2 ** int(number) - 1) / 2
    return straight_through(image, ((image.detach() + 1) * steps).round() / steps - 1)


def blur(image, sigma):
    """Gaussian blur of standard deviation sigma px."""
    from torchvision.transforms.functional import gaussian_blur  # slow to import

    radius = min(max(1, round(3 * sigma)), min(image.shape[-2:]) - 1)
    return gaussian_blur(image, 2 * radius + 1, sigma)


def median(image, size):
    """The median of size x size px around each pixel, size being odd. Feature squeezing."""
    size = int(size)
    padded = F.pad(image, [size // 2] * 4, mode="reflect")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(-2).median(-1).values


def resize(image, scale):
    """Reduced by a factor below 1, with antialiasing, and enlarged again."""
    height, width = image.shape[-2:]
    reduced = max(1, round(scale * height)), max(1, round(scale * width))
    small = F.interpolate(image, reduced, mode="bilinear", antialias=True)
    return F.interpolate(small, (height, width), mode="bilinear")


def noise(image, sigma, generator):
    """Gaussian noise of standard deviation sigma grey levels of 255, the same on all images of the batch."""
    drawn = torch.randn(image.shape[1:], generator=generator, pin_memory=image.is_cuda)
    return (image + drawn.to(image, non_blocking=True) * sigma / 127.5).clamp(-1, 1)


def straight_through(image, transformed):
    """``transformed``, with the gradient of ``image``."""
    return image + (transformed - image).detach()


DEFENCES = {  # name: transformation, whether a parameter is valid, what is, an example
    "jpeg": (jpeg, lambda quality: quality in range(1, 101), "a quality from 1 to 100", "jpeg:75"),
    "blur": (blur, lambda sigma: 0 < sigma <= 20, "a standard deviation in px, up to 20", "blur:1"),
    "bits": (bits, lambda number: number in range(1, 9), "1 to 8 bits", "bits:4"),
    "median": (median, lambda size: size in (3, 5, 7, 9), "3, 5, 7 or 9 px", "median:3"),
    "resize": (resize, lambda scale: 0 < scale < 1, "a factor below 1", "resize:0.5"),
    "noise": (noise, lambda sigma: 0 < sigma <= 128, "a standard deviation in grey levels, up to 128", "noise:4"),
}


def parse_defence(text):
    """(transformation, parameter) of a text such as "jpeg:75".

    Raises:
        InputError: not a defence.
    """
    name, _, value = text.partition(":")
    if name not in DEFENCES:
        raise InputError(f"{text!r} is not a defence NAME:NUMBER with one of the names {', '.join(DEFENCES)}")
    transformation, is_valid, valid, example = DEFENCES[name]
    parameter = number(value)
    if parameter is None or not is_valid(parameter):
        raise InputError(f"{text!r}: {name} takes {valid}, as in {example}")
    return transformation, parameter


def defend(detector, defence, seed=0, draws=1):
    """The detector, of images that first pass through a defence.

    Args:
        detector: detectors.Detector.
        defence: see ``parse_defence``.
        seed: of a random defence, whose draws are common to all images of a batch.
        draws: of a random defence. 1, to judge: the same draw in every pass, so that results do not depend on how
            images are batched. More, to attack: the mean of the outputs over so many, which are new in every pass.

    Returns:
        detectors.Detector
    """
    transformation, parameter = parse_defence(defence)
    if transformation is not noise:
        return detector._replace(network=lambda image: detector.network(transformation(image, parameter)))
    generator = torch.Generator().manual_seed(seed)

    def defended(image):
        if draws == 1:
            generator.manual_seed(seed)
        outputs = detector.network(torch.cat([noise(image, parameter, generator) for _ in range(draws)]))
        return outputs.unflatten(0, (draws, len(image))).mean(0)

    return detector._replace(network=defended)


def both_sides(detector, names, seed):
    """For each defence (name, judge, attacked): the detector behind it, and what an attacker who knows of it attacks.

    Their draws of a random defence are independent. Attacked ones are made anew for each batch, so that draws do not
    depend on the batches before.
    """
    return [(name, defend(detector, name, seed), defend(detector, name, seed + 1, DRAWS)) for name in names]


def errors_behind(detector, names, seed, data, batch_size, device):
    """{defence: array (N, K)}: radial errors in mm behind each, see ``eval.errors_on``."""
    return {name: errors_on(defend(detector, name, seed), data, batch_size, device) for name in names}


# --- reports ---------------------------------------------------------------------------------------------------------


def is_complete(file, names):
    """Whether defences_summary.csv of a test has these defences."""
    return file.exists() and {"none", *names} == {*load_table(file, ["defence"])["defence"]}


def report_accuracy(file, plain, errors):
    """defences_summary.csv of a test: the accuracy behind each defence, and without, from the file ``plain``.

    Args:
        errors: {defence: array (N, K), radial errors in mm}.
    """
    rows = {name: metrics(found).loc["all"] for name, found in errors.items()}
    without = pd.read_csv(plain, index_col="landmark").loc["all"].drop("name").astype(float)
    summary = pd.DataFrame({"none": without, **rows}).T.rename_axis("defence").reset_index()
    write_table(file, summary)
    print(f"\n{summary.to_string(index=False, float_format='%.2f')}")


def report_attacks(records, undefended, out):
    """defences.csv, defences_summary.csv: every defence against an attacker who knows it and one who does not."""
    table = pd.concat([undefended.assign(defence="none", attacker="adaptive"), records])
    summary = summarize(table, by=["defence", "attacker", "iteration"])
    write_table(out / "defences.csv", table)
    write_table(out / "defences_summary.csv", summary)
    role = summary["role"].iloc[0]
    reached = summary[(summary["iteration"] > 0) & (summary["role"] == role)]
    reached = reached.pivot(index=["defence", "attacker"], columns="method", values="within_4mm_%")
    print(f"\nWithin {SUCCESS_MM} mm (%), {role} landmarks\n\n{reached.to_string(float_format='%.1f')}")


# --- a score ---------------------------------------------------------------------------------------------------------


@functools.cache
def shape_model():
    """Mean (38,), modes (10, 38), their standard deviations (10,), that of the other dimensions, float64 in px0."""
    content = json.loads(SHAPE.read_text(encoding="utf-8"))
    mean, modes, std = (torch.tensor(content[name], dtype=torch.float64) for name in ("mean", "modes", "mode_std"))
    mean, modes = mean.flatten(), modes.flatten(1)
    # the file has the residual's standard deviation in each coordinate, but it lies in fewer dimensions
    residual_std = content["residual_std"] * math.sqrt(len(mean) / (len(mean) - len(modes)))
    return mean, modes, std, residual_std


def shape_distance(points, mm_per_px0):
    """How unlike the population's an arrangement of the 19 landmarks is.

    The squared Mahalanobis distance in the population's shape model: along its modes, and in the remaining dimensions,
    which share one variance ("Probabilistic principal component analysis", Tipping and Bishop 1999).

    Args:
        points: (N, 19, 2) float64 px0, in images like those of ISBI 2015.
        mm_per_px0: (N,).

    Returns:
        (N,) float64; 38 on the average of the population.
    """
    mean, modes, std, residual_std = shape_model()
    deviation = (points * (mm_per_px0 / MM_PER_PX0)[:, None, None]).flatten(1) - mean
    weights = deviation @ modes.T
    rest = deviation - weights @ modes
    return (weights / std).square().sum(-1) + (rest / residual_std).square().sum(-1)
