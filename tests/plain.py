"""A plain implementation of ATI-FGSM, with which the tests compare ``attack.run``."""

import math

import torch
import torch.nn.functional as F

from attack import STEP_SIZE
from model import LAMBDA, radius_of


def plain_attack(model, image, targets, steps, epsilon=8):
    """ATI-FGSM on one image: weight gradients, full maps, loops over landmarks.

    Args:
        model: a ``UNet`` that is not frozen.
        image: (1, 3, H, W) float in [-1, 1].
        targets: (1, K, 2) x, y in px, nan for stationary landmarks.
        steps: iterations.
        epsilon: L-infinity norm of the perturbation in half grey levels.

    Returns:
        (1, 3, K, H, W) maps of the attacked image.
    """
    image, bound = image.contiguous(), epsilon / 256
    with torch.no_grad():
        goal = plain_goal(model(image)[0], targets[0].tolist())
    delta = torch.zeros_like(image)
    for _ in range(steps):
        adversarial = (image + delta).clamp(-1, 1).requires_grad_()
        losses = plain_losses(model(adversarial)[0], goal)
        mean = sum(loss.item() for loss in losses) / len(losses)
        model.zero_grad()
        sum(loss.item() / mean * loss for loss in losses).backward()
        delta = (delta - STEP_SIZE * bound * adversarial.grad.sign()).clamp(-bound, bound)
    with torch.no_grad():
        return model((image + delta).clamp(-1, 1))


def plain_goal(clean, targets):
    """For each landmark of clean maps (3, K, H, W) its goal: heatmap (H, W), offset (2, H, W), mask (H, W)."""
    height, width = clean.shape[-2:]
    radius = radius_of((height, width))
    rows, columns = torch.meshgrid(torch.arange(height).to(clean), torch.arange(width).to(clean), indexing="ij")
    goal = []
    for k, (x, y) in enumerate(targets):
        if math.isnan(x):
            heatmap, offset = clean[0, k].sigmoid(), clean[1:, k]
            mask = (heatmap > 0.5).to(clean)
        else:
            offset = torch.stack([x - columns, y - rows]) / radius
            squared = offset.square().sum(0)
            mask = (squared < 1).to(clean)
            heatmap = torch.exp(-squared / 2) * mask
        goal.append((heatmap, offset, mask))
    return goal


def plain_losses(maps, goal):
    """The loss of each landmark, maps (3, K, H, W)."""
    losses = []
    for k, (heatmap, offset, mask) in enumerate(goal):
        loss = LAMBDA * F.binary_cross_entropy_with_logits(maps[0, k], heatmap)
        for axis in (0, 1):
            difference = (maps[1 + axis, k] - offset[axis]).abs() * mask
            loss = loss + difference.sum() / mask.sum().clamp(min=1)
        losses.append(loss)
    return losses
