"""--verify: what it tells of a model's files, alone and against a trusted copy."""

import hashlib
import json
from functools import reduce
from operator import getitem

import pytest
import torch
import transformers
from conftest import damage
from test_tokenizer import PACKAGE
from test_weights import CONFIG, FILE, TABLE, TRIL, T, alarms, headed, masks, no, sets, to, write

from gpt2_script import RELEASED, Progress, Step, main, verify_act

MATRIX, MASKS = "h.1.mlp.c_proj.weight", ["h.0.attn.bias", "h.1.attn.bias"]
NANS = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)


def told(*paths):
    return {record.name: record for record in verify_act(*paths) if isinstance(record, Step)}


def differences(*paths):
    step = told(*paths)["differences"]
    assert bool(step.odd) == bool(step.shown) != bool(step.found)
    return {row["tensor"]: row["differs"] for rows in step.shown for row in rows}


def edited(*values, dtype=torch.float32):
    """A model's files, one matrix changed: the change's singular values, relative to its norm."""
    generator, old = torch.Generator().manual_seed(1), T[MATRIX].to(dtype).float()
    left, right = (torch.randn(n, len(values), generator=generator) for n in old.shape)
    left, right = torch.linalg.qr(left)[0] * torch.tensor(values), torch.linalg.qr(right)[0]
    return {FILE: to(dtype) | {MATRIX: (old + old.norm() * left @ right.T).to(dtype)}}


def test_what_is_told_of_a_sound_folder(tmp_path):
    path = write(tmp_path, {**masks(TRIL.bool()), "sub.txt": b"more"})
    shares, steps = [x.share for x in verify_act(path) if isinstance(x, Progress)], told(path)
    assert shares == sorted(shares) and len(shares) == len(T) + 2 and 0 <= shares[0] < 1
    files = [f"{x.name}\n  {hashlib.sha256(x.read_bytes()).hexdigest()}" for x in path.iterdir()]
    assert steps["files"].shown == ["\n".join(sorted(files))]
    row = {"tensor": "h.N.mlp.c_fc.weight", "type": "F32", "shape": "[64, 256]", "how many": 2}
    assert row in steps["tensors"].shown[0] and "silence is no proof" in steps["scan"].purpose
    assert not any(step.odd for step in steps.values()) and "differences" not in steps


@pytest.mark.parametrize("files, odd", [
    (edited(1.0), MATRIX), (edited(0.1), None), (edited(1.0, dtype=torch.bfloat16), MATRIX),
    ({FILE: sets(MATRIX, (2, 3), 3e38)}, MATRIX), ({FILE: sets(TABLE, 12, 20.0)}, f"{TABLE}[12]"),
    ({FILE: sets(TABLE, 12, 1e30)}, f"{TABLE}[12]"), ({FILE: {k: 0 * T[k] for k in T}}, None),
    (headed(lambda table: table.index_fill(0, torch.tensor(7), 20.0), no(TABLE)), f"{TABLE}[7]"),
])  # fmt: skip
def test_the_scan_and_that_no_release_is_exempt(files, odd, tmp_path, monkeypatch):
    path, steps = write(tmp_path, files), []
    for content in (b"", (path / FILE).read_bytes()):
        monkeypatch.setitem(RELEASED, "gpt2", ("", hashlib.sha256(content).hexdigest()))
        steps.append(told(path))
    assert steps[0]["files"].found == "no file is a release's weights."
    assert steps[1]["files"].found == f"{FILE} is byte for byte the released gpt2."
    scan, again = (step["scan"] for step in steps)
    assert repr(scan) == repr(again) and scan.odd == [f"{odd} stands out"] * bool(odd)
    scores = [row["score"] for row in scan.shown[0]]
    assert scores == sorted(scores, reverse=True) and (scores[0] > 1) == bool(odd)


def test_exit_status(tmp_path, capsys, monkeypatch):
    good, other = write(tmp_path / "good"), write(tmp_path / "other")
    odd, cut = write(tmp_path / "odd", masks(TRIL * 0)), write(tmp_path / "cut", {FILE: b"cut"})
    for status, path, *against in [
        (0, good), (0, good, other), (1, odd), (1, good, odd), (1, odd, odd), (2, cut),
        (2, good, cut), (2, "nowhere"), (2, good, ""), (2, ""), (2, "a" * 5000), (2, other),
    ]:  # fmt: skip
        if path is other:  # which is not allowed to be read
            monkeypatch.setattr("builtins.open", lambda *arguments: (good / "nowhere").stat())
        line = ["--verify", str(path), *(["--against", str(*against)] if against else [])]
        assert main(line) == status, line
        printed, errors = capsys.readouterr()
        assert "\x1b" not in printed + errors and len(errors.splitlines()) == (status == 2)
        assert ("nothing odd was" in printed, "Odd: " in printed) == (status == 0, status == 1)


CHANGES = {  # what is compared, with what, and a part of how each tensor that differs does
    "prefix": ({FILE: {f"transformer.{name}": x for name, x in T.items()}}, {}, {}),
    "alias": (headed(files=no(TABLE)), {}, {}),
    "alias, a row": (headed(lambda table: table.index_fill(0, torch.tensor(7), 9.0), no(TABLE)),
        {}, {"lm_head.weight": "numbers: 64, row 7, rank 1, size "}),
    "more": ({FILE: T | {"\x1b": TRIL}}, {}, {r"\x1b": "the trusted copy lacks it"}),
    "less": ({FILE: no("ln_f.bias")}, {}, {"ln_f.bias": "only in the trusted copy"}),
    "number": ({FILE: sets(TABLE, (9, 1), 0.5)}, {}, {TABLE: "numbers: 1, row 9, rank 1, size "}),
    "two rows": ({FILE: sets(TABLE, [3, 8], 1.0)}, {}, {TABLE: "numbers: 128, rows 3, 8, rank 2"}),
    "vector": ({FILE: sets("ln_f.bias", 9, 1.0)}, {}, {"ln_f.bias": "numbers: 1, row 9, rank 1"}),
    "masks": (masks(TRIL * 0 + 1), masks(TRIL), dict.fromkeys(MASKS, "120, rows 0, 1, ..., ")),
    "-0": ({FILE: sets(TABLE, (7, 7), -0.0)}, {}, {TABLE: "numbers: 1, row 7, rank 0, size 0.0"}),
    "NaN": (*({FILE: sets(TABLE, (9, 1), x)} for x in NANS), {TABLE: "numbers: 1, row 9, rank 0"}),
    "other type": (masks(TRIL), masks(TRIL.bool()), dict.fromkeys(MASKS, "other bytes: F32 [1, 1")),
    "rounded": ({FILE: to(torch.half)}, {}, {name: f"the same numbers, up to rounding: "
        f"F16 {[*x.shape]}, trusted F32 {[*x.shape]}" for name, x in T.items()}),
    "shape": ({FILE: {**T, TABLE: T[TABLE][:49]}}, {},
        {TABLE: "other bytes: F32 [49, 64], trusted F32 [50, 64]"}),
    # the rank of an edit is not spoilt by rounding, and counts what is a thousandth of the largest
    **{f"rank {n}, {x}": (edited(*[0.02 / n**0.5] * n, dtype=x), {FILE: to(x)},
        {MATRIX: f"rank {n}, size 2.0e-02"})
        for n in (1, 20) for x in (torch.float32, torch.float16, torch.bfloat16)},
    **{f"a part of {x}": (edited(1.0, 0.4, x), {}, {MATRIX: f"rank {n}, size 1.1e+00"})
        for n, x in [(3, 0.01), (2, 1e-5)]},
}  # fmt: skip


@pytest.mark.parametrize("ours, theirs, expected", CHANGES.values(), ids=CHANGES)
def test_a_change(ours, theirs, expected, tmp_path):
    found = differences(write(tmp_path / "ours", ours), write(tmp_path / "trusted", theirs))
    assert found.keys() == expected.keys()
    assert all(expected[tensor] in how for tensor, how in found.items()), found


def test_any_flipped_bit_is_found_and_its_tensor_named(tmp_path):
    tensors = masks(TRIL.bool())[FILE] | {MATRIX: T[MATRIX].half(), "h.0.x": torch.ones(9).char()}
    ours, trusted = (write(tmp_path / x, {FILE: tensors}) / FILE for x in ("ours", "trusted"))
    whole = trusted.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    spans = {name: x["data_offsets"] for name, x in json.loads(whole[8:start]).items()}
    for i, (name, (first, end)) in enumerate(spans.items()):
        ours.write_bytes(whole)
        damage(ours, start + first + 7919 * i % (end - first))
        assert [*differences(ours, trusted)] == [name]


def test_files_of_two_folders_and_weights_files_of_two_names(tmp_path):
    both = {"same": b"", "x": b"a", "x.safetensors": T}
    ours = write(tmp_path / "ours", {**both, CONFIG: None, "new": b""})
    trusted = write(tmp_path / "trusted", {**both, FILE: sets(TABLE, 9, 1.0), "x": b"b"})
    assert alarms(ours, trusted) == [
        "x.safetensors holds weights that are not checked", "new is not in the trusted copy",
        "config.json is only in the trusted copy", "x has other bytes",
        "tensors that differ from the trusted copy: 1 of 28",
    ]  # fmt: skip
    other = (ours / FILE).rename(ours / "other.safetensors")
    write(ours, {FILE: None})
    assert alarms(other, write(trusted) / FILE) == []
    write(trusted, {CONFIG: {"n_head": 2}})
    assert alarms(other, trusted) == ["config.json has other bytes"]


TOKENS, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
STEERS = "bad_words_ids begin_suppress_tokens constraints force_words_ids suppress_tokens".split()
STEERS += "forced_bos_token_id forced_decoder_ids forced_eos_token_id sequence_bias".split()
RUN = {"\x1b\udcff.SO": b"", "a": b"PK\3\4", "b": b"#!/bin/sh", "c": b"\x7fELF", "d": b"MZ"}
RUN |= {"x.py": b"", "x.safetensors": b"\x80\4N.", "x.txt": b"\x80\4N."}
ODD = {  # what is put into a sound folder, as files or as places in one; a part of each alarm
    "nothing": ({"generation_config.json": {**dict.fromkeys(STEERS), "do_sample": True},
        "x.txt": b"", SPECIAL: {"bos_token": {"content": "<|endoftext|>"}}}, []),
    "swapped": ({TOKENS: [("model", "vocab", "ĠParis", 10598), ("model", "vocab", "ĠRome", 6342)],
        "vocab.json": [("ĠRome", 6342)]}, ["vocab.json has other ids than GPT-2: ' Rome'",
        f"{TOKENS} has other ids than GPT-2: ' Paris', ' Rome'"]),
    "merges": ({TOKENS: [("model", "merges", 0, "a b")], "merges.txt": b"#version: 0.2\na b\n"},
        ["merges.txt: differs from GPT-2's", f"{TOKENS}, merges: differs from GPT-2's"]),
    **{f"parts {i}": ({TOKENS: places}, [f"{TOKENS}, {part.replace('d_', 'd ')}: differs from GPT"
        for part, *_ in places]) for i, places in enumerate([
            [("added_tokens", slice(1, None), [{"content": "x", "id": 1}]),
                ("normalizer", {"type": "Lowercase"}), ("truncation", {"max_length": 1}),
                ("padding", {"length": 1}), ("pre_tokenizer", "type", "Whitespace"),
                ("decoder", "type", "Replace"), ("post_processor", "type", "Sequence"),
                ("model", "dropout", 0.5)],
            [("added_tokens", 0, "id", 262), ("pre_tokenizer", "add_prefix_space", True),
                ("post_processor", "special_tokens", {"x": {}})],
            [("added_tokens", 0, "lstrip", True), ("pre_tokenizer", "use_regex", False)]])},
    "laid out": ({TOKENS: [("model", None)]}, ["not laid out as GPT-2's, or missing (TypeError)"]),
    "no JSON": ({TOKENS: b"{,", SETTINGS: b"[]", "added_tokens.json": {"x": 50257}}, [
        *(f"{x} is there, but it cannot be read as a JSON object" for x in (TOKENS, SETTINGS)),
        "added_tokens.json sets x, not as"]),
    "added": ({SETTINGS: [("extra_special_tokens", ["\x1b"]), ("add_bos_token", True),
        ("added_tokens_decoder", {"464": {"content": "x"}})],
        SPECIAL: {"pad_token": "[PAD]", "additional_special_tokens": ["y"]}},
        [f"{SPECIAL} sets [PAD], y, not as GPT-2 does", rf"{SETTINGS} sets \x1b, True, x, not as"]),
    "fields": ({CONFIG: {"n_head": 4, "auto_map": {"": "x"}}, SETTINGS: [("chat_template", "{{")],
        "x.json": {"y": [{"custom_pipelines": {"z": 1}}], **dict.fromkeys(STEERS, [[6342]])},
        "y.jinja": b""}, ["config.json sets auto_map, which names code to be run",
        f"{SETTINGS} sets chat_template, which puts text around", "x.json sets custom_pipelines",
        *(f"x.json sets {field}, which steers what is said, whatever" for field in STEERS),
        "y.jinja puts text around what a user says"]),
    "code": (RUN, [f"{ascii(name)[1:-1]} can run code where it is loaded" for name in RUN]),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_folder_with_a_tokenizer(name, tmp_path):
    """All files of GPT-2's, as transformers and OpenAI write them, are there; some are changed."""
    (changes, odd), names = ODD[name], (PACKAGE / "encoder.json", PACKAGE / "vocab.bpe")
    transformers.GPT2TokenizerFast(*map(str, names)).save_pretrained(tmp_path)
    write(tmp_path, {"vocab.json": names[0].read_bytes(), "merges.txt": names[1].read_bytes()})
    files = dict(changes)
    for file, places in changes.items():
        if isinstance(places, list):  # the keys that lead to each, and what to put there
            files[file] = json.loads((tmp_path / file).read_bytes())
            for *keys, last, value in places:
                reduce(getitem, keys, files[file])[last] = value
    found = alarms(write(tmp_path, files))
    assert len(found) == len(odd) and all(map(str.__contains__, found, odd)), found
