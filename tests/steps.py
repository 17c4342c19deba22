"""A training step and a step of each attack, as functions to call again and again."""

from argparse import Namespace
from functools import partial

import numpy as np
import torch

from attack import ATTACKS, run
from dataset import to_input
from detectors import voting
from model import UNet, freeze, place
from train import attack_images, train_step

TRAINING = ("training", "adversarial training")
NAMES = (*TRAINING, *ATTACKS)


def make_step(name, device, size=(64, 48), batch=2, precision="fp32"):
    """The step of a name in NAMES, after two of them; ``size`` (H, W) px, ``batch`` images of noise."""
    torch.manual_seed(0)
    model = place(UNet(), device, precision, training=name in TRAINING)
    images = torch.randint(256, (batch, *size), dtype=torch.uint8)
    landmarks = torch.rand(batch, 19, 2) * (min(size) - 1)
    if name in TRAINING:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        step = partial(training_step, model, optimizer, images, landmarks, device, name == "adversarial training")
    else:
        targeted = torch.arange(19, device=device).expand(batch, -1) < 9
        attack = ATTACKS[name]._replace(steps=None)  # those of one step go on, too
        iterates = run(attack, freeze(model), to_input(images, device), landmarks.to(device), targeted, steps=10**9)
        step = partial(next, iterates)
    step(), step()
    return step


def training_step(model, optimizer, images, landmarks, device, adversarial):
    """As in train.py."""
    image, landmarks = to_input(images, device), landmarks.to(device, non_blocking=True)
    detector = voting(model, size=image.shape[-2:])
    if adversarial:
        options = {"epsilon": 8.0, "attack_steps": 1}
        rngs = [np.random.default_rng(b) for b in range(len(images))]
        image = attack_images(detector, image, landmarks, rngs, Namespace(**options))
    train_step(model, detector, optimizer, image, landmarks, len(images))
