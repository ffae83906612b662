"""As somebody unlucky would run it: it works, or ends with one sentence and status 2."""

import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_script import SCRIPT, play, watch
from test_weights import fetch_from, is_sentence

import gpt2_script
from gpt2_script import GPT2, GPT2Config, InputError, answer_logits, encode

ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "utf-8"}
COMMAND = shlex.join([sys.executable, str(SCRIPT)])


def shell(command, **environment):
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)


def sentence(stderr):
    """The one sentence on standard error, after argparse's usage; it cannot steer a terminal."""
    *usage, last = stderr.splitlines()
    assert last.startswith("gpt2_script.py: error: ") and last.isprintable()
    assert not usage or usage[0].startswith("usage: ") and "Traceback" not in stderr
    return last


def refusal(capsys, *arguments):
    """What the command line says to arguments that it does not take."""
    capsys.readouterr()
    try:
        status = gpt2_script.main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return sentence(capsys.readouterr().err)


# ---- where output goes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("option, unbuffered", [("--step", ""), ("--step", "1"), ("--help", "")])
def test_standard_output_is_full(option, unbuffered):
    result = shell(f"{COMMAND} {option} >/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "No space left on device" in sentence(result.stderr)


@pytest.mark.parametrize("options", ["--help", "--acts watch"])
def test_pipe_that_nobody_reads(options):
    assert shell(f"{COMMAND} {options} | true").stderr == ""


@pytest.mark.parametrize(
    "options, status",
    [
        ("--acts watch >&-", 0),
        ("--acts watch 2>&-", 0),
        ("--acts watch --step <&- >&- 2>&-", 0),
        ("'' <&- >&- 2>&-", 2),
    ],
)
def test_closed_streams(options, status):
    result = shell(f"{COMMAND} {options}")
    assert (result.returncode, result.stderr) == (status, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_four_acts_in_40_columns_without_unicode_or_locale(encoding):
    """What the script itself says is spelt out; only a token may be an escape."""
    environment = {"PYTHONIOENCODING": encoding, "COLUMNS": "40", "LC_ALL": "C", "LANG": ""}
    result = play("🦙 ≠ ü", env=environment, encoding=encoding)
    assert (result.returncode, result.stderr) == (0, "")
    source = SCRIPT.read_text(encoding="utf-8")
    for character in {c for c in source if not c.isascii()}:
        assert ascii(character)[1:-1] not in result.stdout


def test_no_locale_at_all():
    names = {"LC_ALL": "C", "LANG": "", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = watch("🦙 Perú".encode(), env={**names, "PYTHONIOENCODING": ""}, encoding="ascii")
    assert (result.returncode, result.stderr) == (0, "")


def test_step_with_an_input_that_is_no_text():
    result = watch("--step", input=b"\xff\n\xfe\n\xff", stdin=None, encoding=None)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.count(b"Press Enter") == 4


# ---- where files go


def test_full_disk_leaves_the_figures_of_an_earlier_run_alone(tmp_path):
    """No file may exceed a size: to the process, a full disk."""
    (tmp_path / "patterns_h0.png").write_bytes(b"old")
    limit = resource.RLIMIT_FSIZE, (8192, 8192)
    result = watch("--figures", tmp_path, preexec_fn=lambda: resource.setrlimit(*limit))
    assert result.returncode == 2 and "patterns_h0.png': File too large" in sentence(result.stderr)
    assert os.listdir(tmp_path) == ["patterns_h0.png"]
    assert (tmp_path / "patterns_h0.png").read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no reason")])
def test_a_figure_is_written_whole_or_not_at_all(error, tmp_path):
    class Figure:
        def savefig(self, path, format):
            path.write_bytes(b"\x89PNG half of")
            raise error

    with pytest.raises((KeyboardInterrupt, InputError)) as caught:
        gpt2_script.save(tmp_path, "some", Figure)
    assert caught.type is KeyboardInterrupt or "no reason" in str(caught.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("home", ["unset HOME", "HOME=/nonexistent", "HOME=/dev/null"])
def test_no_home_and_a_folder_that_cannot_be_written(home, tmp_path):
    command = f"{home}; cd /proc || cd /; {COMMAND} --acts watch --figures {tmp_path}"
    result = shell(command)
    assert result.returncode == 0 and len(os.listdir(tmp_path)) == 3
    assert "Traceback" not in result.stderr  # matplotlib says where it keeps its fonts instead


# ---- what is asked for

STEERING = b"\x1b[31m\xff\n\x07\xc2\x9b\xe2\x80\xae".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    "option", ["--x{}", "--f={}", "--full={}", "--device={}", "--model={}", "--verify={}"]
)
def test_no_argument_can_steer_the_terminal(option, capsys):
    assert r"\x1b[31m" in refusal(capsys, option.format(STEERING), "prompt")
    assert r"\x1b[31m" in refusal(capsys, "prompt", STEERING)


def test_strange_names_of_files(capsys, path):
    assert "cannot read aaa" in refusal(capsys, "--verify", "a" * 5000)
    assert "cannot read aaa" in refusal(capsys, "--model", "a" * 5000 + ".bin")
    assert "is no file" in refusal(capsys, "--verify", "/dev/null")
    strange = shutil.copy(path, path.with_name("\x1b[31m.safetensors"))
    gpt2_script.verify(path, strange)
    assert "\x1b" not in capsys.readouterr().out
    strange = path.rename(path.with_name("\udcff.safetensors"))
    assert "not UTF-8" in refusal(capsys, "--verify", str(strange))


@pytest.mark.parametrize("options", ["--verify=", "--against=", "--verify={} --against="])
def test_an_empty_name_is_not_passed_over(options, capsys, path):
    """As of a shell variable that is not set: nothing else is done, and nothing less compared."""
    said = refusal(capsys, *options.format(path).split())
    assert "is a folder" in said or "goes with" in said


def test_a_cache_with_a_folder_where_the_file_should_be(tmp_path):
    place = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots"
    (place / gpt2_script.RELEASED["gpt2"][0] / "model.safetensors").mkdir(parents=True)
    assert is_sentence(fetch_from("http://127.0.0.1:9", tmp_path))


def test_released_model_without_a_network(tmp_path):
    result = play("--model", "gpt2", env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2 and result.stdout == ""
    assert "cannot fetch gpt2" in sentence(result.stderr)


# ---- Ctrl-C


def interrupt(*options, heading):
    """Press Ctrl-C, again and again, once a heading is there or, without one, seconds are over."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, SCRIPT, *options], env=ENVIRONMENT, **pipes)
    if heading is None:
        time.sleep(2)
    while heading and not process.stdout.readline().startswith(heading):
        assert process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.communicate()[1] == b"" and process.returncode == 130


ACTS = {"watch": b"h.0.attn.pattern", "learn": b"step  20", "tamper": b"locate", "detect": b"with "}


@pytest.mark.parametrize("act, heading", ACTS.items())
def test_ctrl_c_in_every_act(act, heading, tmp_path):
    interrupt("--acts", act, "--figures", tmp_path, heading=heading)
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".png")]


def test_ctrl_c_while_a_file_is_verified(tmp_path):
    """A file of 4 GB, all of it a hole."""
    path, size = tmp_path / "large.safetensors", 1 << 32
    header = f'{{"a":{{"dtype":"F32","shape":[{size // 4}],"data_offsets":[0,{size}]}}}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    os.truncate(path, 8 + len(header) + size)
    interrupt("--verify", path, heading=None)


# ---- any text


@pytest.fixture(scope="module")
def tiny(drawn):
    """A model that takes 64 tokens of GPT-2's vocabulary."""
    return drawn(GPT2(GPT2Config(n_ctx=64, n_embd=8, n_layer=1, n_head=1))).requires_grad_(False)


KINDS = [["Cs"], ["Cc", "Cf"], ["Zs", "Zl", "Zp"], ["Co", "Cn"], ["L", "M"], ["N", "P", "S"]]
RUNS = [st.text(st.characters(categories=kind), min_size=1, max_size=6) for kind in KINDS]
TEXTS = st.lists(st.one_of(st.text("<|endoftext|> ", min_size=1), *RUNS), min_size=20, max_size=40)


@settings(max_examples=100)
@given(TEXTS.map("".join), st.integers(0, 90))
def test_ten_thousand_prompts(tokenizer, tiny, text, length):
    """Each text is cut into a hundred: any Unicode, control characters, lone surrogates."""
    taken = []
    for i in range(100):
        prompt = (text * 100)[7 * i :][: (length + i) % 70]
        count = len(tokenizer.encode_ordinary(prompt))
        try:
            ids = encode(tokenizer, prompt, 64)[0].tolist()
        except InputError:
            assert not 0 < count <= 64
            continue
        assert 0 < count == len(ids) <= 64
        shown = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(ids) == shown
        taken.append(ids)
    assert not taken or answer_logits(tiny, taken).isfinite().all()
