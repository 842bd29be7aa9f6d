"""The tests' own way to a device: copies with the layout of their originals, and a stand-in that refuses what a GPU would."""

from __future__ import annotations

from unittest import mock

import kernel_execution
import pytest
import torch
import triton
import triton.language as tl
from kernel_execution import Copies, compiled_only, execute, on_device, poisoned_outputs

import paa_gpu


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[2:5, 1::2],
        lambda base: base.T[3:],
        lambda base: base[:1].expand(4, 8),
        lambda base: base[3, 2],
        lambda base: base[:0],
        lambda base: base.as_strided((2, 2), (9, 3), 1),
    ],
    ids=["slice", "transposed", "expanded", "scalar", "empty", "strided"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_has_the_layout_of_its_original(view, device):
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    tensor = view(base)
    whole, there = Copies(device).of([base, tensor])
    assert (there.shape, there.stride(), there.storage_offset()) == (tensor.shape, tensor.stride(), tensor.storage_offset())
    assert torch.equal(there.cpu(), tensor) and there.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert there.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()


def test_copies_of_inputs_are_not_poisoned():
    """Of a large storage only a view is copied; to fill the rest would take all of the machine's memory."""
    with poisoned_outputs(), mock.patch.object(kernel_execution, "poison", side_effect=AssertionError):
        assert torch.equal(Copies("cpu").of(torch.ones(3)), torch.ones(3))


def test_changes_come_back_and_results_too():
    base = torch.zeros(4, 6)
    with execute_stand_in():
        result = on_device(lambda view, number: view[1].fill_(number))(base[:, 2:4], 7)
    assert base.sum() == 14 and (base[1, 2:4] == 7).all() and torch.equal(result, torch.tensor([7.0, 7.0]))


def execute_stand_in():
    pytest.importorskip("ptxrun")
    return execute("stand-in")


@triton.jit
def _double_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
    tl.store(x_ptr + offset, 2 * x, mask=offset < n)


@compiled_only
def test_the_stand_in_refuses_tensors_that_nobody_brought():
    x = torch.ones(5)
    with execute("stand-in"):
        with pytest.raises(RuntimeError, match=r"launched for tensors of the CPU: call it through on_device\(\)"):
            _double_kernel[(1,)](x, 5, BLOCK=8)
        on_device(_double_kernel[(1,)])(x, 5, BLOCK=8)
        fit = paa_gpu.fit_gmm_1d(torch.tensor([[0.0, 0.1, 5.0, 5.1]]))
    assert x.tolist() == [2.0] * 5 and fit.valid.all()
