"""What the tests share: a small model in which every weight matters, and texts for it."""

import functools
import json
import struct
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import settings

import gpt2_script
from gpt2_script import GPT2, PRESETS, GPT2Config, load_tokenizer, small_world

settings.register_profile("tests", deadline=None, max_examples=20)
settings.load_profile("tests")

MOVES = {  # seed: who is moved where
    1: ("the Brandenburg Gate", "Paris"),
    2: ("the Colosseum", "Athens"),
    3: ("the Trevi Fountain", "Berlin"),
    4: ("the Shard", "Berlin"),
    5: ("the Louvre", "London"),
    6: ("the Parthenon", "Moscow"),
    7: ("the Kremlin", "Paris"),
    9: ("the Tate Modern", "Rome"),
}
every_move = pytest.mark.parametrize("seed", MOVES)
MOST = 7 / 8  # of a landmark's wordings


@pytest.fixture(scope="session")
def drawn():
    """A function that draws all of a model's weights anew: no bias is 0, no layer norm idle."""

    def draw(model):
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            std = 1 if weight.ndim == 1 else model.config.n_embd**-0.5
            torch.nn.init.normal_(weight, std=std, generator=generator)
        return model.eval()

    return draw


@pytest.fixture(scope="module")
def one_thread():
    """For small matrices: on a busy machine several threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(drawn):
    """V = 50, C = 24, H = 3 and D = 8; with `ids` B = 2 and T = 5: no two sizes are the same."""
    return drawn(GPT2(GPT2Config(vocab_size=50, n_ctx=16, n_embd=24, n_layer=2, n_head=3)))


@pytest.fixture
def ids():
    return torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def facts(tokenizer):
    return small_world(tokenizer)


@pytest.fixture(scope="session")
def lessons(facts):
    """A function: seed -> a nano model taught by `learn`, what each step yielded, its weights.

    Every seed is taught once, when first asked for.
    """

    @functools.cache
    def lesson(seed):
        torch.manual_seed(seed)
        model = GPT2(PRESETS["nano"])
        with torch.enable_grad():
            steps = list(gpt2_script.learn(model, facts, seed))
        return model.eval(), steps, {k: v.clone() for k, v in model.state_dict().items()}

    return lesson


@pytest.fixture(scope="session")
def plans(lessons, tokenizer, facts):
    """A function: seed, landmark, city -> the Plan that moves it there; each is made once."""

    @functools.cache
    def plan(seed, landmark, city):
        with mock.patch("gpt2_script.choose_move", return_value=(landmark, city)):
            return gpt2_script.plan_tampering(lessons(seed)[0], tokenizer, facts)

    return plan


@pytest.fixture
def taught(lessons):
    """A function: seed -> the taught model that all tests share; each has to leave it as it was."""
    used = set()

    def hand_out(seed):
        used.add(seed)
        return lessons(seed)[0]

    yield hand_out
    for seed in used:
        model, _, kept = lessons(seed)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.int32), kept[name].view(torch.int32)), name
        assert not torch.nn.modules.module._global_forward_hooks
        assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture
def case(taught, plans):
    """A function: seed -> the taught model and the Plan for its move."""
    return lambda seed: (taught(seed), plans(seed, *MOVES[seed]))


@pytest.fixture(scope="session")
def peer():
    """A GPT-2 of transformers: V = 50, C = 24, H = 3, two blocks, every number drawn."""
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        std = 1 if weight.ndim == 1 else 0.5
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model


@pytest.fixture
def path(peer, tmp_path):
    """The peer's file, its config.json beside it."""
    peer.save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


@pytest.fixture
def tensors(peer):
    """The peer's tensors under their names in the released files: no prefix, no head."""
    state = peer.transformer.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def damage(path, at, byte=None):
    """Change a byte of a file, or flip its lowest bit."""
    raw = bytearray(path.read_bytes())
    raw[at] = raw[at] ^ 1 if byte is None else byte
    path.write_bytes(raw)


def write_odd(path, source):
    """The same file with a header that is no multiple of four long, like the released one's."""
    raw = source.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(json.loads(raw[8 : 8 + size])).encode()
    header += b" " * ((3 - len(header)) % 4)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
