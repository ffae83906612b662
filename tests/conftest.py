"""What the tests share: a small model in which every weight matters, and texts for it."""

import pytest
import torch
from hypothesis import settings

from gpt2_script import GPT2, GPT2Config

settings.register_profile("tests", deadline=None, max_examples=40)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def shaken():
    """A function that adds noise to a model's weights: no bias stays 0, no layer norm idle."""

    def shake(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.add_(noise / model.config.n_embd**0.5)
        return model.eval()

    return shake


@pytest.fixture
def model(shaken):
    """B = 2, T = 5, C = 24, H = 3, D = 8 and V = 50: no two sizes are the same."""
    torch.manual_seed(0)
    return shaken(GPT2(GPT2Config(vocab_size=50, n_ctx=16, n_embd=24, n_layer=2, n_head=3)))


@pytest.fixture
def ids():
    return torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])
