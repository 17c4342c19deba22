"""README.md and docs/: the Python example runs, commands parse, links lead somewhere, the file map is complete."""

import ast
import graphlib
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from experiments.scales import EVALUATION
from model import UNet
from support import command

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]


def sources():
    """The project's modules outside tests."""
    folders = (path.parent for path in ROOT.glob("*/__init__.py"))
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.glob("*.py"))]


def test_the_readme_is_short():
    shown = re.sub(r"<!--.*?-->", "", TEXT, flags=re.S)
    assert shown.count("\n") <= 150 and len(shown.split()) <= 1400


def test_the_file_map_is_complete():
    named = {name.strip("/") for name in re.findall(r"`([\w.-]+/?)`", section("Files"))}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {path.partition("/")[0] for path in tracked if path[0] != "."} <= named


def test_imports_go_one_way():
    """No circles among modules, and the paper's modules in the order that the README gives."""
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in sources()}
    graph = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                graph[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] &= modules.keys()
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    chain = ("container", "model", "attack", "eval", "test", "reproduce")
    assert sorted(chain, key=order.index) == list(chain)


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


def test_the_images_of_the_docs_are_the_evaluation_images():
    first, others = re.findall(r'^    IDS(?:50)?="(?:\$IDS )?([\d ]+)"$', (ROOT / "docs/attacks.md").read_text(), re.M)
    assert f"{first} {others}" == EVALUATION and len(first.split()) == 20


def test_commands_are_found():
    found = list(commands(README))
    assert ("train.py", ["--tag", "baseline"]) in found  # typed as in the 2020 README
    assert ("test.py", ["--tag", "baseline", "--iteration", "229"]) in found
    assert ("test.py", ["--tag", "baseline", "--iteration", "229", "--attack", "1", "--rand", "temp"]) in found


# --- the Python example ----------------------------------------------------------------------------------------------


def test_the_python_example_attacks_one_image(data, tmp_path, monkeypatch, capsys):
    """On a copy of the data as JPEG."""
    example, own = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    run = tmp_path / "runs" / "baseline"
    run.mkdir(parents=True)
    for file in data.rglob("*.bmp"):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    data.rename(tmp_path / "dataset")
    (run / "config.json").write_text(json.dumps({"size": [32, 32]}))
    torch.manual_seed(1)  # by which menton is not found at the lower edge
    torch.save(UNet().state_dict(), run / "model_epoch_229.pth")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(example, str(README), "exec"), found)
    change = (found["adversarial"] - found["image"]).abs().max()
    assert 0 < change <= 8 / 256 + 1e-6 and found["adversarial"].abs().max() <= 1
    assert found["targeted"].nonzero().tolist() == [[0, 7]]  # menton is landmark 8
    way = found["targets"] - found["points"]
    assert torch.allclose(way, torch.tensor([0, 80 * 32 / 2400]))  # 8 mm of an original of 2400 px
    assert capsys.readouterr().out.startswith("start, target, end: tensor([[")
    found["my_network"] = torch.nn.Conv2d(3, 5, 1)
    exec(own, found)
    detector = found["make"]()
    assert detector.predict(torch.zeros(1, 3, *detector.size)).shape == (1, detector.names, 2)
