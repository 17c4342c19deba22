import numpy as np
import pandas as pd
import pytest
import torch
from conftest import attack_record

from eval import metrics, summarize


def test_official_metrics_by_hand():
    # two images, two landmarks, mm
    errors = [[1.0, 2.0], [3.0, 6.0]]
    table = metrics(np.array(errors))
    pd.testing.assert_frame_equal(metrics(torch.tensor(errors)), table)
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
    assert summary["largest_change"].tolist() == [3.5, 3.5]


def test_untargeted_records_measure_to_the_truth():
    points, truth = np.array([[[30.0, 0.0]]]), np.zeros((1, 1, 2))
    table = attack_record(["1"], points, truth, None, "untargeted-FGSM", 1, 4.0)
    assert table["radial_error_mm"].tolist() == [3.0] and table["role"].tolist() == ["untargeted"]
    assert pd.isna(table["target_x_px0"]).all()
    assert summarize(table)["mre_mm"].tolist() == [pytest.approx(3.0)]
