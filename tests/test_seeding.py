import numpy as np
import torch

from first_stage.seeding import Purpose, generator, hashed_bits, standard_normals


def test_equal_arguments_give_equal_numbers_and_others_do_not():
    draws = {
        key: tuple(generator(*key).random(4))
        for key in [
            (0, Purpose.VIEW, 1, 2),
            (1, Purpose.VIEW, 1, 2),
            (0, Purpose.NOISE, 1, 2),
            (0, Purpose.VIEW, 2, 1),
            (0, Purpose.VIEW, 1),
        ]
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[0, Purpose.VIEW, 1, 2] == tuple(generator(0, Purpose.VIEW, 1, 2).random(4))


def test_the_global_generator_is_not_touched():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.get_state()[1].copy()  # noqa: NPY002
    generator(0, Purpose.ORDER, 5).permutation(10)
    assert (np.random.get_state()[1] == expected).all()  # noqa: NPY002


class TestManySamples:
    def test_bits_depend_on_every_argument_and_on_nothing_else(self):
        names = [f"sample {n}" for n in range(50)]
        bits = hashed_bits(3, Purpose.LATENT, 7, names)
        assert bits.shape == (50, 2)
        assert len(np.unique(bits)) == 100
        np.testing.assert_array_equal(hashed_bits(3, Purpose.LATENT, 7, names[20:]), bits[20:])
        for other in ((4, Purpose.LATENT, 7), (3, Purpose.VIEW, 7), (3, Purpose.LATENT, 8)):
            assert not (hashed_bits(*other, names) == bits).any()

    def test_bits_are_uniform(self):
        bits = hashed_bits(0, Purpose.LATENT, 0, map(str, range(20000)))
        shares = np.histogram(bits[:, 0] * 2.0**-64, bins=10, range=(0, 1))[0] / 20000
        assert abs(shares - 0.1).max() < 5 * (0.09 / 20000) ** 0.5
        assert abs(np.corrcoef(bits.astype(float).T)[0, 1]) < 5 / 20000**0.5

    def test_normal_values_are_a_function_of_their_own_seed(self):
        values = standard_normals([5, 6, 7], (4, 3, 2))
        assert values.shape == (3, 4, 3, 2)
        assert torch.equal(standard_normals([7], (4, 3, 2))[0], values[2])
        many = standard_normals(range(2000), (20,))
        assert many.mean().abs() < 5 / 40000**0.5
        assert (many.var() - 1).abs() < 5 * (2 / 40000) ** 0.5
