"""Charts and pictures, as PNG files."""

import warnings

import numpy as np
from matplotlib.axis import Tick
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from support.files import atomic

TRUTH = {"marker": "+", "c": "lime", "s": 30, "linewidths": 0.8, "label": "ground truth"}
PREDICTED = {"marker": "o", "c": "none", "edgecolors": "red", "s": 44, "linewidths": 0.9, "label": "prediction"}
TARGET = {"marker": "x", "c": "cyan", "s": 20, "linewidths": 1.3, "label": "target"}  # fits into a prediction's circle
METHODS = {  # in this order and colour in every chart
    "random-search": "tab:pink",
    "noise": "tab:gray",
    "untargeted-FGSM": "tab:brown",
    "FGSM": "tab:purple",
    "I-FGSM": "tab:blue",
    "MI-FGSM": "navy",
    "I-PGD": "lightskyblue",
    "APGD": "teal",
    "CosPGD": "goldenrod",
    "ATI-FGSM": "tab:orange",
    "ATI-PGD": "tab:red",
    "Vote-FGSM": "yellowgreen",
    "Vote-PGD": "tab:green",
    "evasive-Vote-PGD": "tab:olive",
    "universal-Vote-PGD": "tab:cyan",
    "Square": "black",
}
LOSSES = {"loss": "loss", "heatmap_bce": "heatmap BCE", "offset_x_l1": "x-offset L1", "offset_y_l1": "y-offset L1"}


# --- parts of charts -------------------------------------------------------------------------------------------------


def panels(count, width=5.0, height=4.0):
    """(figure, axes) of ``count`` panels side by side."""
    figure, axes = grid(1, count, width, height)
    return figure, axes[0]


def grid(rows, columns, width, height, **options):
    """(figure, axes (rows, columns)) of panels of a size in inches; options of ``Figure.subplots``."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path):
    """Write a figure, its texts as they are: a name with $ is no formula. Characters that the font lacks are boxes."""
    ticks = {text for tick in figure.findobj(Tick) for text in tick.findobj(Text)}  # logarithmic ones are formulas
    for text in set(figure.findobj(Text)) - ticks:
        text.set_parse_math(False)
    with atomic(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(temporary, dpi=120)


def by_method(table, column="method"):
    """{value: rows} of a column: methods in the order of METHODS, others after them in that of the table."""
    groups = dict(tuple(table.groupby(column, sort=False)))
    known = [name for name in METHODS if name in groups]
    return {name: groups[name] for name in dict.fromkeys([*known, *groups])}


def line_with_band(panel, rows, x, y, label):
    """A column against another, the interval <y>_low .. <y>_high as a band."""
    (line,) = panel.plot(rows[x], rows[y], "o-", markersize=3, label=label, color=METHODS.get(label))
    panel.fill_between(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], color=line.get_color(), alpha=0.12, linewidth=0)


def tick_values(panel, values):
    """Ticks of the x axis exactly at the values."""
    ticks = sorted(set(values))
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def bars(panel, groups, ticks, column):
    """Grouped bars with their intervals.

    Args:
        groups: {label: DataFrame with ``column``, its _low and _high, indexed by ``ticks``}.
        ticks: a group of bars at each.
    """
    for i, (label, rows) in enumerate(groups.items()):
        rows = rows.reindex(ticks)
        value = rows[column]
        ends = np.stack([value - rows[f"{column}_low"], rows[f"{column}_high"] - value]).clip(0)
        places, width = grouped_places(len(ticks), len(groups), i)
        look = {"capsize": 2, "error_kw": {"linewidth": 0.8}, "label": label, "color": METHODS.get(label)}
        panel.bar(places, value, width, yerr=np.nan_to_num(ends), **look)
    panel.set_xticks(range(len(ticks)), ticks, fontsize=8, parse_math=False)
    panel.set_ylim(0, 103)
    panel.grid(alpha=0.3, axis="y")


def grouped_places(count, groups, i):
    """Centres of the i-th of ``groups`` bars at each of ``count`` places, and their width."""
    width = 0.8 / groups
    return [place + (i - (groups - 1) / 2) * width for place in range(count)], width


# --- charts ----------------------------------------------------------------------------------------------------------


def plot_training(log, path):
    """Line chart of the loss terms and of the monitored MRE against epochs."""
    monitored = log.dropna(subset="mre_mm") if "mre_mm" in log else log[:0]
    figure, (left, right) = panels(2)
    for column, label in [(column, label) for column, label in LOSSES.items() if column in log]:
        left.plot(log["epoch"], log[column], label=label)
    left.set(title="training loss", ylabel="loss", yscale="log")
    left.legend()
    if len(monitored):
        right.plot(monitored["epoch"], monitored["mre_mm"], "o-", label="MRE")
        right.plot(monitored["epoch"], monitored["median_mm"], "o-", label="median")
        right.set_title(f"monitoring on {monitored['monitored_split'].iloc[-1]}")
        right.legend()
    right.set(ylabel="radial error (mm)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(-0.5, log["epoch"].max() + 0.5)  # both panels alike, also of a single epoch
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    save(figure, path)


def plot_attack(summary, column, label, path):
    """A column of ``eval.summarize`` against iterations: a panel for each role, a line with a band for each method."""
    summary = summary[summary["role"] != "worst"]  # an image's, not a role
    roles = list(dict.fromkeys(summary["role"]))
    figure, axes = panels(len(roles), width=10 / len(roles))
    top = 1.05 * max(summary[[column, f"{column}_high"]].max(axis=None), 1e-3)  # all panels have one scale
    for panel, role in zip(axes, roles, strict=True):
        for method, rows in by_method(summary[summary["role"] == role]).items():
            end = rows["iteration"].max()
            apart = rows[(rows["iteration"] == end) | (rows["iteration"] < 0.98 * end)]  # without 99 beside 100
            line_with_band(panel, apart, "iteration", column, method)
        panel.set(title=f"{role} landmarks", xlabel="iteration", ylabel=label, ylim=(0, top))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    save(figure, path)


# --- pictures --------------------------------------------------------------------------------------------------------


def show(panel, image, size0, title, **look):
    """An image in px0 of its original of ``size0`` (H0, W0); ``look`` is that of the title."""
    panel.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(-0.5, size0[1] - 0.5, size0[0] - 0.5, -0.5))
    panel.set_title(title, **look)
    panel.set_axis_off()


def draw(path, title, data, records, adversarial=None):
    """Draw one image with its landmarks and, if attacked, the attacked image and the magnified perturbation.

    Args:
        path: file to write.
        title: above the picture.
        data: dataset.Cephalograms of this one image.
        records: its records, see ``eval.record``: of an attack those of one method, in the order of iterations.
        adversarial: (C, H, W) float in [-1, 1], C = 1 or 3.
    """
    size0, count = data.sizes[0].tolist(), records["landmark"].nunique()
    first, final = records[:count], records[-count:]
    figure, axes = panels(1 if adversarial is None else 3, width=4.2, height=5.8)
    figure.suptitle(title)
    show(axes[0], data.images[0], size0, "clean")
    for panel, found in zip(axes[:2], (first, final), strict=False):
        if found["true_x_px0"].notna().any():
            panel.scatter(found["true_x_px0"], found["true_y_px0"], **TRUTH)
        panel.scatter(found["x_px0"], found["y_px0"], **PREDICTED)
    if adversarial is not None:
        attacked = adversarial.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
        show(axes[1], attacked / 2 + 0.5, size0, "attacked")
        aimed = final["target_x_px0"].notna().to_numpy()
        if aimed.any():
            start, end = first[aimed], final[aimed]
            way = [np.stack([start[f"{a}_px0"], end[f"{a}_px0"]]) for a in "xy"]
            axes[1].plot(*way, color="red", linewidth=0.6)  # that the prediction has gone,
            axes[1].plot(*(end[[f"{a}_px0", f"target_{a}_px0"]].T for a in "xy"), ":", color="cyan", linewidth=0.8)
            axes[1].scatter(end["target_x_px0"], end["target_y_px0"], **TARGET)
        delta = (attacked + 1) * 127.5 - data.images[0].numpy()[..., None]
        bound = max(np.abs(delta).max(), 1e-6)
        title = f"perturbation x {127.5 / bound:.3g}: black -{bound:.1f}, white +{bound:.1f} of 255"
        show(axes[2], delta / (2 * bound) + 0.5, size0, title)
    for panel in axes[:2]:
        panel.legend(loc="lower left", fontsize=7)
    save(figure, path)
