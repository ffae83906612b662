"""Write the script's definitions into the reading notebook: `python tests/mirror.py`.

Top-level classes, functions and UPPER-CASE constants that the notebook defines under a name that
the script has become the script's text, comments included; all else, outputs too, stays as it is.
To take over a new definition, write `def its_name(): ...`.
"""

import ast
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
SCRIPT, NOTEBOOK = ROOT / "gpt2_script.py", ROOT / "gpt2_notebook.ipynb"


def names_of(node):
    """What a top-level statement defines: the names, with commas between them, or an empty text."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return node.name
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return ""
    names = [part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)]
    return ", ".join(names) if all(map(str.isupper, names)) else ""


def definitions(source):
    """{names: (syntax tree, first line, line after the last)} of what a source defines."""
    found = {}
    for node in filter(names_of, ast.parse(source).body):
        first = min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))
        found[names_of(node)] = node, first - 1, node.end_lineno
    return found


def mirrored(source, script):
    """A cell's source with the script's definitions, and the names of those that differed."""
    ours, lines, names = definitions(script), source.split("\n"), []
    for name, (_, first, end) in reversed(definitions(source).items()):
        if name in ours:
            _, start, stop = ours[name]
            text = "\n".join(script.split("\n")[start:stop]).removesuffix("  # fmt: skip")
            if text != "\n".join(lines[first:end]).removesuffix("  # fmt: skip"):
                lines[first:end], names = text.split("\n"), [name, *names]
    return "\n".join(lines), names


if __name__ == "__main__":
    script, notebook, differ = SCRIPT.read_text(encoding="utf-8"), nbformat.read(NOTEBOOK, 4), []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, names = mirrored(cell.source, script)
            differ += names
    print("\n".join(differ) or "nothing differs")
    nbformat.write(notebook, NOTEBOOK)
