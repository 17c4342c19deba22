"""DataFrames as tables of Markdown."""

import numpy as np


def markdown(table, number=".2f"):
    """A DataFrame as a table of Markdown; floats in the format ``number``, nan as nothing."""

    def cell(value):
        if isinstance(value, float):
            return "" if np.isnan(value) else format(value, number)
        return str(value).replace("|", "\\|")

    rows = [list(table), ["---"] * table.shape[1], *table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows) + "\n"


def fold_intervals(table, number=".1f"):
    """A table in which each column <name> with <name>_low and <name>_high is one of text, value [low, high]."""
    names = [name for name in table if f"{name}_low" in table]
    rows = {name: table[[name, f"{name}_low", f"{name}_high"]].to_numpy() for name in names}
    text = f"{{:{number}}} [{{:{number}}}, {{:{number}}}]"
    folded = {name: ["" if np.isnan(row[0]) else text.format(*row) for row in rows[name]] for name in names}
    return table.assign(**folded).drop(columns=[f"{name}_{end}" for name in names for end in ("low", "high")])
