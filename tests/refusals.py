"""A call that must be refused, and leave its inputs as they were."""

from __future__ import annotations

import re

import pytest
import torch

import paa_gpu


def assert_refused(arguments, error, message, function=paa_gpu.paa_reassign_batch):
    lists = [value for value in arguments.values() if isinstance(value, list)]
    tensors = [item for value in lists for item in value if isinstance(item, torch.Tensor) and not item.is_meta]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        function(**arguments)
    for tensor, wanted in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7), wanted.nan_to_num(7))
