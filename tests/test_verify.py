"""--verify: what it finds in a model's files, alone and beside a trusted copy."""

import json
import os
import pickle
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import save
from test_weights import (
    BIAS,
    CONFIG,
    FILE,
    INDEX,
    START,
    TABLE,
    WHOLE,
    Bomb,
    T,
    changed,
    shards,
    write,
)

import gpt2_script as gpt

STATUS = {"RUNS CODE": 1, "UNREADABLE": 2, "UNSOUND": 1, "DIFFERS": 1}
STATUS |= {"WORTH READING": 0, "nothing": 0}


@pytest.fixture
def verify(capsys, monkeypatch):
    """A function: runs the script's --verify and returns its exit status, the kinds of
    what was found, and all that was printed."""
    monkeypatch.setattr(gpt.console, "width", 1000)

    def run(path, trusted=None):
        against = [] if trusted is None else ["--against", str(trusted)]
        status = gpt.main(["--verify", str(path), *against])
        printed = capsys.readouterr().out
        kinds = [kind for kind in gpt.KINDS if f"\n{kind} ─" in printed]
        return status, kinds or ["nothing"], printed

    return run


def says(**fields):
    return {CONFIG: {"n_head": 2, **fields}}


def pickled(name, protocol):
    return {name: pickle.dumps(Bomb(), protocol)}


HALVES = shards(dict([*T.items()][:9]), dict([*T.items()][9:]))
LLAMA = {"model.embed_tokens.weight": torch.ones(9, 4).bfloat16()}
LLAMA["model.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4).char()
ADAPTER = {"adapter_model.safetensors": {"lora_A.weight": torch.ones(2, 4)}}
ADAPTER["adapter_config.json"] = {"base_model_name_or_path": "org/name", "r": 2}
TEXTS = {"README.md": "# Größe".encode(), ".gitattributes": b"* text", "LICENSE": b""}
TEXTS |= {"MERGES.TXT": b"#version: 0.2", "tokenizer.model": b"\n\x0e\n\x05<unk>"}
TEXTS |= {".git/hooks/a.sample": b"#!/bin/sh", ".cache/huggingface/a.lock": b"PK"}
NAMELESS = says(auto_map={}, trust_remote_code=False, _name_or_path="org/name")
NAMELESS[CONFIG] |= {"unit": "km/h", "summary": "and/or", "pipeline_tag": "text/plain"}
NAMELESS[CONFIG] |= {"labels": ["----", "a.py"], "id2label": {"0": "his/hers"}}
TEXTS |= {"a.txt": b"PKG notes", "b.txt": b"class\nof 2024\nResults\nbuilt"}
TEXTS |= {"c.txt": b"cat\ndog\nRust\nelephant", "d.txt": b"import\nthis\nRust"}
HEX = b"I0x1\n0cos\nsystem\n(Vecho X\ntR."  # pickletools refuses the first number
OCTAL = b"I010\n0cos\nsystem\n(Vecho X\ntR."  # and pickle._Unpickler this one
STACKED = "Vos\nVsystem\nq\xc2\x93(Vecho X\ntR.".encode()
ESCAPED = b'{"auto\\u005fmap": {"AutoModel": "modeling.Model"}}'
PLACES = HALVES[INDEX]["weight_map"]
ONE = {"weight_map": dict.fromkeys(PLACES, "model-1-of-2.safetensors")}
HALF_INDEX = {"weight_map": dict([*PLACES.items()][:9])}
ELSEWHERE = {f"{FILE}.index.json": {"weight_map": {TABLE: "../other/a.safetensors"}}}

FOLDERS = {  # what is found, a part of the sentence, what is not as in the sound folder
    "sound": ("nothing", "a trusted copy can tell", {}),
    "shards": ("nothing", "", HALVES),
    "another architecture": ("nothing", "", {FILE: LLAMA}),
    "an adapter": ("nothing", "", {FILE: None, CONFIG: None, **ADAPTER}),
    "texts, git, the hub": ("nothing", "", TEXTS),
    "code that is none": ("nothing", "", NAMELESS),
    "one text": ("nothing", "", {"a.json": b'"org/name"'}),
    "template in JSON": ("WORTH READING", "chat_template", says(chat_template="{{")),
    "template": ("WORTH READING", "puts text around", {"chat_template.jinja": b"{{"}),
    "suppressed": ("WORTH READING", "suppress_tokens", says(suppress_tokens=[6342])),
    "pickle, bin": ("RUNS CODE", "pytorch_model.bin", pickled("pytorch_model.bin", 2)),
    "pickle, text": ("RUNS CODE", "notes.txt", pickled("notes.txt", 0)),
    "pickle, binary text": ("RUNS CODE", "notes.txt", pickled("notes.txt", 1)),
    "pickle, 0x1": ("RUNS CODE", "notes.txt", {"notes.txt": HEX}),
    "pickle, 010": ("RUNS CODE", "notes.txt", {"notes.txt": OCTAL}),
    "pickle, stack": ("RUNS CODE", "notes.txt", {"notes.txt": STACKED}),
    "pickle, a list": ("RUNS CODE", "a", {"a": b"csys\npath\nV/evil\na"}),
    "pickle, JSON": ("RUNS CODE", "a.json", pickled("a.json", 0)),
    "pickle, safetensors": ("RUNS CODE", FILE, pickled(FILE, 4)),
    "program": ("RUNS CODE", "not what its name says", {"a.model": b"MZ"}),
    "shell script": ("RUNS CODE", "run", {"run": b"#!/bin/sh"}),
    "Python": ("RUNS CODE", "sub/modeling.py", {"sub/modeling.py": b""}),
    "bytecode": ("RUNS CODE", "a.PYC", {"a.PYC": b""}),
    "machine code": ("RUNS CODE", "a.md", {"a.md": b"\x7fELF\0"}),
    "auto_map": ("RUNS CODE", "auto_map › AutoModel", {CONFIG: ESCAPED}),
    "pipelines": ("RUNS CODE", "a › 0 › custom", says(a=[{"custom_pipelines": "b"}])),
    "trust": ("RUNS CODE", "trust_remote", says(trust_remote_code=True)),
    "a repository": ("RUNS CODE", "says model: .*name", says(model="org/name")),
    "in a list": ("RUNS CODE", "--tok", says(tokenizer_class=["e/r--tok.T", None])),
    "its revision": ("RUNS CODE", "attn", says(attn_implementation="org/name@main:f")),
    "paged": ("RUNS CODE", "org/name", says(attn_implementation="paged|org/name")),
    "a class": ("RUNS CODE", "name--a.B", says(text_config={"x": "name--a.B"})),
    "a file of code": ("RUNS CODE", "modeling.py", says(x="modeling.py")),
    "a web page": ("UNREADABLE", "a sound safetensors", {FILE: b"<html>"}),
    "a field twice": ("UNREADABLE", "name stands twice", {CONFIG: b'{"a": 2, "a": 4}'}),
    "deep JSON": ("UNREADABLE", "recursion", {"a.json": b"[" * 100_000}),
    "Latin-1": ("UNREADABLE", "'utf-8' codec", {"README.md": "café".encode("latin1")}),
    "no index": ("UNSOUND", "without a sound index", {**HALVES, INDEX: None}),
    "an index of half": ("UNSOUND", "names no file for", {**HALVES, INDEX: HALF_INDEX}),
    "a wrong shard": ("UNSOUND", "-1-of-2.* which is in .*-2-", {**HALVES, INDEX: ONE}),
    "a second tensor": ("UNSOUND", "as another shard does", shards(T, T)),
    "NaN": ("UNSOUND", "ln_f.bias.* NaN", {FILE: changed(BIAS, 3, torch.nan)}),
    "a missing shard": (
        "UNSOUND",
        "-of-2",
        {**HALVES, "model-2-of-2.safetensors": None},
    ),
    "a shard elsewhere": ("UNSOUND", "names ../other/a", ELSEWHERE),
}


@pytest.mark.parametrize("kind, sentence, files", FOLDERS.values(), ids=FOLDERS)
def test_what_is_found_in_a_folder(
    verify, tmp_path, monkeypatch, kind, sentence, files
):
    """And against itself, nothing."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "model", files)
    status, kinds, printed = verify(path)
    assert kinds == [kind]
    assert status == STATUS[kind]
    assert re.search(sentence, printed)
    assert not os.path.exists("executed")

    status, kinds, printed = verify(path, path)
    assert (status, kinds) == (0, ["nothing"])
    assert "the same as in the trusted copy" in printed


NO_BIAS = {name: T[name] for name in T if name != BIAS}
MATRIX = "h.1.mlp.c_proj.weight"  # 256 rows
WORDS = {"vocab.json": {"Ġrequests": 1, "Ġclick": 2, "a": 3}}
SPACES = {"Ġx": 1, " x": 2}
SWAPPED = {"vocab.json": {"Ġrequests": 2, "Ġclick": 1, "a": 3}}
INT8 = {FILE: {"x": torch.ones(4, 4).char()}}
INT8_TOO = {FILE: {"x": torch.zeros(4, 4).char()}}
PADDED = (START).to_bytes(8, "little") + WHOLE[8:START] + b" " * 8 + WHOLE[START:]
HALF = {FILE: {name: x.bfloat16() for name, x in T.items()}}
LARGE = {FILE: {"x": torch.zeros(4096, 1024)}}  # read in four pieces
FAR_DOWN = {FILE: {"x": torch.zeros(4096, 1024).index_fill(0, torch.tensor(3000), 1)}}


def edited(rank):
    """The tensors, one matrix changed in all of its rows by a hundredth of its norm."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, rank, generator=generator)
    change = rows @ torch.randn(rank, 64, generator=generator)
    change *= 0.01 * T[MATRIX].norm() / change.norm()
    return T | {MATRIX: T[MATRIX] + change}


DIFFERENCES = {  # a part of the sentence, these files, and those of the trusted copy
    "shards": ("", HALVES, {}),
    "another header": ("", {FILE: PADDED}, {}),
    "metadata": ("__metadata__.*only in", {FILE: save(T, {"format": "pt"})}, {}),
    "a row": ("row 7 .*rank 1, ", {FILE: changed(TABLE, 7, 9.0)}, {}),
    "rank 20": ("256 of 256 rows, rank 20, 1.00% of its norm", {FILE: edited(20)}, {}),
    "-0": ("row 7 .*rank 0, 0.00%", {FILE: changed(TABLE, (7, 7), -0.0)}, {}),
    "a vector": ("ln_f.bias: .*row 9 ", {FILE: changed(BIAS, 9, 1.0)}, {}),
    "far down": ("x: row 3000 of 4,096, rank 1,", FAR_DOWN, LARGE),
    "the type": ("the type alone: BF16", HALF, {}),
    "int8": ("x: other bytes: I8", INT8_TOO, INT8),
    "a shape": (r"F32 \[49, 64\], trust", {FILE: T | {TABLE: T[TABLE][:49]}}, {}),
    "a tensor more": ("x: is only in this one", {FILE: T | {"x": T[BIAS]}}, {}),
    "a tensor less": ("bias: is only in the trusted copy", {FILE: NO_BIAS}, {}),
    "a text": ("has other bytes", {"a.txt": b"a"}, {"a.txt": b"b"}),
    "a field": ("n_head: 2 → 2.0", says(n_head=2.0), {}),
    "no value": ('a: "nothing" → nothing', says(), says(a="nothing")),
    "an empty list": (r"a: \{\} → \[\]", says(a=[]), says(a={})),
    "a list's item": ('a › 0: nothing → "x"', says(a=["x"]), says(a={"0": "x"})),
    "an empty one less": (r"added: \[\] → nothing", says(), says(added=[])),
    "two spaces": (
        r" x: 1 → nothing\s+a.json\s+ x: 2 →",
        {"a.json": {}},
        {"a.json": SPACES},
    ),
    "a long name": ("N{90,99}… ›|N{99}…", says(**{"N" * 10**5: 1}), {}),
    "words": ("' click' and ' requests' have changed places", SWAPPED, WORDS),
    "code in both": ("", says(auto_map={"A": "b.C"}), says(auto_map={"A": "b.C"})),
    "other pickles": ("other bytes", pickled("a", 0), pickled("a", 1)),
}


@pytest.mark.parametrize(
    "sentence, ours, theirs", DIFFERENCES.values(), ids=DIFFERENCES
)
def test_how_a_folder_differs_from_a_trusted_copy(
    verify, tmp_path, sentence, ours, theirs
):
    path, trusted = write(tmp_path / "ours", ours), write(tmp_path / "theirs", theirs)
    status, kinds, printed = verify(path, trusted)
    expected = (1, ["DIFFERS"])
    if not sentence:
        expected = (0, ["nothing"])
    assert (status, kinds) == expected
    assert re.search(sentence, printed)


def test_the_verdict_comes_last_and_lists_all_that_was_found(verify, tmp_path):
    files = {"a.py": b"", "b.json": b"{", FILE: changed(BIAS, 3, torch.nan)}
    status, _, printed = verify(write(tmp_path, files))
    verdict = printed.split("\nverdict ")[1]
    lines = ["RUNS CODE: a.py", "UNREADABLE: b.json", f"UNSOUND: {FILE}"]
    assert status == 2
    assert "\n".join(lines) in verdict
    assert "Something was found. Do not load this model" in verdict


def test_links_out_of_the_folder_are_found_and_links_within_it_are_not(
    verify, tmp_path
):
    path, other = write(tmp_path / "model"), write(tmp_path / "other")
    (path / "again.json").symlink_to(CONFIG)
    assert verify(path)[:2] == (0, ["nothing"])
    (path / "b.json").symlink_to(other / CONFIG)
    assert verify(path)[:2] == (1, ["RUNS CODE"])

    (path / "c").symlink_to(other)
    os.mkfifo(path / "pipe")
    status, kinds, printed = verify(path)
    assert (status, kinds) == (2, ["RUNS CODE", "UNREADABLE"])
    assert printed.count("is a link out of the folder") == 2


def test_a_file_that_cannot_be_read_is_found_and_the_rest_go_on(
    verify, tmp_path, monkeypatch
):
    def refuse(path, *mode):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return open(path, *mode)

    files = {"a.txt": b"a", "b.py": b""}
    path, trusted = write(tmp_path / "a", files), write(tmp_path / "b", files)
    monkeypatch.setattr(gpt, "open", refuse, raising=False)
    assert verify(path)[:2] == (2, ["RUNS CODE", "UNREADABLE"])
    status, kinds, _ = verify(path, trusted)
    assert (status, kinds) == (0, ["nothing"])  # both are read as they are

    def refuse_all(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gpt.Path, "read_bytes", refuse_all)
    assert verify(path, trusted)[:2] == (2, ["UNREADABLE"])


def test_a_release_in_the_hubs_cache_and_by_its_name(verify, tmp_path, monkeypatch):
    """The cache is made of links into a folder beside it."""
    blob = write(tmp_path / "blobs") / FILE
    path = tmp_path / "snapshots" / "5" / FILE
    path.parent.mkdir(parents=True)
    path.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **b: str(path))
    monkeypatch.setitem(gpt.RELEASED, "gpt2", f"5 {gpt.file_hash(blob)}")
    assert verify(path.parent)[:2] == (0, ["nothing"])
    assert verify("gpt2", blob)[:2] == (0, ["nothing"])
    write(blob.parent, {FILE: changed(BIAS, 9, 1.0)})
    assert verify("gpt2")[0] == 2


NOTHING = [
    ("nowhere", None),
    (FILE, "nowhere"),
    ("empty", None),
    ("", None),
    (FILE, ""),
]


@pytest.mark.parametrize("path, trusted", NOTHING)
def test_what_is_not_there_is_unreadable(verify, tmp_path, monkeypatch, path, trusted):
    monkeypatch.chdir(write(tmp_path))
    os.mkdir("empty")
    assert verify(path, trusted)[0] == 2


def test_any_flipped_bit_is_found_and_its_tensor_named(verify, tmp_path):
    tensors = {"a": T[BIAS].half(), "b": torch.ones(9, 4).bfloat16(), "c": T[TABLE]}
    tensors |= {"d": torch.ones(9).char(), "e": torch.ones(3, 3).double() * torch.nan}
    trusted, path = tmp_path / FILE, tmp_path / "other.safetensors"
    content = write(tmp_path, {FILE: tensors}).joinpath(FILE).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])

    for i, name in enumerate(tensors):
        first, end = header[name]["data_offsets"]
        for place in (first, (first + end) // 2, end - 1):
            damaged = bytearray(content)
            damaged[start + place] ^= 1 << i
            path.write_bytes(damaged)
            status, kinds, printed = verify(path, trusted)
            assert (status, kinds[-1]) == (1, "DIFFERS")
            assert f"{name}: " in printed
