import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from command import InputError
from container import Sequential
from model import Goal, UNet, decode, encode, landmark_loss, load_weights, loss_terms


def maps_of(goal):
    return torch.cat([goal.heatmap[:, None], goal.offset], dim=1)


# --- container and network


def test_sequential_is_nn_sequential_with_features():
    layers = [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.ReLU()]
    plain, ours = nn.Sequential(*layers), Sequential(*layers)
    x = torch.randn(2, 1, 20, 20)
    y, features = ours(x, get_features=True)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert torch.equal(plain(x), ours(x)) and torch.equal(plain(x), y)
    assert [tuple(f.shape) for f in features] == [(2, 2, 9, 9), (2, 3, 3, 3)]
    assert torch.equal(features[0], plain[:2](x))


def test_encoder_is_torchvisions_vgg19():
    torch.manual_seed(0)
    ours = UNet(2).eval()
    vgg = torchvision.models.vgg19(weights=None, init_weights=False).features.eval()
    vgg.load_state_dict(ours.encoder.state_dict())
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.allclose(vgg(x), ours.encoder(x), atol=1e-6)
    _, features = ours.encoder(x, get_features=True)
    assert [f.shape[1] for f in features] == [64, 128, 256, 512, 512]
    assert [f.shape[2] for f in features] == [32, 16, 8, 4, 2]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 95), (100, 80)])
@pytest.mark.parametrize("landmarks", [1, 19])
def test_output_has_the_inputs_size(size, landmarks):
    model = UNet(landmarks).eval()
    with torch.no_grad():
        maps = model(torch.zeros(2, 3, *size))
    assert maps.shape == (2, 3, landmarks, *size) and maps.dtype == torch.float32


def test_too_small_an_input_is_refused():
    with pytest.raises(ValueError, match="at least 32 x 32"):
        UNet(1)(torch.zeros(1, 3, 31, 64))


def test_head_order_is_heatmaps_x_y():
    model = UNet(2).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(6.0))
        maps = model(torch.zeros(1, 3, 32, 32))
    assert maps[0, :, :, 0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_autocast_sees_noise_that_bfloat16_would_round_away():
    torch.manual_seed(0)
    model = UNet(1).eval()
    image = torch.full((1, 3, 32, 32), 0.75)
    noisy = image + 0.001
    assert torch.equal(image.bfloat16(), noisy.bfloat16())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(image), model(noisy))


def test_vgg19_state_dict_is_loaded_without_its_classifier(tmp_path):
    vgg = torchvision.models.vgg19(weights=None, init_weights=False).features
    state = {f"features.{key}": value for key, value in vgg.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg19.pth")
    model = UNet(3, encoder_weights=tmp_path / "vgg19.pth")
    assert all(torch.equal(model.encoder.state_dict()[key], value) for key, value in vgg.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) < 25e6
    torch.save({key: value for key, value in state.items() if key != "features.0.bias"}, tmp_path / "part.pth")
    with pytest.raises(InputError, match="not the state dict of torchvision's vgg19"):
        UNet(3, encoder_weights=tmp_path / "part.pth")


def test_weights_round_trip_and_other_k_is_refused(tmp_path):
    torch.save(UNet(3).state_dict(), tmp_path / "three.pth")
    model = UNet(3)
    load_weights(model, tmp_path / "three.pth")
    with pytest.raises(InputError, match="made for 3 landmarks, 5 are wanted"):
        load_weights(UNet(5), tmp_path / "three.pth")


# --- encoding and voting


def test_encoding_by_hand():
    # 40 x 60 px: R = int(0.05 * 60) = 3
    goal = encode(torch.tensor([[[10.0, 20.0]], [[10.25, 20.0]]]), (40, 60))
    assert goal.mask.dtype == torch.bool and goal.heatmap.shape == (2, 1, 40, 60)
    assert goal.heatmap[0, 0, 20, 10] == 1
    assert goal.heatmap[0, 0, 22, 11].item() == pytest.approx(math.exp(-5 / 18))  # d^2 = 1 + 4
    assert goal.offset[0, :, 0, 22, 11].tolist() == pytest.approx([-1 / 3, -2 / 3])
    assert goal.mask[0, 0].sum() == 25  # whole points with x^2 + y^2 < 9
    assert not goal.mask[0, 0, 20, 13] and goal.mask[0, 0, 20, 12]  # d = R is outside
    outside = ~goal.mask[0, 0]
    assert goal.heatmap[0, 0][outside].abs().max() == 0 and goal.offset[0, :, 0][:, outside].abs().max() == 0
    assert goal.offset[1, 0, 0, 20, 10].item() == pytest.approx(0.25 / 3)  # positions between pixels count


def test_voting_by_hand():
    # 32 x 32: R = 1, so the int(3.14) = 3 highest pixels vote
    maps = torch.zeros(1, 3, 1, 32, 32)
    for x, y, heat, dx, dy in [(4, 5, 0.9, 1.6, 0), (8, 5, 0.8, -1.6, 0.4), (20, 20, 0.95, 0, 0), (9, 9, 0.7, 11, 11)]:
        maps[0, 0, 0, y, x], maps[0, 1, 0, y, x], maps[0, 2, 0, y, x] = heat, dx, dy
    # (4, 5) and (8, 5) vote for (5.6, 5) and (6.4, 5.4): both (6, 5), rounded; (20, 20) for itself; (9, 9) is fourth
    assert decode(maps).tolist() == [[[6, 5]]]


def test_voting_on_a_very_long_image():
    assert decode(torch.rand(1, 3, 1, 32, 4200)).shape == (1, 1, 2)  # 3.14 R^2 is more than all of its pixels


def test_the_highest_pixel_wins_where_all_votes_fall_outside():
    maps = torch.full((1, 3, 1, 32, 32), 99.0)
    maps[0, 0, 0, 7, 5] = 100.0
    assert decode(maps).tolist() == [[[5, 7]]]


def test_votes_outside_the_image_are_dropped():
    maps = torch.zeros(1, 3, 1, 32, 32)
    for x, y in [(0, 10), (1, 10)]:
        maps[0, 0, 0, y, x], maps[0, 1, 0, y, x] = 0.9, -5  # to x = -5 and -4
    maps[0, 0, 0, 31, 31] = 0.5  # the only vote inside
    assert decode(maps).tolist() == [[[31, 31]]]


@pytest.mark.parametrize("size", [(200, 160), (97, 130), (32, 32)])
def test_round_trip(size):
    height, width = size
    torch.manual_seed(0)
    points = torch.rand(3, 19, 2) * torch.tensor([width - 1, height - 1])
    points[0, :4] = torch.tensor([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]])
    points[0, 4:6] = torch.tensor([[-0.45, -0.45], [width - 0.55, height - 0.55]])  # image edges are at -0.5
    difference = decode(maps_of(encode(points, size))) - points
    assert difference.abs().max() <= 0.5001  # votes are rounded to pixels


def test_decoding_is_batched_over_images_and_landmarks():
    torch.manual_seed(0)
    maps = torch.randn(3, 3, 4, 50, 40)
    together = decode(maps)
    for b in range(3):
        for k in range(4):
            assert torch.equal(decode(maps[b : b + 1, :, k : k + 1])[0, 0], together[b, k])


def test_equal_votes_are_decided_by_the_highest_pixel():
    maps = torch.zeros(1, 3, 1, 32, 32)  # three voters, each for itself
    maps[0, 0, 0, [3, 9, 20], [3, 9, 20]] = torch.tensor([0.5, 0.9, 0.7])
    assert decode(maps).tolist() == [[[9, 9]]]


# --- loss


def test_loss_against_a_plain_loop():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 5, 40, 48)
    points = torch.rand(2, 5, 2) * 40
    goal = encode(points, (40, 48))
    losses = landmark_loss(maps, goal)
    for b in range(2):
        for k in range(5):
            heatmap = F.binary_cross_entropy(maps[b, 0, k].sigmoid(), goal.heatmap[b, k])
            total = 2 * heatmap
            for axis in (0, 1):
                mask = goal.mask[b, k].float()
                difference = (maps[b, 1 + axis, k] - goal.offset[b, axis, k]).abs()
                total += (difference * mask).sum() / mask.sum()
            assert losses[b, k].item() == pytest.approx(total.item(), rel=1e-5)


def test_an_empty_mask_costs_nothing():
    goal = Goal(torch.zeros(1, 1, 32, 32), torch.zeros(1, 2, 1, 32, 32), torch.zeros(1, 1, 32, 32, dtype=torch.bool))
    assert loss_terms(torch.ones(1, 3, 1, 32, 32), goal)[1:].tolist() == [[[0]], [[0]]]
