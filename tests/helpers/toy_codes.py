"""A discrete bottleneck between two small networks, on data of one strong direction."""

import torch
from torch import nn

from first_stage.distributed.processes import Processes
from first_stage.models.discrete import to_rows
from first_stage.models.quantizers import perplexity


def codes_in_effect(make_book, dimensions, prices, strong, steps):
    """How many codes are used in effect after training.

    Args:
        make_book: Makes the bottleneck, after the networks' weights were drawn.
        dimensions: Of a code.
        prices: Weights of its penalties, by name.
        strong: Standard deviations of the data along six directions.
        steps: Steps of 256 vectors.
    """
    torch.manual_seed(0)
    mix = torch.linalg.qr(torch.randn(12, 6))[0] * torch.tensor(strong)
    to_code = nn.Sequential(nn.Linear(12, 32), nn.SiLU(), nn.Linear(32, dimensions))
    to_data = nn.Sequential(nn.Linear(dimensions, 32), nn.SiLU(), nn.Linear(32, 12))
    book = make_book()
    learned = [*to_code.parameters(), *to_data.parameters(), *book.parameters()]
    optimizer = torch.optim.Adam(learned, 1e-2)
    for step in range(steps):
        data = torch.randn(256, 6) @ mix.mT
        code = book(to_code(data).mT.reshape(1, dimensions, 16, 16))
        loss = (to_data(to_rows(code.latents)) - data).square().sum(1).mean()
        loss = loss + sum(weight * code.penalties[name].mean() for name, weight in prices.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        book.finish_step(step, Processes(), seed=0)
    with torch.no_grad():
        tokens = book.tokens(to_code(torch.randn(4096, 6) @ mix.mT).mT[None, :, :, None])
    return perplexity(tokens.flatten().bincount(minlength=len(book.usage)) / 4096).item()
