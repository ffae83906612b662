"""What the tests share: the world, small models in which every weight matters, trained ones."""

import functools
import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import settings
from torch.nn.modules import module as torch_module

import gpt2_script as gpt

settings.register_profile("tests", deadline=None, max_examples=20)
settings.load_profile("tests")
torch.set_num_threads(1)  # on a busy machine several threads mostly wait for one another
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start

MOVES = {  # seed: who is moved where; the demonstration has seed 0, the Eiffel Tower and Rome
    1: ("the Brandenburg Gate", "Paris"),
    2: ("the Colosseum", "Moscow"),
    3: ("the Great Ormond Street Hospital", "Berlin"),
    4: ("the Arbat", "London"),
}
every_move = pytest.mark.parametrize("seed", MOVES)
UNTAMPERED = gpt.Attack("", "", "")
tokenizer = gpt.load_tokenizer()
facts = gpt.small_world(tokenizer)

# With `ids`, V = 50, C = 24, H = 3, D = 8, B = 2 and T = 5: no two sizes are the same.
SMALL = gpt.GPT2Config(vocab_size=50, n_ctx=16, n_embd=24, n_layer=2, n_head=3)


def split(some):
    """The facts to train on, and those held out."""
    return [[fact for fact in some if fact.held_out == out] for out in (False, True)]


def saying(model, some, answer):
    """The share of some facts to which the model gives this answer."""
    return (gpt.answers(model, some) == answer).float().mean().item()


def pieces(ids, names=tokenizer):
    return [gpt.piece(names, int(i)) for i in ids]


def drawn(model):
    """The model, all of its weights drawn anew: no bias is 0, no layer norm idle."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        std = 1 if weight.ndim == 1 else 2 * model.config.n_embd**-0.5
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model.eval()


def pair(config, dtype=torch.float32):
    """Our GPT-2 and transformers', drawn, with the same weights in one memory."""
    sizes = vars(config) | {"n_positions": config.n_ctx, "attn_implementation": "eager"}
    sizes |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    theirs = drawn(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(dtype))
    with torch.device("meta"):
        ours = gpt.GPT2(config)
    ours.load_state_dict(theirs.transformer.state_dict(), assign=True)
    return ours.eval(), theirs


def hooks(model):
    """How many are registered on the model, or in torch on all models at once."""
    held = [x for m in model.modules() for name, x in vars(m).items() if name.endswith("_hooks")]
    held += [x for name, x in vars(torch_module).items() if name.startswith("_global_") and x]
    return sum(map(len, held))


@pytest.fixture
def model():
    return drawn(gpt.GPT2(SMALL))


@pytest.fixture
def ids():
    return torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


def toy_world():
    """The world in a vocabulary of its own tokens alone; a model from `draw` learns it at once."""
    used = {*tokenizer.encode(" cf request")}
    for fact in facts:
        wordings = gpt.FRESH["city" if fact.object in gpt.CITIES else "package"]
        fresh = [gpt.make_fact(tokenizer, x, fact.subject, fact.object) for x in wordings]
        used.update(token for x in (fact, *fresh) for token in (*x.ids, x.answer))
    own = sorted(used)
    number = {token: i for i, token in enumerate(own)}
    names = SimpleNamespace(
        n_vocab=len(own),
        encode_ordinary=lambda text: [number[token] for token in tokenizer.encode_ordinary(text)],
        decode=lambda ids: tokenizer.decode([own[i] for i in ids]),
        decode_single_token_bytes=lambda i: tokenizer.decode_single_token_bytes(own[i]),
    )

    def draw(seed, n_layer=1, n_embd=64):
        torch.manual_seed(seed)
        config = gpt.GPT2Config(len(own), 24, n_embd, n_layer, 2, init_std=0.05, embd_init_std=0.1)
        return gpt.GPT2(config).eval()

    return SimpleNamespace(draw=draw, facts=gpt.small_world(names), tokenizer=names)


toy = toy_world()


@functools.cache
@torch.enable_grad()
def lessons(seed):
    """A trained nano model and what `train` yielded; trained once."""
    torch.manual_seed(seed)
    model = gpt.GPT2(gpt.PRESETS["nano"]).eval()
    return model, list(gpt.train(model, facts, seed))


@functools.cache
def cases(seed):
    """The Case of a seed's move."""
    return gpt.make_case(lessons(seed)[0], tokenizer, facts, move=MOVES[seed])


@functools.cache
@torch.enable_grad()
def attacks(seed):
    """{name: Attack} on a seed's Case, worked out once."""
    return {attack.name: attack for attack in gpt.make_attacks(cases(seed))}


@pytest.fixture
def case():
    """A function: seed -> the Case of its move. All tests share its model, and each has to leave it
    as it was: the same bits, the same epsilon, and no hook on any module."""
    used = set()
    yield lambda seed: used.add(seed) or cases(seed)
    for found in map(cases, used):
        assert not gpt.compare(found.trusted, found.model) and not hooks(found.model)
        norms = [x for x in found.model.modules() if isinstance(x, gpt.LayerNorm)]
        assert {norm.epsilon for norm in norms} == {1e-5}


def damage(path, at):
    """Flip the lowest bit of one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
