"""README.md and docs/*.md: each figure of a result is a number of a committed CSV, rounded once, halves up.

A figure is a number that fills a cell of a table or stands in a column in %, points or mm, and, in other text, a number
with %, points, mm or an interval. A paragraph, a list item or a table names where its figures come from, below docs/; a
table in the line above it, or in a row, for this row and those below:

    <!-- figures: results/cosine-200x160/attack_shift.csv by method, iteration -->
    <!-- figures: results/pretrained/epsilon.csv: 8 mm, epsilon=4; epsilon=8; results/pretrained/fancy.csv -->
    <!-- no result: why these figures are none -->

``FILE: value, column=value`` selects the rows of a CSV that have these cells, and what follows a semicolon other rows,
of the same file unless it names another. ``by column, column`` divides them into groups with equal cells. All figures
of a paragraph, an item or a row lie in one group of each selection; where the text names values of these columns, in a
group of those. A figure in %, points or mm is of a column of that unit. A column of a Markdown table stands for one
column of the CSV.
"""

import csv
import functools
import itertools
import re
from decimal import ROUND_HALF_UP, Decimal

import pytest
from conftest import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
EXEMPT = {"docs/data.md": "facts about the data, and bounds of its checks"}

DEFINED = r"(?<![\w.])[248]\smm\b(?!\s\[)|95\s%\s(?:confidence\s)?interval"  # success, displacements, SDR
NUMBER = r"(?<![\w.-])[+-]?\d+(?:\.\d+)?(?!\w)"
FIGURE = rf"(?P<value>{NUMBER})(?:\s*(?P<unit>%|mm\b|points?\b))?"
FIGURE += r"(?:\s+\[(?P<low>[+-]?[\d.]+),\s+(?P<high>[+-]?[\d.]+)\])?"  # its interval
PLAIN = re.sub(r"\?P<\w+>", "?:", FIGURE)
LIST = rf"{PLAIN}(?:(?:,\s+(?:and\s+)?|\s+(?:and|to|or|instead\sof)\s+){PLAIN})*"
CELL = rf"[\s(*]*{PLAIN}(?:[\s(*]+{PLAIN})*[\s)*]*"
COMMENT = re.compile(r"<!--\s*(figures|no result):\s*(.*?)\s*-->", re.S)


# --- pages -----------------------------------------------------------------------------------------------------------


def unit_of(name):
    """% or mm, of the name of a column or a unit; percentage points are %."""
    return "%" if re.search("%|point", name) else "mm" if re.search(r"(?<![a-z0-9])mm\b|_mm$", name) else None


def blank(match):
    return re.sub(r"\S", " ", match[0])


def figures(text, header=None):
    """Matches of FIGURE with their units in a text, or in the cell of a table whose column has this header."""
    found, cell = [], header and (unit_of(header) or re.fullmatch(CELL, text))
    text = re.sub(DEFINED, blank, text)
    for part in re.finditer(LIST, text):
        items = list(re.compile(FIGURE).finditer(text, *part.span()))
        named = [item["unit"] for item in items]
        if cell or any(named) or any(item["low"] for item in items):
            near = (next(filter(None, [*named[i:], *named[i::-1]]), header or "") for i in range(len(items)))
            found += zip(items, map(unit_of, near), strict=True)
    return found


def blocks(page):
    """(line, text) of paragraphs, list items, and rows of tables; code is left out."""
    found, new, code = [], True, False
    for number, line in enumerate(page.splitlines(), 1):
        code ^= line.startswith("```")
        if code or not line.strip() or re.match("```|#|    " if new else "```|#", line):
            new = True
        elif new or re.match(r"\||[*-] |\d+\. ", line):
            found.append((number, line))
            new = False
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{line}")
    return found


# --- CSV -------------------------------------------------------------------------------------------------------------


@functools.cache
def read(file):
    with open(ROOT / "docs" / file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def plain(cell):
    """A cell as one writes it: 4 for 4.0000."""
    return f"{float(cell):g}" if re.fullmatch(NUMBER, cell) else cell


def numbers(row, chosen, selection):
    """(value, low, high, unit, place) of each number of a row; ``chosen``: its cells by which it has been selected.

    The place, for numbers that mean the same in other rows: selection, column, and the texts of the row.
    """
    number = rf"{FIGURE}|[\d.e+-]*"
    texts = tuple(cell for cell in row.values() if cell not in chosen and not re.fullmatch(number, cell))
    for column, cell in row.items():
        match = re.fullmatch(FIGURE, cell)
        if match and not column.endswith(("_low", "_high")):
            ends = [match[end] or row.get(f"{column}_{end}") for end in ("low", "high")]
            yield match["value"], *ends, unit_of(column), (selection, column, *texts)


def selections(source):
    """[{the values of a group: its numbers}] of the selections in a comment."""
    found, file = [], None
    for i, part in enumerate(re.split(r";\s*", " ".join(source.split()))):
        named, values, by = re.fullmatch(r"(\S+\.csv)?:?\s*(.*?)(?:\s*by (.*))?", part).groups()
        file, by = named or file, by.split(", ") if by else []
        rows = read(file)
        for value in filter(None, values.split(", ")):
            column, _, cell = value.rpartition("=")
            rows = [row for row in rows if cell in ([plain(row[column])] if column else row.values())]
        if not rows:
            raise LookupError(f"{file} has no row of {values}")
        groups = {}
        for row in rows:
            key = tuple(row[column] for column in by)
            groups.setdefault(key, []).extend(numbers(row, [*key, *values.split(", ")], i))
        found.append(groups)
    return found


def groups_named(groups, text):
    """The groups whose values a text names; of a column of which it names none, all values."""

    def named(value):
        return re.search(rf"(?<![\w.-]){re.escape(plain(value))}(?![\w:-]|\.\d|\s*(?:\[|%|mm|points))", text)

    wanted = [set(filter(named, values)) or set(values) for values in zip(*groups, strict=True)]
    return [group for key, group in groups.items() if all(map(set.__contains__, wanted, key))]


# --- the comparison --------------------------------------------------------------------------------------------------


def rounds_to(number, shown):
    digits = Decimal(1).scaleb(-len(shown.partition(".")[2]))
    return bool(number) and Decimal(number).quantize(digits, ROUND_HALF_UP) == Decimal(shown)


def places(figure, unit, found):
    """The places of the numbers that a figure may be."""
    shown = [part for part in figure.group("value", "low", "high") if part]
    return {place for *number, of, place in found if unit in (None, of) and all(map(rounds_to, number, shown))}


def compare(found, source, text):
    """The places of each figure, by the choice of one group of each selection in which most figures have one."""
    best = {}
    for groups in itertools.product(*(groups_named(groups, text) for groups in selections(source))):
        group = [number for part in groups for number in part]
        here = [places(figure, unit, group) for figure, unit, _ in found]
        best.setdefault(sum(map(bool, here)), []).append(here)
    if not best:
        raise LookupError(f"no rows are {text.strip()} in {source}")
    choices = best[max(best)] if max(best) == len(found) else best[max(best)][:1]
    return [set().union(*either) for either in zip(*choices, strict=True)]


def claims(page):
    """(line, comment, text, figures) of paragraphs, list items and rows of tables; figures: [(match, unit, column)]."""
    above, header, end = None, None, 0
    for line, block in blocks(page):
        comment, text = COMMENT.search(block), re.sub(COMMENT, blank, block)
        if line != end + 1:
            above = header = None
        end = line + block.count("\n")
        if not text.strip():
            above = comment
        elif not text.startswith("|"):
            yield line, comment, text, [(*figure, None) for figure in figures(text)]
        elif header is None:
            header = labels = text.strip()[1:-1].split("|")
            table = line
        elif not re.fullmatch(r"[\s|:-]+", text):
            row = text.strip()[1:-1].split("|")
            empty = len(list(itertools.takewhile(str.isspace, row)))  # as in the row above
            labels = [*labels[:empty], *row[empty:]]
            found = []
            for i, cell in enumerate(row):
                column = (table, i) if re.fullmatch(CELL, cell) else None
                found += [(*figure, column and (*column, k)) for k, figure in enumerate(figures(cell, header[i]))]
            above = comment or above
            yield line, above, "|".join(labels), found


def faults(page):
    """What is wrong with the figures of a page, a line each."""
    wrong, columns = [], {}
    for first, comment, text, found in claims(page):
        kind, source = (comment[1], " ".join(comment[2].split())) if comment else ("none", "")
        if not found or kind == "no result":
            continue
        try:
            sources = compare(found, source, text) if comment else [set()] * len(found)
        except (OSError, LookupError) as error:
            wrong.append(f"{first}: {error}")
            continue
        for (figure, _, column), here in zip(found, sources, strict=True):
            line = first + text.count("\n", 0, figure.start())
            where = f"{line}: {' '.join(figure[0].split())}"
            if not here:
                wrong.append(f"{where}: {f'not in {source}' if comment else 'no source is named'}")
            elif column:
                both = columns.get(column, here) & here
                columns[column] = both or columns[column]
                if not both:
                    wrong.append(f"{where}: of another column of the CSV than the cells above it")
    return wrong


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_figures_have_a_source(page):
    wrong = [] if page in EXEMPT else faults((ROOT / page).read_text(encoding="utf-8"))
    assert not wrong, f"{page}:\n" + "\n".join(wrong)


CSV = """method,role,iteration,images,mre_mm,mre_mm_low,mre_mm_high,within_4mm_%
I-FGSM,targeted,99,20,2.4500,1.5000,3.1499,82.5000
I-FGSM,stationary,99,20,1.2000,1.1000,1.3000,97.0000
Vote-PGD,targeted,100,20,0.4449,0.3000,0.6000,95.0000
"""
NONE = "3: no rows are Vote-PGD, stationary | 97 in CSV by method, role"
TABLE = "{} by method, role -->\n| | MRE (mm) | % |\n| --- | --- | --- |\n"


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("reaches 83 %, 2.5 mm [1.5, 3.1] away, after 99 iterations {}: I-FGSM, targeted -->", []),
        ("reaches 83 % {}: I-FGSM, iteration=100; Vote-PGD -->", ["1: CSV has no row of I-FGSM, iteration=100"]),
        ("reaches\n82 % {} -->", ["2: 82 %: not in CSV"]),  # halves up
        ("MRE 0.5 mm {} -->", ["1: 0.5 mm: not in CSV"]),  # 0.4449, rounded by way of 0.45
        ("2.5 mm [1.5, 3.2] {} -->", ["1: 2.5 mm [1.5, 3.2]: not in CSV"]),
        ("0.4 instead of 95 mm {} -->", ["1: 95 mm: not in CSV"]),
        ("1.2 to 2.5 mm {} by method -->", []),
        ("0.4 to 2.5 mm {} by method -->", ["1: 0.4: not in CSV by method"]),
        ("by Vote-PGD 83 % {} by method -->", ["1: 83 %: not in CSV by method"]),
        ("| | % |\n| - | - |\n| Vote-PGD, stationary | 97 {} by method, role --> |", [NONE]),
        ("* 83 %\n* 97 % {} -->", ["1: 83 %: no source is named"]),
        (TABLE + "| I-FGSM | 2.5 | 83, then 95 |\n", ["4: 95: not in CSV by method, role"]),
        ("5 % <!-- no result: R -->\n\n    7 %\n\n```\n8 %\n```\n20 images, 100 px, within 4 mm", []),
        (TABLE + "| I-FGSM, targeted | 2.5 | 83 |\n| stationary | 1.2 | 97 |\n", []),
        (TABLE + "| I-FGSM | 2.5 | 83 |\n| | 1.2 | 95 |\n", ["5: 95: not in CSV by method, role"]),
        (TABLE + "| I-FGSM | 2.5 | 20 |\n", ["4: 20: not in CSV by method, role"]),
    ],
)
def test_faults(page, wrong, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(CSV)
    assert [line.replace(str(file), "CSV") for line in faults(page.format(f"<!-- figures: {file}"))] == wrong


def test_a_column_of_a_table_is_one_of_the_csv(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    page = f"<!-- figures: {tmp_path}/a.csv by method -->\n| | a | b |\n| - | - | - |\n| I-FGSM | 99 | 83 |\n"
    assert not faults(page + "| Vote-PGD | 100 | 95 |\n")
    assert faults(page + "| Vote-PGD | 95 | 100 |\n") == [
        f"5: {shown}: of another column of the CSV than the cells above it" for shown in ("95", "100")
    ]
