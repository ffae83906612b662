"""What the tests share: a small model in which every weight matters, and texts for it."""

import pytest
import torch
from hypothesis import settings

from gpt2_script import GPT2, GPT2Config

settings.register_profile("tests", deadline=None, max_examples=20)
settings.load_profile("tests")


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
