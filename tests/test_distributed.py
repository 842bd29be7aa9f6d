"""Means over processes, and the library in the processes of `torch.distributed`: the bits of a serial run."""

from __future__ import annotations

import pytest
import torch
from test_head import gradients, make_features, make_head, make_targets
from test_threads import bits, make
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import paa_gpu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.int64, torch.float32),
        (torch.uint8, torch.float32),
        (torch.bool, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0)], ids=str)
def test_without_a_process_group_the_mean_is_the_value(shape, dtype, wanted):
    value = torch.ones(shape, dtype=dtype)
    mean = paa_gpu.reduce_mean(value)
    assert torch.equal(mean, torch.ones(shape, dtype=wanted))
    assert mean.dtype == wanted
    mean.zero_()
    assert torch.equal(value, torch.ones(shape, dtype=dtype))


def test_no_graph_is_recorded():
    value = torch.ones(3, requires_grad=True)
    assert not paa_gpu.reduce_mean(value * 2).requires_grad


def test_errors():
    with pytest.raises(TypeError, match=r"^`tensor` must be a Tensor, got int$"):
        paa_gpu.reduce_mean(3)
    with pytest.raises(TypeError, match=r"^`tensor` must be real, got complex64$"):
        paa_gpu.reduce_mean(torch.zeros(2, dtype=torch.complex64))


def test_the_head_averages_with_it(monkeypatch):
    """A mean twice as large halves what is divided by it."""
    features, targets = make_features(2), make_targets([3, 1])
    usual = make_head().loss(features, targets)
    monkeypatch.setattr(paa_gpu.head, "reduce_mean", lambda tensor: 2 * paa_gpu.reduce_mean(tensor))
    for name, loss in make_head().loss(features, targets).items():
        torch.testing.assert_close(loss, usual[name] / 2, rtol=1e-5, atol=0)


VALUES = torch.arange(6.0).view(2, 3)


def one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(2)
    batch = make()
    out = paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options)
    num_pos = out.num_pos[rank::2]  # as if the images were shared
    result = {
        "bits": bits(batch),
        "num_pos": num_pos,
        "mean": paa_gpu.reduce_mean(num_pos.sum()),
        "of no positives": paa_gpu.reduce_mean(torch.tensor(0)).clamp(min=1),
        "matrix": paa_gpu.reduce_mean(torch.full((2, 3), rank, dtype=torch.float64)),
        "strides": paa_gpu.reduce_mean(VALUES.clone() if rank else VALUES.t().contiguous().t()),
        "nan": paa_gpu.reduce_mean(torch.tensor([0.0, torch.nan if rank else 1.0])),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    wanted = bits(make())
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    total = int(first["num_pos"].sum() + second["num_pos"].sum())
    assert total > 2000
    for result in (first, second):
        assert result["bits"] == wanted
        assert result["mean"].item() == total / 2  # the authors' repository: reduce_sum(num_pos) / number of processes
        assert result["of no positives"].item() == 1
        assert torch.equal(result["matrix"], torch.full((2, 3), 0.5, dtype=torch.float64))
        assert torch.equal(result["strides"], VALUES)
        assert result["nan"][0] == 0 and result["nan"][1].isnan()
    assert int(first["num_pos"].sum()) != int(second["num_pos"].sum())


def head_with_long_scales():
    """As docs/head.md says."""
    head = make_head()
    for level in head.scales:
        level.scale = nn.Parameter(level.scale.detach().view(1))
    return head


def sharded_one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    head = head_with_long_scales()
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    register_fsdp_forward_method(head, "loss")
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    sum(head.loss([level[own] for level in make_features(3)], make_targets([5, 0, 2])[own]).values()).backward()
    torch.save([gradient.full_tensor() for gradient in gradients(head)], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_head_has_the_gradients_of_one_process(tmp_path):
    torch.multiprocessing.spawn(sharded_one_of_two, (str(tmp_path),), nprocs=2)
    alone = make_head()
    sum(alone.loss(make_features(3), make_targets([5, 0, 2])).values()).backward()
    for got, wanted in zip(torch.load(tmp_path / "0.pt"), gradients(alone), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_weights_with_long_scales_load():
    head, usual = head_with_long_scales(), make_head()
    with torch.no_grad():
        head.scales[1].scale.fill_(3.0)
    usual.load_state_dict(head.state_dict())
    assert usual.scales[1].scale == 3 and usual.scales[1].scale.shape == ()
