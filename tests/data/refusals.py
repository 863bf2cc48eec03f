"""What is said, in one line, of data that are refused."""

import pytest

from hybrid.core import InputError
from hybrid.data import DataConfig, read_examples, read_rows


def source_refusal(source, **options):
    return _refusal(lambda: read_rows(source, **options))


def rows_refusal(rows, **settings):
    return _refusal(lambda: read_examples(rows, DataConfig(**settings)))


def _refusal(read):
    with pytest.raises(InputError) as info:
        read()
    message = str(info.value)
    assert "\n" not in message
    return message
