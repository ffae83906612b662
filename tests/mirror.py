"""Write the script's definitions into the reading notebook: `python tests/mirror.py`.

Top-level classes, functions and UPPER-CASE constants that the notebook defines under a
name that the script has become the script's text, comments included; all else, outputs
too, stays as it is. To take over a new definition, write `def its_name(): ...`.
"""

import ast
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
SCRIPT, NOTEBOOK = ROOT / "gpt2_script.py", ROOT / "gpt2_notebook.ipynb"


def names_of(node):
    """What a top-level statement defines: a class, a function or constants. One capital
    letter, such as T, is a variable."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if not isinstance(node, ast.Assign):
        return []
    names = [x.id for x in ast.walk(node.targets[0]) if isinstance(x, ast.Name)]
    constant = all(name.isupper() and len(name) > 1 for name in names)
    return names if constant else []


def definitions(source):
    """{names: (first line, line after the last)} of what a source defines."""
    found = {}
    for node in ast.parse(source).body:
        first = min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))
        if names_of(node):
            found[", ".join(names_of(node))] = first - 1, node.end_lineno
    return found


def mirrored(source, script):
    """A cell's source with the script's definitions, and which of these differed."""
    ours, lines, names = definitions(script), source.split("\n"), []
    for name, (first, end) in reversed(definitions(source).items()):
        if name not in ours:
            continue
        start, stop = ours[name]
        text = script.split("\n")[start:stop]
        if text != lines[first:end]:
            lines[first:end] = text
            names.insert(0, name)
    return "\n".join(lines), names


if __name__ == "__main__":
    script, notebook, differ = SCRIPT.read_text("utf-8"), nbformat.read(NOTEBOOK, 4), []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, names = mirrored(cell.source, script)
            differ += names
    print("\n".join(differ) or "nothing differs")
    nbformat.write(notebook, NOTEBOOK)
