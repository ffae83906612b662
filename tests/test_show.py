"""How records are printed: nothing is lost, whatever the console can do."""

import io
import math
import re
from collections import Counter

import pytest
import torch
from rich.console import Console

import gpt2_script as gpt
from gpt2_script import Act, Matrix, Progress, Step

TOKENS = [f"{i} ' t{i}'" for i in range(12)]
NUMBERS = torch.arange(3456.0).view(3, 12, 96)


@pytest.fixture
def printed(monkeypatch):
    """A function: what `show` prints on such a console, without spaces at line ends."""

    def render(record, full=False, width=80, **settings):
        settings |= {"markup": False, "emoji": False, "highlight": False}
        console = Console(file=io.StringIO(), width=width, **settings)
        monkeypatch.setattr(gpt, "console", console)
        gpt.show(record, full)
        return re.sub(" +$", "", console.file.getvalue(), flags=re.MULTILINE)

    return render


def step(*shown):
    return Step("a step", "its purpose", shown=list(shown))


def body(text):
    """The lines that a step shows, without its head and the empty line at its end."""
    return text.splitlines()[2:-1]


def test_a_step_is_shown_with_all_that_it_says(printed):
    shown = ["a text", [{"who": "a", "x": 1.25}, {"who": "bcd", "x": -100}]]
    record = Step("a name", "what it is for", "a formula", shown, "what was found")
    assert printed(record, width=20).splitlines() == [
        "a name ─────────────",
        "what it is for",
        "a formula",
        "a text",
        "who     x",
        "a   1.250",  # numbers stand at the right, words at the left
        "bcd  -100",
        "→ what was found",
        "",
    ]
    assert printed(Act("An act", "text"), width=12) == "── An act ──\ntext\n\n"


def test_a_table_too_wide_folds_and_loses_nothing(printed):
    row = {"test": "other facts", "question": "Are answers about others right?"}
    row |= {"before": 0.125, "after": -12.5, "": "ALARM: 0 of 8 about the Eiffel Tower"}
    lines = body(printed(step([row, row]), width=40))
    assert max(map(len, lines)) <= 40

    cells = "".join(str(gpt.cell_text(cell)) for cell in row.values())
    said = "".join(row) + cells + cells
    assert Counter("".join(lines).replace(" ", "")) == Counter(said.replace(" ", ""))


def test_of_many_heads_four_rows_of_the_first_and_its_last_are_shown(printed):
    """And no number as minus zero."""
    heads = [Matrix(x, TOKENS, (), f"head {i}") for i, x in enumerate(NUMBERS - 1e-5)]
    assert body(printed(step(*heads), width=40)) == [
        "head 0                 0       1       2",
        "0 ' t0'            0.000   1.000   2.000",
        "1 ' t1'           96.000  97.000  98.000",
        "2 ' t2'          192.000 193.000 194.000",
        "3 ' t3'          288.000 289.000 290.000",
        "11 ' t11'        1056.000 1057.000 1058.000",
    ]


def test_full_shows_every_number_of_every_head(printed):
    words = printed(step(*[Matrix(x, TOKENS) for x in NUMBERS]), full=True).split()
    for number in NUMBERS.flatten():
        assert f"{number:.3f}" in words


def test_a_heat_map_has_percents_and_dots_also_under_one_name(printed):
    shares = torch.tensor([[0.004, 0.006, math.nan], [0.5, 0.51, 1.0]])
    columns = ["the", "3 long", "the"]
    heat_map = Matrix(shares, ["a row", "b"], columns, "title", is_map=True)
    assert body(printed(step(heat_map))) == [
        "title            the 3 l the",
        "a row              0   1   ·",
        "b                 50  51 100",
    ]


def test_colour_is_for_terminals_that_want_it(printed):
    record = step([{"": "ALARM: a hash"}])
    terminal = {"force_terminal": True, "color_system": "standard"}
    bright = printed(record, **terminal)
    grey = printed(record, **terminal, _environ={"NO_COLOR": "1"})
    piped = printed(record)

    assert "\x1b[1;31mALARM" in bright
    assert "\x1b[1mALARM" in grey and "31m" not in grey
    assert "\x1b" not in piped
    assert re.sub(r"\x1b\[[\d;]*m", "", bright).split() == piped.split()


def test_progress_is_a_line_and_a_bar_alone_is_overwritten(printed):
    assert printed(Progress(0.25, "step 10")) == "step 10 █████───────────────\n"
    assert printed(Progress(0.25, "step 10"), width=10) == "step 10 ██\n"
    assert printed(Progress(0.25)) == ""
    assert printed(Progress(0.25), force_terminal=True) == " █████───────────────\r"


@pytest.mark.parametrize("typed, waits", [("\n" * 9, 4), ("\n", 2), ("", 1), (None, 1)])
def test_play_waits_as_long_as_somebody_answers(monkeypatch, capsys, typed, waits):
    stdin = None if typed is None else io.StringIO(typed)
    monkeypatch.setattr("sys.stdin", stdin)
    records = [Act("an act", ""), Progress(1, "done"), *map(step, "abc")]
    gpt.play(records, wait=True)
    text = capsys.readouterr().out
    assert text.count("Press Enter for the next step\n") == waits
    assert re.search("an act.*done.*a\n.*b\n.*c\n", text, re.DOTALL)
