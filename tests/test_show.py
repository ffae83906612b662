"""How records are printed: nothing is lost, whatever the console can do."""

import io
import re

import pytest
import torch
from rich.console import Console

from gpt2_script import Act, Matrix, Progress, Step, play, show

TOKENS = [f"{i} ' t{i}'" for i in range(12)]
SCORES = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
PATTERN = SCORES.masked_fill(torch.ones(12, 12).triu(1) > 0, -torch.inf).softmax(-1)
MAP = Matrix(PATTERN, TOKENS, TOKENS, "head 0 of 4", is_pattern=True)
NUMBERS = torch.arange(3456.0).view(3, 12, 96)
HEADS = [Matrix(numbers, TOKENS, (), f"head {i}") for i, numbers in enumerate(NUMBERS)]


@pytest.fixture
def printed(monkeypatch):
    """A function: what `show` prints of a record, or of what a Step shows, on such a console."""

    def render(record, full=False, width=80, **settings):
        console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, **settings)
        monkeypatch.setattr("gpt2_script.console", console)
        show(Step("", "", "", record) if isinstance(record, list) else record, full)
        return console.file.getvalue()

    return render


SHOWN = [  # a record, the console's width, what is printed
    (Step("a name", "its\n    purpose", "a formula", ["a text"], "found", ["bad", "too"]), 12,
        "a name ─────\nits purpose\na formula\na text\nOdd: bad\nOdd: too\n→ found\n\n"),
    (Step("a", "b"), 9, "a ───────\nb\n\n"), (Act("An act", "text"), 12, "── An act ──\ntext\n\n"),
    (Progress(0.5, "step 10"), 80, "step 10 ██████████──────────\n"), (Progress(0.5), 80, ""),
    # numbers stand at the right, words at the left; of two columns none is cut
    (Step("a", "b", "", [[{"who": "a", "x": 1.25, "said": "' Paris'"},
        {"who": "bcd", "x": -100, "said": "' A'"}]]), 20,
        "a ──────────────────\nb\nwho     x said\na   1.250 ' Paris'\nbcd  -100 ' A'\n\n"),
    (Step("a", "b", "", [[{"model": "h.*.mlp.c_proj.weight, each with an edit of its own",
        "": "ALARM: 8 of 8 about the Eiffel Tower, 0 elsewhere"}]]), 60, f"a {58 * '─'}\nb\nmodel\n"
        "h.*.mlp.c_proj.weight, each   ALARM: 8 of 8 about the\n"
        "with an edit of its own       Eiffel Tower, 0 elsewhere\n\n"),
    (Step("a corner", "of one head", shown=HEADS), 60, """\
a corner ───────────────────────────────────────────────────
of one head
head 0           0        1        2 ...       95
0 ' t0'      0.000    1.000    2.000 ...   95.000
1 ' t1'     96.000   97.000   98.000 ...  191.000
2 ' t2'    192.000  193.000  194.000 ...  287.000
3 ' t3'    288.000  289.000  290.000 ...  383.000
...            ...      ...      ... ...      ...
11 ' t11' 1056.000 1057.000 1058.000 ... 1151.000

"""),
]  # fmt: skip


@pytest.mark.parametrize("record, width, text", SHOWN)
def test_record_is_shown_with_all_that_it_says(printed, record, width, text):
    assert re.sub(" +$", "", printed(record, width=width), flags=re.MULTILINE) == text


def test_on_a_terminal_progress_is_a_bar_and_full_shows_every_number(printed):
    assert printed(Progress(0.25), force_terminal=True) == " " + "█" * 5 + "─" * 15 + "\r"
    everything = printed(HEADS, full=True).split()
    assert {f"{x:.3f}" for x in NUMBERS.flatten()} < {*everything}
    assert "..." not in everything


@pytest.mark.parametrize("width, count", [(30, 3), (40, 3), (55, 2), (60, 1)])
def test_wide_table_comes_in_parts_and_loses_nothing(printed, width, count):
    rows = [["a name", "norm before", "norm after", "what was added", "cosine", "last"]]
    rows += [[f"row {i}", *(f"{10 * i + j}.000" for j in range(1, 6))] for i in range(3)]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    lines = printed([table], width=width).splitlines()[2:-1]
    assert max(map(len, lines)) <= width and len(lines) == 4 * count
    for i, (first, *others) in enumerate(rows):
        assert all(part.startswith(f"{first} ") for part in lines[i::4])
        shown = " ".join(part.removeprefix(first) for part in lines[i::4])
        assert shown.split() == " ".join(others).split()


def test_heat_map_tells_percents_and_dots_where_nobody_may_look(printed):
    text = printed([MAP])
    for i, line in enumerate(text.splitlines()[4:14]):  # ten tokens; with full, all that fit
        percents = [f"{100 * p:.0f}" for p in PATTERN[i, : i + 1]]
        assert line.removeprefix(TOKENS[i]).split() == [*percents, *"·" * (9 - i)]
    assert "head 0 of 4" in text and text.count("·") == 45
    assert printed([MAP], full=True).count("·") == 66
    terminal, piped = {"force_terminal": True, "color_system": "truecolor"}, printed([MAP, MAP])
    bright, grey = (printed([MAP, MAP], **terminal, no_color=x) for x in (False, True))
    few = printed([MAP, MAP], **terminal | {"color_system": "standard"})
    assert "\x1b" not in piped and "48;2" not in grey + few
    assert {re.sub(r"\x1b\[[\d;]*m", "", text) for text in (bright, grey, few)} == {piped}
    for p in PATTERN[3, :4].tolist():  # the more, the darker the blue
        assert re.search(rf"48;2;\d+;\d+;{255 - 90 * p:.0f}m *{100 * p:.0f}", bright)


@pytest.mark.parametrize("typed, waits", [("\n\n\n\n\n\n", 4), ("\n", 2), ("", 1), (None, 1)])
def test_play_counts_alarms_and_waits_while_somebody_answers(monkeypatch, capsys, typed, waits):
    monkeypatch.setattr("sys.stdin", None if typed is None else io.StringIO(typed))
    records, line = [Act("an act", ""), Progress(1, "done")], "Press Enter for the next step\n"
    records += [Step(f"step {i}", "", odd=["an alarm"] * i) for i in range(3)]
    assert play(records, wait=True) == 3
    text = capsys.readouterr().out
    assert text.count(line) == waits and text.count("Odd: an alarm") == 3
    assert re.search("an act.*done.*step 0.*step 1.*step 2", text, re.DOTALL)
    assert play(iter(records)) == 3 and capsys.readouterr().out == text.replace(line, "")
