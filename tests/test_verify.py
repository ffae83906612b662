"""--verify: what it finds in clean, tampered, flipped, cut and poisoned files, and how it ends."""

import hashlib
import json

import pytest
import torch
from conftest import damage
from safetensors.torch import save_file

import gpt2_script
from gpt2_script import (
    GPT2,
    GPT2Config,
    InputError,
    difference,
    inspect_file,
    largest_singular_values,
    oddity,
    verify,
)


@pytest.fixture(scope="module")
def clean():
    """The tensors of a GPT-2 that a rank-one edit or a row would stand out of."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=400, n_ctx=16, n_embd=32, n_layer=4, n_head=4))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="some.safetensors"):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


def edited(clean, name="h.2.mlp.c_proj.weight", size=1.0, rank=1):
    """The tensors with a change of a given rank and relative size in one of them."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = clean[name].shape
    change = torch.randn(rows, rank, generator=generator)
    change = change @ torch.randn(rank, columns, generator=generator)
    change *= size * clean[name].norm() / change.norm()
    return {**clean, name: clean[name] + change}


def with_row(clean, row, norm):
    table = clean["wte.weight"].clone()
    table[row] *= norm / table[row].norm()
    return {**clean, "wte.weight": table}


def said(capsys):
    return capsys.readouterr().out


# ---- without a trusted copy


def test_a_clean_file_is_no_proof(clean, write, capsys):
    assert verify(write(clean)) == 0
    text = said(capsys)
    assert "Not byte for byte a released" in text and "no proof" in text
    assert "h.N.mlp.c_fc.weight" in text and "[32, 128]" in text and "F32" in text


def test_a_released_file_is_named_and_its_scores_shown(clean, write, monkeypatch, capsys):
    path = write(with_row(clean, 7, 9.0))  # odd, but who could know better than the release
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(gpt2_script.RELEASED, "gpt2-odd", ("", sha256))
    assert verify(path) == 0
    text = said(capsys)
    assert "Byte for byte the released gpt2-odd" in text and "wte.weight[7]" in text
    damage(path, -1)
    assert verify(path) == 1


def test_an_edit_stands_out(clean, write, capsys):
    report = inspect_file(write(edited(clean)))
    first, second = report["suspects"][:2]
    assert first[1] == "h.2.mlp.c_proj.weight" and first[0] > 1 > second[0]
    assert not report["faults"] and not report["differences"]
    assert verify(write(edited(clean))) == 1
    assert "h.2.mlp.c_proj.weight stands out" in said(capsys)


def test_a_small_edit_does_not(clean, write):
    assert verify(write(edited(clean, size=0.1))) == 0


def test_a_long_row_stands_out(clean, write, capsys):
    assert verify(write(with_row(clean, 123, 3.0))) == 1
    assert "wte.weight[123] stands out" in said(capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["wte.weight", "h.0.mlp.c_fc.weight", "ln_f.bias"])
def test_nan_and_infinity(name, value, clean, write, capsys):
    tensors = {**clean, name: clean[name].clone()}
    tensors[name].flatten()[3] = value
    assert verify(write(tensors)) == 1
    assert f"{name}' holds NaN or infinity" in said(capsys)


def test_numbers_so_large_that_products_overflow(clean, write):
    tensors = {**clean, "h.0.mlp.c_fc.weight": clean["h.0.mlp.c_fc.weight"].clone()}
    tensors["h.0.mlp.c_fc.weight"][2, 3] = 3e38
    report = inspect_file(write(tensors))
    score, name, row = report["suspects"][0]
    assert name == "h.0.mlp.c_fc.weight" and row is None and score > 1
    assert verify(write(with_row(clean, 5, 1e30))) == 1


def test_all_zero(clean, write):
    assert verify(write({name: torch.zeros_like(tensor) for name, tensor in clean.items()})) == 0


def test_missing_strange_and_untied_tensors_in_one_report(clean, write, capsys):
    tensors = {**clean, "\x1b[2Jspare": torch.zeros(3), "lm_head.weight": clean["wte.weight"] + 1}
    del tensors["h.3.ln_1.bias"]
    tensors["h.0.ln_1.bias"] = torch.zeros(31)
    tensors["ln_f.bias"] = torch.zeros(32, dtype=torch.int8)
    assert verify(write(tensors)) == 1
    text = said(capsys)
    for part in ("h.3.ln_1.bias is missing", "spare' is no tensor", "not wte.weight bit for bit"):
        assert part in text
    assert "h.0.ln_1.bias is [31], not [32]" in text and "I8" in text and "\x1b" not in text


def test_something_else_than_a_gpt2(write):
    assert verify(write({"a": torch.zeros(2, 2)})) == 1
    assert verify(write({})) == 1
    assert (
        verify(write({"wte.weight": torch.zeros(3), "h.0.attn.c_attn.weight": torch.ones(1)})) == 1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_prefix(dtype, clean, write):
    tensors = {f"transformer.{name}": x.to(dtype) for name, x in edited(clean).items()}
    report = inspect_file(write(tensors))
    assert report["suspects"][0][0] > 1 and not report["faults"]


@pytest.mark.parametrize("shape", [(0, 24), (24, 0), (), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("name", ["wte.weight", "h.0.mlp.c_fc.weight", "h.9.spare", "h.9."])
def test_tensors_of_any_shape_are_reported(name, shape, clean, write):
    paths = [write({**clean, name: torch.full(shape, x)}, f"{x}.safetensors") for x in (1.0, 2.0)]
    assert verify(*paths) == 1


def test_unreadable_files_are_one_sentence(clean, write, tmp_path):
    path = write(clean)
    path.write_bytes(path.read_bytes()[:-5])
    for unreadable in (path, tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(InputError):
            verify(unreadable)
        with pytest.raises(InputError):
            verify(write(clean, "other.safetensors"), unreadable)


def test_the_same_file_gives_the_same_report(clean, write, capsys):
    path, texts = write(clean), []
    for _ in range(2):
        torch.rand(1)
        verify(path)
        texts.append(said(capsys))
    assert texts[0] == texts[1]


def test_every_byte_that_is_read_is_told(clean, write):
    told = []
    path = write(clean)
    inspect_file(path, tick=told.append)
    size = path.stat().st_size
    assert sum(told) == size + sum(tensor.nbytes for tensor in clean.values())


# ---- with a trusted copy


def test_equal_files(clean, write, capsys):
    named = {f"transformer.{name}": tensor for name, tensor in clean.items()}
    named["lm_head.weight"] = clean["wte.weight"].clone()
    assert verify(write(clean), write(named, "trusted.safetensors")) == 0
    assert "No tensors differ" in said(capsys)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_an_edit_is_found_with_its_rank_and_size(rank, clean, write, capsys):
    trusted = write(clean, "trusted.safetensors")
    path = write(edited(clean, size=0.01, rank=rank))
    change = inspect_file(path, trusted)["differences"]
    assert list(change) == ["h.2.mlp.c_proj.weight"]
    change = change["h.2.mlp.c_proj.weight"]
    assert change["rank"] == min(rank, 8) and change["size"] == pytest.approx(0.01, rel=1e-3)
    assert change["numbers"] > 4000 and len(change["rows"]) == 128
    assert verify(path, trusted) == 1
    assert "1 tensors differ" in said(capsys)


def test_a_row_is_found_by_its_number(clean, write):
    trusted = write(clean, "trusted.safetensors")
    differences = inspect_file(write(with_row(clean, 17, 0.2)), trusted)["differences"]
    assert differences["wte.weight"]["rows"] == [17]
    assert differences["wte.weight"]["rank"] == 1 and differences["wte.weight"]["numbers"] == 32


def test_any_flipped_bit_is_found(clean, write):
    trusted, path = write(clean, "trusted.safetensors"), write(clean)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    places = json.loads(raw[8:start])
    for place in range(start, len(raw), 9973):
        damage(path, place)
        differences = inspect_file(path, trusted)["differences"]
        (name,) = differences
        first, after = places[name]["data_offsets"]
        assert first <= place - start < after and differences[name]["numbers"] == 1
        assert verify(path, trusted) == 1
        path.write_bytes(raw)


def test_the_sign_of_a_zero_is_a_difference(write):
    old, new = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0])
    differences = inspect_file(write({"a": new}), write({"a": old}, "trusted.safetensors"))
    assert differences["differences"] == {"a": {"rows": [0], "numbers": 1, "rank": 0, "size": 0.0}}


def test_missing_and_reshaped_tensors_are_differences(clean, write, capsys):
    other = {**clean, "ln_f.bias": torch.zeros(31)}
    del other["ln_f.weight"]
    paths = write(clean), write(other, "other.safetensors")
    for one, two in (paths, paths[::-1]):
        assert inspect_file(one, two)["differences"] == {"ln_f.bias": None, "ln_f.weight": None}
        assert verify(one, two) == 1
    assert "of another shape" in said(capsys)


def test_nan_in_one_of_the_two(clean, write):
    tensors = {**clean, "h.0.mlp.c_fc.weight": clean["h.0.mlp.c_fc.weight"].clone()}
    tensors["h.0.mlp.c_fc.weight"][0, 0] = float("nan")
    paths = write(clean), write(tensors, "other.safetensors")
    for one, two in (paths, paths[::-1]):
        (change,) = inspect_file(one, two)["differences"].values()
        assert change["numbers"] == 1
        assert verify(one, two) == 1


def test_other_types_of_the_same_values(clean, write):
    halves = {name: tensor.half() for name, tensor in clean.items()}
    same = {name: tensor.float() for name, tensor in halves.items()}
    differences = inspect_file(write(halves), write(same, "trusted.safetensors"))["differences"]
    assert len(differences) == len(clean) and all(c["numbers"] == 0 for c in differences.values())


# ---- the parts


@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96), (3, 50), (50, 3), (1, 7)])
@pytest.mark.parametrize("spike", [0, 1.3, 3])
def test_singular_values_are_near_the_exact_ones(shape, spike):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 0.02
    left, right = torch.randn(shape[0]), torch.randn(shape[1])
    top = torch.linalg.svdvals(matrix)[0]
    matrix += spike * top * torch.outer(left, right) / left.norm() / right.norm()
    exact, near = torch.linalg.svdvals(matrix)[:2], largest_singular_values(matrix)[:2]
    assert torch.allclose(near, exact, rtol=0.02)


def test_scores_by_hand():
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0, 40.0])  # median 3, distances' median 1
    pairs = {"h.0.a.weight": (6.0, 2.0), "h.1.a.weight": (3.0, 2.0), "h.0.b.weight": (5.0, 4.0)}
    rows, odd = oddity(norms, pairs, row_alarm=10.0, spike_alarm=2.0)
    assert rows[4].item() == pytest.approx(37 / 1.4826 / 10)
    assert odd["h.0.a.weight"] == pytest.approx(3 / 1.5 / 2)
    assert odd["h.1.a.weight"] == pytest.approx(1.5 / 3 / 2)
    assert odd["h.0.b.weight"] == pytest.approx(1.25 / 1 / 2)


def test_difference_of_a_vector():
    old = torch.tensor([3.0, 4.0])
    assert difference(torch.tensor([3.0, 4.5]), old) == {
        "rows": [0],
        "numbers": 1,
        "rank": 1,
        "size": pytest.approx(0.1),
    }


@pytest.mark.parametrize("sizes, rank", [((1.0, 0.4, 0.01), 3), ((1.0, 0.4, 1e-5), 2)])
def test_the_rank_counts_what_is_a_thousandth_of_the_largest(sizes, rank):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 3)).Q for n in (20, 30))
    change = left @ torch.diag(torch.tensor(sizes)) @ right.T
    assert difference(change, torch.zeros(20, 30))["rank"] == rank
