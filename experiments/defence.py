"""Defences.

Transformations of the input, and adversarial training. An *oblivious* attacker perturbs the image for the plain
detector, an *adaptive* one for the defended detector, with gradients through the transformation, or straight through
it where it rounds, averaged over the draws of a random one. Only what holds against the adaptive one is a defence.
Then, whether images can be told to be attacked without any training.
"""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch

from attack import ATTACKS
from beyond.defences import shape_distance
from eval import SUCCESS_MM, interval, named, read_records
from experiments.markdown import fold_intervals, markdown
from experiments.results import HEADINGS, clean_and_last, join_clean, of_role, outcome, rate
from readers.points import LANDMARKS
from support.errors import InputError
from support.figures import bars, panels, save
from support.files import load_table, read_config, write_table

ACCURACY = ["mre_mm", "median_mm", "sdr_2mm_%", "sdr_4mm_%"]
SCORES = {"votes": "share of votes", "peak": "heatmap peak", "shape": "shape", "sum": "sum of the three"}
RUN = ["detector", "epsilon", "steps"]  # labels of a run
CONDITION = ["defence", "attacker"]
ATTACK = [*RUN, "method"]
INTRODUCTIONS = {  # of each table in the report
    "accuracy": "Accuracy on clean images:",
    "attacks": "Attacks, 95 % intervals:\n\n![success behind each defence](defence_attacks.png)",
    "masking": "Checks for masked gradients: the first of each pair should succeed at most as often as the second.",
    "detection": "Detecting attacks, area under the ROC curve (%, 50: chance):\n\n![ROC](defence_roc.png)",
}
ITERATED = [name for name, attack in ATTACKS.items() if attack.steps is None and not attack.universal]


def publish(results, data, out):
    """Write tables and charts to ``out``; return the section of the report."""
    runs = {"accuracy": [], "attack": []}
    for result in results:
        kind, labels = describe(result)
        runs[kind].append((labels, result))
    attacks = runs["attack"]
    tables = {
        "accuracy": concatenate(compute_accuracy, runs["accuracy"]),
        "attacks": concatenate(compute_attack, attacks),
        "transfer": concatenate(compute_transfer, attacks),
    }
    if attacks:
        tables["masking"] = pd.DataFrame(compute_masking(tables["attacks"], tables["transfer"]))
        plot(tables["attacks"], out / "defence_attacks.png")
    scores = concatenate(compute_scores, [run for run in attacks if run[0]["detector"] == attacks[0][0]["detector"]])
    if len(scores):
        tables["detection"] = pd.DataFrame(compute_detection(scores))
        plot_roc(scores, out / "defence_roc.png")
    tables = {name: table for name, table in tables.items() if len(table)}
    for name, table in tables.items():
        write_table(out / f"defence_{name}.csv", table)
    return render(tables)


def describe(result):
    """The kind of a run, accuracy or attack, and a dict of its ``RUN``.

    Raises:
        InputError: not a run of test.py.
    """
    config = read_config(result.folder / "config.json")
    if "attack" not in config:
        raise InputError(f"{result.folder}: not results of test.py")
    kind = "attack" if config["attack"] else "accuracy"
    return kind, {"detector": config["tag"], "epsilon": config["epsilon"], "steps": config["steps"]}


def concatenate(compute, runs):
    """One table of what ``compute`` finds in each run (labels, result): a table, or rows."""
    tables = [pd.DataFrame(compute(*run)) for run in runs]
    return pd.concat([table for table in tables if len(table)] or [pd.DataFrame()])


# --- tables ----------------------------------------------------------------------------------------------------------


def compute_accuracy(labels, result):
    """MRE and SDR on clean images behind each defence."""
    file = result.folder / "defences_summary.csv"
    if file.exists():
        table = load_table(file, [*ACCURACY, "defence"])
    else:
        table = load_table(result.folder / "summary.csv", ACCURACY).query("landmark == 'all'").assign(defence="none")
    table = table.assign(detector=labels["detector"], images=result.predictions()["image"].nunique())
    return table[["detector", "images", "defence", *ACCURACY]]


def compute_attack(labels, result):
    """The outcome of each method under each ``CONDITION``, those without a defence first."""
    file = result.folder / "defences.csv"
    plain = {"defence": "none", "attacker": "adaptive"}
    records = read_records([file]) if file.exists() else result.predictions().assign(**plain)
    return pd.concat(
        outcome(join_clean(rows), labels | dict(zip(CONDITION, condition, strict=True)))
        for condition, rows in records.groupby(CONDITION, sort=False)
    )


def compute_transfer(labels, result):
    """Success of the stored attacked images on other detectors, a row for each and each method."""
    file, own = result.folder / "read_back.csv", labels["detector"]
    if not file.exists():
        return
    table = read_records([file])
    others = table["detector"].str.split(", ").str[0] != own  # "<own>, <defence>" is itself behind a defence
    table = table[others & (table["stored"] == "8-bit input")]
    for (detector, method), found in table.groupby(["detector", "method"], sort=False):
        targeted = of_role(found, "targeted")
        success = named("within_4mm_%", *rate(targeted, targeted["radial_error_mm"] <= SUCCESS_MM))
        yield {"from": own, "to": detector, "epsilon": labels["epsilon"], "method": method} | success


def compute_masking(attacks, transfer):
    """The usual checks for masked gradients, a row each with the two success rates that it compares.

    ``holds``: "yes" where the first rate is at most the second, "within intervals" where it is not but their intervals
    overlap, else "no". Of the targeted attacks of several iterations, which alone can fail by masked gradients.
    """
    for check, one, other in checks(attacks[attacks["method"].isin(ITERATED)], transfer):
        row = {"check": check, "detector": other["detector"], "method": other["method"]}
        for side, rates in (("first", one), ("second", other)):
            row |= named(f"{side}_%", *(rates[f"within_4mm_%{end}"] for end in ("", "_low", "_high")))
        overlap = "within intervals" if row["first_%_low"] <= row["second_%_high"] else "no"
        yield row | {"holds": "yes" if row["first_%"] <= row["second_%"] else overlap}


def checks(attacks, transfer):
    """(check in words, the row that should have the lower rate, the other row); both attack one detector."""
    plain = attacks[attacks["defence"] == "none"]
    for _, group in plain.groupby(["detector", "method"], sort=False):
        for changing, fixed in (("steps", "epsilon"), ("epsilon", "steps")):
            for value, part in group.groupby(fixed, sort=False):
                part = part.drop_duplicates(changing).sort_values(changing)
                for (_, one), (_, other) in pairwise(part.iterrows()):
                    yield f"{changing} {one[changing]:g} against {other[changing]:g}, {fixed} {value:g}", one, other
    others = plain.drop_duplicates(["detector", "epsilon", "method"])  # whatever their steps
    for _, one in plain[plain["method"] == "random-search"].iterrows():
        same = others.query("detector == @one.detector and epsilon == @one.epsilon and method != 'random-search'")
        for _, other in same.iterrows():
            yield f"random search of {one.steps:g} against {other.steps:g} steps, epsilon {one.epsilon:g}", one, other
    for _, one in transfer.iterrows():
        same = others.query("detector == @one.to and epsilon == @one.epsilon and method == @one.method")
        for _, other in same.iterrows():
            yield f"transfer from {one['from']} against white box, epsilon {one.epsilon:g}", one, other
    for (*_, defence), group in attacks.groupby([*ATTACK, "defence"], sort=False):
        if len(group) == 2:
            one, other = (group[group["attacker"] == attacker].iloc[0] for attacker in ("oblivious", "adaptive"))
            yield f"oblivious against adaptive, {defence}, epsilon {one.epsilon:g}", one, other


# --- detection of attacks --------------------------------------------------------------------------------------------


def compute_scores(labels, result):
    """Scores of each image, clean and attacked; a higher one is more suspicious."""
    keys = ["method", "iteration", "image"]
    records = clean_and_last(result.predictions()).sort_values([*keys, "landmark"], kind="stable")
    if records["landmark"].max() != len(LANDMARKS) or "vote_share" not in records:  # no heads, or no votes
        return pd.DataFrame()
    table = records.drop_duplicates(keys)[[*keys, "mm_per_px0"]].reset_index(drop=True)
    points = torch.tensor(records[["x_px0", "y_px0"]].to_numpy()).unflatten(0, (len(table), -1))
    table["shape"] = shape_distance(points, torch.tensor(table["mm_per_px0"].to_numpy())).numpy()
    for name, column in (("votes", "vote_share"), ("peak", "heatmap_peak")):
        table[name] = -np.log(records[column].clip(1e-3).to_numpy()).reshape(len(table), -1).mean(1)
    table["attacked"] = table["iteration"] > 0
    clean = table[~table["attacked"]].drop_duplicates("image")
    table["sum"] = sum((table[name] - clean[name].mean()) / clean[name].std() for name in ("votes", "peak", "shape"))
    return table.assign(**labels)


def auc(pairs):
    """Area under the ROC curve: how often an attacked image has a higher score than a clean one, of (images, 2)."""
    clean, attacked = pairs.T
    if np.isnan(pairs).any():
        return np.nan  # a single image, whose score has no deviation to be standardised by
    return ((attacked[:, None] > clean) + 0.5 * (attacked[:, None] == clean)).mean()


def score_pairs(rows, score):
    """A score of each image, clean and attacked: (images, 2)."""
    return rows.pivot(index="image", columns="attacked", values=score).to_numpy()


def compute_detection(scores):
    """Area under the ROC curve in % of each score, a row for each attack."""
    for key, found in scores.groupby(ATTACK, sort=False):
        row = dict(zip(ATTACK, key, strict=True)) | {"images": found["image"].nunique()}
        for name in SCORES:
            row |= named(f"{name}_auc_%", *(100 * v for v in interval(score_pairs(found, name), auc)))
        yield row


# --- charts and text -------------------------------------------------------------------------------------------------


def plot(table, path):
    """Success behind each defence, of both attackers, by method; the first detector's attack with most defences."""
    counts = table.groupby(ATTACK, sort=False)["defence"].nunique()
    chosen = table.set_index(RUN).loc[[counts.idxmax()[:-1]]]
    chosen = chosen[chosen.groupby("method")["defence"].transform("nunique") == counts.max()]
    methods, defences = list(chosen.groupby("method", sort=False)), chosen["defence"].unique()
    figure, axes = panels(len(methods), width=6.5)
    for panel, (method, rows) in zip(axes, methods, strict=True):
        rows = rows.set_index("defence")
        attackers = {attacker: rows[rows["attacker"] == attacker] for attacker in ("oblivious", "adaptive")}
        bars(panel, attackers, defences, "within_4mm_%")
        panel.set(title=method, ylabel=f"targeted, within {SUCCESS_MM} mm of target (%)", ylim=(0, 118))
    axes[0].legend(fontsize=8, loc="upper right", ncols=2)
    save(figure, path)


def plot_roc(scores, path):
    """A ROC curve for each score, a panel for each attack."""
    groups = list(scores.groupby(ATTACK, sort=False))
    figure, axes = panels(len(groups), width=4.2, height=4.8)
    for panel, ((detector, epsilon, steps, method), rows) in zip(axes, groups, strict=True):
        for name, label in SCORES.items():
            clean, attacked = score_pairs(rows, name).T
            limits = np.sort(np.concatenate([clean, attacked, [np.inf, -np.inf]]))[::-1]
            places = [100 * (values >= limits[:, None]).mean(1) for values in (clean, attacked)]
            panel.plot(*places, label=label)
        panel.plot([0, 100], [0, 100], ":", color="tab:gray", linewidth=0.8)
        panel.set(xlabel="clean images flagged (%)", ylabel="attacked images flagged (%)", aspect="equal")
        panel.set_title(f"{method}, epsilon {epsilon:g}, {steps} steps\n{detector}")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    save(figure, path)


def render(tables):
    headings = HEADINGS | {f"{score}_auc_%": label for score, label in SCORES.items()}
    return "".join(
        f"\n{introduction}\n\n{markdown(fold_intervals(tables[name]).rename(columns=headings))}"
        for name, introduction in INTRODUCTIONS.items()
        if name in tables
    )


# --- finished runs ---------------------------------------------------------------------------------------------------


def check(results):
    """The runs, unless they do not compare: two of one kind, two detectors of one name, other images or targets."""
    seen, targets = {}, {}
    for result in results:
        (kind, labels), config = describe(result), read_config(result.folder / "config.json")
        for method in config["attack"] or ["none"]:
            key = (kind, *labels.values(), method)
            if key in seen:
                raise InputError(f"{result.folder}: the same kind of run as {seen[key]}; give one of them")
            seen[key] = result.folder
        detector = [config.get(name) or False for name in ("checkpoint_sha256", "batch_statistics", "subpixel")]
        if seen.setdefault(config["tag"], detector) != detector:
            raise InputError(f"{result.folder}: another checkpoint or decoding of {config['tag']} than in the others")
        if kind == "attack":  # a file of targets may be for any image
            truth = result.predictions().groupby("image")["true_x_px0"].first().fillna(0).to_dict()
            targets.setdefault((config["targets_sha256"], *truth.items()), result.folder)
    if len(targets) > 1:
        first, other, *_ = targets.values()
        raise InputError(f"{other}: other images or targets than in {first}; give runs with the same")
    return results
