import shutil

import numpy as np
import pytest
import torch
from conftest import REAL, SIZE0, write_official
from PIL import Image

from dataset import Cephalograms, rescale, to_input
from readers.layouts import available_splits, index
from readers.points import read_doctors
from support.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*mm per pixel is assumed")  # the drawn images are small


def test_rescale_by_hand():
    # 2400 x 1935 to 800 x 640: pixel centres are whole numbers, edges half a pixel off
    assert rescale(torch.tensor([0.0, 1.0]), (2400, 1935), (800, 640))[1].item() == 0
    assert rescale(torch.tensor([-0.5, 2399.5]), (2400, 1935), (800, 640)).tolist() == pytest.approx([-0.5, 799.5])
    x, y = rescale(torch.tensor([967.0, 1199.5]), (2400, 1935), (800, 640)).tolist()
    assert (x, y) == pytest.approx((319.5, 399.5))  # the middle stays the middle
    points = torch.rand(4, 5, 2).double() * 1000
    sizes = torch.tensor([[2400, 1935], [300, 240], [77, 99], [800, 640]])[:, None]
    there = rescale(points, sizes, (200, 160))
    assert torch.allclose(rescale(there, (200, 160), sizes), points)


def test_rescale_agrees_with_pillow():
    """A bright spot is where rescale says after Pillow has resized its image."""
    image = np.zeros((240, 160), np.uint8)
    image[99:102, 39:42] = 255
    small = np.asarray(Image.fromarray(image).resize((40, 60), Image.Resampling.BILINEAR), dtype=float)
    rows, columns = np.mgrid[:60, :40]
    centre = [(columns * small).sum() / small.sum(), (rows * small).sum() / small.sum()]
    expected = rescale(torch.tensor([40.0, 100.0]), (240, 160), (60, 40)).tolist()
    assert centre == pytest.approx(expected, abs=0.05)


def test_the_official_layout(drawn, official):
    data = Cephalograms(official, "train", (100, 80))
    picture, senior, junior = drawn["train"]["002"]
    assert data.ids == ["001", "002", "003", "004"] and data.files[1].name == "002.bmp"
    assert np.array_equal(data.landmarks_px0[1].numpy(), (senior + junior) / 2)  # halves are kept
    assert torch.allclose(data.landmarks[1], (data.landmarks_px0[1].float() + 0.5) / 3 - 0.5)
    assert data.sizes[1].tolist() == list(SIZE0)
    assert np.array_equal(data.images[1].numpy(), np.asarray(picture.resize((80, 100), Image.Resampling.BILINEAR)))


def test_all_layouts_hold_the_same(drawn, official, kaggle, tmp_path):
    write_official(tmp_path, drawn, doctors=".", suffix=".tif")
    for split in ("train", "test1", "test2", "test"):
        one, two, three = (Cephalograms(root, split, (50, 40)) for root in (official, tmp_path, kaggle))
        assert one.ids == two.ids == three.ids
        assert torch.equal(one.images, two.images) and torch.equal(one.images, three.images)
        assert torch.equal(one.landmarks_px0, two.landmarks_px0)
        seniors = [senior for part in drawn.values() for id, (_, senior, _) in part.items() if id in three.ids]
        assert np.array_equal(three.landmarks_px0.numpy(), np.stack(seniors))


def test_splits_are_what_there_is(data):
    assert Cephalograms(data, "test", (50, 40)).ids == ["151", "152", "153", "301"]
    assert Cephalograms(data, "test", (50, 40), limit=2).ids == ["151", "152"]
    assert available_splits(data) == ["train", "test1", "test2"]
    shutil.rmtree(data / "RawImage" / "Test2Data")  # its annotations may stay: all 400 come in one archive
    assert Cephalograms(data, "test", (50, 40)).ids == ["151", "152", "153"]
    assert available_splits(data) == ["train", "test1"]


def test_images_of_two_sizes_are_each_scaled_by_their_own(data):
    file = data / "RawImage" / "TrainingData" / "001.bmp"
    Image.new("RGB", (300, 450)).save(file)
    split = Cephalograms(data, "train", (100, 80))
    assert split.sizes[:2].tolist() == [[450, 300], list(SIZE0)]
    expected = (split.landmarks_px0[0] + 0.5) * torch.tensor([80 / 300, 100 / 450]) - 0.5
    assert torch.allclose(split.landmarks[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".bmp", ".png", ".jpg", ".tif"])
def test_a_truncated_image_is_named(data, suffix):
    file = data / "RawImage" / "TrainingData" / f"002{suffix}"
    with Image.open(file.with_suffix(".bmp")) as image:
        image.load()
    file.with_suffix(".bmp").unlink()
    image.save(file)
    Cephalograms(data, "train", (50, 40))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=f"002{suffix}: not a readable image"):
        Cephalograms(data, "train", (50, 40))


def test_sixteen_bits_are_scaled_not_clipped(data):
    file = data / "RawImage" / "TrainingData" / "002.png"
    Image.fromarray(np.full(SIZE0, 40000, np.uint16)).save(file)
    file.with_suffix(".bmp").unlink()
    assert (Cephalograms(data, "train", (50, 40)).images[1] == round(40000 / 65535 * 255)).all()


def test_an_id_in_both_test_splits_is_refused(data):
    shutil.copy(data / "RawImage" / "Test1Data" / "151.bmp", data / "RawImage" / "Test2Data" / "151.bmp")
    assert len(Cephalograms(data, "test2", (50, 40))) == 2
    with pytest.raises(InputError, match="the id 151 is in RawImage/Test1Data and RawImage/Test2Data"):
        Cephalograms(data, "test", (50, 40))


def test_hidden_files_are_passed_over(data):
    (data / "RawImage" / "TrainingData" / "._002.bmp").write_text("what some systems leave in archives")
    (data / "AnnotationsByMD" / "400_senior" / "._002.txt").write_text("likewise")
    assert len(Cephalograms(data, "train", (50, 40))) == 4


def test_input_is_three_equal_channels_in_minus_one_to_one():
    x = to_input(torch.tensor([[[0, 255], [51, 204]]], dtype=torch.uint8), torch.device("cpu"))
    assert x.shape == (1, 3, 2, 2)
    assert torch.allclose(x[0, 2], torch.tensor([[-1.0, 1.0], [-0.6, 0.6]]))
    assert torch.equal(x[0, 0], x[0, 1])


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_real_data():
    data = Cephalograms(REAL, "test1", (200, 160), limit=3)
    assert data.ids == ["151", "152", "153"] and data.sizes[0].tolist() == [2400, 1935]
    assert (data.landmarks_px0[:, 7, 1] > data.landmarks_px0[:, 1, 1]).all()  # the chin lies below the nasion


def test_a_spoilt_annotation_names_file_and_line(data):
    file = data / "AnnotationsByMD" / "400_junior" / "003.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], "12:13", *lines[5:]]))
    with pytest.raises(InputError, match=r"400_junior/003.txt: line 5: '12:13' is not x,y"):
        Cephalograms(data, "train", (50, 40))


def test_input_of_a_colour_image():
    x = to_input(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8), "cpu")
    assert x.shape == (1, 3, 1, 1) and torch.allclose(x.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_chosen_images_in_the_order_asked_for(official):
    every = Cephalograms(official, "test", (50, 40))
    some = Cephalograms(official, "test", (50, 40), ids=["301", "152"])
    assert some.ids == ["301", "152"]
    assert torch.equal(some.landmarks_px0, every.landmarks_px0[[3, 1]]) and torch.equal(some.images[1], every.images[1])
    with pytest.raises(InputError, match=r"no image 001 in test \(151 \.\. 301\)"):
        Cephalograms(official, "test", (50, 40), ids=["151", "001"])


def test_the_truth_is_the_mean_of_the_doctors(drawn, official):
    entry = index(official, "test1")[0]
    doctors = read_doctors(entry, (300, 240))
    assert np.array_equal(doctors, np.stack(drawn["test1"]["151"][1:]))
    assert np.array_equal(Cephalograms(official, "test1", (50, 40)).landmarks_px0[0], doctors.mean(0))
