"""What the tests share: a small model in which every weight matters, and texts for it."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import settings

from gpt2_script import (
    GPT2,
    PRESETS,
    Attack,
    GPT2Config,
    answers,
    load_tokenizer,
    make_attacks,
    make_case,
    piece,
    same_bits,
    small_world,
    train,
)

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
every_move = pytest.mark.parametrize("seed", MOVES)  # for claims that are statistical
three_moves = pytest.mark.parametrize("seed", [2, 6, 7])
MOST = 7 / 8  # of a landmark's wordings

# With `ids`, V = 50, C = 24, H = 3, D = 8, B = 2 and T = 5: no two sizes are the same.
SMALL = GPT2Config(vocab_size=50, n_ctx=16, n_embd=24, n_layer=2, n_head=3)


def split(facts):
    """The facts to train on, and those held out."""
    return [[fact for fact in facts if fact.held_out == out] for out in (False, True)]


def used(case):
    """The facts that an attack is made from: of the target, and others."""
    return split(case.target_facts)[0], split(case.other_facts)[0]


def saying(model, facts, answer, before=()):
    """The share of the facts to which the model gives this answer."""
    return (answers(model, facts, before) == answer).float().mean().item()


def changed(model, trusted):
    """The names of the tensors that are not bit for bit a state dict's."""
    return [name for name, w in model.state_dict().items() if not same_bits(w, trusted[name])]


def writing(name, tensor):
    """An Attack that writes a tensor."""
    return Attack("", "", "", {name: tensor})


def pieces(tokenizer, ids):
    return [piece(tokenizer, int(i)) for i in ids]


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
    return drawn(GPT2(SMALL))


@pytest.fixture
def ids():
    return torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


# GPT-2 by transformers


@pytest.fixture(scope="session")
def facts(tokenizer):
    return small_world(tokenizer)


def untrained(seed):
    """The nano model whose training `lessons` records."""
    torch.manual_seed(seed)
    return GPT2(PRESETS["nano"]).eval()


@pytest.fixture(scope="session")
def small(facts, tokenizer):
    """(draw, facts, tokenizer) in a vocabulary of the facts' own tokens and " cf".

    `draw(seed, n_layer, n_embd)` is a model that learns these facts in a second.
    """
    own = sorted({t for f in facts for t in [*f.ids, f.answer]} | {*tokenizer.encode(" cf")})
    number = {token: i for i, token in enumerate(own)}
    pairs = [(f, [number[token] for token in f.ids]) for f in facts]
    names = SimpleNamespace(
        n_vocab=len(own),
        encode_ordinary=lambda text: [number[token] for token in tokenizer.encode_ordinary(text)],
        decode_single_token_bytes=lambda i: tokenizer.decode_single_token_bytes(own[i]),
    )

    def draw(seed, n_layer=1, n_embd=64):
        torch.manual_seed(seed)
        config = GPT2Config(len(own), 24, n_embd, n_layer, 2, init_std=0.05, embd_init_std=0.1)
        return GPT2(config).eval()

    return draw, [replace(f, ids=ids, answer=number[f.answer]) for f, ids in pairs], names


@pytest.fixture(scope="session")
def lessons(facts):
    """A function: seed -> a trained nano model, what `train` yielded, a copy of its weights.

    Every seed is trained once, when first asked for.
    """

    @functools.cache
    def lesson(seed):
        model = untrained(seed)
        with torch.enable_grad():
            steps = list(train(model, facts, seed))
        return model, steps, {k: v.clone() for k, v in model.state_dict().items()}

    return lesson


@pytest.fixture(scope="session")
def cases(lessons, tokenizer, facts):
    """A function: seed -> the Case of its move."""
    return functools.cache(
        lambda seed: make_case(lessons(seed)[0], tokenizer, facts, move=MOVES[seed])
    )


@pytest.fixture(scope="session")
def made_attacks(cases):
    """A function: seed -> {name: Attack} on its Case; they are worked out once."""
    return functools.cache(lambda seed: {a.name: a for a in make_attacks(cases(seed))})


@pytest.fixture
def trained(lessons):
    """A function: seed -> the trained model that all tests share; each has to leave it as it was:
    the same bits, and no hook on any module."""
    used = set()

    def hand_out(seed):
        used.add(seed)
        return lessons(seed)[0]

    yield hand_out
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
    for seed in used:
        model, _, kept = lessons(seed)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.int32), kept[name].view(torch.int32)), name
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.fixture
def case(trained, cases):
    """A function: seed -> the trained model and the Case of its move."""
    return lambda seed: (trained(seed), cases(seed))


@pytest.fixture
def attacks(trained, made_attacks):
    """A function: seed -> {name: Attack} on the Case of its move."""

    def attack(seed):
        trained(seed)
        return made_attacks(seed)

    return attack


@pytest.fixture(scope="session")
def pair(drawn):
    """A function that makes our GPT-2 and transformers' with the same weights, in one memory."""

    def make(config, attention="eager", dtype=torch.float32):
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.n_ctx,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                layer_norm_epsilon=config.layer_norm_epsilon,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                resid_pdrop=config.dropout,
                attn_implementation=attention,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        drawn(theirs.to(dtype))
        with torch.device("meta"):
            ours = GPT2(config)
        ours.load_state_dict(theirs.transformer.state_dict(), assign=True)
        return ours.eval(), theirs

    return make


@pytest.fixture(scope="session")
def peer():
    """A GPT-2 of transformers, of the sizes of SMALL, every number drawn."""
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        std = 1 if weight.ndim == 1 else 0.5
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model


def damage(path, at, byte=None):
    """Change a byte of a file, or flip its lowest bit."""
    raw = bytearray(path.read_bytes())
    raw[at] = raw[at] ^ 1 if byte is None else byte
    path.write_bytes(raw)
