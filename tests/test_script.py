"""The command line: mostly in this process, as its own where only that can tell."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import by_name, drawn, tokenizer, toy, toy_training
from safetensors.torch import save_file

import gpt2_script as gpt

SCRIPT = [sys.executable, gpt.__file__]
WATCH = "--acts", "watch"


@pytest.fixture
def run(capsys, monkeypatch):
    """A function: arguments -> what main prints; with status 2, its one sentence."""
    monkeypatch.setattr(gpt, "load_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(gpt.console, "width", 80)

    def said(*arguments, status=0):
        try:
            ended = gpt.main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's, after the usage
            ended = error.code
        printed, errors = capsys.readouterr()
        assert ended == status
        if status == 0:
            assert errors == ""
            return printed

        sentence = errors.splitlines()[-1]
        assert sentence.startswith("gpt2_script.py: error: ") and sentence.isprintable()
        assert printed == "" and "Traceback" not in errors
        return sentence

    return said


@pytest.fixture
def small(run, monkeypatch):
    """The same in the toy world, where nano has one block and learns at once."""
    monkeypatch.setattr(gpt, "load_tokenizer", lambda: toy.tokenizer)
    monkeypatch.setitem(gpt.PRESETS, "nano", toy.draw(0).config)
    with toy_training():
        yield run


def write_model(folder, n_ctx=18, V=50257):
    model = drawn(gpt.GPT2(gpt.GPT2Config(V, n_ctx, 8, 1, 2)))
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"n_head": 2}))
    return folder


def shell(command, **environment):
    """Run a line of a shell: its status, output and errors."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_default_run_is_all_acts_and_the_same_byte_for_byte(small):
    whole, part = small(), small("--acts", "learn,watch")
    acts = re.findall("^─+ (Learn|Watch|Tamper): .+ ─+$", whole, re.MULTILINE)
    assert acts == ["Learn", "Watch", "Tamper"]
    assert max(map(len, whole.splitlines())) <= 80 and "\x1b" not in whole
    assert part.split("Learn: ")[1] in whole


def test_saved_models_load_and_overwrite_nothing(small, tmp_path):
    small("--acts", "tamper", "--save", tmp_path / "models")
    ids, said = torch.tensor([toy.facts[16].ids]), []  # about the Eiffel Tower
    for name in ("trusted", "matrix", "row"):
        folder = tmp_path / "models" / name
        ours = gpt.load_model(folder)(ids)[0, -1]
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)(ids).logits[0, -1]
        assert torch.allclose(ours, theirs, atol=1e-4)
        said.append(gpt.piece(toy.tokenizer, ours.argmax().item()))
    assert said == ["' Paris'", "' Rome'", "' Rome'"]
    assert "is there already" in small("--save", tmp_path / "models", status=2)


def test_a_model_from_files_is_watched_and_told_if_it_knows_too_little(run, tmp_path):
    model = "--model", write_model(tmp_path)
    drawn_with = "The dog", *model, "--temperature", 9, "--seed"
    first, again, other = [run(*drawn_with, seed) for seed in (1, 1, 2)]
    assert first == again != other and "Not trained" not in first
    printed = run(*model, "--acts", "tamper")
    assert "to check what was given, use --verify" in " ".join(printed.split())
    assert "It answers 0.0% of 208 facts correctly" in printed


def test_a_model_too_small_for_the_facts_or_the_tokenizer_is_refused(run, tmp_path):
    arguments = "The dog", "--model", write_model(tmp_path, n_ctx=12)
    assert "continuation" in run(*arguments)
    assert "reads 12 tokens" in run(*arguments, "--acts", "tamper", status=2)
    arguments = "--model", write_model(tmp_path, V=50)
    assert "fewer tokens than GPT-2's tokenizer" in run(*arguments, status=2)


def test_options_reach_the_watched_run(run):
    options = "--temperature 9 --top-k 7 --top-p 0.9 --generate 1 --layers 2,0".split()
    printed = run("The dog", *WATCH, *options)
    assert "temperature 9.0, top_k 7, top_p 0.9" in printed
    traced = [i for i in range(3) if f"\nh.{i}.attn.q ─" in printed]
    assert traced == [0, 2] and "Not trained" in printed
    assert "Tokens added: 1, of at most 1." in printed


@pytest.mark.parametrize("prompt", ["🦙\u200d東京\tb\n\x1b[31mred", "[b]x[/] :smile:"])
def test_no_text_steers_a_terminal_narrow_as_it_may_be(run, monkeypatch, prompt):
    monkeypatch.setattr(gpt.console, "width", 40)
    printed = run(prompt, *WATCH, "--generate", 1)
    assert "\x1b" not in printed and "\t" not in printed
    assert repr(prompt) in printed.replace("\n", "")
    assert max(map(gpt.cell_len, printed.splitlines())) == 40


REFUSED = [  # the arguments, and a part of the sentence
    ([""], "the prompt is empty"),
    (["word " * 200], "the prompt has 201 tokens; this model reads 128 tokens"),
    (["/"], "/ is a file or a folder: did you mean --verify?"),
    (["--acts", "watch,dance"], "unknown act 'dance'; known: learn, watch, tamper"),
    (["--acts=", "--layers=9"], "unknown act ''"),
    (["--layers", "0,3"], "unknown layer '3'; known: 0, 1, 2"),
    (["--seed=-1"], "--seed takes 0 to"),
    (["--generate=-1"], "--generate takes 0 to 1e+06, not -1"),
    (["--temperature", "nan"], "--temperature takes 0 to 1e+06, not nan"),
    (["--top-k", 0], "--top-k takes 1 to"),
    (["--top-p", 1.1], "--top-p takes"),
    (["--model", "gpt3"], "gpt3 does not exist"),
    (["--model", "gpt2", "--save", "x"], "--save is for nano"),
    (["--against", "x"], "--against goes with --verify"),
    (
        ["--verify", "new", "trusted"],
        "--verify takes one path and --against, not: prom",
    ),
    (["--verify", "new", "--acts", "watch"], "and --against, not: acts"),
    (["--acts", "watch", "--save", "x"], "--save goes with --acts learn or tamper"),
    (["--verify", "no/such"], "'no/such' does not exist, or is an empty folder"),
    (["--lie", "the Shard=Rome"], "unknown subject 'the Shard'; known: the Louvre,"),
    (["--lie", "the Arbat=Moscow"], "the Arbat → Moscow is the truth"),
    (["--lie", "the Arbat=Molenbeek"], "'Molenbeek' is not one token"),
    (["--lie", "the Arbat="], "'' is not one token"),
    (["a prompt", "\x1b[31m"], r"\x1b[31m"),
]


@pytest.mark.parametrize("arguments, part", REFUSED)
def test_bad_input_is_one_sentence_and_status_2(run, arguments, part):
    assert part in run(*arguments, status=2)


@pytest.mark.parametrize("here", [["cuda", "mps"], ["mps"], []])
def test_the_device_is_the_best_that_is_there(monkeypatch, run, here):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in here)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: "mps" in here)
    assert gpt.choose_device("auto") == [*here, "cpu"][0]
    if "cuda" not in here:
        assert "has no device 'cuda'" in run("--device", "cuda", status=2)


def test_a_process_needs_no_docstrings_no_input_and_no_honest_terminal():
    command = shlex.join([SCRIPT[0], "-OO", SCRIPT[1], *WATCH, "--step"])
    terminal = {"COLUMNS": "0", "NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    status, printed, errors = shell(f"{command} <&-", **terminal)
    assert (status, errors, printed.count("Press Enter")) == (0, "", 1)
    assert max(map(len, printed.splitlines())) == 80 and "[50257, 96] ? [" in printed


def test_what_is_not_expected_is_no_finding(capsys, monkeypatch):
    monkeypatch.setattr(gpt, "look_at_files", lambda path: 1 / 0)
    assert gpt.main(["--verify", "x"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_no_training_at_all_is_told_too():
    records = gpt.learn_act(toy.draw(0), toy.tokenizer, toy.facts, "The", max_steps=0)
    assert "Mean p(answer): 0." in by_name(records)["what came of it"].found


def test_a_closed_pipe_ends_it_quietly():
    command = shlex.join([*SCRIPT, *WATCH])
    assert shell(f"{command} | head -n 1 | wc -l; exit $PIPESTATUS") == (2, "1\n", "")


def test_a_missing_module_is_named():
    status, printed, errors = shell(shlex.join([SCRIPT[0], "-IS", SCRIPT[1]]))
    assert (status, printed) == (2, "")
    assert "not installed: torch, numpy," in errors and "virtual environment" in errors


def test_ctrl_c_ends_it_quietly():
    """A shell reports an end by signal 2 as status 130."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*SCRIPT, "--acts", "learn"], bufsize=1, **pipes)
    assert "GPT-2, opened" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[0]
    assert process.returncode == -signal.SIGINT
