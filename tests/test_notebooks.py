"""The notebooks: made from the script, executed in order, fit to be read on GitHub."""

import ast
import base64
import difflib
import hashlib
import os
import re

import jupytext
import mirror
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import save_file

from gpt2_script import GPT2, GPT2Config

SCRIPT = mirror.SCRIPT.read_text(encoding="utf-8")
NAMES = sorted(path.name for path in mirror.ROOT.glob("*.ipynb"))


def read(name):
    return nbformat.read(mirror.ROOT / name, as_version=4)


@pytest.fixture
def reading():
    return read(mirror.NOTEBOOK.name)


every_notebook = pytest.mark.parametrize("name", NAMES)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    """What a cell's outputs show as text."""
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)


def images(notebook):
    outputs = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


def test_script_notebook_is_the_script_cell_by_cell():
    """But for the cells that make sense in the script alone."""
    made, committed = jupytext.reads(SCRIPT, "py:percent").cells, read("gpt2_script.ipynb").cells
    made = [cell for cell in made if "active-py" not in cell.metadata.get("tags", [])]
    made, committed = ([(x.cell_type, x.source) for x in cells] for cells in (made, committed))
    assert made == committed


def test_what_a_notebook_defines_is_the_scripts(reading):
    whole = "\n\n".join(cell.source for cell in code_cells(reading))
    assert mirror.mirrored(whole, SCRIPT) == (whole, [])
    shared = mirror.definitions(whole).keys() & mirror.definitions(SCRIPT).keys()
    assert len(shared) > 40


@pytest.mark.parametrize("before", ("", "%pip list\n", "if True:\n    !ls\n", "x = 1  # é\n"))
def test_mirror_replaces_a_definition_and_nothing_else(before):
    script = "A, B = 1, 2  # two\n\n\n@cache\ndef f(x):\n    return x\n"
    cell = f"{before}A, B = ...\ny = 5  # A\n\n@old\ndef f(): ...\n\n\ndef g(): ...\nf(1)"
    wanted = f"{before}A, B = 1, 2  # two\ny = 5  # A\n\n@cache\ndef f(x):\n    return x\n\n\n"
    assert mirror.mirrored(cell, script) == (wanted + "def g(): ...\nf(1)", ["A, B", "f"])
    assert mirror.mirrored(wanted, script) == (wanted, [])


def bare(function):
    """What a function does, without its docstring and all names that it may choose."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    text = ast.dump(ast.Module(body, []))
    return re.sub(r"\b(id|arg|name)='\w+'", "", text)


def test_no_function_stands_in_both_under_two_names(reading):
    ours = {name: x[0] for name, x in mirror.definitions(SCRIPT).items()}
    known = {bare(x): name for name, x in ours.items() if isinstance(x, ast.FunctionDef)}
    for cell in code_cells(reading):
        for name, (node, *_) in mirror.definitions(cell.source).items():
            if isinstance(node, ast.FunctionDef) and name not in ours:
                assert bare(node) not in known, (name, known[bare(node)])


@every_notebook
def test_committed_outputs_come_from_one_run_in_order(name):
    notebook = read(name)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(notebook):
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        if re.search(r"^(show_|print\(|play\()|;$", cell.source.split("\n")[-1]):
            assert cell.outputs, cell.source


@pytest.mark.parametrize("name, size", (("gpt2_notebook.ipynb", 1e6), ("gpt2_script.ipynb", 4e5)))
def test_github_can_show_it_and_no_cell_is_long_or_wide_or_speaks_of_a_machine(name, size):
    notebook = read(name)
    assert "widgets" not in notebook.metadata
    assert (mirror.ROOT / name).stat().st_size < size
    for cell in code_cells(notebook):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert kinds <= {"text/plain", "image/png"}
        shown = text_of(cell).splitlines()
        assert len(cell.source.splitlines()) <= 45, cell.source
        assert max(map(len, cell.source.splitlines())) <= 100, cell.source
        assert len(shown) <= 40 and max(map(len, shown), default=0) <= 90, cell.source
        assert not re.search(r"/(home|root|tmp|work|Users|usr)/|Warning|\x1b", text_of(cell))


def test_the_reading_is_no_longer_than_it_says(reading):
    words = sum(len(x.source.split()) for x in reading.cells if x.cell_type == "markdown")
    lines = sum(bool(line.strip()) for x in code_cells(reading) for line in x.source.splitlines())
    assert words <= 7_500 and lines <= 1_400


def test_the_reading_draws_and_the_script_does_not(reading):
    """A figure's PNG is larger than that of an empty one; the README shows one of them."""
    assert len(images(reading)) >= 10 and min(map(len, images(reading))) > 6_000
    assert not images(read("gpt2_script.ipynb"))
    readme = (mirror.ROOT / "README.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"!\[[^]]*\]\(([^)]*)\)", readme)
    assert (mirror.ROOT / path).read_bytes() in images(reading)


def test_the_switch_takes_a_released_file(reading, tmp_path):
    """Here one of that format and other sizes, in place of the download; then another file."""
    path, sizes = tmp_path / "released.safetensors", "GPT2Config(n_embd=64, n_layer=2, n_head=1)"
    weights = GPT2(GPT2Config(n_embd=64, n_layer=2, n_head=1)).state_dict()
    save_file(weights | {"h.0.attn.bias": torch.ones(1024, 1024).tril()[None, None]}, path)
    sources = [cell.source for cell in code_cells(reading)]
    end = next(i for i, source in enumerate(sources) if 'MODEL = "nano"' in source)
    switch, before = sources[end], "\n\n".join(sources[:end])
    (download,) = re.findall(r"hf_hub_download\(.*?\)", switch)
    (released,) = re.findall(r'SHA256 = "(\w+)"', switch)

    def changed(text, changes):
        for old, new in changes.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        return nbformat.v4.new_code_cell(text)

    changes = {
        '"nano"': '"gpt2"',
        download: repr(str(path)),
        'GPT2(PRESETS["gpt2"])': f"GPT2({sizes})",
    }
    own = {released: hashlib.sha256(path.read_bytes()).hexdigest()}
    short = changed(before, {"in train(model, world)": "in train(model, world, max_steps=1)"})
    reading.cells = [short, changed(switch, changes | own), changed(switch, changes)]
    client = NotebookClient(reading, timeout=300, allow_errors=True)
    client.resources = {"metadata": {"path": str(tmp_path)}}
    client.execute()
    _, taken, refused = reading.cells
    assert text_of(taken).startswith("gpt2 on cpu says")
    assert refused.outputs[-1].evalue == "this is not the released GPT-2"


@every_notebook
def test_it_runs_from_top_to_bottom_in_an_empty_folder(name, tmp_path):
    """And says what is committed, but for numbers and for a word here and there."""
    notebook = read(name)

    def said():
        text = "".join(map(text_of, code_cells(notebook)))
        return re.sub(r"[-\d.]+", "0", text).splitlines()

    committed = said()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    alike = difflib.SequenceMatcher(None, committed, said(), autojunk=False).ratio()
    assert alike > 0.9 and os.listdir(tmp_path) == []
