"""Documents of a configuration, and the errors of reading them."""

import pytest

from quantizable_flax.data.text.documents import iter_documents
from quantizable_flax.errors import UserError


def documents(config, split="train"):
    """Returns the documents of a split."""
    return list(iter_documents(config.data, split))


def expect_error(config, pattern, split="train"):
    """Reading a split fails with one sentence."""
    with pytest.raises(UserError, match=pattern) as caught:
        documents(config, split)
    assert "\n" not in str(caught.value)
