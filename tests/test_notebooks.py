"""The notebooks: made from the script, executed in order, fit to be read on GitHub."""

import ast
import base64
import difflib
import re

import jupytext
import mirror
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from other_seeds import chapters_to_4
from safetensors.torch import save_file

from gpt2_script import GPT2, GPT2Config, file_hash

SCRIPT = mirror.SCRIPT.read_text(encoding="utf-8")
# the name, how many bytes at most, and what it shows besides text
NOTEBOOKS = [("gpt2_notebook.ipynb", 1e6, {"image/png"}), ("gpt2_script.ipynb", 4e5, set())]


def read(name):
    return nbformat.read(mirror.ROOT / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)


def test_script_notebook_is_the_script_cell_by_cell():
    """But for the cells that make sense in the script alone."""
    made, committed = jupytext.reads(SCRIPT, "py:percent").cells, read("gpt2_script.ipynb").cells
    made = [cell for cell in made if "active-py" not in cell.metadata.get("tags", [])]
    made, committed = ([(x.cell_type, x.source) for x in cells] for cells in (made, committed))
    assert made == committed


def functions(source):
    return [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)]


def bare(function):
    """What a function does, without its docstring and all names that it may choose."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return re.sub(r"\b(id|arg|name)='\w+'", "", ast.dump(ast.Module(body, [])))


def test_what_a_notebook_defines_is_the_scripts():
    """And no function stands in both under two names."""
    whole = "\n\n".join(cell.source for cell in code_cells(read("gpt2_notebook.ipynb")))
    assert mirror.mirrored(whole, SCRIPT) == (whole, [])
    known = {bare(x): x.name for x in functions(SCRIPT)}
    assert all(known.get(bare(x), x.name) == x.name for x in functions(whole))
    assert sum(x.name in known.values() for x in functions(whole)) > 40


def test_mirror_replaces_a_definition_and_nothing_else():
    script = "A, B = 1, 2  # two\n\n\n@cache\ndef f(x):\n    return x\n"
    cell = "A, B = ...\ny = 5  # é A\n\n@old\ndef f(): ...\n\n\ndef g(): ...\nf(1)"
    wanted = "A, B = 1, 2  # two\ny = 5  # é A\n\n@cache\ndef f(x):\n    return x\n\n\n"
    assert mirror.mirrored(cell, script) == (wanted + "def g(): ...\nf(1)", ["A, B", "f"])


@pytest.mark.parametrize("name, size, pictures", NOTEBOOKS)
def test_outputs_come_from_one_run_in_order_and_github_can_show_them(name, size, pictures):
    """No cell is long or wide, shows anything but text and pictures, or speaks of a machine."""
    notebook, place = read(name), r"/(home|root|tmp|work|Users|usr)/|Warning|\x1b"
    assert "widgets" not in notebook.metadata and (mirror.ROOT / name).stat().st_size < size
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(notebook):
        kinds = {kind for o in cell.outputs for kind in o.get("data", [o.get("name")])}
        assert kinds <= {"stdout", "text/plain"} | pictures
        source, shown = cell.source.splitlines(), text_of(cell).splitlines()
        assert cell.outputs or not re.search(r"^(show_|print\(|play\()|;$", source[-1]), cell.source
        assert len(source) <= 45 and max(map(len, source)) <= 100, cell.source
        assert len(shown) <= 40 and max(map(len, shown), default=0) <= 90, cell.source
        assert not re.search(place, text_of(cell)), cell.source


def test_the_reading_is_no_longer_than_it_says_draws_and_can_take_another_seed():
    """A figure's PNG is larger than an empty one's; the README shows one, and the same rates."""
    reading = read("gpt2_notebook.ipynb")
    words = sum(len(x.source.split()) for x in reading.cells if x.cell_type == "markdown")
    lines = sum(len(x.source.splitlines()) for x in code_cells(reading))
    assert words <= 7_500 and lines <= 1_350
    shown = [output.get("data", {}) for cell in code_cells(reading) for output in cell.outputs]
    images = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert len(images) >= 10 and min(map(len, images)) > 6_000
    readme = (mirror.ROOT / "README.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"!\[[^]]*\]\(([^)]*)\)", readme)
    assert (mirror.ROOT / path).read_bytes() in images
    prose = "\n".join(cell.source for cell in reading.cells).splitlines()
    rates = {x.split("|")[1]: x.split("|")[-6:] for x in prose if re.search(r"/\d0\|", x)}
    rows = [x.split("|")[1:] for x in readme.splitlines() if re.search(r"/\d0\|", x)]
    assert len(rows) == 10 and all(row == rates[name] for name, *row in rows)
    code = chapters_to_4(5)
    assert "manual_seed(5)\nuntrained" in code and "train(model, world, 5, " in code
    assert compile(code, "chapters 1 to 4", "exec")


def said(cells):
    return re.sub(r"[-\d.]+", "0", "".join(map(text_of, cells))).splitlines()


def switched(switch, path):
    """Cells that refuse and take, for the download, a file of that format and other sizes."""
    weights = GPT2(config := GPT2Config(n_embd=64, n_layer=2, n_head=1)).state_dict()
    save_file(weights | {"h.0.attn.bias": torch.ones(1024, 1024).tril()[None, None]}, path)
    switch = switch.replace('"nano"', '"gpt2"').replace('PRESETS["gpt2"]', repr(config))
    switch = re.sub(r"hf_hub_download\(.*?\)", repr(str(path)), switch)
    takes = re.sub(r'SHA256 = "\w+"', f'SHA256 = "{file_hash(path)}"', switch)
    takes += "\ndel file, weights, hf_hub_download"  # what follows must do without
    refuses = nbformat.v4.new_code_cell(switch, metadata={"tags": ["raises-exception"]})
    return refuses, nbformat.v4.new_code_cell(takes)


@pytest.mark.parametrize("name", [name for name, *_ in NOTEBOOKS])
def test_it_runs_from_top_to_bottom_in_an_empty_folder(name, tmp_path):
    """And says what is committed, but for numbers and some words; on its way it takes a release."""
    notebook, folder = read(name), tmp_path / "empty"
    cells = code_cells(notebook)
    committed = said(cells)
    switches = [i for i, x in enumerate(notebook.cells) if 'MODEL = "nano"' in x.source]
    assert len(switches) == (name == mirror.NOTEBOOK.name)
    for i in switches:
        notebook.cells[i:i] = switched(notebook.cells[i].source, tmp_path / "released.safetensors")
    folder.mkdir()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    alike = difflib.SequenceMatcher(None, committed, said(cells), autojunk=False).ratio()
    assert alike > 0.9 and not [*folder.iterdir()]
    for i in switches:
        refuses, takes = notebook.cells[i : i + 2]
        assert refuses.outputs[-1].evalue == "this is not the released GPT-2"
        assert text_of(takes).startswith("gpt2 on cpu says")
