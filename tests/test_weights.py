"""Files of a model: what other programs write and what suspicious people send, in small.

CASES says of each folder what a user may expect of loading it and of --verify.
"""

import hashlib
import json
import math
import os
import pickle
import struct
import threading
import time
from pathlib import Path
from wsgiref.simple_server import make_server

import pytest
import torch
import transformers
from conftest import damage
from huggingface_hub import hf_hub_download
from safetensors.torch import save, save_file

import gpt2_script
from gpt2_script import InputError, fetch, load_model, verify_act

FILE, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TABLE, HEAD, TIE = "wte.weight", "lm_head.weight", "tie_word_embeddings"
NAN, INF, TRIL = math.nan, math.inf, torch.ones(1, 1, 16, 16).tril()
UNREADABLE = object()  # --verify ends with the refusal, too


def config(**more):
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return transformers.GPT2Config(**sizes | more)


def reference(tensors, **settings):
    """transformers' GPT-2 with these tensors."""
    model = transformers.GPT2LMHeadModel(config(vocab_size=len(tensors[TABLE]), **settings))
    model.transformer.load_state_dict({name: x.float() for name, x in tensors.items()})
    return model.eval()


T, GENERATOR = {}, torch.Generator().manual_seed(0)  # the sound model's tensors
for name, x in transformers.GPT2Model(config()).state_dict().items():
    T[name] = 0.3 * torch.randn(x.shape, generator=GENERATOR)
T[TABLE][7, 7] = 0.0
WHOLE = save(T)
START = 8 + int.from_bytes(WHOLE[:8], "little")  # of the numbers
TEXT = WHOLE[8:START].decode().rstrip()
BIAS = json.loads(TEXT)["ln_f.bias"]["data_offsets"]


def sets(name, index, value):
    """The tensors, some numbers of one replaced."""
    changed = {**T, name: T[name].clone()}
    changed[name][index] = value
    return changed


def no(part):
    return {name: tensor for name, tensor in T.items() if part not in name}


def to(dtype, part=""):
    return {name: x.to(dtype) if part in name else x for name, x in T.items()}


def masks(mask, name="attn.bias"):
    return {FILE: T | {f"h.{i}.{name}": mask.clone() for i in range(2)}}


def headed(change=lambda table: table, files=T, **fields):
    """A model with an output table, made from the token table."""
    return {FILE: {**files, HEAD: change(T[TABLE].clone())}, **says(**fields)}


def says(**fields):
    return {CONFIG: {"n_head": 4, **fields}}


def raw(header, data=WHOLE[START:]):
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def adds(name, dtype, shape, data=b"", place=None):
    """The sound file with one more tensor, or with one more name for a place."""
    place = place or [len(WHOLE) - START, len(WHOLE) - START + len(data)]
    entry = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": place}})
    return {FILE: raw(f"{TEXT[:-1]},{entry[1:]}", WHOLE[START:] + data)}


def spaced(low):
    """The sound file, its header so long that the file begins with these bytes."""
    spaces = (int.from_bytes(low, "little") - len(TEXT)) % (1 << 8 * len(low))
    return {FILE: raw(TEXT + " " * spaces)}


def empty(names):
    """A file of tensors without numbers."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return {FILE: raw("{" + ",".join(f'"{name}":{entry}' for name in names) + "}", b"")}


def shards(index=None, **parts):
    """A model in shards, {file's name: tensors}, and their index."""
    named = {name: f"{part}.safetensors" for part, x in parts.items() for name in x}
    files = {f"{part}.safetensors": tensors for part, tensors in parts.items()}
    return {FILE: None, INDEX: {"weight_map": named if index is None else index}, **files}


PREFIXED = {f"transformer.{name}": tensor for name, tensor in T.items()}
LONG = {**T, TABLE: T[TABLE].repeat(2, 1)}
ONE, TWO = no("h.1"), {name: tensor for name, tensor in T.items() if "h.1" in name}
MANY, ONE_BY_ONE = range(12_000), torch.ones(1, 1)
NO_JSON, NO_GPT2 = "config.json is there, but it is not JSON", "is no tensor of GPT-2"
OPEN, OWN = "is not the causal mask that its name says", "an output table of its own"
ELSEWHERE, NO_FILE = "does not name the files of its own folder", "folder without model.safetensors"

# folder: its files, other than the sound ones; what it loads like, as tensors and settings for
# transformers, or a part of the refusal; a part of every alarm of --verify, if it is another one
CASES = {
    # a GPT-2 as other programs write it
    "plain": ({}, {}), "prefix": ({FILE: PREFIXED}, {}), "alias": (headed(files=no(TABLE)), {}),
    "head is tied": (headed(), {}), "head is tied, says not": (headed(**{TIE: False}), {}),
    "prefix and head": (headed(files=PREFIXED), {}), "shards": (shards(one=ONE, two=TWO), {}),
    "file and shards": ({**shards(one=to(torch.half)), FILE: T}, {}, "one.safetensors holds"),
    **{f"starts with {low}": (spaced(low), {}) for low in (b"\3", b"\x80", b"PK")},  # no pickle
    **{f"{x}": ({FILE: to(x)}, {"tensors": to(x)}) for x in (torch.half, torch.bfloat16)},
    "float64": ({FILE: to(torch.double)}, {}),
    "some float16": ({FILE: to(torch.half, "mlp")}, {"tensors": to(torch.half, "mlp")}),
    **{f"mask of {x}": (masks(TRIL.to(x)), {})
        for x in (torch.bool, torch.uint8, torch.half, torch.bfloat16, torch.float)},
    "masked_bias": (masks(torch.tensor(-1e4), "attn.masked_bias"), {}),
    "100 rows": ({FILE: LONG, **says(vocab_size=100)}, {"tensors": LONG}),
    "sum overflows": ({FILE: sets("wpe.weight", (15, slice(2)), 3e38)}, {}),
    # config.json
    "heads, other name": ({CONFIG: {"num_attention_heads": 8}}, {"n_head": 8}),
    "epsilon": (says(layer_norm_epsilon=0.1), {"layer_norm_epsilon": 0.1}, "epsilon 0.1, not GPT"),
    "every field": ({CONFIG: config(n_head=2).to_dict()}, {"n_head": 2}),
    "other names": (says(n_inner=256, hidden_size=64, max_position_embeddings=16), {}),
    **{code: ({CONFIG: '{"n_head": 2}'.encode(code)}, {"n_head": 2})
        for code in ("utf-8-sig", "utf-16", "utf-32-be")},
    "no config": ({CONFIG: None}, {"n_head": 1}),
    "config without heads": ({CONFIG: {}}, "give n_head", None),
    **{f"config {text[:20]}": ({CONFIG: text}, NO_JSON)
        for text in (b"", b'{"n_head": 4,}', b'{"n_head": 4, "by": "\xe9"}', b"[" * 100_000)},
    "config list": ({CONFIG: b"[4]"}, "is not a JSON object"),
    "field nested": ({CONFIG: b'{"model_type":' + b"[" * 900 + b"]" * 900 + b"}"}, "model_type"),
    **{f"{field} {value!r}"[:40]: (says(**{field: value}), f"{field} ")
        for field, *values in [
            ("n_head", True, "3", 2.0, 0, -4, None, [4]), ("num_attention_heads", "4", 4.0, 2),
            ("layer_norm_epsilon", "x", 0.0, 0, -1e-5, NAN, INF, True, None, [], 10**400),
            ("model_type", "bert", "\x1b[31m" * 999),
            ("activation_function", "quick_gelu", "gelu"), ("quantization_config", {"bits": 4}),
            ("n_inner", 100), ("pruned_heads", {"0": [1]}), ("add_cross_attention", True),
            ("is_encoder_decoder", True), ("scale_attn_weights", False), ("n_layer", 12),
            ("scale_attn_by_inverse_layer_idx", True), ("n_embd", 768), ("hidden_size", 65),
            ("num_hidden_layers", 1), ("vocab_size", 50257), ("n_positions", 1024), (TIE, False),
            ("max_position_embeddings", 8), ("transformers_weights", "other.safetensors"),
        ] for value in values},
    **{f"{str(n)[:9]} heads": (says(n_head=n), "divide into") for n in (5, 10**9, 10**4000)},
    "100 rows, says 50": ({FILE: LONG, **says(vocab_size=50)}, "vocab_size 50"),
    "alias, says untied": (headed(files=no(TABLE), **{TIE: False}), TIE),
    # tensors that are not GPT-2's
    **{f"head {i}": (headed(change, **{TIE: i > 0}), OWN)
        for i, change in enumerate([
            lambda table: table + 1, lambda table: table.index_fill(0, torch.tensor(9), 1.0),
            lambda table: torch.where(table == 0, -0.0, table), lambda table: table.double(),
            lambda table: table[:49], lambda table: table.view(25, 128)])},
    "int8": ({FILE: to(torch.int8, "c_fc.weight")}, "c_fc.weight is I8"),
    "int32": ({FILE: to(torch.int32, "ln_f.weight")}, "ln_f.weight is I32"),
    "NaN": ({FILE: sets("h.1.mlp.c_fc.weight", (3, 5), NAN)}, "h.1.mlp.c_fc.weight holds NaN"),
    "infinity": ({FILE: to(torch.half) | {TABLE: (T[TABLE] / 0).half()}}, "wte.weight holds NaN"),
    "infinities": ({FILE: sets("ln_f.bias", range(2), torch.tensor([INF, -INF]))}, "infinity"),
    "block missing": ({FILE: no("h.0.")}, "h.0.ln_1.weight is missing", ""),
    **{f"no {x}": ({FILE: no(x)}, f"{x} is missing") for x in (TABLE, "wpe.weight", "ln_f.bias")},
    **{f"only {[*x]}": ({FILE: x}, "wte.weight is missing") for x in ({}, {"a": TRIL})},
    "extra matrix": ({FILE: T | {"h.0.\x1b": TRIL[0, 0]}}, rf"'h.0.\x1b' {NO_GPT2}", r"h.0.\x1b"),
    "block 999...": ({FILE: T | {f"h.{'9' * 5000}.attn.bias": TRIL}}, NO_GPT2),
    **{f"extra {name!a}": ({FILE: T | {name: TRIL}}, f"{name!a} {NO_GPT2}")
        for name in ["\x1b[2J\n", "h.0.\u202eü", "attn.bias", "h.0.attn.bias2"]
            + [f"h.{n}.attn.bias" for n in ("999999999", "00", "٣", "-1")]},
    "block 2 has a mask alone": ({FILE: T | {"h.2.attn.bias": TRIL}}, "h.2.", "h.2."),
    "twice": ({FILE: T | {"transformer.ln_f.bias": TRIL}}, f"'ln_f.bias once more (1)' {NO_GPT2}"),
    "twice in the header": (adds("ln_f.bias", "F32", [64], place=BIAS), "once more (1)"),
    "twice, float16": (adds("ln_f.bias", "F16", [128], place=BIAS), "once more (1)"),
    **{f"{name} {shape}": ({FILE: T | {name: torch.zeros(shape)}}, f"{name} is")
        for name, *shape in [("h.0.mlp.c_fc.weight", 256, 64), ("h.1.attn.c_attn.weight", 64, 71),
            ("wpe.weight", 16, 63), ("wpe.weight", 16), ("wpe.weight", 0, 64), (TABLE, 50, 0),
            (TABLE, 50), ("ln_f.weight",)]},
    **{f"mask {i}": (masks(mask), {}, OPEN)
        for i, mask in enumerate([
            TRIL * 0 + 1, TRIL * NAN, TRIL[..., :8, :8], TRIL.flatten(), torch.zeros(0, 0),
            TRIL.bool() ^ (torch.arange(256) == 37).view(1, 1, 16, 16)])},  # open by one
    "mask of int64": (masks(TRIL.long()), {}, "attn.bias is I64, which no mask is"),
    "mask of bytes": ({FILE: T | {"h.0.attn.bias": torch.arange(240).byte()}}, {}, OPEN),
    "mask of 7": (adds("h.0.attn.bias", "BOOL", [16, 16], bytes(TRIL.byte().flatten() * 7)), {},
        OPEN),
    "mask of no type": (adds("h.0.attn.bias", "F4", [128], bytes(64)), {}, "is F4"),
    **{f"masked_bias {x}": (masks(torch.tensor(x), "attn.masked_bias"), {}, "hides nothing")
        for x in (0.0, NAN, [-1e4, -1e4])},
    # headers that could take long
    "12,000 blocks": (empty(f"h.{i}.x" for i in MANY), "wte.weight is missing"),
    "12,000 times": (empty("a" for i in MANY), "wte.weight is missing"),
    "3 MB": (empty(f"h.{i}.{'x' * 200}" for i in MANY), "wte.weight is missing"),
    "12,000 matrices": ({FILE: {TABLE: ONE_BY_ONE, "wpe.weight": ONE_BY_ONE.clone()}
        | {f"h.{i}.attn.c_proj.weight": ONE_BY_ONE.clone() for i in MANY}},
        "of 12000 blocks many tensors are missing", ""),
    # no weights
    **{f"file {content and content[:9]} {len(content or b'')}": ({FILE: content}, part, UNREADABLE)
        for part, *contents in [
            ("is empty", b""), (NO_FILE, None), ("cut short or damaged", WHOLE[:9], WHOLE[:300]),
            ("no safetensors file", b"<html>log in</html>", bytes(99), b"\xff" * 99, WHOLE[:3],
                WHOLE[:8], pickle.dumps({"weights": 1})),
            ("damaged", WHOLE[:-1], WHOLE + b"x", WHOLE[:20] + b"\0" + WHOLE[21:],
                raw('{"a":' * 50_000), struct.pack("<Q", 10**11) + WHOLE[8:]),
        ] for content in contents},
    "only a pickle": ({FILE: None, "pytorch_model.bin": b"\x80\4."}, NO_FILE, UNREADABLE),
    "a shard missing": (shards({"a": "2.x"}, one=T), "folder without 2.x", UNREADABLE),
    "a shard is a pickle": (shards({"a": "one.bin"}, one=ONE), "is a pickle", UNREADABLE),
    "a tensor in two shards": (shards(one=T, two=TWO), f"once more (1)' {NO_GPT2}"),
    "index not JSON": ({**shards(one=T), INDEX: b"{,"}, "index.json is there, but", UNREADABLE),
    **{f"index {names}": (shards(names, one=T), ELSEWHERE, UNREADABLE)
        for names in [{}, ["one.safetensors"]] + [{"a": name} for name in
            ("../x", "/etc/passwd", "..", ".", "", "sub/x", "a/../../x", 5, None)]},
}  # fmt: skip


def write(folder, files):
    """Write files as they are given: tensors, JSON, bytes; None is no file."""
    for name, content in files.items():
        if isinstance(content, dict) and name.endswith(".safetensors"):
            content = save({key: tensor.contiguous() for key, tensor in content.items()})
        elif isinstance(content, dict):
            content = json.dumps(content).encode()
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def sound(tmp_path):
    return write(tmp_path, {FILE: T, CONFIG: {"n_head": 4}})


def refusal(path, **arguments):
    with pytest.raises(InputError) as caught:
        load_model(path, **arguments)
    assert len(str(caught.value)) < 250 + 2 * len(str(path))
    return str(caught.value)


def alarms(*paths):
    return [text for record in verify_act(*paths) for text in getattr(record, "odd", ())]


def is_same(model, peer, ids):
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits
    return (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_folder(name, tmp_path, ids):
    files, expected, *rest = CASES[name]
    refused = isinstance(expected, str)
    odd = rest[0] if rest else expected if refused else None
    write(tmp_path, {FILE: T, CONFIG: {"n_head": 4}} | files)
    start = time.process_time()
    if refused:
        sentence = refusal(tmp_path).replace(str(tmp_path), "")
        assert expected in sentence and sentence.isprintable()
    else:
        model = load_model(tmp_path)
        assert is_same(model, reference(**{"tensors": T} | expected), ids) and not model.training
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    loaded = time.process_time()
    if odd is UNREADABLE:
        with pytest.raises(InputError) as caught:
            alarms(tmp_path)
        assert expected in str(caught.value).replace(str(tmp_path), "")
    else:
        found = [text.replace(str(tmp_path), "") for text in alarms(tmp_path)]
        assert bool(found) == (odd is not None) and len(found) == len({*found}) < 25
        assert all(odd in text and text.isprintable() for text in found)
    verified = time.process_time()
    assert loaded - start < 1 and verified - loaded < (4 if name == "12,000 matrices" else 2)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl", "PT", "Bin"])
def test_a_pickle_is_never_unpickled(suffix, sound, monkeypatch):
    monkeypatch.chdir(sound)
    path = sound / f"model.{suffix}"
    for save_bomb in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        save_bomb(Bomb(), path)
        assert "unpickling runs code" in refusal(path)
        assert alarms(sound) == [f"{path.name} can run code where it is loaded"]
        (sound / FILE).write_bytes(path.read_bytes())
        assert "no safetensors file" in refusal(sound)
        save_file(T, sound / FILE)
    assert not os.path.exists("executed")


def test_what_is_no_file(sound, monkeypatch):
    for name in (sound / "no.safetensors", "gpt3", "./gpt2", "a\0b"):
        assert f"{name} does not exist: give a .safetensors file" in refusal(name)
    assert "cannot read aaa" in refusal("a" * 5000) and "is empty" in refusal("")
    assert "is no plain file" in refusal("/dev/null")
    assert "name that is not UTF-8" in refusal(sound / "\udcff.safetensors")
    os.mkfifo(sound / "pipe.safetensors")
    assert "pipe.safetensors is no plain file" in refusal(sound / "pipe.safetensors")
    with pytest.raises(InputError, match="is no plain file"):
        alarms(sound)
    (sound / "pipe.safetensors").rename(sound / CONFIG)
    assert "config.json is no plain file" in refusal(sound)
    (sound / CONFIG).unlink()
    (sound / CONFIG).symlink_to("nowhere")
    assert "cannot read" in refusal(sound)
    monkeypatch.setattr("builtins.open", lambda *arguments: os.open("/nowhere", 0))
    assert "cannot read" in refusal(sound)  # as where it is not allowed


def test_gpt2_is_the_release_and_its_path_a_folder(sound, monkeypatch, ids):
    def no_fetch(name):
        raise InputError(f"fetched {name}")

    monkeypatch.setattr(gpt2_script, "fetch", no_fetch)
    assert "fetched gpt2" in refusal(Path("gpt2"))  # where there is no such folder
    monkeypatch.chdir(sound)
    (sound / "gpt2").mkdir()
    write(sound / "gpt2", {FILE: T, CONFIG: {"n_head": 2}})
    for name in ("./gpt2", Path("gpt2"), sound / "gpt2", f"gpt2/{FILE}", sound / "gpt2" / FILE):
        assert is_same(load_model(name), reference(T, n_head=2), ids)
        assert alarms(name, name) == []
    for paths in [("gpt2",), (".", "gpt2"), (Path("gpt2"), "gpt2-xl")]:
        with pytest.raises(InputError, match="fetched gpt2"):
            alarms(*paths)


def test_heads_are_those_asked_for_or_guessed_where_there_is_no_config(sound, capsys):
    assert load_model(sound, n_head=2).config.n_head == 2
    for n_head in (0, -1, 2.0, True, 5):
        assert f"does not divide into {n_head} heads" in refusal(sound, n_head=n_head)
    (sound / CONFIG).write_text("{")
    assert NO_JSON in refusal(sound, n_head=4)
    (sound / CONFIG).unlink()
    assert capsys.readouterr().out == ""
    assert load_model((sound / FILE).rename(sound / "\x1b[31m.safetensors")).config.n_head == 1
    said = capsys.readouterr().out
    assert "1 head, 64 numbers for each" in said and "\x1b" not in said
    transformers.GPT2LMHeadModel(config(n_embd=96)).save_pretrained(sound)
    assert load_model(sound).config.n_head == 4
    (sound / CONFIG).unlink()
    assert "give n_head" in refusal(sound)


def test_weights_are_the_mapped_file_and_can_be_trained_and_changed(sound, ids):
    before = torch.get_rng_state()
    model = load_model(sound)
    assert torch.equal(torch.get_rng_state(), before)
    if Path("/proc/self/maps").exists():
        assert str(sound / FILE) in Path("/proc/self/maps").read_text()
    model(ids).sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight += weight.grad
    assert (sound / FILE).read_bytes() == WHOLE
    assert torch.equal(load_model(sound).wte.weight, T[TABLE])


def test_a_release_is_asked_for_and_its_hash_checked(sound, monkeypatch, ids):
    assert list(gpt2_script.RELEASED) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    for revision, sha256 in gpt2_script.RELEASED.values():
        assert len(bytes.fromhex(revision)) == 20 and len(bytes.fromhex(sha256)) == 32
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *place, **arguments: asked.append((place, arguments)) or str(sound / FILE),
    )
    monkeypatch.setitem(gpt2_script.PRESETS, "gpt2", gpt2_script.GPT2Config(n_head=4))
    assert f"{sound / FILE} is not the released gpt2, its SHA-256 differs" in refusal("gpt2")
    sha256 = hashlib.sha256(WHOLE).hexdigest()
    monkeypatch.setitem(gpt2_script.RELEASED, "gpt2", ("5" * 40, sha256))
    assert is_same(load_model("gpt2"), reference(T), ids)
    place = "openai-community/gpt2", FILE
    assert asked[-1] == (place, {"revision": "5" * 40, "token": False})
    damage(sound / FILE, -1)
    assert "SHA-256 differs" in refusal("gpt2")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function: how a hub answers everything, nothing if there is none -> what fetch says."""
    answer, download = [], hf_hub_download

    def reply(environment, start):
        status, headers, body = answer
        start(f"{status} is its status", [*headers.items()])
        return [body] * (environment["REQUEST_METHOD"] == "GET")

    server = make_server("127.0.0.1", 0, reply)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between one attempt and the next
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def ask(*said):
        answer[:] = said
        there = {"endpoint": f"http://127.0.0.1:{server.server_port if said else 9}"}
        there["cache_dir"] = tmp_path / "hub"
        fetched = "huggingface_hub.hf_hub_download"
        monkeypatch.setattr(fetched, lambda *a, **k: download(*a, **k | there))
        with pytest.raises(InputError) as caught:
            fetch("gpt2")
        return str(caught.value)

    yield ask
    server.shutdown()
    server.server_close()


REVISION, SHA256 = gpt2_script.RELEASED["gpt2"]
LIKE_A_FILE = {"X-Repo-Commit": REVISION, "ETag": '"abc"', "Content-Length": "9"}
DELETE = " is not the released gpt2, its SHA-256 differs: delete it"


def test_a_hub_that_is_not_there_or_talks_rubbish(hub, tmp_path, capfd):
    for answer in [
        (), (404, {}, b"no"), (500, {}, b"\xff\xfe"), (302, {"Location": "/elsewhere"}),
        (200, {}, b"<html>log in to the hotel</html>"), (200, LIKE_A_FILE, b"123"),  # too short
    ]:  # fmt: skip
        said = hub(*answer)
        assert said.startswith("cannot fetch gpt2 from the model hub (") and said.isprintable()
    assert not [*tmp_path.rglob("*.safetensors")] and "Retrying" not in capfd.readouterr().err
    path = Path(hub(200, LIKE_A_FILE, b"something").removesuffix(DELETE))
    assert path.read_bytes() == b"something" and not path.is_symlink()
    path.unlink()  # as it says
    assert "cannot fetch" in hub()


def test_a_cache_that_is_half_written_or_no_cache(hub, tmp_path):
    """As left by a full disk: what the cache has is not the release, and it is told which file."""
    cache = tmp_path / "hub" / "models--openai-community--gpt2"
    snapshot, blob = cache / "snapshots" / REVISION / FILE, cache / "blobs" / SHA256
    for folder in (snapshot.parent, blob.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(b"half")
    snapshot.symlink_to(blob)
    assert hub() == f"{blob.resolve()}{DELETE}"
    blob.unlink()
    assert "cannot fetch" in hub()
    snapshot.unlink()
    snapshot.mkdir()
    assert "cannot fetch" in hub()
    cache.parent.rename(tmp_path / "other")
    cache.parent.write_text("a file where the cache's folder should be")
    assert "cannot fetch" in hub()


@pytest.mark.network
def test_the_released_gpt2_continues_the_dog(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    try:
        model = load_model("gpt2")
    except InputError as error:
        pytest.skip(str(error))
    known = "464 3290 373 1043 287 257 2214 1474 262 16246 286 262 2688 290 2688 27262 13 198 198"
    ids = gpt2_script.generate(model, torch.tensor([[464, 3290]]), 18)
    assert ids[0].tolist() == [*map(int, known.split()), 464]
