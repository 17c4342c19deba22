"""README.md and docs/: the Python example runs, commands parse, links lead somewhere, the file map is complete."""

import ast
import fnmatch
import importlib
import json
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT

from model import UNet, landmark_loss
from support import command

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]


def in_root(suffix=""):
    """Names of the root's files and folders that belong to the project."""
    names = [path.name for path in ROOT.iterdir() if path.name.endswith(suffix)]
    return [n for n in names if n[0] != "." and not any(fnmatch.fnmatch(n, pattern) for pattern in IGNORED)]


def test_the_readme_is_short():
    assert TEXT.count("\n") <= 200


def test_the_file_map_is_complete():
    named = [name.strip("/") for name in re.findall(r"`([\w.-]+/?)`", section("Files"))]
    assert not {*in_root()} - {*named}


def test_imports_go_the_way_that_the_readme_says():
    order = re.search(r"Imports go one way.*?: (.*?)\.\n", section("Files"), re.S)[1]
    order = re.split(r",\s+", order)
    assert {*order} >= {name.removesuffix(".py") for name in in_root(".py")}
    for i, name in enumerate(order):
        files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).glob("*.py"))
        assert files, name
        for file in files:
            imported = set()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    imported |= {getattr(node, "module", None) or node.names[0].name}
            assert not {module.partition(".")[0] for module in imported} & {*order[i + 1 :]}, file


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(page):
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), path
            assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


# --- commands --------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """The arguments of a command were accepted."""


def commands(page):
    """(program, arguments) of all commands of the project that a page shows, in blocks or within a line."""
    for line in re.findall(r"(?:^|`)[ \t]*((?:python|torchrun) [^`\n]+)", page.read_text(encoding="utf-8"), re.M):
        tokens = shlex.split(line, comments=True)
        programs = [i for i, token in enumerate(tokens) if token.endswith(".py")]
        if programs:
            yield tokens[programs[0]], tokens[programs[0] + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page, monkeypatch):
    parse_args = command.Parser.parse_args

    def parse_and_stop(parser, argv=None):
        parse_args(parser, argv)
        raise Parsed

    monkeypatch.setattr(command.Parser, "parse_args", parse_and_stop)
    for program, arguments in commands(page):
        assert (ROOT / program).is_file(), program
        if "/" not in program:
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(Parsed):
                importlib.import_module(program.removesuffix(".py")).main()


def test_commands_are_found():
    found = list(commands(README))
    assert ("train.py", ["--tag", "baseline"]) in found  # typed as in the 2020 README
    assert ("test.py", ["--tag", "baseline", "--iteration", "229"]) in found
    assert ("test.py", ["--tag", "baseline", "--iteration", "229", "--attack", "1", "--rand", "temp"]) in found


# --- the Python example ----------------------------------------------------------------------------------------------


def test_the_python_example_attacks_one_image(data, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    run = tmp_path / "runs" / "baseline"
    run.mkdir(parents=True)
    data.rename(tmp_path / "dataset")
    (run / "config.json").write_text(json.dumps({"size": [32, 32]}))
    torch.manual_seed(0)
    torch.save(UNet().state_dict(), run / "model_epoch_229.pth")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(example, str(README), "exec"), found)
    change = (found["adversarial"] - found["image"]).abs().max()
    assert change == pytest.approx(8 / 256, rel=1e-4)
    assert found["adversarial"].abs().max() <= 1
    before, after = (landmark_loss(found[maps], found["goal"]).sum() for maps in ("clean", "maps"))
    assert after < before
    aim = found["targets"] - found["points"]
    assert aim.tolist() == [[[0, 80]] * 19]
    assert found["targeted"].nonzero().tolist() == [[0, 7]]  # menton is landmark 8
    assert "tensor" in capsys.readouterr().out
