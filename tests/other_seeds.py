"""Chapter 4 of the notebook on models of other seeds: which block does what?

python tests/other_seeds.py [SEEDS]: runs the notebook's own cells up to that chapter's end with
seeds from 1 on (10), half a minute each. Prints medians, and the least and the most.
"""

import contextlib
import io
import statistics
import sys

import matplotlib as mpl
import nbformat
import torch
from mirror import NOTEBOOK

SHOWN = ("attention on the subject", "the subject brings back", "the last token brings back",
    "own city, end of name", "own city, last token")  # fmt: skip


def chapters_to_4(seed):
    """The code of the notebook's first four chapters for another seed; the nonsense model, which
    chapter 4 does not use, is trained for ten steps only."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    (end,) = (i for i, cell in enumerate(cells) if cell.source.startswith("## 5."))
    code = "\n\n".join(cell.source for cell in cells[:end] if cell.cell_type == "code")
    for old, new in (
        ("torch.manual_seed(0)\nuntrained =", f"torch.manual_seed({seed})\nuntrained ="),
        ("train(model, world)", f"train(model, world, {seed}, 130 if world is facts else 10)"),
    ):
        if code.count(old) != 1:
            raise ValueError(f"{code.count(old)} times in the notebook: {old}")
        code = code.replace(old, new)
    return code


def measured(seed):
    """What is SHOWN, each in every block of one model, and the share of landmarks that are right
    when all MLPs are silenced."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(chapters_to_4(seed), "chapters 1 to 4", "exec"), names)
    mpl.pyplot.close("all")
    subject, last = torch.stack(names["traced"]).mean(0).T.tolist()
    rows = [names["weight"].mean(1).tolist(), subject, last]
    for place in ("name_end", "last"):
        found = (names["specific"]("trained", i, names[place]) for i in range(3))
        own = (push.argmax(1)[top] == names["mine"] for top, push in found)
        rows.append([x.float().mean().item() for x in own])
    with names["patch"](names["trained"], {"h.*.mlp.out": lambda value: value * 0}):
        return rows, names["accuracy"](names["trained"], names["landmarks"])


if __name__ == "__main__":
    mpl.use("agg")
    seeds = range(1, 1 + int(sys.argv[1] if len(sys.argv) > 1 else 10))
    found, right = zip(*map(measured, seeds), strict=True)

    def spread(values):
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    for name, *rows in zip(SHOWN, *found, strict=True):
        print(f"{name:28}", *(f"{spread(values):23}" for values in zip(*rows, strict=True)))
    print(f"{'right without any MLP':28}", spread(right))
