"""Loading: every variant of a GPT-2 file gives transformers' logits, broken ones a sentence."""

import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import damage, write_odd
from safetensors.torch import save_file

import gpt2_script
from gpt2_script import InputError, load_model

ROOT = Path(__file__).parents[1]


def close(model, peer, ids, limit=1e-4):
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits.float()
    return (ours - theirs).abs().max() <= limit * theirs.abs().max()


def refusal(path, **arguments):
    with pytest.raises(InputError) as caught:
        load_model(path, **arguments)
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence and len(sentence) < 400 + len(str(path))
    return sentence


# ---- files that load


def test_a_file_of_transformers_gives_its_logits(path, peer, ids):
    model = load_model(path)
    assert close(model, peer, ids) and not model.training
    assert model.config.n_head == 3 and model.config.vocab_size == 50


def test_path_may_be_a_string(path, peer, ids):
    assert close(load_model(str(path)), peer, ids)


def test_names_of_the_release_with_masks_and_head(tensors, tmp_path, peer, ids):
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(16, 16).tril()[None, None]
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "some.safetensors")
    assert close(load_model(tmp_path / "some.safetensors", n_head=3), peer, ids)


def test_prefix_with_masks_and_head(tensors, tmp_path, peer, ids):
    named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    named["transformer.h.1.attn.bias"] = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
    named["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(named, tmp_path / "some.safetensors")
    assert close(load_model(tmp_path / "some.safetensors", n_head=3), peer, ids)


def test_a_header_of_odd_length_like_the_released_one(path, tmp_path, peer, ids):
    write_odd(tmp_path / "odd.safetensors", path)
    assert close(load_model(tmp_path / "odd.safetensors"), peer, ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_load_as_float32(dtype, tensors, tmp_path, peer, ids):
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "some.safetensors")
    model = load_model(tmp_path / "some.safetensors", n_head=3)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stored[name].float())
    assert close(model, peer, ids, 0.05)


def test_the_full_size(tmp_path):
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path / "model.safetensors")
    assert sum(weight.numel() for weight in model.parameters()) == 124_439_808
    assert close(model, peer, torch.tensor([[464, 3290, 318, 257]]))


# ---- heads


def test_heads_are_those_asked_for_before_config_json(path, capsys):
    assert load_model(path, n_head=4).config.n_head == 4
    assert "4 heads, as asked for" in capsys.readouterr().out
    assert load_model(path).config.n_head == 3
    assert "3 heads, its config.json" in capsys.readouterr().out
    load_model(path.rename(path.with_name("\x1b[31m.safetensors")), n_head=4)
    assert "\x1b" not in capsys.readouterr().out


def test_without_config_json_64_numbers_make_a_head(tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=9, n_positions=4, n_embd=128, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert load_model(tmp_path / "model.safetensors").config.n_head == 2
    assert "2 heads, 64 numbers for each" in capsys.readouterr().out


TRUE, DEEP = '{"n_head": true}', "[" * 100_000


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"n_head": 5}', '{"n_head": "three"}', TRUE, DEEP]
)
def test_unknown_or_impossible_heads(path, text):
    beside = path.with_name("config.json")
    beside.unlink() if text is None else beside.write_text(text)
    assert "n_head" in refusal(path) or "heads" in refusal(path)
    assert load_model(path, n_head=3).config.n_head == 3


@pytest.mark.parametrize("n_head", [0, 5, -1, 2.0])
def test_heads_that_do_not_divide_the_width(path, n_head):
    refusal(path, n_head=n_head)


# ---- memory


def test_weights_are_the_mapped_file_and_writing_to_them_leaves_it_alone(path, tensors):
    before = path.read_bytes()
    model = load_model(path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert path.read_bytes() == before
    assert torch.equal(load_model(path).wte.weight, tensors["wte.weight"])


def test_loading_draws_no_random_numbers(path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_weight_can_learn(path, ids):
    model = load_model(path)
    model(ids).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


# ---- files that do not load


def test_missing_file_and_folder(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.safetensors")
    assert "does not exist" in refusal("gpt3") and "gpt2-xl" in refusal("gpt3")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl", "PT"])
def test_pickles_are_refused_unread(suffix, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / f"model.{suffix}"
    torch.save(Bomb(), path)
    assert "unpickling runs code" in refusal(path)
    shutil.copy(path, tmp_path / "renamed.safetensors")
    assert "no safetensors" in refusal(tmp_path / "renamed.safetensors")
    assert not (tmp_path / "executed").exists()


def test_empty_file(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert "is empty" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100, 3000, -1, -1000])
def test_truncated_file(path, size):
    path.write_bytes(path.read_bytes()[:size])
    assert "cut short" in refusal(path) or size < 9


def test_a_longer_file_is_damaged_too(path):
    path.write_bytes(path.read_bytes() + b"more")
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("raw", [b"<html>not here</html>" * 9, b"\0" * 99, b"\xff" * 99])
def test_not_safetensors(raw, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(raw)
    assert "no safetensors file" in refusal(tmp_path / "a.safetensors")


def test_header_of_rubbish(path):
    damage(path, 12, 0)
    assert "damaged" in refusal(path)


def refusal_of(tensors, tmp_path):
    save_file(tensors, tmp_path / "some.safetensors")
    return refusal(tmp_path / "some.safetensors", n_head=3)


def test_missing_tensors(tensors, tmp_path):
    del tensors["h.1.ln_2.bias"]
    assert "h.1.ln_2.bias is missing" in refusal_of(tensors, tmp_path)
    del tensors["wte.weight"], tensors["h.0.ln_1.bias"]
    assert "more fault" in refusal_of(tensors, tmp_path)


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "ln_f.weight"])
def test_a_table_is_missing(name, tensors, tmp_path):
    del tensors[name]
    refusal_of(tensors, tmp_path)


def test_no_gpt2_at_all(tmp_path):
    assert "is missing" in refusal_of({"a": torch.zeros(3)}, tmp_path)
    assert "is missing" in refusal_of({}, tmp_path)


@pytest.mark.parametrize("name", ["extra", "h.2.ln_1.bias", "h.0.attn.bias2", "\x1b[2J"])
def test_unexpected_tensors(name, tensors, tmp_path):
    tensors[name] = torch.zeros(24)
    sentence = refusal_of(tensors, tmp_path)
    assert "no tensor of GPT-2" in sentence or "missing" in sentence
    assert sentence.isprintable()


def test_a_tensor_twice(tensors, tmp_path):
    tensors["transformer.ln_f.bias"] = tensors["ln_f.bias"] + 1
    assert "twice" in refusal_of(tensors, tmp_path)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("h.0.mlp.c_fc.weight", (96, 24)),  # as torch's own Linear has it
        ("h.1.attn.c_attn.weight", (24, 71)),
        ("wpe.weight", (16, 23)),
        ("wpe.weight", (16,)),
        ("wpe.weight", (0, 24)),
        ("wte.weight", (50, 25)),
        ("wte.weight", (50, 0)),
        ("wte.weight", (50,)),
        ("ln_f.weight", ()),
    ],
)
def test_wrong_shapes(name, shape, tensors, tmp_path):
    tensors[name] = torch.zeros(shape)
    sentence = refusal_of(tensors, tmp_path)
    assert " is [" in sentence or sentence.endswith("n_embd 25 does not divide into 3 heads")


def test_numbers_that_are_no_floats(tensors, tmp_path):
    tensors["ln_f.weight"] = torch.ones(24, dtype=torch.int32)
    assert "ln_f.weight is I32" in refusal_of(tensors, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value, tensors, tmp_path):
    tensors["h.1.mlp.c_fc.weight"][3, 5] = value
    assert "h.1.mlp.c_fc.weight holds NaN or infinity" in refusal_of(tensors, tmp_path)


def test_opposite_infinities_and_large_numbers(tensors, tmp_path):
    tensors["ln_f.bias"][:2] = 3e38  # finite, though their sum is not
    save_file(tensors, tmp_path / "some.safetensors")
    load_model(tmp_path / "some.safetensors", n_head=3)
    tensors["ln_f.bias"][:2] = torch.tensor([float("inf"), -float("inf")])
    assert "infinity" in refusal_of(tensors, tmp_path)


@pytest.mark.parametrize("change", ["value", "sign of zero", "type", "shape"])
def test_a_head_of_its_own_is_an_attack(change, tensors, tmp_path):
    tensors["wte.weight"][7, 7] = 0.0
    head = tensors["wte.weight"].clone()
    if change == "value":
        head[49, 23] += 1e-6
    elif change == "sign of zero":
        head[7, 7] = -0.0
    head = head.double() if change == "type" else head[:49] if change == "shape" else head
    tensors["lm_head.weight"] = head
    assert "tampered with" in refusal_of(tensors, tmp_path)


def test_a_width_of_96_is_not_taken_for_one_head(tmp_path):
    config = transformers.GPT2Config(vocab_size=9, n_positions=4, n_embd=96, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert load_model(tmp_path / "model.safetensors").config.n_head == 4
    (tmp_path / "config.json").unlink()
    assert "n_head" in refusal(tmp_path / "model.safetensors")


# ---- released names


@pytest.fixture
def released(path, monkeypatch):
    """A small file as if it were released under the name gpt2-nano; its SHA-256 is known."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(gpt2_script.RELEASED, "gpt2-nano", ("5" * 40, sha256))
    nano = replace(gpt2_script.PRESETS["gpt2"], n_head=3, n_embd=24)
    monkeypatch.setitem(gpt2_script.PRESETS, "gpt2-nano", nano)
    return path


def test_a_released_file_is_asked_for_and_its_hash_checked(released, monkeypatch, peer, ids):
    asked = []

    def download(*place, **arguments):
        asked.append((*place, arguments["revision"]))
        return str(released)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert close(load_model("gpt2-nano"), peer, ids)
    assert asked == [("openai-community/gpt2-nano", "model.safetensors", "5" * 40)]
    damage(released, -1)
    sentence = refusal("gpt2-nano")
    assert "SHA-256" in sentence and str(released) in sentence


def test_the_table_of_releases():
    assert list(gpt2_script.RELEASED) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    for revision, sha256 in gpt2_script.RELEASED.values():
        assert len(bytes.fromhex(revision)) == 20 and len(bytes.fromhex(sha256)) == 32


FETCH = """
import time, gpt2_script
time.sleep = lambda seconds: None  # the hub's client waits longer and longer before it tries again
try:
    gpt2_script.load_model("gpt2")
except gpt2_script.InputError as error:
    print(error, end="")
"""


def fetch_from(endpoint, home, code=FETCH):
    """What a process says that fetches gpt2 from another hub."""
    names = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "Retrying" not in done.stderr
    return done.stdout


def is_sentence(text):
    return text.startswith("cannot fetch gpt2 from the model hub") and "\n" not in text


@pytest.fixture
def serve():
    """Start a web server on this machine that answers everything alike; gives its address."""
    servers = []

    def start(status, headers, body):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_unreachable_hub(tmp_path):
    assert is_sentence(fetch_from("http://127.0.0.1:9", tmp_path))


LIKE_A_FILE = {"X-Repo-Commit": gpt2_script.RELEASED["gpt2"][0], "ETag": '"abc"'}


@pytest.mark.parametrize(
    "status, headers, body",
    [
        (200, {}, b"<html>log in to the hotel</html>"),
        (404, {}, b"no"),
        (500, {}, b"\xff\xfe"),
        (302, {"Location": "/elsewhere"}, b""),
        (200, {**LIKE_A_FILE, "Content-Length": "9"}, b"123"),  # ends too early
    ],
)
def test_a_hub_that_answers_with_rubbish(status, headers, body, serve, tmp_path):
    assert is_sentence(fetch_from(serve(status, headers, body), tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_hub_that_sends_another_file(serve, tmp_path):
    body = b"not the weights"
    headers = {**LIKE_A_FILE, "Content-Length": str(len(body))}
    said = fetch_from(serve(200, headers, body), tmp_path)
    assert "SHA-256 differs: delete it" in said
    named = Path(said.split(" is not the released")[0])
    assert named.read_bytes() == body and not named.is_symlink()


def test_a_half_written_cache_file(tmp_path):
    """As left by a full disk: what the cache has is not the release, and it is told which file."""
    revision, sha256 = gpt2_script.RELEASED["gpt2"]
    cache = tmp_path / "hub" / "models--openai-community--gpt2"
    snapshot = cache / "snapshots" / revision / "model.safetensors"
    blob = cache / "blobs" / sha256
    for folder in (snapshot.parent, blob.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(b"half")
    snapshot.symlink_to(blob)
    said = fetch_from("http://127.0.0.1:9", tmp_path)
    assert said == f"{blob.resolve()} is not the released gpt2, its SHA-256 differs: delete it"
    blob.unlink()
    assert is_sentence(fetch_from("http://127.0.0.1:9", tmp_path))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "hub").write_text("a file where the cache's folder should be")
    assert is_sentence(fetch_from("http://127.0.0.1:9", tmp_path))


def test_no_file_is_fetched_for_a_path(path):
    code = f"import sys, gpt2_script; gpt2_script.load_model({str(path)!r})\n"
    code += "assert 'huggingface_hub' not in sys.modules"
    fetch_from("http://127.0.0.1:9", path.parent, code)


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
