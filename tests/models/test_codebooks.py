"""Quantizers by hand in float64, and what a codebook remembers from step to step."""

import math
import threading

import pytest
import torch
from torch.nn import functional as F
from toy_codes import codes_in_effect

from first_stage.distributed.processes import Processes
from first_stage.models.codebooks import Codebook, LinearCodebook
from first_stage.models.grids import FiniteGrid
from first_stage.models.quantizers import grid, nearest, perplexity, rotate, round_to_grid

SHAPE = (3, 4, 2, 2)
VALUES = 4 * 2 * 2
"""Latent values of a sample."""


def rows(latents):
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def brute_force(vectors, codes):
    """Nearest codes by the definition."""
    return (vectors[:, None] - codes[None]).square().sum(2).argmin(1)


def gradients(bottleneck, latents, upstream, weights):
    """Of <upstream, latents to decode> + weighted penalties: at the encoder's output and at the
    bottleneck's parameters."""
    code = bottleneck(latents)
    loss = (code.latents * upstream).sum()
    for name, weight in weights.items():
        loss = loss + weight * code.penalties[name].mean()
    loss.backward()
    return rows(latents.grad), {n: p.grad for n, p in bottleneck.named_parameters()}, code


def make(rule, codes=7, **options):
    torch.manual_seed(0)
    made = LinearCodebook(codes, 4) if rule == "linear" else Codebook(codes, 4, rule, **options)
    made = made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    latents = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    return made, latents, torch.randn(SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("weights", [{"codebook": 1.0, "commitment": 0.25},
                                     {"codebook": 0.7, "commitment": 3.0}])  # fmt: skip
def test_gradients_of_free_codes_are_those_of_equation_3(weights):
    """van den Oord et al. 2017: beta weighs what pulls vectors, not what pulls codes."""
    book, latents, upstream = make("euclidean")
    found, parameters, code = gradients(book, latents, upstream, weights)
    z, e = rows(latents.detach()), book.codes.detach()
    tokens = brute_force(z, e)
    share = 2 / (len(latents) * VALUES)
    expected = rows(upstream) + weights["commitment"] * share * (z - e[tokens])
    torch.testing.assert_close(found, expected)
    of_codes = torch.zeros_like(e)
    of_codes.index_add_(0, tokens, weights["codebook"] * share * (e[tokens] - z))
    torch.testing.assert_close(parameters["codes"], of_codes)
    torch.testing.assert_close(rows(code.latents.detach()), e[tokens])


def test_the_default_weights_are_the_papers():
    assert Codebook.weights == {"codebook": 1.0, "commitment": 0.25}


def test_gradients_of_linear_codes():
    book, latents, upstream = make("linear")
    found, parameters, _ = gradients(book, latents, upstream, Codebook.weights)
    z, matrix, frozen = rows(latents.detach()), book.matrix.detach(), book.frozen
    e = (matrix @ frozen.mT).mT
    tokens = brute_force(z, e)
    share = 2 / (len(latents) * VALUES)
    torch.testing.assert_close(found, rows(upstream) + 0.25 * share * (z - e[tokens]))
    # d/dW sum |W c - z|^2 = 2 sum (W c - z) c^T: one matrix moves every code.
    expected = share * (e[tokens] - z).mT @ frozen[tokens]
    torch.testing.assert_close(parameters["matrix"], expected)
    assert set(parameters) == {"matrix"}


def test_gradients_of_cosine_codes():
    book, latents, upstream = make("cosine")
    found, parameters, code = gradients(book, latents, upstream, Codebook.weights)
    z, raw = rows(latents.detach()), book.codes.detach()
    lengths, sizes = z.norm(dim=1, keepdim=True), raw.norm(dim=1, keepdim=True)
    unit, e = z / lengths, raw / sizes
    tokens = (unit @ e.mT).argmax(1)  # the largest cosine
    share = 2 / (len(latents) * VALUES)
    up = rows(upstream)  # passes u = z / |z|: what lies along u is lost, the rest over |z|
    through = (up - (up * unit).sum(1, keepdim=True) * unit) / lengths
    torch.testing.assert_close(found, through + 0.25 * share * (z - e[tokens]))
    at_codes = torch.zeros_like(e)
    at_codes.index_add_(0, tokens, share * (e[tokens] - unit))
    expected = (at_codes - (at_codes * e).sum(1, keepdim=True) * e) / sizes
    torch.testing.assert_close(parameters["codes"], expected)
    torch.testing.assert_close(rows(code.latents.detach()), e[tokens])


def test_gradients_of_a_grid():
    levels = (4, 3, 5, 2)
    book = FiniteGrid(levels).double()
    torch.manual_seed(0)
    latents = (1.5 * torch.randn(SHAPE, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    found, parameters, code = gradients(book, latents, upstream, {"range": 2.0})
    z = rows(latents.detach())
    beyond = (z.abs() - 1).clamp_min(0) * z.sign()
    assert (beyond != 0).any()
    expected = rows(upstream) + 2.0 * 2 / (len(latents) * VALUES) * beyond
    torch.testing.assert_close(found, expected)
    assert not parameters
    tokens = brute_force(z, grid(levels).double())
    torch.testing.assert_close(rows(code.latents.detach()), grid(levels).double()[tokens])


def hats(vectors, levels):
    """How much each vector counts for each point of a grid, `(N, K)`, by the definition."""
    points, near = grid(levels).double(), vectors.new_ones(len(vectors), math.prod(levels))
    for axis, count in enumerate(levels):
        apart = (vectors[:, axis, None].clamp(-1, 1) - points[:, axis]).abs()
        near = near * (1 - apart * (count - 1) / 2).clamp_min(0)
    return near


@pytest.mark.parametrize("levels", [(4, 3, 5, 2), (5, 2)])
def test_the_entropys_gradient_is_that_of_vectors_that_count_for_the_points_around_them(levels):
    torch.manual_seed(0)
    book, one = FiniteGrid(levels).double(), Processes()
    earlier = torch.rand(6, len(levels), 5, 5, dtype=torch.float64) * 2 - 1
    book(earlier)
    book.finish_step(0, one, seed=0)
    z = (torch.rand(3, len(levels), 4, 4, dtype=torch.float64) * 2.6 - 1.3).requires_grad_()
    (found,) = torch.autograd.grad(book(z).penalties["entropy"].mean(), z)
    codes = math.prod(levels)
    p = (book.recent + 0.1 / codes).requires_grad_()
    (by_share,) = torch.autograd.grad((p * p.log()).sum() / math.log(codes), p)
    soft = hats(rows(z), levels)
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft), dtype=torch.float64))
    (expected,) = torch.autograd.grad((soft.mean(0) * by_share).sum(), z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found != 0).any()
    assert not found[z.abs() > 1].any()


def test_the_entropys_penalty_says_how_far_codes_are_from_equally_frequent():
    book, points = FiniteGrid((4, 2)), grid((4, 2)).T.reshape(1, 2, 8, 1)
    book(points)
    book.finish_step(0, Processes(), seed=0)
    added = math.log(1 + 0.1) / math.log(8)  # to each share, for those that nothing uses
    assert book(points).penalties["entropy"].item() == pytest.approx(added, abs=1e-6)
    for step in range(1, 200):  # now of one code
        book(points[:, :, :1])
        book.finish_step(step, Processes(), seed=0)
    of_one = book(points[:, :, :1]).penalties["entropy"].item()
    assert of_one == pytest.approx(1, abs=0.01)
    # Those around a crowd are drawn to where nobody is.
    z = (points[:, :, :1] + torch.tensor([0.1, -0.2]).view(1, 2, 1, 1)).requires_grad_()
    book(z).penalties["entropy"].sum().backward()
    assert z.grad.flatten()[0] < 0  # a step against it leads away from the crowd
    assert z.grad.flatten()[1] == 0  # out of bounds


def trained_grid(weight):
    """How many codes of 125 are used in effect."""
    prices, strong = {"range": 1.0, "entropy": weight}, [1, 0.3, 0.2, 0.1, 0.05, 0.05]
    return codes_in_effect(lambda: FiniteGrid((5, 5, 5)), 3, prices, strong, steps=250)


def test_the_entropy_fills_a_grid_that_else_learns_one_direction_on_all_axes():
    assert trained_grid(0.3) > 1.2 * trained_grid(0.0)


def test_a_rotated_gradient_is_turned_as_its_vector_was():
    """The one rotation in the plane of both that takes the vector's direction to the code's."""
    torch.manual_seed(0)
    z, e = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: rotate(v[None], e[None])[0], z)
    turn = jacobian * z.norm() / e.norm()
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(rotate(z[None], e[None])[0], e)
    torch.testing.assert_close(turn @ turn.mT, identity)
    torch.testing.assert_close(torch.linalg.det(turn), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(turn @ (z / z.norm()), e / e.norm())
    plane, _ = torch.linalg.qr(torch.stack([z, e], 1), mode="complete")
    across = plane[:, 2:]  # what is across both stays
    torch.testing.assert_close(turn @ across, across)


def test_the_rotation_is_an_option():
    copied, latents, upstream = make("euclidean")
    straight, _, _ = gradients(copied, latents, upstream, {})
    torch.testing.assert_close(straight, rows(upstream))
    turned, latents, upstream = make("euclidean", gradient="rotation")
    found, _, code = gradients(turned, latents, upstream, {})
    z, e = rows(latents.detach()), rows(code.latents.detach())
    # A rotation keeps lengths; the whole is scaled as the code's length to the vector's.
    scale = e.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), rows(upstream).norm(dim=1) * scale)
    assert not torch.allclose(found, straight)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (7, 5, 5, 5, 5)])
def test_numbers_of_a_grid(levels):
    points = grid(levels)
    assert points.shape == (math.prod(levels), len(levels))
    book = FiniteGrid(levels)
    # The last axis counts ones, the one before it as many as the last has levels, and so on.
    place = [((points[:, a] + 1) / 2 * (n - 1)).round().long() for a, n in enumerate(levels)]
    number = torch.zeros(len(points), dtype=torch.int64)
    for axis, count in enumerate(levels):
        number = number * count + place[axis]
    assert torch.equal(number, torch.arange(len(points)))
    torch.manual_seed(0)
    latents = 3 * torch.rand(2, len(levels), 8, 8) - 1.5
    by_axis = round_to_grid(rows(latents), levels)
    assert torch.equal(book._numbers(by_axis).view(2, 8, 8), book.tokens(latents))
    assert torch.equal(book.from_tokens(book.tokens(latents)), book.settle(latents))
    torch.testing.assert_close(rows(book.settle(latents)), by_axis)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5)])
def test_a_grids_tokens_are_those_of_diffusers_own_fsq(levels):
    """`FSQRegularizer` bounds by tanh and counts the first axis fastest; else both are the same."""
    module = "diffusers.models.autoencoders.autoencoder_vidtok"
    regularizer = pytest.importorskip(module, reason="diffusers has it from 0.38 on").FSQRegularizer
    sizes = torch.tensor(levels)
    torch.manual_seed(0)
    places = torch.rand(4096, len(levels)) * (sizes - 1)  # between the levels, which count from 0
    offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
    half = (sizes - 1) * (1 + 1e-3) / 2
    unbounded = ((places - sizes // 2 + offset) / half).atanh() - (offset / half).atanh()
    _, theirs = regularizer(list(levels[::-1]))(unbounded.flip(1)[None])
    latents = (places / (sizes - 1) * 2 - 1).T[None, :, :, None].contiguous()
    ours = FiniteGrid(levels).tokens(latents).flatten()
    assert torch.equal(ours, theirs.flatten().long())
    assert len(ours.unique()) > min(len(places), sizes.prod()) / 2


def test_the_search_is_chunked_and_keeps_nothing_of_its_size():
    torch.manual_seed(0)
    vectors, codes = torch.randn(1000, 8), torch.randn(512, 8)
    assert torch.equal(nearest(vectors, codes), brute_force(vectors, codes))
    assert torch.equal(nearest(vectors, codes, at_once=96), brute_force(vectors, codes))
    assert nearest(vectors[:0], codes).shape == (0,)
    kept = []
    book = Codebook(512, 8)
    latents = torch.randn(4, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                  lambda t: t):  # fmt: skip
        book(latents)
    assert max(kept) <= max(latents.numel(), 512 * 8)  # 4 * 256 * 512 would be N x K


def test_autocast_does_not_change_codes():
    torch.manual_seed(0)
    book, latents = LinearCodebook(2048, 8), torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        table, code = book.table(), book(latents)
        tokens = book.tokens(latents)
    assert code.latents.dtype == torch.float32
    assert torch.equal(tokens, book.tokens(latents))
    torch.testing.assert_close(code.latents, book.settle(latents))
    assert torch.equal(table, book.table())


def test_facts_say_what_was_used():
    book, one = FiniteGrid((2, 2)), Processes()
    latents = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])
    latents = latents.T.reshape(1, 2, 2, 2)
    assert book(latents).facts["codes/used"] == 0
    book.finish_step(0, one, seed=0)
    facts = book(latents).facts
    assert facts["codes/used"] == 0.5
    assert facts["codes/dead"] == 2
    assert facts["codes/most_frequent"] == 0.75
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert facts["codes/perplexity"].item() == pytest.approx(math.exp(entropy))
    for step in range(1, 101):  # a code counts as used for a hundred steps
        assert step == 1 or book(latents[:, :, :1]).facts["codes/used"] == 0.5
        book.finish_step(step, one, seed=0)
    book(latents[:, :, :1])
    book.finish_step(101, one, seed=0)
    assert book(latents).facts["codes/used"] == 0.25
    assert perplexity(torch.full((8,), 1 / 8)).item() == pytest.approx(8)


class Thread(Processes):
    """One of several processes that are threads of this one."""

    def __init__(self, rank, world, shared, barrier):
        self.rank, self.world, self._shared, self._barrier = rank, world, shared, barrier

    def sum(self, tensor):
        self._shared[self.rank] = tensor
        self._barrier.wait()
        total = torch.stack([self._shared[rank] for rank in range(self.world)]).sum(0)
        self._barrier.wait()
        return total


def train_codes(world, micro, latents, **options):
    """Steps of a codebook on samples dealt to processes in stretches; each one's state."""
    shared, barrier, states = {}, threading.Barrier(world), {}

    def run(rank):
        processes = Thread(rank, world, shared, barrier)
        book, jumps = books[rank], []
        for step, batch in enumerate(latents):
            for part in batch.chunk(world)[rank].split(micro):
                book(part)
            jumped = book.finish_step(step, processes, seed=3)
            jumps.append(jumped["codes"].clone())
        states[rank] = {**book.state_dict(), "jumps": torch.stack(jumps)}

    books = []
    for _ in range(world):
        torch.manual_seed(0)
        books.append(Codebook(40, 4, **options))
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [states[rank] for rank in range(world)]


@pytest.mark.parametrize("rule", ["euclidean", "cosine"])
def test_restarts_are_the_same_for_any_number_of_processes(rule):
    torch.manual_seed(1)
    latents = 0.1 * torch.randn(7, 12, 4, 2, 2) + 0.5
    latents[4:] -= 1  # elsewhere: the codes are left behind
    options = {"rule": rule, "restart_after": 2}
    (expected,) = train_codes(1, 12, latents, **options)
    assert expected["jumps"][0].any()  # at once, where the first batch is
    assert expected["jumps"][1:].any()
    assert not expected["jumps"].all()
    for world, micro in ((1, 3), (2, 2), (3, 4), (4, 1)):
        for state in train_codes(world, micro, latents, **options):
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(state[name], value), (world, name)


def test_a_moved_code_is_a_vector_of_the_batch():
    torch.manual_seed(1)
    latents = torch.randn(1, 12, 4, 2, 2) + 5
    (state,) = train_codes(1, 12, latents, rule="euclidean", restart_after=2)
    moved = state["codes"][state["jumps"][0]]
    apart = (moved[:, None] - rows(latents[0])[None]).abs().sum(2)
    assert (apart.min(1).values == 0).all()
    (unit,) = train_codes(1, 12, latents, rule="cosine", restart_after=2)
    lengths = unit["codes"][unit["jumps"][0]].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_trained_codes_do_not_jump_in_the_first_step():
    torch.manual_seed(0)
    table = torch.randn(16, 4)
    book = Codebook(16, 4, restart_after=5, table=table)
    book(torch.full((1, 4, 2, 2), 9.0))
    jumped = book.finish_step(0, Processes(), seed=0)
    assert not jumped["codes"].any()
    assert torch.equal(book.codes.detach(), table)


def test_codes_that_rest_are_counted_but_not_moved():
    book = Codebook(16, 4, restart_after=1)
    book.requires_grad_(False)
    before = book.codes.clone()
    for step in range(4):
        book(torch.zeros(1, 4, 2, 2))
        assert not book.finish_step(step, Processes(), seed=0)
    assert torch.equal(book.codes, before)
    assert book(torch.zeros(1, 4, 2, 2)).facts["codes/dead"] == 15


def test_unit_codes_find_the_largest_cosine_of_vectors_of_any_length():
    torch.manual_seed(0)
    book, latents = Codebook(64, 8, "cosine"), 7 * torch.randn(2, 8, 4, 4)
    table, vectors = book.table().detach(), rows(latents)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(64))
    expected = (F.normalize(vectors, dim=1) @ table.mT).argmax(1)
    assert torch.equal(book.tokens(latents).flatten(), expected)
