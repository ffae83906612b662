"""Chapter 4 of the notebook on models of other seeds: which block does what?

python tests/other_seeds.py [SEEDS]: runs the notebook's own cells up to that chapter's
end with seeds from 1 on (10), half a minute each. Prints medians, and the least and the
most.
"""

import contextlib
import io
import statistics
import sys

import matplotlib as mpl
import nbformat
import torch
from mirror import NOTEBOOK

SHOWN = (
    "attention on the subject",
    "the subject brings back",
    "the last token brings back",
    "own city, end of name",
    "own city, last token",
)


def chapters_to_4(seed):
    """The code of the notebook's first four chapters for another seed. The nonsense
    model, which chapter 4 does not use, is trained for ten steps only."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    (end,) = [i for i, cell in enumerate(cells) if cell.source.startswith("## 5.")]
    cells = [cell.source for cell in cells[:end] if cell.cell_type == "code"]
    code, steps = "\n\n".join(cells), "130 if world is facts else 10"
    for old, new in (
        ("manual_seed(0)\nuntrained =", f"manual_seed({seed})\nuntrained ="),
        ("train(model, world)", f"train(model, world, {seed}, {steps})"),
    ):
        if code.count(old) != 1:
            raise ValueError(f"{code.count(old)} times in the notebook: {old}")
        code = code.replace(old, new)
    return code


def measured(seed):
    """What is SHOWN, each in every block of one model, and the share of landmarks that
    are right when all MLPs are ablated."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(chapters_to_4(seed), "chapters 1 to 4", "exec"), names)
    mpl.pyplot.close("all")

    subject, last = torch.stack(names["traced"]).mean(0).T.tolist()
    rows = [names["weight"].mean(1).tolist(), subject, last]
    for place in ("name_end", "last"):
        shares = []
        for i in range(3):
            top, push = names["specific"]("trained", i, names[place])
            own = push.argmax(1)[top] == names["mine"]
            shares.append(own.float().mean().item())
        rows.append(shares)
    with names["patch"](names["trained"], {"h.*.mlp.out": lambda value: value * 0}):
        return rows, names["accuracy"](names["trained"], names["landmarks"])


def spread(values):
    """A median, and the least and the most."""
    middle = statistics.median(values)
    return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    mpl.use("agg")
    seeds = range(1, 1 + int(sys.argv[1] if len(sys.argv) > 1 else 10))
    found, right = zip(*map(measured, seeds), strict=True)
    for name, *rows in zip(SHOWN, *found, strict=True):
        blocks = [spread(values) for values in zip(*rows, strict=True)]
        print(f"{name:28}", *(f"{text:23}" for text in blocks))
    print(f"{'right without any MLP':28}", spread(right))
