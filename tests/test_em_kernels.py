"""The EM kernels as they are executed: compiled for several capabilities, or interpreted (see `kernel_execution`)."""

from __future__ import annotations

import itertools

import extended_em
import numpy as np
import pytest
import torch
from kernel_execution import INTERPRETER, assert_written, compiled_only, execute, on_device, poisoned_outputs, slow_interpreted

from paa_gpu import _ops, testing
from paa_gpu.kernels import em
from paa_gpu.separation import SCHEMES, separate

LENGTHS = (1, 2, 31, 32, 33, 45, 63, 64, 65, 1000, 4096)
SHAPES = tuple(shape for shape in testing.LOSS_SHAPES if shape not in ("one", "two"))
COVARIANCE_TYPES = ("full", "diag", "spherical", "tied")

#: Rows of a test: the interpreter takes a second for five.
FEW, MANY = (2, 6) if INTERPRETER else (6, 24)

#: Of max(1, |value|), against extended precision. Rounding is 2e-15 here; the specification asks for 1e-9.
TOLERANCE = 1e-12


def fit(x, count=None, lengths=None, inits=(None, None, None), covariance_type="diag", **options):
    """The operator, on poisoned outputs."""
    options = {"tol": 1e-3, "reg_covar": 1e-6, "max_iter": 100, "precision": "float64", **options}
    with poisoned_outputs():
        result = _ops.fit_gmm_1d(x, count, lengths, *inits, covariance_type, *options.values())
    assert_written(*result)
    return result


def assert_row(result, row, values, covariance_type="diag", tolerance=TOLERANCE, **options):
    """A row against the direct EM in extended precision, or against the flags of a row that cannot be fitted."""
    weights, means, variances, lower_bound, n_iter, converged, valid = (tensor[row] for tensor in result)
    if len(values) < 2 or not np.isfinite(values).all():
        assert (bool(valid), int(n_iter), bool(converged)) == (False, 0, False)
        assert torch.cat([weights, means, variances, lower_bound[None]]).isnan().all()
        return
    want = extended_em.fit(values, covariance_type, **options)
    assert (bool(valid), int(n_iter), bool(converged)) == (True, want.n_iter, want.converged)
    for got, wanted in zip((weights, means, variances, lower_bound), want, strict=False):
        error = np.abs(got.double().numpy() - wanted) / np.maximum(1, np.abs(wanted))
        assert error.max() <= tolerance, (row, got, wanted)


def draw_rows(rng, rows, length=45):
    return np.stack([testing.make_losses(SHAPES[i % len(SHAPES)], length, rng) for i in range(rows)])


@pytest.mark.parametrize("length", [*LENGTHS[:-1], pytest.param(LENGTHS[-1], marks=pytest.mark.slow)])
def test_rows_of_any_length(session, length, rng):
    rows = draw_rows(rng, FEW if length <= 65 else 2, length)
    result = fit(torch.from_numpy(rows))
    for row, values in enumerate(rows):
        assert_row(result, row, values)


def test_flat_rows(session, rng):
    """Rows of all lengths behind one another, the empty ones at both ends and in the middle too, in strided memory."""
    lengths = [0, 3, 1, 45, 0, 64, 65, 2, 33, 0]
    rows = [testing.make_losses("bimodal", length, rng) for length in lengths]
    flat = torch.full((2 * sum(lengths),), torch.nan, dtype=torch.float64)
    flat[::2] = torch.from_numpy(np.concatenate(rows))
    result = fit(flat[::2], lengths=lengths)
    for row, values in enumerate(rows):
        assert_row(result, row, values)


@pytest.mark.slow
def test_flat_long_rows(session, rng):
    lengths = [1025, 5, 2050]
    rows = [testing.make_losses("bimodal", length, rng) for length in lengths]
    result = fit(torch.from_numpy(np.concatenate(rows)), lengths=lengths)
    for row, values in enumerate(rows):
        assert_row(result, row, values)


def test_no_rows(session):
    assert [tensor.shape[0] for tensor in fit(torch.zeros(0, 45))] == [0] * 7
    assert [tensor.shape[0] for tensor in fit(torch.zeros(0), lengths=[])] == [0] * 7
    assert not fit(torch.zeros(3, 0))[-1].any()


@pytest.mark.parametrize("layout", ["transposed", "every second value", "reversed rows in wider memory"])
def test_strides(session, layout, rng):
    rows = torch.from_numpy(draw_rows(rng, FEW))
    x = {
        "transposed": lambda: rows.t().contiguous().t(),
        "every second value": lambda: torch.stack([rows, torch.full_like(rows, torch.nan)], -1).flatten(1)[:, ::2],
        "reversed rows in wider memory": lambda: torch.cat([rows, torch.full_like(rows, torch.nan)], 1)[:, :45],
    }[layout]()
    assert not x.is_contiguous() and torch.equal(x, rows)
    result = fit(x)
    for row, values in enumerate(rows.numpy()):
        assert_row(result, row, values)


@compiled_only
@pytest.mark.parametrize("rows_apart", [False, True], ids=["columns far apart", "rows far apart"])
def test_offsets_beyond_32_bits(rows_apart, rng):
    """4 GiB of float16 that nobody touches but for a few values: the system does not provide them."""
    values = torch.from_numpy(draw_rows(rng, 3, 3)).half()
    strides = (2**30, 1) if rows_apart else (1, 2**30)
    x = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((3, 3), strides)
    x.copy_(values)
    with execute(90):
        result = fit(x)
    for row, want in enumerate(values.double().numpy()):
        assert_row(result, row, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_count_is_clamped(session, dtype, rng):
    """Whatever `count` holds nothing outside of the row is read: ptxrun would see it, and so would the NaN beyond."""
    x = torch.from_numpy(draw_rows(rng, 8))
    limit = torch.iinfo(dtype)
    counts = torch.tensor([0, 1, 2, 44, 45, 46, limit.max, limit.min, 3], dtype=dtype)[:8]
    strided = torch.stack([counts, counts - counts - 7], 1)[:, 0]
    result = fit(x, strided)
    for row, count in enumerate(counts.clamp(0, 45).tolist()):
        assert_row(result, row, x[row, :count].numpy())


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_non_finite_values(session, bad, rng):
    """They count inside the row only, and spoil no other row."""
    x = draw_rows(rng, 5)
    x[1, 0] = x[2, 44] = x[3, 20] = bad
    x[4, 40:] = bad
    counts = [45, 45, 45, 45, 40]
    result = fit(torch.from_numpy(x), torch.tensor(counts))
    for row, count in enumerate(counts):
        assert_row(result, row, x[row, :count])


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_covariance_types(session, covariance_type, rng):
    rows = draw_rows(rng, 2 * FEW)
    result = fit(torch.from_numpy(rows), covariance_type=covariance_type)
    for row, values in enumerate(rows):
        assert_row(result, row, values, covariance_type)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(session, dtype, rng):
    x = torch.from_numpy(draw_rows(rng, FEW)).to(dtype)
    result = fit(x)
    for row, values in enumerate(x.double().numpy()):
        assert_row(result, row, values)


def test_float32_fit(session, rng):
    """Against extended precision on bimodal rows of scale 1: the specification measures and publishes, and asks for no digits."""
    rows = np.stack([testing.make_losses("bimodal", 45, rng) for _ in range(2 * FEW)]).astype(np.float32)
    result = fit(torch.from_numpy(rows), precision="float32")
    assert [tensor.dtype for tensor in result[:4]] == [torch.float32] * 4
    for row, values in enumerate(rows.astype(np.float64)):
        assert_row(result, row, values, tolerance=1e-5)


@pytest.mark.parametrize("covariance_type", ["diag", "tied"])
@pytest.mark.parametrize("each", [False, True], ids=["one for all rows", "one for each"])
def test_initial_values(session, covariance_type, each, rng):
    rows = draw_rows(rng, FEW)
    shape = (len(rows) if each else 1,)
    weights = rng.dirichlet([2, 2], shape)
    means = rng.normal(1, 1, (*shape, 2))
    precisions = rng.uniform(0.5, 4, (*shape, 1 if covariance_type == "tied" else 2))
    for chosen in [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        given = [init if use else None for init, use in zip((weights, means, precisions), chosen, strict=True)]
        inits = [None if init is None else torch.from_numpy(init) for init in given]
        result = fit(torch.from_numpy(rows), inits=inits, covariance_type=covariance_type)
        for row, values in enumerate(rows):
            mine = [None if init is None else init[row if each else 0] for init in given]
            names = ("weights", "means", "precisions")
            assert_row(result, row, values, covariance_type, **dict(zip(names, mine, strict=True)))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1e-300)])
def test_initial_weights_at_the_edge(session, weights, rng):
    """A component that has nothing, far from or next to values that the other one explains as exp(-800) at best."""
    x = 50 * testing.make_losses("bimodal", 45, rng)[None]
    result = fit(torch.from_numpy(x), inits=(torch.tensor([weights], dtype=torch.float64), None, None))
    with np.errstate(divide="ignore"):
        assert_row(result, 0, x[0], weights=weights)


@pytest.mark.parametrize("options", [{"tol": 1e-8}, {"tol": 0.0, "max_iter": 7}, {"max_iter": 1}], ids=str)
def test_options(session, options, rng):
    rows = draw_rows(rng, FEW)
    result = fit(torch.from_numpy(rows), **options)
    for row, values in enumerate(rows):
        assert_row(result, row, values, **options)


def test_constants_keep_their_precision(session, rng):
    """reg_covar is all there is of a variance of equal values; tol decides between neighbouring float64 numbers."""
    equal = torch.full((2, 5), 1.5, dtype=torch.float64)
    for reg_covar in (1e-6, 0.1):
        assert torch.equal(fit(equal, reg_covar=reg_covar)[2], torch.full((2, 2), reg_covar, dtype=torch.float64))
    x = torch.from_numpy(draw_rows(rng, 1))
    first, second = (fit(x, tol=0.0, max_iter=max_iter)[3].item() for max_iter in (1, 2))
    change = abs(second - first)
    for tol, converged in ((change, False), (np.nextafter(change, np.inf), True)):
        assert fit(x, tol=tol, max_iter=2)[5].item() is converged
    # log(2 pi) / 2: the log-density at the mean of two equal values, both components on it, less log of the deviation.
    lower_bound = fit(torch.zeros(1, 2), reg_covar=1.0, max_iter=1)[3].item()
    assert abs(lower_bound + np.log(2 * np.pi) / 2) < 1e-15


@compiled_only
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("length", [31, 32, 33, 64, 128, 1000, 1500])
@pytest.mark.parametrize("seed", [2, 3])
def test_every_thread_agrees(length, precision, seed, rng):
    """Threads that disagree about convergence meet at different collectives; warps that disagree write different values."""
    x = torch.from_numpy(draw_rows(rng, 40 if length <= 64 else 4, length))
    with execute(90, seed=seed):
        results = fit(x, precision=precision)
    with execute(90, seed=None):
        again = fit(x, precision=precision)
    for result, other in zip(results, again, strict=True):
        assert torch.equal(result, other)


# The launcher of the reassignment ------------------------------------------------------------------------------------------


class Candidates:
    """Ascending losses of `counts` candidates, scattered over `positive` and `ignored` with room between them."""

    def __init__(self, rows, width, rng, dtype=torch.float64):
        self.counts = torch.tensor([len(row) for row in rows])
        self.loss = torch.full((len(rows), width), torch.inf, dtype=torch.float64)
        self.index = torch.full((len(rows), width), -1)
        places = iter(rng.permutation(3 * sum(map(len, rows)) + 1).tolist())
        self.size = 3 * sum(map(len, rows)) + 1
        for g, row in enumerate(rows):
            self.loss[g, : len(row)] = torch.from_numpy(np.sort(row))
            self.index[g, : len(row)] = torch.tensor([next(places) for _ in row], dtype=torch.int64)
        self.loss = self.loss.to(dtype)

    def scatter(self, mask):
        """A mask [G, K] over the potential positives."""
        flat = torch.zeros(self.size, dtype=torch.bool)
        flat[self.index[mask]] = True
        return flat

    def fitted(self, covariance_type="diag"):
        """assignment, score [G, K] of the direct EM; the rows in which a candidate is within rounding of both components."""
        assignment, score = (
            torch.zeros(self.loss.shape, dtype=torch.bool),
            torch.full(self.loss.shape, -torch.inf).double(),
        )
        close = []
        for g, count in enumerate(self.counts.tolist()):
            x = self.loss[g, :count].double().numpy()
            if count < 2 or not np.isfinite(x).all():
                continue
            fit = extended_em.fit(x, covariance_type)
            log_p = extended_em.log_densities(x.astype(extended_em.REAL), fit.weights, fit.means, fit.variances)
            difference = log_p[:, 0] - log_p[:, 1]
            assignment[g, :count] = torch.from_numpy(difference >= -1e-9)
            score[g, :count] = torch.from_numpy(np.logaddexp(log_p[:, 0], log_p[:, 1]).astype(float))
            if (np.abs(difference + 1e-9) < 1e-10).any():
                close.append(g)
        return assignment, score, close


#: A recorded ground truth that every separation scheme treats in its own way: its lowest loss belongs to the background.
TELLING = [0.21, 0.39, 0.40, 0.42, 0.44, 0.46, 0.46, 0.47, 0.53, 0.55, 0.57, 0.57, 0.58, 0.62, 0.75, 0.87, 0.93, 0.99]


def random_candidates(rng, rows=MANY, width=45, **options):
    """Every loss shape, with one, two and no candidates, NaN and infinity, equal values."""
    drawn = [testing.make_losses(SHAPES[i % len(SHAPES)], int(rng.integers(2, width + 1)), rng) for i in range(rows)]
    special = [[], [1.5], [np.nan], [np.inf], [1.0, 2.0], [1.0, np.inf], [0.5, 1.0, np.nan], [-np.inf, 1.0], [2.0, 2.0]]
    special += [[1.0, 1.0, 3.0, 3.0], [1.0] * width, TELLING]
    return Candidates([*drawn[: rows // 2], *map(np.array, special), *drawn[rows // 2 :]], width, rng, **options)


def launch(candidates, covariance_type="diag", precision="float64", separation=None, singleton="background"):
    """assignment, score or positive, ignored; poisoned or zeroed as the caller of `launch_fit` has them; and the fit."""
    rows, width = candidates.loss.shape
    with poisoned_outputs():
        fitted = _ops.empty_fit(candidates.loss, rows, precision)
        if separation is None:
            outputs = (
                torch.empty((rows, width), dtype=torch.bool),
                torch.empty((rows, width), dtype=_ops.PRECISIONS[precision]),
            )
            masks = {"assignment": outputs[0], "score": outputs[1]}
            on_device(em.launch_fit)(candidates.loss, candidates.counts, fitted, covariance_type, **masks)
        else:
            outputs = torch.zeros(candidates.size, dtype=torch.bool), torch.zeros(candidates.size, dtype=torch.bool)
            on_device(em.launch_fit)(
                candidates.loss, candidates.counts, fitted, covariance_type, index=candidates.index, positive=outputs[0],
                ignored=outputs[1], separation=separation, singleton=singleton,
            )  # fmt: skip
    assert_written(*outputs, *fitted)
    return *outputs, fitted


@pytest.mark.parametrize("width", [1, 45, *slow_interpreted(2, 64, 65), pytest.param(600, marks=pytest.mark.slow)])
def test_assignment_and_score(session, width, rng):
    few = Candidates([rng.normal(size=width), rng.normal(size=1), []], width, rng)
    candidates = random_candidates(rng, MANY // 2, width) if width > 4 else few
    assignment, score, fitted = launch(candidates)
    wanted, wanted_score, close = candidates.fitted()
    assert close == []
    assert torch.equal(assignment, wanted)
    assert torch.equal(score.isneginf(), wanted_score.isneginf())
    torch.testing.assert_close(score, wanted_score, rtol=1e-9, atol=1e-9)
    for row, count in enumerate(candidates.counts.tolist()):
        assert_row(fitted, row, candidates.loss[row, :count].numpy())


def test_the_candidates_tell_the_schemes_apart(rng):
    candidates = random_candidates(rng)
    masks = [torch.cat(wanted_masks(candidates, separation, "background")) for separation in SCHEMES]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("singleton", ["background", *slow_interpreted("positive")])
@pytest.mark.parametrize("separation", SCHEMES)
def test_separation(session, separation, singleton, rng):
    candidates = random_candidates(rng)
    positive, ignored, _ = launch(candidates, separation=separation, singleton=singleton)
    wanted = wanted_masks(candidates, separation, singleton)
    assert torch.equal(positive, candidates.scatter(wanted[0]))
    assert torch.equal(ignored, candidates.scatter(wanted[1]))


@pytest.mark.parametrize("separation", ["mmdet", "b"])
@pytest.mark.parametrize("width", [100, pytest.param(700, marks=pytest.mark.slow)])
def test_separation_of_long_rows(session, separation, width, rng):
    candidates = Candidates([testing.make_losses(shape, width - 3, rng) for shape in SHAPES], width, rng)
    positive, ignored, _ = launch(candidates, separation=separation)
    wanted = wanted_masks(candidates, separation, "background")
    assert torch.equal(positive, candidates.scatter(wanted[0]))
    assert torch.equal(ignored, candidates.scatter(wanted[1]))


def wanted_masks(candidates, separation, singleton):
    assignment, score, close = candidates.fitted()
    assert close == []
    position = torch.arange(candidates.loss.shape[1])
    mask = (position < candidates.counts[:, None]) & ~score.isneginf()
    positive, ignored = separate(assignment, score, candidates.loss, mask, separation)
    if singleton == "positive":
        positive |= (candidates.counts[:, None] == 1) & (position == 0) & candidates.loss[:, :1].isfinite()
    return positive, ignored


@compiled_only
@pytest.mark.parametrize("rows", [400, pytest.param(5000, marks=pytest.mark.long)])
def test_random_rows_against_the_cpu_path(rows, rng):
    """The fit against that of the CPU path; the masks against the separation of the kernel's own assignment and scores."""
    candidates = random_candidates(rng, rows)
    wanted = _ops.fit_gmm_1d(candidates.loss, candidates.counts, None, None, None, None, "diag", 1e-3, 1e-6, 100, "float64")
    with execute(90):
        assignment, score, fitted = launch(candidates)
        positive, ignored, _ = launch(candidates, separation="b")
    for got, want in zip(fitted, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    mask = (torch.arange(candidates.loss.shape[1]) < candidates.counts[:, None]) & wanted[-1][:, None]
    masks = separate(assignment, score, candidates.loss, mask, "b")
    assert torch.equal(positive, candidates.scatter(masks[0]))
    assert torch.equal(ignored, candidates.scatter(masks[1]))


@pytest.mark.parametrize("separation", ["mmdet", *slow_interpreted("b")])
def test_first_of_tied_scores_wins(session, separation, rng):
    """Pairs symmetric about the mean of their component: what reaches them from the other one, 1e-13 to 1e-9, is a tie."""
    rows = []
    for _ in range(20):
        pair = rng.uniform(0.1, 1) + np.array([0, 0.1])
        rows.append(np.concatenate([pair, pair[1] + rng.uniform(2.5, 3.5) + np.array([0, 1.4])]))
    candidates = Candidates(rows, 4, rng)
    _, score, _ = candidates.fitted()
    higher = score[:, 1] - score[:, 0]
    close = (higher > 1e-14) & (higher < 0.9e-9)
    assert close.sum() >= 5
    positive, ignored, _ = launch(candidates, separation=separation)
    wanted = wanted_masks(candidates, separation, "background")
    assert torch.equal(positive, candidates.scatter(wanted[0]))
    assert torch.equal(ignored, candidates.scatter(wanted[1]))
    first, second = candidates.index[close][:, 0], candidates.index[close][:, 1]
    assert positive[first].all() and not positive[second].any()


def test_first_of_equal_losses_wins(session, rng):
    """Equal losses have equal scores: only the first of them is positive, whether the fit finds one component or two."""
    rows = [np.array([2.0] * 5), np.array([1.0, 1.0, 1.0, 8.0, 8.0]), np.array([3.0, 3.0])]
    candidates = Candidates(rows, 5, rng)
    positive, ignored, _ = launch(candidates, separation="b")
    assert positive[candidates.index[:, 0]].all() and positive.sum() == 3
    # Of the second row: background begins with its first candidate, behind the two other foreground ones.
    assert ignored[candidates.index[1]].tolist() == [False, True, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_loss_dtypes(session, dtype, rng):
    """float16 losses have many ties."""
    candidates = random_candidates(rng, dtype=dtype)
    for separation in ("mmdet", "paper"):
        positive, ignored, _ = launch(candidates, separation=separation)
        wanted = wanted_masks(candidates, separation, "background")
        assert torch.equal(positive, candidates.scatter(wanted[0]))
        assert torch.equal(ignored, candidates.scatter(wanted[1]))


@pytest.mark.slow
def test_float32_candidates(session, rng):
    """In float32 the rule is plain: component 0 at least as likely, equal scores tie. Checked on the kernel's own scores."""
    candidates = random_candidates(rng, dtype=torch.float32)
    assignment, score, fitted = launch(candidates, precision="float32")
    positive, ignored, _ = launch(candidates, precision="float32", separation="b")
    mask = (torch.arange(45) < candidates.counts[:, None]) & fitted[-1][:, None]
    wanted = separate(assignment, score, candidates.loss, mask, "b")
    assert torch.equal(positive, candidates.scatter(wanted[0]))
    assert torch.equal(ignored, candidates.scatter(wanted[1]))


def test_an_index_below_zero_writes_nothing(session, rng):
    candidates = random_candidates(rng)
    candidates.index.fill_(-1)
    positive, ignored, _ = launch(candidates, separation="b")
    assert not positive.any() and not ignored.any()


# Work ----------------------------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("length", [33, 45, 64])
@pytest.mark.parametrize(("precision", "budget"), [("float64", 500), ("float32", 250)])
def test_work_of_an_iteration(precision, budget, length, rng):
    """Warp instructions per iteration and row without moves; one warp, so no shared memory and no barrier."""
    x = torch.from_numpy(draw_rows(rng, 20, length))
    work = {}
    for max_iter in (3, 13):
        with execute(90, seed=None, count=True, racecheck=0) as session:
            assert fit(x, tol=0.0, max_iter=max_iter, precision=precision)[4].tolist() == [max_iter] * 20
        counters = session.counters
        assert counters.barriers == 0 and counters.warp_classes["shared"] == 0
        work[max_iter] = counters.warp_classes.copy()
    classes = {name: (work[13][name] - work[3][name]) / 200 for name in work[13] if name != "mov"}
    total = sum(classes.values())
    print(f"{precision}, {length} values: {total:.0f} of", {name: round(n, 1) for name, n in classes.items() if n})
    assert total <= budget


@compiled_only
def test_loads_are_coalesced(rng):
    """A row is read twice at most, each time without gaps: 45 values of 8 bytes begin anywhere in a sector."""
    x = torch.from_numpy(draw_rows(rng, 64))
    with execute(90, seed=None, count=True, racecheck=0) as session:
        fit(x)
    counters = session.counters
    sectors, needed = counters.load_sectors, counters.load_bytes / 32
    print(f"{sectors} sectors loaded for {needed:.0f}")
    assert sectors <= 1.5 * needed
