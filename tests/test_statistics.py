import numpy as np
import pandas as pd
import pytest
from conftest import K, attack_record

from eval import exact, interval, resample, summarize
from experiments.markdown import fold_intervals, markdown
from experiments.results import rate
from experiments.statistics import ENOUGH, by_training, paired_difference, verdict


def attacked(errors, method="ATI-FGSM", iteration=5, targeted=()):
    """Records with given radial errors (N, k) in mm; the landmarks ``targeted`` are, the others are stationary."""
    truth = np.full((*errors.shape, 2), 100.0)
    targets = np.full_like(truth, np.nan)
    targets[:, targeted] = 100
    points = truth + np.stack([10 * errors, np.zeros_like(errors)], axis=-1)
    ids = [f"{i:03d}" for i in range(len(errors))]
    return attack_record(ids, points, truth, targets, method, iteration)


def test_tables_of_markdown():
    table = pd.DataFrame({"|T|": [1, 12], "MRE": [0.125, np.nan], "name": ["a|b", ""]})
    assert markdown(table) == "| \\|T\\| | MRE | name |\n| --- | --- | --- |\n| 1 | 0.12 | a\\|b |\n| 12 |  |  |\n"
    assert markdown(table[["MRE"]], ".4g").splitlines()[2] == "| 0.125 |"
    intervals = pd.DataFrame({"a": [1, 2], "x": [1.0, np.nan], "x_low": [0.5, np.nan], "x_high": [2.0, np.nan]})
    assert fold_intervals(intervals).to_dict("list") == {"a": [1, 2], "x": ["1.0 [0.5, 2.0]", ""]}


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_intervals_are_percentiles_over_resampled_images():
    values = np.arange(12.0).reshape(4, 3)
    found = [values[chosen].mean() for chosen in resample(4)]
    assert len(found) == 1000
    assert interval(values, np.mean) == (5.5, *np.percentile(found, [2.5, 97.5]))
    value, low, high = interval(values, lambda values: values.mean(0))  # of several numbers at once
    assert value.shape == low.shape == high.shape == (3,) and (low < value).all() and (value < high).all()


def test_intervals_cover_trainings_too():
    """Images that do not differ: all of the interval is of the two trainings."""
    records = pd.concat([attacked(np.full((6, 2), error)).assign(seed=seed) for seed, error in enumerate((0.0, 8.0))])
    assert rate(records, records["radial_error_mm"] <= 4) == (50, 0, 100)
    assert by_training(records, records["radial_error_mm"]).shape == (6, 2, 2)
    row = paired_difference(records.assign(radial_error_mm=0.0), records)
    assert [row[f"within_4mm_points{end}"] for end in ("", "_low", "_high")] == [50, 0, 100]
    assert [row[f"mre_mm{end}"] for end in ("", "_low", "_high")] == [-4, -8, 0] and row["images"] == 6


def test_draws_in_which_nothing_is_defined_do_not_count():
    value, low, high = interval(np.array([[2.0], [np.nan]]), np.nanmean)
    assert (value, low, high) == (2, 2, 2)


def test_intervals_are_of_images_not_of_landmarks():
    alike = summarize(attacked(np.tile([1.0, 7.0], (6, 1)))).iloc[0]  # images do not differ at all
    assert alike["mre_mm_low"] == alike["mre_mm"] == alike["mre_mm_high"] == 4
    assert alike["within_4mm_%_low"] == alike["within_4mm_%_high"] == 50
    apart = summarize(attacked(np.array([[0.0, 0.0], [8.0, 8.0]]))).iloc[0]
    assert (apart["mre_mm_low"], apart["mre_mm"], apart["mre_mm_high"]) == (0, 4, 8)  # a draw may take one image twice
    assert (apart["within_4mm_%_low"], apart["within_4mm_%_high"]) == (0, 100)


def test_intervals_narrow_as_statistics_say():
    errors = np.random.default_rng(0).normal(10, 2, (100, 1))
    row = summarize(attacked(errors)).iloc[0]
    assert row["mre_mm_high"] - row["mre_mm_low"] == pytest.approx(2 * 1.96 * errors.std() / 10, rel=0.1)


def test_each_row_of_a_summary_has_its_own_interval():
    """Roles, methods and iterations; the same draws for all, against a loop."""
    errors = np.random.default_rng(1).uniform(0, 8, (4, K))
    records = pd.concat(
        attacked(errors * scale, method, iteration, targeted=[0, 5])
        for method, iteration, scale in (("I-FGSM", 0, 1), ("I-FGSM", 5, 2), ("ATI-FGSM", 0, 1), ("ATI-FGSM", 5, 0.75))
    )
    table = summarize(records)
    row = table.query("role == 'targeted' and method == 'ATI-FGSM' and iteration == 5").iloc[0]
    drawn = 0.75 * errors[:, [0, 5]][resample(4)].reshape(1000, -1)
    for name, values in (
        ("mre_mm", drawn.mean(1)),
        ("median_mm", np.median(drawn, axis=1)),
        ("within_4mm_%", 100 * (drawn <= 4).mean(1)),
    ):
        ends = row[[f"{name}_low", f"{name}_high"]].tolist()
        assert ends == pytest.approx(np.percentile(values, [2.5, 97.5])), name


def test_where_all_succeed_or_none_the_bound_is_exact():
    """Of 20 images without a failure: 0.025 = 0.8316^20."""
    low, high = exact(np.array([0.0, 40.0, 100.0]), np.array([0.0, 20, 100]), np.array([0.0, 60, 100]), 20)[1:]
    assert low == pytest.approx([0, 20, 83.16], abs=0.01) and high == pytest.approx([16.84, 60, 100], abs=0.01)
    records = attacked(np.zeros((4, K)), "I-FGSM", 5, targeted=[0])
    row = summarize(records).query("role == 'targeted'").iloc[0]
    assert row["within_4mm_%_low"] == pytest.approx(100 * 0.025**0.25) and row["within_4mm_%_high"] == 100


# --- differences -----------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_image():
    """Images that differ by far more than the methods do: each still differs by 1 mm."""
    errors = np.random.default_rng(0).uniform(5, 50, (30, 1))
    errors[:2] = 4.5
    row = paired_difference(attacked(errors - 1), attacked(errors[:25]))
    assert row["images"] == 25
    assert [row["mre_mm"], row["mre_mm_low"], row["mre_mm_high"]] == pytest.approx([-1, -1, -1])
    assert row["within_4mm_points"] == pytest.approx(100 * 2 / 25)


@pytest.mark.parametrize(
    "low, high, images, words",
    [
        (1, 2, ENOUGH - 1, "pilot, n = 19"),
        (1, 2, ENOUGH, "higher"),
        (-2, -1, ENOUGH, "lower"),
        (-1, 2, ENOUGH, "interval contains 0"),
        (0, 2, ENOUGH, "interval contains 0"),
    ],
)
def test_what_an_interval_supports(low, high, images, words):
    assert verdict(low, high, images) == words
