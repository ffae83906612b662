"""Learn, tamper and detect as a user meets them: run as processes, read from their output."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpt2_script.py"
TITLES = {
    "watch": "Watch: a prompt on its way through GPT-2",
    "learn": "Learn: how weights come to know",
    "tamper": "Tamper: changing its mind",
    "detect": "Detect: finding what was changed",
}
FIGURES = {
    "watch": {"patterns_h0", "stream", "logit_lens"},
    "learn": {"learning", "weights", "space"},
    "tamper": {"trace", "answers"},
    "detect": {"row_norms", "singular_values", "trade_offs"},
}
# one thread each, so that two runs at a time do not wait for each other, and the same bits
PLAIN = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
OTHER_PROMPT = "You will find the Louvre in"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{acts: (the finished process, the names of its figures)} for several --acts, all seed 3."""
    folder = tmp_path_factory.mktemp("figures")

    def play(acts):
        chosen = [] if acts == "default" else ["--acts", acts]
        arguments = [OTHER_PROMPT, "--seed", "3", "--figures", folder / acts, *chosen]
        process = subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            env=PLAIN,
            capture_output=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        return process, {path.name for path in (folder / acts).iterdir()}

    acts = ["default", "learn", "tamper", "detect,watch"]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(acts, pool.map(play, acts), strict=True))


def acts_in(output):
    """{act: what it printed}, in the order in which the acts began."""
    parts = re.split(rf"^─+ ({'|'.join(map(re.escape, TITLES.values()))}) ─+$", output, flags=re.M)
    names = {text: act for act, text in TITLES.items()}
    return {names[t]: body for t, body in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize(
    "acts, expected",
    [
        ("default", ["watch", "learn", "tamper", "detect"]),
        ("learn", ["learn"]),
        ("tamper", ["tamper"]),
        ("detect,watch", ["watch", "detect"]),
    ],
)
def test_acts_run_in_their_order_and_save_their_figures(runs, acts, expected):
    process, figures = runs[acts]
    assert (process.returncode, process.stderr) == (0, "")
    assert list(acts_in(process.stdout)) == expected
    assert figures == {f"{name}.png" for act in expected for name in FIGURES[act]}


@pytest.mark.parametrize("acts", ["learn", "tamper", "detect,watch"])
def test_an_act_alone_prints_what_it_prints_after_the_others(runs, acts):
    """The same seed twice gives the same bytes, and learning unseen is the same learning."""
    everything = acts_in(runs["default"][0].stdout)
    alone = acts_in(runs[acts][0].stdout)
    for act, text in alone.items():
        assert text.strip() == everything[act].strip() and len(text) > 1000


def test_no_line_is_too_wide_or_coloured(runs):
    for process, _ in runs.values():
        assert "\x1b" not in process.stdout
        assert max(map(len, process.stdout.splitlines())) <= 80


def test_default_run_tells_the_whole_story(runs):
    parts = {
        act: " ".join(text.split()) for act, text in acts_in(runs["default"][0].stdout).items()
    }
    assert re.search(r"held-out \w+ 30 of 30 are right", parts["learn"])
    assert len(re.findall(r"(7|8) of 8 wordings now say Rome", parts["tamper"])) == 2
    assert "The model is what it was" in parts["tamper"]
    assert re.search(r"(7|8) of 8 old answers are back", parts["detect"])
    assert "The model is what it was" in parts["detect"] and "NOT" not in parts["detect"]
    for act in ("learn", "tamper", "detect"):
        assert "OWASP LLM" in parts[act] and "AML." in parts[act]


def test_every_step_says_what_it_changed(runs):
    for process, _ in runs.values():
        for part in acts_in(process.stdout).values():
            headings = re.findall(r"^[^─\n]+ ─+$", part, re.M)
            assert headings and part.count("Changed: ") == len(headings)


def test_ctrl_c_while_learning_exits_130_quietly():
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--acts", "learn"],
        env={**PLAIN, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not process.stdout.readline().startswith(b"step  20"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"") and b"Traceback" not in rest
