"""Files by their names, numbers and tables in text: CSV separated by commas, semicolons, tabs or spaces."""

import csv
import math
import re
from pathlib import PureWindowsPath

from readers.images import SUFFIXES, UNSUPPORTED
from support.errors import InputError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
SEPARATORS = (";", "\t", ",", " ")  # the first one that the header holds


def find(folder, name):
    """The path of a file or folder in a folder, in whatever case it is spelled there; as ``name`` if it is not there.

    Raises:
        InputError: two of them.
    """
    found = [path for path in folder.iterdir() if path.name.lower() == name.lower()] if folder.is_dir() else []
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1].name} are in the same folder; remove one")
    return found[0] if found else folder / name


def image_id(text):
    """The id of an image that a table names by its id, its file's name or its path, with slashes or backslashes."""
    path = PureWindowsPath(text)
    return path.stem if path.suffix.lower() in (*SUFFIXES, *UNSUPPORTED) else path.name


def number(text):
    """A finite float, or None if the text is not a number (unlike for ``float``, 1_0 is not one)."""
    text = text.strip()
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def read_text(path):
    """The content of a text file.

    Raises:
        InputError: unreadable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file ({error})") from None


def read_by_image(path, column, columns, header, optional=None):
    """The rows of a table with one for each image as {id: (line number, {column: text})}; ``column`` names the image.

    Raises:
        InputError: two rows of an image, and see ``read_table``, as for the other arguments.
    """
    table = {}
    for line, row in read_table(path, [column, *columns], header, optional):
        id = image_id(row[column])
        if id in table:
            raise InputError(f"{path}: line {line}: a second row of image {id}; remove one")
        table[id] = line, row
    return table


def read_table(path, columns, header, optional=None):
    """The rows of a table with a header, each as (line number, {column: text}).

    Args:
        columns: names of the columns that it must have, in any order; case does not matter.
        header: how the message names them.
        optional: names of those that it may have; None: any others, which are left out.

    Raises:
        InputError: unreadable, another header, or a row of another length.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            separator = next((separator for separator in SEPARATORS if separator in first.strip()), ",")
            lines = (line.strip() for line in file) if separator == " " else file
            reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
            rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file ({error})") from None
    names = [name.lower() for name in rows[0][1]] if rows else []
    wanted = [name for name in names if name in columns or name in (optional or ())]
    odd = len(set(wanted)) < len(wanted) or (optional is not None and len(wanted) < len(names))
    if odd or not set(columns) <= set(wanted):
        raise InputError(f"{path}: the header should be {header}, each column once")
    for line, row in rows[1:]:
        if len(row) != len(names):
            raise InputError(f"{path}: line {line}: {len(row)} fields, {len(names)} needed")
    places = {name: names.index(name) for name in wanted}
    return [(line, {name: row[place] for name, place in places.items()}) for line, row in rows[1:]]
