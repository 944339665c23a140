"""Work ahead of time: the same results in the same order, as far ahead as it may be."""

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from supra.data.ahead import ahead
from supra.errors import UserError


def square(number):
    if number == 7:
        raise UserError("7 has none")
    return number * number


@pytest.mark.parametrize("length", [0, 1, 3, 6])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_all_results_in_order(threads, length):
    with ThreadPoolExecutor(threads or 1) as pool:
        found = list(ahead(square, range(length), pool if threads else None, 2))
    assert found == [n * n for n in range(length)]


def test_no_more_items_are_taken_than_allowed():
    taken = []
    items = (taken.append(n) or n for n in count())
    with ThreadPoolExecutor(1) as pool:
        found = ahead(square, items, pool, 4)
        assert taken == []
        assert [next(found) for _ in range(3)] == [0, 1, 4]
        assert taken == list(range(7)), "three were asked for, and four are ahead"


def test_an_error_comes_with_its_item():
    with ThreadPoolExecutor(2) as pool:
        found = ahead(square, range(9), pool, 4)
        assert [next(found) for _ in range(7)] == [n * n for n in range(7)]
        with pytest.raises(UserError, match="7 has none"):
            next(found)
