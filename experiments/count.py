"""Number of targeted landmarks.

Success against the number |T| of landmarks that are targeted at once; all others are stationary.
"""

from experiments.epsilon import plot
from experiments.results import outcomes, render_outcomes
from support.files import write_table


def publish(results, data, out):
    table = outcomes(results)
    write_table(out / "count.csv", table)
    plot(table, "|T|", "method", "number of targeted landmarks |T|", out / "count.png")
    return f"\n{render_outcomes(table)}\n![success against |T|](count.png)\n"
