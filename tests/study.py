"""What the reading notebook defines, as a module: `study.steer`, `study.TESTS`.

Only the notebook has the attacks of its chapter 6 and the tests of its chapter 7. Its
imports, constants, classes and functions are taken; no other statement of it is run.
What it shares with the script is the script's, which is the same code (as
test_notebooks.py checks), so that models of both can be attacked.

Its functions use its variables, such as `facts`, `lie`, `unseen`, `tokenizer`, `cities`
and `trigger`. None is set here: a program says `study.lie = lie` before it calls.
"""

import ast
import sys

import nbformat
from mirror import NOTEBOOK, ROOT, names_of

sys.path.insert(0, str(ROOT))
import gpt2_script  # noqa: E402

CELLS = [x for x in nbformat.read(NOTEBOOK, 4).cells if x.cell_type == "code"]

for node in ast.parse("\n\n".join(cell.source for cell in CELLS)).body:
    names = names_of(node)
    if names and hasattr(gpt2_script, names[0]):
        globals().update({name: getattr(gpt2_script, name) for name in names})
    elif names or isinstance(node, (ast.Import, ast.ImportFrom)):
        exec(compile(ast.Module([node], []), NOTEBOOK.name, "exec"))
