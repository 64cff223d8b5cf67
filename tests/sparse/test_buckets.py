from typing import NamedTuple

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.sparse import BucketLadder


class Levels(NamedTuple):
    fine: int
    coarse: int


def test_a_bucket_multiplies_every_level_and_rounds_up():
    ladder = BucketLadder((100, 1000), ratio=1.5)
    assert ladder.capacities(0) == (128, 1024)
    assert ladder.capacities(2) == (256, 2304)  # 225 and 2250 in whole blocks of 64


def test_the_lowest_bucket_that_fits_every_level_is_taken():
    ladder = BucketLadder((640, 640), ratio=2.0)
    assert ladder.bucket((640, 640)) == 0
    assert ladder.bucket((10, 641)) == 1
    assert ladder.bucket((10, 5000), limit=2) is None
    assert ladder.bucket((10, 5000), limit=3) == ladder.bucket((10, 5000)) == 3
    assert ladder.fit((10, 5000)) == (5120, 5120)


def test_a_named_tuple_stays_one():
    ladder = BucketLadder(Levels(100, 10))
    assert ladder.capacities(1) == Levels(128, 64) and isinstance(ladder.capacities(1), Levels)
    assert isinstance(ladder.fit(Levels(1000, 1)), Levels)
    measured = BucketLadder.measured([Levels(100, 10), Levels(100, 10)])
    assert measured.base == Levels(100, 10) and isinstance(measured.base, Levels)


def test_a_measured_ladder_holds_mean_and_three_deviations_of_the_neediest_dataset():
    small, large = [(10, 1)] * 3, [(90, 2), (110, 2)]
    ladder = BucketLadder.measured([small, [], large], scans=4, ratio=1.5, max_bucket=2)
    assert ladder.base == (4 * 100 + 3 * 2 * 10, 8)
    assert (ladder.ratio, ladder.max_bucket) == (1.5, 2)


def test_a_ladder_measured_on_batches():
    assert BucketLadder.measured([(90, 7), (110, 7)]).base == (100 + 3 * 10, 7)
    assert BucketLadder.measured([(90, 7), (110, 7)]) == BucketLadder.measured([[(90, 7), (110, 7)]])


def test_a_ladder_may_begin_at_the_smallest_batch():
    samples = [(100, 30), (200, 30), (300, 60)]
    ladder = BucketLadder.measured(samples, lowest="smallest")
    assert ladder.base == (150, 30)  # levels as in the mean, (200, 40), just so large that (100, 30) fits
    two = BucketLadder.measured([samples, [(1000, 200)]], lowest="smallest")
    assert two.base == (150, 30)  # levels as in (600, 120)
    assert BucketLadder.measured([(1000, 200)], scans=4, lowest="smallest").base == (4000, 800)
    with pytest.raises(ValueError, match="expected 'usual' or 'smallest'"):
        BucketLadder.measured(samples, lowest="first")


def test_a_level_without_sites_has_rows_all_the_same():
    ladder = BucketLadder((0, 64))
    assert ladder.capacities(0) == (64, 64)
    assert ladder.fit((65, 0))[0] >= 65


def test_wrong_ladders_raise():
    with pytest.raises(InputError, match="2 levels, the sizes 3"):
        BucketLadder((1, 2)).bucket((1, 2, 3))
    with pytest.raises(InputError, match="does not rise"):
        BucketLadder((1, 2), ratio=1.0)
    for nothing in ([], [[]]):
        with pytest.raises(InputError, match="given none"):
            BucketLadder.measured(nothing)
