import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import spread
from torch import nn

import model
import train
from container import Sequential
from detectors import detector_of
from model import (
    ImageConv2d,
    UNet,
    compile_network,
    decode,
    encode,
    freeze,
    in_parts,
    landmark_loss,
    load_weights,
    loss_terms,
    place,
    product,
    upsample_by_products,
)
from support.checkpoints import write_tensors
from support.errors import InputError


def maps_of(goal):
    return torch.cat([goal.heatmap[:, None], spread(goal)[0]], dim=1)


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
    model = freeze(place(UNet(1), "cpu", "bf16"))
    image = torch.full((1, 3, 32, 32), 0.75)
    noisy = image + 0.001
    assert torch.equal(image.bfloat16(), noisy.bfloat16())
    with torch.no_grad():
        assert not torch.equal(model(image), model(noisy))


@pytest.fixture(params=[False, True], ids=["vgg19", "vgg19_bn"])
def trained(request):
    """A network whose batch norms have seen images and whose heatmaps are not all alike."""
    torch.manual_seed(0)
    model = UNet(3, encoder_batch_norm=request.param)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model(torch.rand(4, 3, 64, 48) * 2 - 1)
    return model.eval()


# --- kernels for GPUs


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (25, 20), (50, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_products_interpolate(size, dtype):
    torch.manual_seed(0)
    x = torch.rand(2, 3, *size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected, found = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), upsample_by_products(x)
    weight = torch.rand_like(expected)
    gradients = [torch.autograd.grad(y, x, weight)[0] for y in (expected, found)]
    tolerance = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(*gradients, **tolerance)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (found, *gradients))  # as convolutions want


def test_two_products_in_bfloat16_keep_a_constant():
    x = torch.full((1, 2, 25, 20), 1.2265625).bfloat16()
    assert torch.equal(upsample_by_products(x), x[..., :1, :1].expand(-1, -1, 50, 40))


def test_the_network_with_the_kernels_of_a_gpu(trained, monkeypatch):
    image = torch.rand(2, 3, 65, 47) * 2 - 1
    with torch.no_grad():
        expected = trained(image)
        monkeypatch.setattr(model, "upsample", upsample_by_products)
        found = trained(image)
    assert 0 < (found - expected).abs().max() < 1e-4 * expected.std()


def test_an_image_in_two_parts():
    torch.manual_seed(0)
    image = (torch.rand(2, 3, 40, 32) * 2 - 1).requires_grad_()
    parts = in_parts(image)
    high, low, others = parts.bfloat16().double().split([3, 3, 2], dim=1)
    assert parts.shape[1] == 8 and torch.equal(high, parts[:, :3].double()) and torch.equal(others, high[:, :2])
    assert (high + low - image).abs().max() <= 2**-17
    conv = ImageConv2d(3, 4, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(image)
    exact = F.conv2d(image, conv.weight.bfloat16().float(), conv.bias, padding=1)
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=5e-4)  # its bias and result are rounded
    gradients = [torch.autograd.grad(y.sum(), image)[0] for y in (found, exact)]
    torch.testing.assert_close(*gradients, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_head_is_a_convolution(layout):
    torch.manual_seed(0)
    head, x = nn.Conv2d(64, 57, 1), torch.rand(2, 64, 10, 9).contiguous(memory_format=layout).requires_grad_()
    expected, found = head(x), product(head, x)
    torch.testing.assert_close(found, expected)
    assert all(image_map.is_contiguous() for maps in found for image_map in maps)
    weight = torch.rand_like(expected)
    inputs = x, head.weight, head.bias
    for one, other in zip(*(torch.autograd.grad(y, inputs, weight) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
    assert product(head.bfloat16(), x.bfloat16()).dtype == torch.float32


# --- frozen


def test_freezing_changes_the_maps_by_rounding_only(trained):
    image = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        plain = trained(image)
        exact = freeze(place(copy.deepcopy(trained).double(), "cpu"))(image.double())
        single = freeze(place(copy.deepcopy(trained), "cpu"))(image)
        autocast = place(copy.deepcopy(trained), "cpu", "bf16")(image)
        half = freeze(place(copy.deepcopy(trained), "cpu", "bf16"))(image)
    scale = plain.std()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in freeze(copy.deepcopy(trained)).modules())
    assert (exact - trained.double()(image.double())).abs().max() < 1e-10 * scale
    assert (single - plain).abs().max() < 1e-4 * scale
    # folding costs bf16 no more than bf16 costs by itself
    assert (half - plain).square().mean().sqrt() < 1.5 * (autocast - plain).square().mean().sqrt() < 0.05 * scale
    assert half.dtype == torch.float32 and not torch.equal(half, single)


def test_batch_statistics_are_those_of_one_image_in_training_mode(trained):
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        frozen = freeze(place(copy.deepcopy(trained), "cpu"), batch_statistics=True)(images)
        folded = freeze(place(copy.deepcopy(trained), "cpu"))(images)
        alone = torch.cat([trained.train()(image[None]) for image in images])
    assert torch.allclose(frozen, alone, atol=1e-4 * alone.std())
    assert (folded - alone).abs().max() > 0.01 * alone.std()


def test_frozen_weights_take_no_gradient_and_the_image_does(trained):
    model = freeze(place(trained, "cpu", "bf16"))
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(image).sum(), image)
    assert gradient.abs().max() > 0 and gradient.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_failing_compiler_costs_a_warning_only(trained, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nSet this and that")

    monkeypatch.setattr(torch, "compile", lambda model, **_: broken)
    image = torch.zeros(1, 3, 32, 32)
    with pytest.warns(UserWarning, match=r"--compile: continuing without \(RuntimeError: no compiler\)"):
        network = compile_network(trained.train(), image)
    assert network is trained and trained.training


def test_trying_a_compiled_network_leaves_it_as_it_was(trained, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda image: model(image))
    before = copy.deepcopy(trained.state_dict())
    compile_network(trained.train(), torch.rand(2, 3, 32, 32))
    after = trained.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(weight.grad is None for weight in trained.parameters())


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


def test_batch_norm_in_the_encoder_is_torchvisions_vgg19_bn(tmp_path):
    torch.manual_seed(0)
    vgg = torchvision.models.vgg19_bn(weights=None, init_weights=False).features.eval()
    state = {
        f"features.{key}": value for key, value in vgg.state_dict().items() if "tracked" not in key
    }  # as published
    torch.save(state, tmp_path / "vgg19_bn.pth")
    model = UNet(3, encoder_weights=tmp_path / "vgg19_bn.pth", encoder_batch_norm=True).eval()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.allclose(vgg(x), model.encoder(x), atol=1e-6)
    with pytest.raises(InputError, match=r"torchvision's vgg19 \("):
        UNet(3, encoder_weights=tmp_path / "vgg19_bn.pth")


def test_weights_round_trip_and_other_k_is_refused(tmp_path):
    torch.save(UNet(3).state_dict(), tmp_path / "three.pth")
    model = UNet(3)
    load_weights(model, tmp_path / "three.pth")
    with pytest.raises(InputError, match="weights for 3 landmarks, 5 are needed"):
        load_weights(UNet(5), tmp_path / "three.pth")


# --- encoding and voting


def test_encoding_by_hand():
    # 40 x 60 px: R = int(0.05 * 60) = 3
    goal = encode(torch.tensor([[[10.0, 20.0]], [[10.25, 20.0]]]), (40, 60))
    offset, mask = spread(goal)
    assert goal.heatmap.shape == (2, 1, 40, 60) and goal.pixels.shape == (2, 1, 49)
    assert goal.heatmap[0, 0, 20, 10] == 1
    assert goal.heatmap[0, 0, 22, 11].item() == pytest.approx(math.exp(-5 / 18))  # d^2 = 1 + 4
    assert offset[0, :, 0, 22, 11].tolist() == pytest.approx([-1 / 3, -2 / 3])
    assert mask[0, 0].sum() == 25  # whole points with x^2 + y^2 < 9
    assert not mask[0, 0, 20, 13] and mask[0, 0, 20, 12]  # d = R is outside
    assert goal.heatmap[0, 0][~mask[0, 0]].abs().max() == 0
    assert goal.weight[0, 0].max().item() == pytest.approx(1 / 25) and goal.weight[0].sum().item() == pytest.approx(1)
    assert offset[1, 0, 0, 20, 10].item() == pytest.approx(0.25 / 3)  # positions between pixels count


def test_pixels_beyond_the_whole_numbers_of_float32():
    """A map of more than 2^24 pixels."""
    point = torch.tensor([[[3001.0, 4990.0]]])
    maps = maps_of(encode(point, (5000, 4001)))
    assert maps[0, 0, 0].argmax() == 4990 * 4001 + 3001 and torch.equal(decode(maps), point)


@pytest.mark.parametrize("size", [(40, 60), (33, 47)])
def test_encoding_is_the_definition_on_all_pixels(size):
    height, width = size
    radius = int(0.05 * max(size))
    torch.manual_seed(0)
    points = torch.rand(2, 9, 2, dtype=torch.float64) * torch.tensor([width, height]) - 0.5
    points[0, :3] = torch.tensor([[0, 0], [width - 1, height - 1], [width - 0.5, -0.5]])
    goal = encode(points, size)
    offset, mask = spread(goal)
    for b in range(2):
        for k in range(9):
            x, y = points[b, k].tolist()
            rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
            squared = (columns - x) ** 2 + (rows - y) ** 2
            inside = squared < radius**2
            assert torch.equal(mask[b, k], inside)
            heatmap = torch.exp(-squared / (2 * radius**2)) * inside
            assert torch.allclose(goal.heatmap[b, k], heatmap)
            assert torch.allclose(offset[b, 0, k], (x - columns) / radius * inside)
            assert torch.allclose(offset[b, 1, k], (y - rows) / radius * inside)


def test_voting_by_hand():
    # 32 x 32: R = 1, so the int(3.14) = 3 highest pixels vote
    maps = torch.zeros(1, 3, 1, 32, 32)
    for x, y, heat, dx, dy in [(4, 5, 0.9, 1.6, 0), (8, 5, 0.8, -1.6, 0.4), (20, 20, 0.95, 0, 0), (9, 9, 0.7, 11, 11)]:
        maps[0, 0, 0, y, x], maps[0, 1, 0, y, x], maps[0, 2, 0, y, x] = heat, dx, dy
    # (4, 5) and (8, 5) vote for (5.6, 5) and (6.4, 5.4): both (6, 5), rounded; (20, 20) for itself; (9, 9) is fourth
    assert decode(maps).tolist() == [[[6, 5]]]


def test_voting_below_a_pixel():
    point = torch.tensor([[[20.3, 15.6], [7.0, 30.5]]])
    maps = maps_of(encode(point, (40, 48)))
    assert decode(maps).tolist()[0][0] == [20, 16]
    assert torch.allclose(decode(maps, subpixel=True), point, atol=1e-4)
    maps[:, 1:, :, 0, 0] = 0.0  # one vote far away changes nothing
    maps[:, 0, :, 0, 0] = 2.0
    assert torch.allclose(decode(maps, subpixel=True), point, atol=1e-4)


def test_below_a_pixel_votes_outside_the_image_are_dropped():
    maps = torch.zeros(1, 3, 1, 40, 48)
    maps[0, 0, 0, 20, :2] = 1.0
    maps[0, 1, 0, 20] = -torch.arange(48) / 2  # all vote for x = 0, then some for x = -0.6, which is no pixel
    maps[0, 1, 0, 20, 1] = -1.6 / 2
    maps[:, 1:, :, :20] = maps[:, 1:, :, 21:] = 1000
    assert decode(maps).tolist() == [[[0, 20]]] and decode(maps, subpixel=True).tolist() == [[[0, 20]]]


def test_below_a_pixel_the_highest_pixel_stands_where_no_vote_is_near():
    maps = torch.zeros(1, 3, 1, 40, 48)
    maps[:, 1] = 100.0  # all votes fall outside
    maps[0, 0, 0, 12, 34] = 1.0
    assert decode(maps, subpixel=True).tolist() == [[[34, 12]]]


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


def test_voting_against_a_plain_loop():
    """Few places to vote for, so that votes are often equal, some of them outside."""
    torch.manual_seed(0)
    size, radius = (100, 96), 5
    maps = torch.randn(2, 3, 8, *size)
    maps[:, 1:] = (maps[:, 1:] * 12).round() / radius
    maps[:, 0, :, 30:40, 30:40] += 6
    points = decode(maps)
    for b in range(2):
        for k in range(8):
            heatmap = maps[b, 0, k].flatten()
            order = heatmap.argsort(descending=True).tolist()
            votes = torch.zeros(size)
            for q in order[: int(3.14 * radius**2)]:
                x = round(q % 96 + radius * maps[b, 1, k].flatten()[q].item())
                y = round(q // 96 + radius * maps[b, 2, k].flatten()[q].item())
                if 0 <= x < 96 and 0 <= y < 100:
                    votes[y, x] += 1
            votes[order[0] // 96, order[0] % 96] += 0.5
            winner = votes.argmax().item()
            assert points[b, k].tolist() == [winner % 96, winner // 96]


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
    offsets, masks = spread(goal)
    losses = landmark_loss(maps, goal)
    for b in range(2):
        for k in range(5):
            heatmap = F.binary_cross_entropy(maps[b, 0, k].sigmoid(), goal.heatmap[b, k])
            total = 2 * heatmap
            for axis in (0, 1):
                mask = masks[b, k].float()
                difference = (maps[b, 1 + axis, k] - offsets[b, axis, k]).abs()
                total += (difference * mask).sum() / mask.sum()
            assert losses[b, k].item() == pytest.approx(total.item(), rel=1e-5)


def test_an_empty_mask_costs_nothing():
    goal = encode(torch.tensor([[[-50.0, 10.0]]]), (32, 32))
    assert not spread(goal)[1].any() and goal.heatmap.max() == 0
    assert loss_terms(torch.ones(1, 3, 1, 32, 32), goal)[1:].tolist() == [[[0]], [[0]]]


def test_a_resumed_optimizer_has_the_layout_of_its_weights(tmp_path):
    """A training may go on on another device, where the weights lie differently in memory."""
    landmarks, image = torch.full((1, 1, 2), 20.0), torch.rand(1, 3, 48, 40) * 2 - 1

    def new_state(layout):
        torch.manual_seed(0)
        model = place(UNet(1), "cpu", training=True).to(memory_format=layout)
        return train.State(model, torch.optim.Adam(model.parameters(), fused=True))

    def step(state):
        train.train_step(state.model, detector_of(state.model, (48, 40)), state.optimizer, image, landmarks, 1)
        return torch.cat([weight.detach().flatten() for weight in state.model.parameters()])

    first, other = new_state(torch.channels_last), new_state(torch.contiguous_format)
    step(first)
    content = {name: getattr(first, name) for name in train.SAVED}
    content |= {"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}
    write_tensors(tmp_path / "resume.pth", content)
    train.load_state(other, tmp_path / "resume.pth")
    assert (step(first) - step(other)).abs().mean() < 1e-5  # a step is of 1e-3
