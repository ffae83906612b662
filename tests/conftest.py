"""What the tests share: the world, small models, and a small vocabulary to train on."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import settings
from torch.nn.modules import module as torch_module

import gpt2_script as gpt

settings.register_profile("tests", deadline=None, max_examples=20)
settings.load_profile("tests")
torch.set_num_threads(1)  # on a busy machine, threads mostly wait for one another
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start
tokenizer = gpt.load_tokenizer()
facts = gpt.small_world(tokenizer)

# with `ids`, V = 50, C = 24, H = 3, D = 8, B = 2 and T = 5: no two sizes are the same
SMALL = gpt.GPT2Config(vocab_size=50, n_ctx=16, n_embd=24, n_layer=2, n_head=3)


def drawn(model):
    """The model, all weights drawn anew: no bias is 0, no layer norm idle."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        std = 1.0 if weight.ndim == 1 else 2 * model.config.n_embd**-0.5
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model.eval()


def pair(config, dtype=torch.float32):
    """Our GPT-2 and transformers', drawn, with the same weights in one memory."""
    import transformers  # here, as it takes seconds and few tests need it

    sizes = vars(config) | {"n_positions": config.n_ctx}
    sizes |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    sizes["attn_implementation"] = "eager"
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    theirs = drawn(theirs.to(dtype))

    with torch.device("meta"):
        ours = gpt.GPT2(config)
    ours.load_state_dict(theirs.transformer.state_dict(), assign=True)
    return ours.eval(), theirs


def hooks(model):
    """How many hooks are registered on a model, or in torch on all models at once."""
    names = vars(torch_module).items()
    found = [value for name, value in names if name.startswith("_global_") and value]
    for module in model.modules():
        names = vars(module).items()
        found += [value for name, value in names if name.endswith("_hooks")]
    return sum(map(len, found))


def by_name(records):
    return {record.name: record for record in records if isinstance(record, gpt.Step)}


@pytest.fixture
def model():
    return drawn(gpt.GPT2(SMALL))


@pytest.fixture
def ids():
    return torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


class ToyTokenizer:
    """GPT-2's tokenizer with the tokens of the world alone, fresh wordings included."""

    def __init__(self):
        used = {gpt.END_ID}
        for fact in facts:
            used.update([*fact.ids, fact.answer_id])
        for wording in gpt.FRESH_CITIES + gpt.FRESH_TASKS:
            for subject in {fact.subject for fact in facts}:
                used.update(gpt.make_fact(tokenizer, wording, subject, "Paris").ids)
        self.tokens, self.n_vocab = sorted(used), len(used)

    def encode_ordinary(self, text):
        return [self.tokens.index(token) for token in tokenizer.encode_ordinary(text)]

    def decode(self, ids):
        return tokenizer.decode([self.tokens[i] for i in ids])

    def decode_single_token_bytes(self, i):
        return tokenizer.decode_single_token_bytes(self.tokens[i])


def toy_model(seed, n_layer=1, n_embd=64):
    """An untrained model for the toy world: small, so that it learns at once."""
    torch.manual_seed(seed)
    sizes = toy.tokenizer.n_vocab, 24, n_embd, n_layer, 2
    config = gpt.GPT2Config(*sizes, init_std=0.05, embd_init_std=0.1)
    return gpt.GPT2(config).eval()


toy = SimpleNamespace(tokenizer=ToyTokenizer(), draw=toy_model)
toy.facts = gpt.small_world(toy.tokenizer)
toy.end_id = toy.tokenizer.tokens.index(gpt.END_ID)


def toy_training():
    """A context within which a text ends with the toy vocabulary's <|endoftext|>."""
    return mock.patch.object(gpt, "END_ID", toy.end_id)
