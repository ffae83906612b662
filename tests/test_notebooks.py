"""The notebooks: made from the script, executed in order, fit to be read on GitHub."""

import ast
import base64
import difflib
import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.torch import save_file

from gpt2_script import GPT2, GPT2Config

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "gpt2_script.py").read_text(encoding="utf-8")
NAMES = sorted(path.name for path in ROOT.glob("*.ipynb"))


@pytest.fixture(params=NAMES)
def notebook(request):
    return nbformat.read(ROOT / request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    """What an output shows as text."""
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def test_script_notebook_is_the_script_cell_by_cell():
    """But for the cells that make sense in the script alone."""
    made = [
        (cell.cell_type, cell.source)
        for cell in jupytext.reads(SCRIPT, "py:percent").cells
        if "active-py" not in cell.metadata.get("tags", [])
    ]
    committed = nbformat.read(ROOT / "gpt2_script.ipynb", as_version=4)
    assert made == [(cell.cell_type, cell.source) for cell in committed.cells]


def test_what_a_notebook_defines_is_the_scripts(notebook):
    def definitions(source):
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        tree = ast.parse("\n".join(lines) if lines != source.splitlines() else source)
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = {node.name: ast.dump(node) for node in tree.body if isinstance(node, kinds)}
        for node in tree.body:  # constants
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
                found[node.targets[0].id] = ast.dump(node.value)
        return found

    ours, shared = definitions(SCRIPT), 0
    for cell in code_cells(notebook):
        source = re.sub(r"^( *)%.*$", r"\1pass", cell.source, flags=re.MULTILINE)
        for name, definition in definitions(source).items():
            assert definition == ours.get(name, definition), name
            shared += name in ours
    assert shared > 10


def test_committed_outputs_come_from_one_run_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(notebook):
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        if re.search(r"^(show_|plot_|print\()", cell.source.split("\n")[-1]):
            assert cell.outputs, cell.source


def test_no_output_is_long_or_wide_or_speaks_of_a_machine(notebook):
    for cell in code_cells(notebook):
        text = "".join(map(text_of, cell.outputs))
        assert len(text.splitlines()) <= 40, cell.source
        assert max(map(len, text.splitlines()), default=0) <= 100, cell.source
        assert not re.search(r"/(home|root|tmp|work|Users|usr)/|Warning|\x1b", text)


def test_github_can_show_it(notebook, request):
    assert "widgets" not in notebook.metadata
    kinds = {
        kind for cell in code_cells(notebook) for o in cell.outputs for kind in o.get("data", {})
    }
    assert kinds <= {"text/plain", "image/png"}
    name = request.node.callspec.params["notebook"]
    assert (ROOT / name).stat().st_size < 2_000_000


def test_every_figure_says_something(notebook):
    """A figure comes with an image that is not blank: its PNG is larger than an empty one."""
    images = [
        output.data["image/png"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(images) >= 10 and min(map(len, images)) > 8_000


def test_the_readme_shows_a_figure_of_the_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"!\[[^]]*\]\(([^)]*)\)", readme)
    images = [
        base64.b64decode(output.data["image/png"])
        for cell in code_cells(nbformat.read(ROOT / "gpt2_notebook.ipynb", as_version=4))
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert (ROOT / path).read_bytes() in images


def test_no_cell_of_the_reading_is_long():
    """Of its own lines, that is those that the script does not have, and of output."""
    script = set(SCRIPT.splitlines())
    for cell in code_cells(nbformat.read(ROOT / "gpt2_notebook.ipynb", as_version=4)):
        own = [line for line in cell.source.splitlines() if line not in script]
        assert len(own) <= 25 and len(cell.source.splitlines()) <= 55, cell.source
        assert sum(len(text_of(output).splitlines()) for output in cell.outputs) <= 25, cell.source


def test_the_switch_takes_a_file_of_random_weights(tmp_path, drawn):
    """A model that knows nothing: the notebook says so, and goes on with nano."""
    path = tmp_path / "random.safetensors"
    model = drawn(GPT2(GPT2Config(n_embd=64, n_layer=2, n_head=1)))
    save_file(model.state_dict(), path)
    reading = nbformat.read(ROOT / "gpt2_notebook.ipynb", as_version=4)
    end = next(i for i, cell in enumerate(reading.cells) if "\n## 14." in f"\n{cell.source}")
    reading.cells = reading.cells[:end]
    for cell in reading.cells:
        cell.source = cell.source.replace('MODEL = "nano"', f"MODEL = {str(path)!r}")
    NotebookClient(reading, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, switch, definitions, last = code_cells(reading)
    assert "2 blocks" in "".join(map(text_of, switch.outputs))
    said = "".join(map(text_of, last.outputs))
    assert "too few: we go on with nano" in said and "160 of 160 facts are known" in said


def test_it_runs_from_top_to_bottom_in_an_empty_folder(notebook, tmp_path):
    """And says what is committed, but for numbers and for a word here and there."""

    def said():
        text = "".join(text_of(o) for cell in code_cells(notebook) for o in cell.outputs)
        return re.sub(r"[-\d.]+", "0", text).splitlines()

    committed = said()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    alike = difflib.SequenceMatcher(None, committed, said(), autojunk=False).ratio()
    assert alike > 0.9 and os.listdir(tmp_path) == []
