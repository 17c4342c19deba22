"""Common parts of the charts of several experiments."""

from matplotlib.figure import Figure

from eval import SUCCESS_MM
from support.files import atomic

RATES = {  # column -> title of a panel
    "within_4mm_%": f"targeted, within {SUCCESS_MM} mm of target",
    "half_way_%": "targeted, more than halfway",
    "stationary_within_4mm_%": f"stationary, within {SUCCESS_MM} mm of truth",
}
EPSILON = "epsilon (half grey levels of 255)"


def save(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


def panels(count, width=5.0, height=4.0):
    """(figure, axes) of ``count`` panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def line_with_band(panel, rows, x, y, label):
    """A column against another, the interval <y>_low .. <y>_high as a band."""
    (line,) = panel.plot(rows[x], rows[y], "o-", markersize=3, label=label)
    panel.fill_between(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], color=line.get_color(), alpha=0.12, linewidth=0)


def tick_values(panel, values):
    """Ticks of the x axis exactly at the values."""
    ticks = sorted(set(values))
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def plot_rates(table, x, group, xlabel, path, **axis):
    """``RATES`` of a table of ``measures.measure`` against x, a line for each value of ``group``."""
    figure, axes = panels(len(RATES))
    for panel, (column, title) in zip(axes, RATES.items(), strict=True):
        for name, rows in table.groupby(group, sort=False):
            line_with_band(panel, rows, x, column, name)
        panel.set(title=title, xlabel=xlabel, ylabel="landmarks (%)", ylim=(0, 103), **axis)
        tick_values(panel, table[x])
    axes[0].legend(fontsize=8)
    save(figure, path)


def grouped_places(count, groups, i):
    """Centres of the i-th of ``groups`` bars at each of ``count`` places, and their width."""
    width = 0.8 / groups
    return [place + (i - (groups - 1) / 2) * width for place in range(count)], width
