import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import K, attack_record

from detectors import voting
from eval import accuracy_table, metrics, stand_apart, summarize, what_is_seen
from model import radius_of
from phantom import SHAPE


def test_official_metrics_by_hand():
    # two images, two landmarks, mm
    table = metrics(np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert table.loc["1", ["mre_mm", "sd_mm", "sdr_2mm_%", "sdr_3mm_%"]].tolist() == [2, 1, 50, 100]
    assert table.loc["2", ["mre_mm", "sd_mm", "sdr_2mm_%", "sdr_4mm_%"]].tolist() == [4, 2, 50, 50]
    assert table.loc["all", ["mre_mm", "sd_mm", "median_mm"]].tolist() == [3, 1.5, 2.5]
    assert table.loc["all", ["sdr_2mm_%", "sdr_2.5mm_%", "sdr_3mm_%", "sdr_4mm_%"]].tolist() == [50, 50, 75, 75]


def test_attack_records_measure_to_the_target_or_the_truth():
    points = np.array([[[10.0, 10.0], [50.0, 90.0], [0.0, 0.0]]])
    truth = np.array([[[10.0, 40.0], [50.0, 50.0], [0.0, 0.0]]])
    targets = np.array([[[40.0, 50.0], [np.nan, np.nan], [np.nan, np.nan]]])
    table = attack_record(["007"], points, truth, targets, "I-FGSM", 20, 3.5)
    assert table["radial_error_mm"].tolist() == [5.0, 4.0, 0.0]  # 30-40-50 to the target; 40 px0 to the truth
    assert table["role"].tolist() == ["targeted", "stationary", "stationary"]
    assert table["landmark"].tolist() == [1, 2, 3] and table["image"].tolist() == ["007"] * 3
    summary = summarize(table).set_index("role")
    assert summary.loc["targeted", ["landmarks", "mre_mm", "within_4mm_%"]].tolist() == [1, 5, 0]
    assert summary.loc["stationary", ["landmarks", "mre_mm", "median_mm", "within_4mm_%"]].tolist() == [2, 2, 2, 100]
    assert summary.loc["worst", ["landmarks", "mre_mm", "within_4mm_%"]].tolist() == [1, 5, 0]
    assert summary["largest_change"].tolist() == [3.5] * 3


def test_untargeted_records_measure_to_the_truth():
    points, truth = np.array([[[30.0, 0.0]]]), np.zeros((1, 1, 2))
    table = attack_record(["1"], points, truth, None, "untargeted-FGSM", 1, 4.0)
    assert table["radial_error_mm"].tolist() == [3.0] and table["role"].tolist() == ["untargeted"]
    assert pd.isna(table["target_x_px0"]).all()
    assert summarize(table)["mre_mm"].tolist() == [pytest.approx(3.0)]


# --- images that do not fit


@pytest.mark.parametrize(
    ("mre", "apart"),
    [
        ([1, 1.2, 1.4, 1.6, 50], [False, False, False, False, True]),  # median 1.4, MAD 0.2
        ([1, 1.2, 1.4, 1.6, 10.1], [False, False, False, False, True]),
        ([1, 1.2, 1.4, 1.6, 9.9], [False] * 5),  # not above 10 mm
        ([12, 14, 16, 18, 31], [False] * 5),  # median 16, MAD 2: 15 above it
        ([12, 14, 16, 18, 33], [False, False, False, False, True]),
        ([30, 60], [False, False]),
        ([np.nan, np.nan], [False, False]),
    ],
)
def test_images_that_stand_apart_by_hand(mre, apart):
    errors = np.array(mre)[:, None] + [-0.5, 0.5]
    assert stand_apart(errors).tolist() == apart


def test_the_accuracy_without_images_that_do_not_fit():
    errors = np.full((5, K), 1.0)
    errors[2] = 60
    with pytest.warns(UserWarning) as said:
        table = accuracy_table(errors, [*"abcde"]).set_index("landmark")
    assert table.loc["all", "mre_mm"] == pytest.approx(12.8) and table.loc["others", "mre_mm"] == 1
    assert table.loc["others", "name"] == "all landmarks, without c"
    assert str(said[0].message) == (
        "c (MRE 60.0 mm): image and annotation may not belong together (median of the others 1.0 mm); the MRE of all "
        "is 12.80 mm, without 1.00 mm"
    )
    assert "others" not in set(accuracy_table(np.delete(errors, 2, 0), [*"abde"])["landmark"])


def test_what_is_seen():
    """A network that finds a head where the image brightens to its left, votes that scatter elsewhere."""
    size = (60, 48)
    head = torch.tensor(json.loads(SHAPE.read_text())["mean"]) / 40
    jumbled = head[torch.randperm(K, generator=torch.Generator().manual_seed(0))]

    def network(image):
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        pixels = torch.stack([columns, rows])[None]  # (1, 2, H, W)
        maps = []
        for grey in image[:, 0]:
            places = (jumbled if grey.std() > 0.5 else head)[..., None, None]
            offset = (places - pixels) / radius_of(size)  # all votes agree
            if grey[:, 0].mean() <= grey[:, -1].mean():
                offset = 0 * offset
            maps.append(torch.cat([-offset.norm(dim=1)[None], offset.transpose(0, 1)]))
        return torch.stack(maps)

    ramp = torch.linspace(1, 0, size[1]).expand(*size)
    image = torch.stack([ramp, ramp.flip(-1), torch.zeros(size), 3 * ramp])[:, None].repeat(1, 3, 1, 1)
    detector = voting(network)
    points = detector.predict(image)
    share = np.array([[0.9], [0.05], [0.05], [0.9]]).repeat(K, 1)
    columns = what_is_seen(detector, image, points.numpy().astype(float), share)
    assert columns["seen"].tolist() == [["head"], ["faces left"], ["no head"], ["odd shape"]]
