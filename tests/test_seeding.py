import numpy as np

from first_stage.seeding import Purpose, generator


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
