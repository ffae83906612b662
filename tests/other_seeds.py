"""Chapter 5 of the notebook on models of other seeds: which part does what?

python tests/other_seeds.py [SEEDS]: runs the notebook's own cells up to that chapter's
end with seeds from 1 on (10), a minute each. Prints a table of medians, and in brackets
the least and the most, as it stands in the notebook.
"""

import contextlib
import io
import statistics
import sys
from types import SimpleNamespace

import matplotlib as mpl
import nbformat
import torch
from mirror import NOTEBOOK


def chapters_to_5(seed):
    """The code of the notebook's first five chapters for another seed. The nonsense
    model is trained for ten steps only, and figures of the training are left out, as
    chapter 5 uses neither."""
    code, steps = "", "130 if world is facts else 10"
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.source.startswith("## 6."):
            break
        is_figure = "histories" in cell.source and "plt." in cell.source
        if cell.cell_type == "code" and not is_figure:
            code += cell.source + "\n\n"

    for old, new in (
        ("manual_seed(0)\nuntrained =", f"manual_seed({seed})\nuntrained ="),
        ("train(model, world)", f"train(model, world, {seed}, {steps})"),
    ):
        if code.count(old) != 1:
            raise ValueError(f"{code.count(old)} times in the notebook: {old}")
        code = code.replace(old, new)
    return code


def run_chapters(seed):
    """The notebook's variables at the end of chapter 5."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(chapters_to_5(seed), "chapters 1 to 5", "exec"), names)

    mpl.pyplot.close("all")
    return SimpleNamespace(**names)


def attention(run):
    """From the last token: each block's mean share on the subject, and the share of the
    head that reads the subject's end most."""
    rows = {"attention on the subject": [], "most of one head on its end": []}
    for block in run.blocks:
        pattern = run.recorded["trained"][f"{block}.attn.pattern"]
        pattern = pattern[run.every, :, run.last]  # [B, H, T]
        shares = torch.einsum("bht,bkt->hk", pattern, run.members) / len(pattern)
        rows["attention on the subject"].append(shares[:, 1:3].sum(1).mean().item())
        rows["most of one head on its end"].append(shares[:, 2].max().item())
    return rows


def patched(run):
    """What comes back from each part, at the subject and at the last token, and at the
    subject's last token alone: means over the notebook's pairs."""
    streams, parts = run.mean_shares[1:4], run.mean_shares[4:]
    rows = {}

    for i, place in enumerate(("subject", "last token")):
        rows[f"stream at the {place}"] = streams[:, i].tolist()
        rows[f"attention at the {place}"] = parts[::2, i].tolist()
        rows[f"MLP at the {place}"] = parts[1::2, i].tolist()

    taps, found = [f"{block}.mlp.out" for block in run.blocks], []
    for fact, other in run.pairs:
        end = [[fact.span[-1]]]
        found.append(run.brought_back(run.trained, fact, other, taps, end))
    rows["MLP at the name's end alone"] = torch.stack(found).mean(0)[:, 0].tolist()
    return rows


def adds(run):
    """What each part adds to the logit difference."""
    terms = run.attributions[1][1:]
    return {"attention adds": terms[::2].tolist(), "MLP adds": terms[1::2].tolist()}


def ablations(run):
    """The shares of right answers with one part ablated, by zeros and by its mean."""
    rows, ablated = {}, run.ablated  # [part, zeros or mean, of five or all]

    for j, question in enumerate(("of five", "of all")):
        for i, part in enumerate(("attention", "MLP")):
            for k, way in enumerate(("zeros", "mean")):
                row = f"right {question} without {part}, {way}"
                rows[row] = ablated[i:6:2, k, j].tolist()
    return rows


def neurons(run):
    """The share of specific neurons that push their landmark's own city."""
    rows = {}
    for where, position in (("name's end", run.name_end), ("last token", run.last)):
        shares = []
        for i in range(3):
            top, push = run.specific_neurons("trained", i, position)
            shares.append((push.argmax(1)[top] == run.own).float().mean().item())
        rows[f"neurons for the own city, {where}"] = shares
    return rows


def whole(run):
    """What is one number each: without all attention, all MLPs, the worst head."""
    rows = {"the worst single head ablated, right": [run.worst]}
    for i, part in ((6, "all attention"), (7, "all MLPs")):
        for k, way in enumerate(("zeros", "mean")):
            for j, question in enumerate(("of five", "of all")):
                row = f"right {question} without {part}, {way}"
                rows[row] = [run.ablated[i, k, j].item()]
    return rows


def measured(seed):
    """{row: a number per block, or one} of one model."""
    run, rows = run_chapters(seed), {}
    for measure in (attention, patched, adds, ablations, neurons, whole):
        rows |= measure(run)
    return rows


def spread(values):
    """A median, and the least and the most."""
    middle = statistics.median(values)
    return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    mpl.use("agg")
    mpl.rcParams["figure.max_open_warning"] = 0
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    found = []
    for seed in range(1, 1 + count):
        found.append(measured(seed))
        print(f"seed {seed} done", file=sys.stderr, flush=True)

    print("|shares, and logits that a part adds|h.0|h.1|h.2|\n|---|---|---|---|")
    for row in found[0]:
        columns = list(zip(*(one[row] for one in found), strict=True))
        if len(columns) == 1:  # not a block's
            print(f"- {row}: {spread(columns[0])}")
        else:
            print(f"|{row}|{'|'.join(map(spread, columns))}|")
