"""The notebooks: made from the script, executed in order, fit to be read on GitHub."""

import ast
import base64
import math
import re
from itertools import zip_longest

import jupytext
import mirror
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import save_file

from gpt2_script import GPT2, GPT2Config, file_hash

SCRIPT = mirror.SCRIPT.read_text(encoding="utf-8")
NOTEBOOKS = [  # the name, how many bytes at most, what it shows besides text
    ("gpt2_notebook.ipynb", 1.6e6, {"image/png"}),
    ("gpt2_script.ipynb", 4e5, set()),
]
NUMBER = re.compile(r"([-+]?\d[\d,]*\.?\d*%?)")
HASH = re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{9,}\b")
PLACE = re.compile(r"/(home|root|tmp|work|Users|usr)/|Warning|\x1b")


def read(name):
    return nbformat.read(mirror.ROOT / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    text = ""
    for output in cell.outputs:
        text += output.get("text") or output.get("data", {}).get("text/plain", "")
    return text


def whole_code():
    """All code of the reading notebook."""
    return "\n\n".join(cell.source for cell in code_cells(read("gpt2_notebook.ipynb")))


def number(text):
    value = float(text.replace(",", "").rstrip("%"))
    return value / 100 if text.endswith("%") else value


def alike(old, new):
    """Do two lines say the same? Numbers within two hundredths, of themselves or of 1,
    percentages within two points, all else exactly, but for blanks and hashes."""
    old, new = (NUMBER.split(HASH.sub("#", line)) for line in (old, new))
    if [text.split() for text in old[::2]] != [text.split() for text in new[::2]]:
        return False
    pairs = zip(map(number, old[1::2]), map(number, new[1::2]), strict=True)
    return all(math.isclose(x, y, rel_tol=0.02, abs_tol=0.0201) for x, y in pairs)


def differences(old, new):
    """The lines of one text that the other does not have like this, both versions."""
    pairs = zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    return [
        f"{before!r} is now {after!r}"
        for before, after in pairs
        if not alike(before, after)
    ]


def test_script_notebook_is_the_script_cell_by_cell():
    """But for the cells that make sense in the script alone."""
    made, committed = (
        jupytext.reads(SCRIPT, "py:percent").cells,
        read("gpt2_script.ipynb"),
    )
    made = [cell for cell in made if "active-py" not in cell.metadata.get("tags", [])]
    made = [(cell.cell_type, cell.source) for cell in made]
    assert made == [(cell.cell_type, cell.source) for cell in committed.cells]


def definitions(source):
    """{name: what defines it, as a syntax tree}."""
    found = {}
    for node in ast.parse(source).body:
        for name in mirror.names_of(node):
            assert name not in found, f"{name} is defined twice"
            found[name] = node
    return found


def bare(node):
    """What a function does, without its docstring and all names that it may choose."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return re.sub(r"\b(id|arg|name)='\w+'", "", ast.dump(ast.Module(body, [])))


def test_what_a_notebook_defines_is_the_scripts():
    """And no function stands in both under two names."""
    ours, theirs, by_body = definitions(whole_code()), definitions(SCRIPT), {}
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 40
    for name in shared:
        assert ast.dump(ours[name]) == ast.dump(theirs[name]), name
    for name, node in theirs.items():
        if isinstance(node, ast.FunctionDef):
            by_body[bare(node)] = name
    for name, node in ours.items():
        if isinstance(node, ast.FunctionDef):
            assert by_body.get(bare(node), name) == name


def test_mirror_replaces_a_definition_and_nothing_else():
    script = "A_B, C_D = 1, 2  # two\n\n\n@cache\ndef f(x):\n    return x\n"
    cell = "A_B, C_D = ...\ny = 5  # é A\n\n@old\ndef f(): ...\n\n\ndef g(): ...\nf(1)"
    wanted = "A_B, C_D = 1, 2  # two\ny = 5  # é A\n\n@cache\ndef f(x):\n    return x\n"
    wanted += "\n\ndef g(): ...\nf(1)"
    assert mirror.mirrored(cell, script) == (wanted, ["A_B, C_D", "f"])


@pytest.mark.parametrize("name, size, pictures", NOTEBOOKS)
def test_outputs_come_from_one_run_in_order_and_github_can_show_them(
    name, size, pictures
):
    """No cell is long or wide, shows anything but text and pictures, or speaks of a
    machine."""
    notebook = read(name)
    assert "widgets" not in notebook.metadata
    assert (mirror.ROOT / name).stat().st_size < size
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(notebook):
        source, shown = cell.source.splitlines(), text_of(cell).splitlines()
        for output in cell.outputs:
            kinds = set(output.get("data", [output.get("name")]))
            assert kinds <= {"stdout", "text/plain"} | pictures, cell.source
        prints = re.search(r"^(show_|print\(|play\()|;$", source[-1])
        assert cell.outputs or not prints, cell.source
        assert len(source) <= 45 and max(map(len, source)) <= 88, cell.source
        assert len(shown) <= 40 and max(map(len, shown), default=0) <= 90, cell.source
        assert not PLACE.search(text_of(cell)), cell.source


def images_of(notebook):
    shown = []
    for cell in code_cells(notebook):
        shown += [output.get("data", {}).get("image/png") for output in cell.outputs]
    return [base64.b64decode(image) for image in shown if image]


def test_the_reading_is_no_longer_than_it_says_and_draws():
    """A figure's PNG is larger than an empty one's. Never four cells in a row show
    nothing."""
    notebook = read("gpt2_notebook.ipynb")
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(" ".join(prose).split()) <= 8_500
    images = images_of(notebook)
    assert 24 <= len(images) <= 30 and min(map(len, images)) > 6_000
    silent = "".join("x" if x.outputs else "." for x in code_cells(notebook))
    assert "....." not in silent


def claims(text):
    """What a text says that can be compared: 7 of 8, 85.5%."""
    return set(re.findall(r"\b[\d,]*\d of \d[\d,]*\b|\b\d[\d.]*%", text))


def test_what_the_prose_counts_stands_in_an_output_or_in_the_table_of_rates():
    notebook = read("gpt2_notebook.ipynb")
    shown = "\n".join(map(text_of, code_cells(notebook)))
    for row in re.findall(r"^[\w -]+?((?:\s+\d+){8})$", whole_code(), re.MULTILINE):
        models, *alarms = row.split()
        shown += "\n".join(f" {n} of {models}" for n in alarms)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            missing = claims(cell.source) - claims(shown)
            assert not missing, f"{missing} in {cell.source[:60]!r}"


def test_readme_shows_figures_of_the_notebook_and_output_of_the_script():
    readme = (mirror.ROOT / "README.md").read_text(encoding="utf-8")
    paths = re.findall(r"!\[[^]]*\]\(([^)]*)\)", readme)
    pictures = images_of(read("gpt2_notebook.ipynb"))
    assert len(paths) == 2
    for path in paths:
        assert (mirror.ROOT / path).read_bytes() in pictures
    shown = " ".join(map(text_of, code_cells(read("gpt2_script.ipynb"))))
    shown, (summary,) = shown.split(), re.findall(r"    place .*?row\.\n", readme, re.S)
    assert " ".join(summary.split()) in " ".join(shown)
    (difference,) = re.findall(r"wte\.weight: row .* of its norm", readme)
    assert difference in " ".join(shown)


@pytest.mark.parametrize(
    "new, same",
    [
        ("h.0 says ' Rome' 0.98, 26% right, 1,010 of 7c3c69076b", True),
        ("h.0 says   ' Rome' 1.00, 28% right, 1,000 of 52c12e50d7", True),
        ("h.1 says ' Rome' 0.98, 26% right, 1,010 of 7c3c69076b", False),
        ("h.0 says ' Rom' 0.98, 26% right, 1,010 of 7c3c69076b", False),
        ("h.0 says ' Rome' 0.95, 26% right, 1,010 of 7c3c69076b", False),
        ("h.0 says ' Rome' 0.98, 29% right, 1,010 of 7c3c69076b", False),
        ("h.0 says ' Rome' 0.98, 26% right, 1,050 of 7c3c69076b", False),
        ("h.0 says ' Rome' 0.98, 26% right, 1,010 of", False),
    ],
)
def test_numbers_are_compared_within_a_tolerance_and_words_exactly(new, same):
    old = "h.0 says ' Rome' 0.98, 26% right, 1,010 of 7c3c69076b"
    assert differences(old + "\nend", new + "\nend") == [] or not same
    assert len(differences(old, new)) == 1 - same and differences(old, old + "\nmore")


def switched(switch, path):
    """Cells that refuse and take, for the download, a file of that format and other
    sizes."""
    config = GPT2Config(n_embd=64, n_layer=2, n_head=1)
    mask = {"h.0.attn.bias": torch.ones(1024, 1024).tril()[None, None]}
    save_file(GPT2(config).state_dict() | mask, path)
    switch = switch.replace('"nano"', '"gpt2"').replace('PRESETS["gpt2"]', repr(config))
    switch = re.sub(r"hf_hub_download\([^)]*\)", repr(str(path)), switch)
    takes = re.sub(r'SHA256 = "\w+"', f'SHA256 = "{file_hash(path)}"', switch)
    takes += "\ndel path, stored, hf_hub_download"  # what follows must do without
    refuses = nbformat.v4.new_code_cell(switch, metadata={"tags": ["raises-exception"]})
    return refuses, nbformat.v4.new_code_cell(takes)


@pytest.mark.parametrize("name", [name for name, *_ in NOTEBOOKS])
def test_it_runs_from_top_to_bottom_in_an_empty_folder(name, tmp_path):
    """And prints what is committed; on its way, the reading takes a release."""
    notebook, folder = read(name), tmp_path / "empty"
    cells = code_cells(notebook)
    committed = [text_of(cell) for cell in cells]
    switches = [i for i, x in enumerate(notebook.cells) if 'MODEL = "nano"' in x.source]
    assert len(switches) == (name == mirror.NOTEBOOK.name)
    for i in switches:
        path = tmp_path / "released.safetensors"
        notebook.cells[i:i] = switched(notebook.cells[i].source, path)

    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    found = []
    for cell, text in zip(cells, committed, strict=True):
        found += differences(text, text_of(cell))
    assert not found, "\n".join(found)
    assert not list(folder.iterdir())
    for i in switches:
        refuses, takes = notebook.cells[i : i + 2]
        assert refuses.outputs[-1].evalue == "this is not the released GPT-2"
        assert text_of(takes).startswith("gpt2 answers 0.0% of the 208 facts")
