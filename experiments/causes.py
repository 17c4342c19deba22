"""What makes the attack weak or strong.

Attacks on detectors, or with perturbations, that differ in one property, by displacements of 8 mm unless a question
says otherwise; the answers to a question are compared on the images, at the last iteration and on the landmarks whose
role is the same in all. Where an answer has several trainings, intervals are of a bootstrap over images and
trainings. *Neighbours* are the two nearest landmarks of a displaced one: they are held in place like
all others, go along with it, or are free to go anywhere; were they what holds it, it would be easier to move when
they are free. A detector that starts from the weights of one of another size differs in its training too. The
detector's MRE is that on the clean images of the attack.
"""

from itertools import product

import pandas as pd

from eval import SUCCESS_MM
from experiments.results import last, of_role, outcome, render_differences, render_outcomes
from experiments.statistics import paired_difference
from support.figures import bars, by_method, panels, save
from support.files import write_table


def publish(results, data, out):
    """Write tables and the chart to ``out``; return the section of the report."""
    records = collect(results)
    table, paired = compute(records), pd.DataFrame(compute_differences(records))
    write_table(out / "causes.csv", table)
    write_table(out / "causes_differences.csv", paired)
    plot(table, out / "causes.png")
    return (
        f"\n{render_outcomes(table)}\n![success by cause](causes.png)\n\n"
        f"Targeted landmarks, differences on the same images:\n\n{render_differences(paired)}"
    )


def collect(results):
    """Records with question and answer, of the images, methods and iterations that all answers to a question have.

    Landmarks that have another role in another answer have the role "other".
    """
    tables = [result.attacked().assign(**({"seed": 0} | result.labels)) for result in results]
    records = pd.concat(tables, ignore_index=True)
    for column in ("image", "method", "iteration"):
        records = records[in_all_answers(records, column)]
    same = in_all_answers(records, "image", "landmark", "role")
    return records.assign(role=records["role"].where(same, "other"))


def in_all_answers(records, *columns):
    """Of each record, whether all answers to its question have what it has in the columns."""
    answers = records.groupby("question")["answer"].transform("nunique")
    return records.groupby(["question", *columns])["answer"].transform("nunique") == answers


def compute(records):
    """The outcome of each answer, of landmarks alone: those with the role "other" make no image complete."""
    return pd.concat(
        outcome(rows, {"question": question, "answer": answer, "iteration": rows["iteration"].max()})
        for (question, answer), rows in records.groupby(["question", "answer"], sort=False)
    ).filter(regex="^(?!complete)")


def compute_differences(records):
    """Targeted landmarks: each answer minus the first, a row for each question and method, paired by image."""
    targeted = of_role(records, "targeted")
    for question, rows in targeted.groupby("question", sort=False):
        (first, rows), *others = ((answer, last(found)) for answer, found in rows.groupby("answer", sort=False))
        for (answer, other), method in product(others, rows["method"].unique()):
            labels = {"question": question, "answer": answer, "minus": first, "method": method}
            yield labels | paired_difference(other[other["method"] == method], rows[rows["method"] == method])


def plot(table, path):
    """Success by question, answer and method."""
    questions = table["question"].unique()
    figure, axes = panels(len(questions), width=3.6, height=4.2)
    for panel, question in zip(axes, questions, strict=True):
        rows = table[table["question"] == question].set_index("answer")
        bars(panel, by_method(rows), rows.index.unique(), "within_4mm_%")
        panel.set_title(question)
    axes[0].set_ylabel(f"targeted, within {SUCCESS_MM} mm of target (%)")
    axes[0].legend(fontsize=8)
    save(figure, path)
