"""Files of a model: what other programs write and what suspicious people send, in small."""

import gc
import hashlib
import json
import os
import pickle
import threading
import time
from pathlib import Path
from unittest import mock
from wsgiref.simple_server import make_server

import pytest
import torch
import transformers
from conftest import damage
from huggingface_hub import hf_hub_download as download
from safetensors.torch import save

from gpt2_script import PRESETS, RELEASED, GPT2Config, InputError, generate, load_model, verify_act

FILE, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TABLE, HEAD, TIE = "wte.weight", "lm_head.weight", "tie_word_embeddings"
NAN, INF, TRIL = torch.nan, torch.inf, torch.ones(1, 1, 16, 16).tril()
UNREADABLE = object()  # --verify ends with the refusal, too


def config(**more):
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return transformers.GPT2Config(**sizes | more)


DRAWN, GENERATOR = transformers.GPT2Model(config()).state_dict(), torch.Generator().manual_seed(0)
T = {name: 0.3 * torch.randn(x.shape, generator=GENERATOR) for name, x in DRAWN.items()}  # sound
T[TABLE][7, 7] = 0.0
WHOLE = save(T)
START = 8 + int.from_bytes(WHOLE[:8], "little")  # of the numbers
ENTRIES, DATA = WHOLE[8:START].decode().rstrip()[1:-1], WHOLE[START:]
ENTRY = '"{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}}'  # of a tensor in a header


def sets(name, index, value):
    changed = {**T, name: T[name].clone()}
    changed[name][index] = value
    return changed


def no(part):
    return {name: tensor for name, tensor in T.items() if part not in name}


def to(dtype, part=""):
    return {name: x.to(dtype) if part in name else x for name, x in T.items()}


def masks(mask, name="attn.bias"):
    return {FILE: T | {f"h.{i}.{name}": mask for i in range(2)}}


def says(**fields):
    return {CONFIG: {"n_head": 4, **fields}}


def headed(change=lambda table: table, files=T, **fields):
    return {FILE: {**files, HEAD: change(T[TABLE].clone())}, **says(**fields)}


def raw(*entries, data=DATA):
    """A file with such a header, not necessarily a sound one."""
    header = f"{{{','.join(entries)}}}".encode()
    return {FILE: len(header).to_bytes(8, "little") + header + data}


def shards(**parts):
    """A model in shards, {file's name: tensors}, and their index."""
    files = {f"{part}.safetensors": tensors for part, tensors in parts.items()}
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    return {FILE: None, INDEX: index, **files}


ONE, TWO = no("h.1"), {name: tensor for name, tensor in T.items() if "h.1" in name}
WIDE = {"vocab_size": 100, "n_embd": 96, "n_layer": 3, "n_head": 2}
NANO = transformers.GPT2Model(config(**WIDE)).state_dict()
NO_GPT2, NO_JSON = "is no tensor of GPT-2", "config.json is there, but it cannot be read as a JSON"

# folder: its files, other than the sound ones; what it loads like, as tensors and settings for
# transformers, or a part of the refusal; a part of every alarm of --verify, if it is another one
CASES = {
    # a GPT-2 as other programs write it
    "alias": (headed(files=no(TABLE)), {}), "head, untied": (headed(**{TIE: False}), {}),
    "prefix, head": (headed(files={f"transformer.{name}": x for name, x in T.items()}), {}),
    "shards": (shards(one=ONE, two=TWO), {}),
    "file and shards": ({**shards(one=to(torch.half)), FILE: T}, {}, "one.safetensors holds"),
    "starts like a zip": (raw(ENTRIES.ljust(int.from_bytes(b"PK", "little") - 2)), {}),
    **{f"{x}, {part}": ({FILE: to(x, part)}, {"tensors": to(x, part)}) for x, part in [
        (torch.half, ""), (torch.half, "mlp"), (torch.bfloat16, ""), (torch.double, "")]},
    **{f"mask, {x}": (masks(TRIL.to(x)), {}) for x in (torch.bool, torch.uint8, torch.float)},
    "masked_bias": (masks(torch.tensor(-1e4), "attn.masked_bias"), {}),
    "sum overflows": ({FILE: sets("wpe.weight", (15, slice(2)), 3e38)}, {}),
    "other names": ({CONFIG: {"num_attention_heads": 8, "hidden_size": 64, "n_inner": 256,
        "max_position_embeddings": 16}}, {"n_head": 8}),
    "every field": ({CONFIG: config(n_head=2).to_dict()}, {"n_head": 2}),
    "epsilon": (says(layer_norm_epsilon=0.1), {"layer_norm_epsilon": 0.1}, "epsilon 0.1, not GPT"),
    "as wide as nano": ({FILE: NANO, **says(**WIDE)}, {"tensors": NANO, **WIDE}, "nano's is 4"),
    **{x: ({CONFIG: '{"n_head": 2}'.encode(x)}, {"n_head": 2}) for x in ("utf-8-sig", "utf-16")},
    "no config": ({CONFIG: None}, {"n_head": 1}),
    "config without heads": ({CONFIG: {}}, "tells n_head", None),
    **{f"config {text[:20]}": ({CONFIG: text}, NO_JSON)
        for text in (b'{"n_head": 4,}', b'{"n_head": 4, "by": "\xe9"}', b"[4]", b"[" * 100_000,
            b'{"n_head": 4, "x": ' + b"[" * 600 + b"]" * 600 + b"}")},
    **{f"{field} {value!r}"[:40]: (says(**{field: value}), f"{field} ")
        for field, *values in [
            ("n_head", True, 2.0, None, 0, -4), ("num_attention_heads", "4", 2),
            ("layer_norm_epsilon", "x", 0.0, 0, NAN, INF, 10**400), ("n_inner", 100), (TIE, False),
            ("model_type", "bert", "\x1b[31m" * 999), ("activation_function", "gelu"),
            ("quantization_config", {"bits": 4}), ("pruned_heads", {"0": [1]}), ("n_layer", 12),
            ("add_cross_attention", True), ("is_encoder_decoder", True), ("n_embd", 768),
            ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
            ("hidden_size", 65), ("num_hidden_layers", 1), ("vocab_size", 50257),
            ("n_positions", 1024), ("max_position_embeddings", 8), ("transformers_weights", "x"),
        ] for value in values},
    **{f"{str(n)[:9]} heads": (says(n_head=n), "divide into") for n in (5, 10**4000)},
    "alias, untied": (headed(files=no(TABLE), **{TIE: False}), TIE),
    # tensors that are not GPT-2's
    **{f"head {i}": (headed(change, **{TIE: i > 0}), "of its own") for i, change in enumerate([
        lambda x: x.index_fill(0, torch.tensor(9), 1.0), lambda x: x.double(),
        lambda x: torch.where(x == 0, -0.0, x), lambda x: x.view(25, 128)])},
    "int8": ({FILE: to(torch.int8, "c_fc.weight")}, "c_fc.weight is I8"),
    **{f"holds {x}": ({FILE: sets("ln_f.bias", range(2), torch.tensor(x))}, "ln_f.bias holds NaN")
        for x in ([NAN, 0], [INF, 0], [INF, -INF])},
    "above float32": ({FILE: T | {"ln_f.bias": 1e200 * T["ln_f.bias"].double()}}, "holds NaN"),
    "block missing": ({FILE: no("h.0.")}, "h.0.ln_1.weight is missing", ""),
    **{f"no {x}": ({FILE: no(x)}, f"{x} is missing") for x in (TABLE, "wpe.weight", "ln_f.bias")},
    "block 999...": ({FILE: T | {f"h.{'9' * 5000}.attn.bias": TRIL}}, NO_GPT2),
    **{f"extra {name!a}": ({FILE: T | {name: TRIL}}, f"{name!a} {NO_GPT2}")
        for name in ("\x1b[2J\n", "h.0.\x1b", "attn.bias", "h.0.attn.bias2", "h.00.attn.bias",
            "h.999999999.attn.bias", "h.٣.attn.bias")},
    "block 2 has a mask alone": ({FILE: T | {"h.2.attn.bias": TRIL}}, "h.2.", "h.2."),
    "twice": ({FILE: T | {"transformer.ln_f.bias": TRIL}}, "a second 'ln_f.bias'", UNREADABLE),
    **{f"{name} {shape}": ({FILE: T | {name: torch.zeros(shape)}}, f"{name} is")
        for name, *shape in [("h.0.mlp.c_fc.weight", 256, 64), ("wpe.weight", 16, 63),
            ("wpe.weight", 16), ("wpe.weight", 0, 64), (TABLE, 50, 0), ("ln_f.weight",)]},
    **{f"mask {i}": (masks(mask), {}, "not the causal mask")  # the last by one number
        for i, mask in enumerate([TRIL * 0 + 1, TRIL[..., :8, :8], TRIL.flatten(),
            TRIL.bool() ^ (torch.arange(256) == 37).view(1, 1, 16, 16)])},
    "mask, short": (masks(TRIL.short()), {}, "bias is I16 [1, 1, 16, 16], which no mask is"),
    **{f"mask of {len(more)}, {shape}": (raw(ENTRIES, ENTRY.format("h.0.attn.bias", "BOOL", shape,
        len(DATA), len(DATA + more)), data=DATA + more), {}, odd) for shape, more, odd in [
            ("16,16", bytes(TRIL.byte().flatten() * 7), "not the causal mask"),
            (f"{2**63},0", b"", "which no mask is")]},
    **{f"hides {x}": (masks(torch.tensor(x), "attn.masked_bias"), {}, "hides nothing")
        for x in (0.0, NAN, [-1e4, -1e4])},
    # headers that could take long
    "12,000 times": (raw(*[ENTRY.format("a", "F32", 0, 0, 0)] * 12_000, data=b""),
        "a second 'a'", UNREADABLE),
    "16,000 blocks": ({FILE: dict.fromkeys([TABLE, "wpe.weight", *(f"h.{i}.attn.c_proj.weight"
        for i in range(16_000))], torch.ones(1, 1)), **says(n_head=1)}, "of 16000 blocks many"),
    "long context": ({FILE: {TABLE: torch.ones(1, 1), "wpe.weight": torch.ones(1 << 19, 1),
        "h.0.attn.bias": TRIL}}, "is missing", ""),  # a mask for it would have 2 ** 38 numbers
    **{f"file {content[:9]} {len(content)}": ({FILE: content}, part, UNREADABLE)
        for part, *contents in [
            ("is empty", b""), ("no safetensors file", b"<html>log in</html>", WHOLE[:8]),
            ("cut short or damaged", WHOLE[:9], WHOLE[:-1], WHOLE + b"x",
                raw('"a":{' * 50_000)[FILE], (10**11).to_bytes(8, "little") + WHOLE[8:]),
        ] for content in contents},
    "only a pickle": ({FILE: None, "pytorch_model.bin": b""}, f"folder without {FILE}", UNREADABLE),
    "a tensor in two shards": (shards(one=T, two=TWO), "holds a second '", UNREADABLE),
    "index not JSON": ({**shards(one=T), INDEX: b"{,"}, "index.json is there, but", UNREADABLE),
    **{f"index {names}": ({**shards(one=ONE), INDEX: {"weight_map": names}}, part, UNREADABLE)
        for part, *indices in [("folder without 2.x", {"a": "2.x"}), ("pickle", {"a": "one.bin"}),
            ("does not name the files of its own folder", {}, ["one.safetensors"], {"a": "../x"},
                {"a": "/x"}, {"a": ".."}, {"a": ""}, {"a": 5})] for names in indices},
}  # fmt: skip
gc.freeze()  # or a timing below counts a walk through all that the imports made


def write(folder, files=()):
    """A sound model's folder, but for these files: tensors, JSON or bytes; None is no file."""
    folder.mkdir(exist_ok=True)
    for name, content in {FILE: T, **says(), **dict(files)}.items():
        if isinstance(content, dict) and name.endswith(".safetensors"):
            content = save({key: tensor.contiguous().clone() for key, tensor in content.items()})
        elif isinstance(content, dict):
            content = json.dumps(content).encode()
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def refusal(path, act=load_model, **arguments):
    with pytest.raises(InputError) as caught:
        act(path, **arguments)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def alarms(*paths):
    return [text for record in verify_act(*paths) for text in getattr(record, "odd", ())]


def check_parity(model, ids, tensors=T, **settings):
    peer = transformers.GPT2LMHeadModel(config(**settings)).eval()
    peer.transformer.load_state_dict({name: x.float() for name, x in tensors.items()})
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_folder(name, tmp_path, ids):
    files, expected, *odd = CASES[name]
    odd = odd[0] if odd else expected if isinstance(expected, str) else None
    write(tmp_path, files)
    start = time.process_time()
    if isinstance(expected, str):
        sentence = refusal(tmp_path)
        assert expected in sentence and sentence.isprintable()
    else:
        model = load_model(tmp_path)
        check_parity(model, ids, **expected)
        assert {(x.dtype, model.training) for x in model.parameters()} == {(torch.float32, False)}
    loaded = time.process_time()
    if odd is UNREADABLE:
        assert expected in refusal(tmp_path, alarms)
    else:
        found = alarms(tmp_path)
        assert bool(found) == (odd is not None) and len(found) == len({*found}) < 25
        assert all(odd in text and text.isprintable() for text in found)
    assert loaded - start < 1 and time.process_time() - loaded < 3


def test_a_pickle_is_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path))
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    paths = [tmp_path / f"model.{suffix}" for suffix in ("PT", "bin", "ckpt", "pkl", "pt", "pth")]
    for i, path in enumerate(paths):
        torch.save(bomb, path) if i % 2 else path.write_bytes(pickle.dumps(bomb))
        assert "unpickling runs code" in refusal(path)
    assert alarms(tmp_path) == [f"{path.name} can run code where it is loaded" for path in paths]
    for path in paths[:2]:
        path.replace(tmp_path / FILE)
        assert "no safetensors file" in refusal(tmp_path)
    assert not os.path.exists("executed")


def test_what_is_no_file(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe.safetensors")
    for name in ("gpt3", "./gpt2", "a\0b", "/dev/null", pipe):
        assert f"{name} is no file: give a .safetensors file, a model's folder" in refusal(name)
    assert "is empty" in refusal("") and "not UTF-8" in refusal("\udcff.safetensors")
    for make, *target in [(os.mkfifo,), (os.symlink, "nowhere"), (os.symlink, "."), (os.mkdir,)]:
        for name in (CONFIG, "a.json" if make is os.mkdir else "a"):
            path = write(tmp_path / f"{make.__name__} {target} {name}", {CONFIG: None}) / name
            make(*target, path)
            assert f"{path} is no file that can be read" == refusal(path.parent, alarms)
            assert name != CONFIG or NO_JSON in refusal(path.parent)


def test_gpt2_is_the_release_and_its_path_a_folder(tmp_path, monkeypatch, ids):
    monkeypatch.setattr("gpt2_script.fetch", lambda name: load_model(f"no {name} fetched"))
    monkeypatch.chdir(write(tmp_path))
    assert "no gpt2 fetched" in refusal(Path("gpt2"))  # where there is no such folder
    write(tmp_path / "gpt2", says(n_head=2))
    for name in ("./gpt2", Path("gpt2"), f"gpt2/{FILE}"):
        check_parity(load_model(name), ids, n_head=2)
        assert alarms(name, name) == []
    for path, trusted in [("gpt2", None), (".", "gpt2"), (Path("gpt2"), "gpt2-xl")]:
        assert f"no {trusted or path} fetched" in refusal(path, lambda x, y=trusted: alarms(x, y))


def test_heads_are_those_asked_for_or_guessed_where_there_is_no_config(tmp_path, capsys):
    assert load_model(write(tmp_path), n_head=2).config.n_head == 2
    for n_head in (0, 2.0, True, 5):
        assert f"does not divide into {n_head} heads" in refusal(tmp_path, n_head=n_head)
    (tmp_path / CONFIG).write_text("{")
    assert NO_JSON in refusal(tmp_path, n_head=4)
    (tmp_path / CONFIG).unlink()
    assert capsys.readouterr().out == ""
    path = (tmp_path / FILE).rename(tmp_path / "\x1b[31m.safetensors")
    assert load_model(path).config.n_head == 1
    said = capsys.readouterr().out
    assert "1 head, 64 numbers for each" in said and "\x1b" not in said
    assert "tells n_head" in refusal(write(tmp_path, {FILE: NANO, CONFIG: None}))  # 96 wide


def test_weights_are_the_mapped_file_and_can_be_trained_and_changed(tmp_path, ids):
    before = torch.get_rng_state()
    model = load_model(write(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / FILE) in Path("/proc/self/maps").read_text()
    model(ids).sum().backward()
    for weight in model.parameters():
        weight.data += weight.grad
    assert (tmp_path / FILE).read_bytes() == WHOLE


def test_a_release_is_fetched_and_its_hash_checked(tmp_path, monkeypatch, capfd, ids):
    """From `hub`, which answers everything with `answer`, or is not there."""
    assert list(RELEASED) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert {len(bytes.fromhex(x)) for pair in RELEASED.values() for x in pair} == {20, 32}

    def reply(environment, start):
        status, headers, body = answer
        start(f"{status} is its status", [*headers.items()])
        return [body] * (environment["REQUEST_METHOD"] == "GET")

    server = make_server("127.0.0.1", 0, reply)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between one attempt and the next
    asked = mock.Mock(wraps=lambda *a, **k: download(*a, **k, endpoint=hub, cache_dir=cache))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    monkeypatch.setitem(RELEASED, "gpt2", ("5" * 40, hashlib.sha256(WHOLE).hexdigest()))
    monkeypatch.setitem(PRESETS, "gpt2", GPT2Config(n_head=4))
    like_a_file = {"X-Repo-Commit": "5" * 40, "ETag": '"abc"', "Content-Length": f"{len(WHOLE)}"}
    cache, hub = tmp_path / "hub", f"http://127.0.0.1:{server.server_port}"
    for said in [
        (404, {}, b"no"), (500, {}, b"\xff\xfe"), (302, {"Location": "/elsewhere"}, b""),
        (200, {}, b"<html>log in to the hotel</html>"), (200, like_a_file, b"123"),  # too short
    ]:  # fmt: skip
        answer = said
        sentence = refusal("gpt2")
        assert sentence.startswith("cannot fetch gpt2 from the model hub (")
        assert sentence.isprintable() and not [*cache.rglob(FILE)]
    assert "Retrying" not in capfd.readouterr().err
    answer = 200, like_a_file, WHOLE
    check_parity(load_model("gpt2"), ids)
    asked.assert_called_with("openai-community/gpt2", FILE, revision="5" * 40, token=False)
    hub = "http://127.0.0.1:9"  # from here on there is none, but what is in the cache
    check_parity(load_model("gpt2"), ids)
    path = next(cache.rglob(FILE)).resolve()  # not the link to it
    damage(path, -1)
    assert refusal("gpt2") == f"{path} is not the released gpt2, its SHA-256 differs: delete it"
    path.unlink()
    assert "cannot fetch" in refusal("gpt2")
    server.shutdown()


@pytest.mark.network
def test_the_released_gpt2_continues_the_dog(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    try:
        model = load_model("gpt2")
    except InputError as error:
        pytest.skip(str(error))
    known = "464 3290 373 1043 287 257 2214 1474 262 16246 286 262 2688 290 2688 27262 13 198 198"
    ids = generate(model, torch.tensor([[464, 3290]]), 18)
    assert ids[0].tolist() == [*map(int, known.split()), 464]
