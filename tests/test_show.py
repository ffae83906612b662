"""How records are printed: nothing is lost, whatever the console can do."""

import io
import re

import pytest
import torch
from rich.console import Console

import gpt2_script as gpt
from gpt2_script import Act, Matrix, Progress, Step, play

TOKENS = [f"{i} ' t{i}'" for i in range(12)]
SCORES = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
PATTERN = SCORES.masked_fill(torch.ones(12, 12).triu(1) > 0, -torch.inf).softmax(-1)
MAP = Matrix(PATTERN, TOKENS, TOKENS, "head 0 of 4", is_pattern=True)


@pytest.fixture
def printed(monkeypatch):
    """A function: what `show` prints of a record, or of a table's rows, on a console so wide."""

    def render(record, full=False, width=80, **settings):
        console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, **settings)
        monkeypatch.setattr(gpt, "console", console)
        gpt.show(record if isinstance(record, Step | Progress) else Step("", "", "", record), full)
        return console.file.getvalue()

    return render


@pytest.mark.parametrize("width, count", [(30, 3), (40, 3), (55, 2), (60, 1)])
def test_wide_table_comes_in_parts_and_loses_nothing(printed, width, count):
    names = ["a name", "norm before", "norm after", "what was added", "cosine", "last"]
    rows = [[f"row {i}", *(10.0 * i + j for j in range(1, 6))] for i in range(3)]
    table = [dict(zip(names, row, strict=True)) for row in rows]
    lines = printed([table], width=width).splitlines()[2:-1]
    assert max(map(len, lines)) <= width and len(lines) == 4 * count
    headings = "".join(line.removeprefix("a name") for line in lines[::4])
    assert " ".join(headings.split()) == " ".join(names[1:])
    for i, row in enumerate(rows):
        parts = lines[i + 1 :: 4]
        assert all(part.startswith(f"row {i} ") for part in parts)
        assert " ".join(part[5:] for part in parts).split() == [f"{x:.3f}" for x in row[1:]]


def test_numbers_stand_at_the_right_and_words_at_the_left(printed):
    rows = [{"who": "a", "x": 1.25, "said": "' Paris'"}, {"who": "bcd", "x": -100, "said": "' A'"}]
    lines = [line.rstrip() for line in printed([rows]).splitlines()]
    assert lines[2:5] == ["who     x said", "a   1.250 ' Paris'", "bcd  -100 ' A'"]


def test_corner_holds_the_first_numbers_and_the_last(printed):
    values = torch.arange(12 * 96.0).view(12, 96)
    heads = [Matrix(values + 5000 * i, TOKENS, (), f"head {i}") for i in range(3)]
    lines = printed(heads, width=60).splitlines()[2:]
    assert lines[0].split() == ["head", "0", "0", "1", "2", "...", "95"]
    shown = {0: TOKENS[0], 1: TOKENS[1], 2: TOKENS[2], 3: TOKENS[3], None: "...", 11: TOKENS[11]}
    for line, (i, name) in zip(lines[1:7], shown.items(), strict=True):
        numbers = [f"{values[i, j]:.3f}" if i is not None else "..." for j in (0, 1, 2, 95)]
        assert line.startswith(f"{name} ")
        assert line.removeprefix(name).split() == [*numbers[:3], "...", numbers[3]]
    assert lines[7:] == [""]  # one head of several; with full, all of each
    everything = printed(heads, full=True).split()
    assert {f"{x:.3f}" for head in heads for x in head.values.flatten()} < {*everything}
    assert "..." not in everything


def test_heat_map_tells_percents_and_dots_where_nobody_may_look(printed):
    text = printed([MAP])
    lines = text.splitlines()[4:14]  # ten tokens; with full, all that fit
    for i, line in enumerate(lines):
        percents = [f"{100 * p:.0f}" for p in PATTERN[i, : i + 1]]
        assert line.removeprefix(TOKENS[i]).split() == [*percents, *"·" * (9 - i)]
    assert "head 0 of 4" in text and text.count("·") == 45
    assert printed([MAP], full=True).count("·") == 66


def test_heat_map_reads_without_colour_as_with_it(printed):
    piped, bright = printed([MAP, MAP]), {"force_terminal": True, "color_system": "truecolor"}
    grey, bright = printed([MAP, MAP], no_color=True, **bright), printed([MAP, MAP], **bright)
    few = printed([MAP, MAP], force_terminal=True, color_system="standard")
    assert "\x1b" not in piped and "48;2" not in grey and "48;2" not in few
    assert {re.sub(r"\x1b\[[\d;]*m", "", text) for text in (bright, grey, few)} == {piped}
    for p in PATTERN[3, :4].tolist():  # the more, the darker the blue
        assert re.search(rf"48;2;\d+;\d+;{255 - 90 * p:.0f}m *{100 * p:.0f}", bright)


def test_no_table_of_two_columns_cuts_its_text(printed):
    rows = {"h.*.mlp.c_proj.weight, of every block, and what else is changed": "yes"}
    rows |= {"a name": "the Great Ormond Street Hospital, the Arc de Triomphe, the Arbat"}
    for row in rows.items():
        text = " ".join(printed([[dict(zip("ab", row, strict=True))]]).split())
        assert all(cell in text for cell in row)


def test_record_is_shown_with_all_that_it_says(printed):
    parts, shown = ["a name", "a purpose", "a formula"], [[{"a table": "x", "y": 1}], "a text"]
    text = printed(Step(*parts, shown, "a finding", ["bad news"]))
    assert all(part in text for part in [*parts, "a table", "a text"])
    assert text.endswith("\nOdd: bad news\n→ a finding\n\n")
    assert "→" not in printed(Step("a", "b")) and "Odd" not in printed(Step("a", "b"))
    assert re.fullmatch("─+ An act ─+", printed(Act("An act", "text")).splitlines()[0])
    # progress is a line in a pipe, a bar on a terminal
    assert printed(Progress(0.5, "step 10")) == "step 10 " + "█" * 10 + "─" * 10 + "\n"
    assert printed(Progress(0.25)) == ""
    assert printed(Progress(0.25), force_terminal=True) == " " + "█" * 5 + "─" * 15 + "\r"


@pytest.mark.parametrize("typed, waits", [("\n\n\n\n\n\n", 4), ("\n", 2), ("", 1), (None, 1)])
def test_play_counts_alarms_and_waits_while_somebody_answers(monkeypatch, capsys, typed, waits):
    monkeypatch.setattr("sys.stdin", None if typed is None else io.StringIO(typed))
    steps = [Step(f"step {i}", "", odd=["an alarm"] * i) for i in range(3)]
    records = [Act("an act", ""), Progress(1, "done"), *steps]
    line = "Press Enter for the next step\n"
    assert play(records, wait=True) == 3
    text = capsys.readouterr().out
    assert text.count(line) == waits and text.count("Odd: an alarm") == 3
    assert text.index("an act") < text.index("done") < text.index("step 0") < text.index("step 2")
    assert play(iter(records)) == 3 and capsys.readouterr().out == text.replace(line, "")
    assert play(steps[:1]) == 0


@pytest.mark.parametrize("width", [40, 90])
def test_watched_run_fits_the_console(printed, tokenizer, width):
    model = gpt.GPT2(gpt.GPT2Config(n_ctx=24, n_embd=12, n_layer=3, n_head=2)).eval()
    for step in gpt.watch_act(gpt.run_prompt(model, tokenizer, gpt.PROMPT), seed=1):
        text, tables = printed(step, width=width), [x for x in step.shown if isinstance(x, list)]
        assert max(map(len, text.splitlines())) <= width, step.name
        cells = [cell for rows in tables for row in rows for cell in row.values()]
        assert all(cell in text for cell in cells if isinstance(cell, str)), step.name
