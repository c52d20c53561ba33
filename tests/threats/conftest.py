"""One stack for all threat cases, and after each case a look at whether it did any harm."""

from collections.abc import Iterator

import pytest

from tests.threats.stack import Stack, a_stack


@pytest.fixture(scope="session")
def whole_stack() -> Iterator[Stack]:
    yield from a_stack()


@pytest.fixture
def stack(whole_stack: Stack) -> Iterator[Stack]:
    """The stack, which is as healthy after the test as it was before."""
    yield whole_stack
    whole_stack.assert_unharmed()
