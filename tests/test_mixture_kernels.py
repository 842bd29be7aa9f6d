"""The kernels that read mixtures out, as they are executed: compiled for several capabilities, or interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_execution import INTERPRETER, assert_written, compiled_long, compiled_only, execute, poisoned_outputs
from test_mixture import assert_row, mixtures, wanted

from paa_gpu import _ops
from paa_gpu.kernels import mixture

#: Against extended precision: the difference of two log-densities of some 100 has an error of 1e-14.
TOLERANCE = 1e-13


#: What most tests read: the others share their code with these.
USUAL = ("predict_proba", "log_likelihood")


def read(gmm, x, count=None, lengths=None, readouts=_ops.READOUTS):
    """Readouts of the operator, on poisoned outputs."""
    with poisoned_outputs():
        answers = {what: _ops.read_mixture(x, count, lengths, *gmm[:3], what) for what in readouts}
    assert_written(*answers.values())
    return answers


def check(gmm, answers, row, x, at, tolerance=TOLERANCE):
    """The answers at the places `at` are those of the values x of a row; so is the sum of its log-densities."""
    assert_row(gmm, row, x, {what: answer[at] for what, answer in answers.items() if what != "log_likelihood"}, tolerance)
    total, want = answers["log_likelihood"][row].item(), float(wanted(gmm, row, x)["score_samples"].sum())
    assert np.isclose(total, want, rtol=tolerance, atol=10 * tolerance, equal_nan=True)


@pytest.mark.parametrize("components", compiled_long(2, 1, 3, 8))
def test_rows_of_several_blocks(session, components, rng):
    x = torch.from_numpy(rng.normal(0, 3, (2, 144 if INTERPRETER else 1104)))
    gmm = mixtures(rng, 2, components)
    answers = read(gmm, x)
    for row in range(2):
        check(gmm, answers, row, x[row].numpy(), row)


@pytest.mark.parametrize("length", compiled_long(63, 1, 64, 65))
def test_short_rows(session, length, rng):
    x = torch.from_numpy(rng.normal(0, 3, (5, length)))
    gmm = mixtures(rng, 5, 2)
    answers = read(gmm, x, readouts=USUAL)
    for row in range(5):
        check(gmm, answers, row, x[row].numpy(), row)


def test_of_equal_means_the_first_is_the_lowest(session, rng):
    x, gmm = torch.from_numpy(rng.normal(0, 3, (3, 40))), mixtures(rng, 3, 3)
    gmm = gmm._replace(means=torch.stack([gmm.means[:, 0] + 1, gmm.means[:, 0], gmm.means[:, 0]], 1))
    answers = read(gmm, x, readouts=("low_probability", "predict_proba"))
    torch.testing.assert_close(answers["low_probability"], answers["predict_proba"][..., 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", compiled_long(torch.int64, torch.int32))
def test_padding_and_counts_out_of_range(session, dtype, rng):
    """What is not counted is not read: ptxrun would see it, and so would the sum."""
    x = torch.from_numpy(rng.normal(0, 3, (6, 90)))
    limit = torch.iinfo(dtype)
    count = torch.tensor([0, 1, 64, 89, limit.max, limit.min], dtype=dtype)
    gmm, sizes = mixtures(rng, 6, 2), count.clamp(0, 90).tolist()
    padded = torch.where(torch.arange(90) < torch.tensor(sizes)[:, None], x, torch.inf)
    answers = read(gmm, padded, count, readouts=("predict", *USUAL))
    for row, size in enumerate(sizes):
        check(gmm, answers, row, x[row, :size].numpy(), (row, slice(size)))
        assert (answers["predict"][row, size:] == -1).all() and answers["predict_proba"][row, size:].isnan().all()


@pytest.mark.parametrize("components", compiled_long(3, 2))
def test_flat_rows(session, components, rng):
    """Rows of all lengths, the empty ones at both ends and in the middle too, in strided memory."""
    lengths = [0, 3, 1, 0, 64, 300, 65, 0]
    flat = torch.from_numpy(rng.normal(0, 3, 2 * sum(lengths)))[::2]
    gmm = mixtures(rng, len(lengths), components)
    answers, begin = read(gmm, flat, lengths=lengths), 0
    for row, length in enumerate(lengths):
        place = slice(begin, begin + length)
        check(gmm, answers, row, flat[place].numpy(), place)
        begin += length


def test_more_blocks_than_one_pass_adds(session, rng):
    """Short rows set the block, so a long row beside them has more blocks than are added at once."""
    lengths = [5000, *[1] * 200]
    flat, gmm = torch.from_numpy(rng.normal(0, 3, sum(lengths))), mixtures(rng, len(lengths), 2)
    assert lengths[0] > 64 * mixture.launch_rule(len(lengths), len(flat))["BLOCK"]
    answer = read(gmm, flat, lengths=lengths, readouts=("log_likelihood",))["log_likelihood"]
    want = [wanted(gmm, row, part.numpy())["score_samples"].sum() for row, part in enumerate(flat.split(lengths))]
    np.testing.assert_allclose(answer.numpy(), want, rtol=TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize("dtype", compiled_long(torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("fit_dtype", compiled_long(torch.float32, torch.float64))
def test_dtypes_and_strides(session, dtype, fit_dtype, rng):
    x = torch.from_numpy(rng.normal(size=(70, 3))).to(dtype).T
    gmm = mixtures(rng, 3, 2, fit_dtype)
    answers = read(gmm, x, readouts=USUAL)
    for row in range(3):
        tolerance = 1e-5 if fit_dtype == torch.float32 else TOLERANCE
        check(gmm, answers, row, x[row].double().numpy(), row, tolerance)


@pytest.mark.parametrize("components", compiled_long(2, 1, 3))
def test_values_and_rows_that_are_not_finite(session, components, rng):
    x = torch.from_numpy(rng.normal(size=(3, 70)))
    x[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x[1, 0] = -torch.inf
    gmm = mixtures(rng, 3, components)
    for values in gmm[:3]:
        values[2] = torch.nan
    answers = read(gmm, x)
    for row in range(3):
        check(gmm, answers, row, x[row].numpy(), row)
    assert (answers["predict"][2] == -1).all() and answers["log_likelihood"].isfinite().logical_not().all()
    far = torch.full((3, 1), 1e200, dtype=torch.float64)
    assert read(gmm, far, readouts=("predict",))["predict"].tolist() == [[0], [0], [-1]]


def test_parameters_of_any_strides(session, rng):
    x, gmm = torch.from_numpy(rng.normal(size=(3, 63))), mixtures(rng, 3, 2)
    strided = gmm._replace(**{name: getattr(gmm, name).T.contiguous().T for name in ("weights", "means", "variances")})
    for one, other in zip(read(gmm, x, readouts=USUAL).values(), read(strided, x, readouts=USUAL).values(), strict=True):
        assert torch.equal(one, other)


def test_no_values(session, rng):
    for x, lengths, rows in ((torch.zeros(0, 5), None, 0), (torch.zeros(3, 0), None, 3), (torch.zeros(0), [0, 0], 2)):
        answers = read(mixtures(rng, rows, 2), x, lengths=lengths)
        assert answers["predict"].shape == x.shape and answers["predict_proba"].shape == (*x.shape, 2)
        assert torch.equal(answers["log_likelihood"], torch.zeros(rows, dtype=torch.float64))


@compiled_only
@pytest.mark.parametrize("what", _ops.READOUTS[:4])
def test_the_work_of_a_value(what, rng):
    """Each value is read once and each answer written once, by a program for every 1,024 values of a long row."""
    n, gmm = 16_384, mixtures(rng, 1, 2)
    x, answers = torch.from_numpy(rng.normal(size=(1, n))), 2 if what == "predict_proba" else 1
    with execute(90, count=True, racecheck=0) as session:
        _ops.read_mixture(x, None, None, *gmm[:3], what)
    work = session.counters
    instructions = work.warp_instructions / (n / 32)
    print(f"{what}: {instructions:.0f} warp instructions for 32 values, {work.load_sectors} and {work.store_sectors} sectors")
    assert work.ctas == n // mixture.launch_rule(1, n)["BLOCK"] == 16
    # Two components are two stores side by side, each of which touches all sectors of both.
    assert work.store_sectors == answers**2 * n // 4
    # The parameters are read by every warp, for 128 values.
    assert n // 4 <= work.load_sectors <= 1.5 * n // 4
    assert instructions <= {"predict": 130, "predict_proba": 300, "low_probability": 170, "score_samples": 290}[what]
