"""What is compared: the published loop, scikit-learn, gmm-gpu, this library, and numpy's bare arithmetic. Results are checked first."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import paa_gpu
from paa_gpu import diagnose, reference, testing

from .cases import Call

Targets = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]

# Under pytest `mmdet` also finds the folder tests/mmdet, which has no file of its own to import.
MMDET = getattr(importlib.util.find_spec("mmdet"), "origin", None) is not None
GMM_GPU = importlib.util.find_spec("gmm_gpu") is not None


# --- reassignment ---------------------------------------------------------------------------------------------------------------


def published(call: Call) -> Targets:
    """The published head's loop, image by image: mmdetection's own code where it is installed, else our reference."""
    batch = call.batch
    if not MMDET:
        options = {"num_classes": batch.num_classes, "topk": call.topk, "published": True}
        return [reference.paa_reassign(*arguments, **options) for arguments in zip(*batch.arguments, strict=True)]
    head = _mmdet_head(batch.num_classes, call.topk)
    return [
        head.paa_reassign(*tensors, [torch.empty(size, 4) for size in levels])
        for *tensors, levels in zip(*batch.arguments, strict=True)
    ]


@functools.cache
def _mmdet_head(num_classes: int, topk: int = 9) -> Any:
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        import stand_in  # noqa: F401  # for mmcv's compiled module: tests/mmdet, which `make bench-mmdet` puts on the path
    from mmdet.models.dense_heads import PAAHead

    return PAAHead(num_classes, 32, feat_channels=32, stacked_convs=1, topk=topk, covariance_type="diag")


def library(call: Call) -> Targets:
    """One call of `paa_reassign_batch`."""
    got = paa_gpu.paa_reassign_batch(*call.batch.arguments, **call.options)
    return list(zip(got.label, got.label_weight, got.bbox_weight, got.num_pos.tolist(), strict=True))


def library_one_by_one(call: Call) -> Targets:
    """`paa_reassign` for one image after the other. It finds the number of ground truths itself, as the published loop does."""
    options = {"num_classes": call.batch.num_classes, "topk": call.topk}
    return [paa_gpu.paa_reassign(*arguments, **options) for arguments in zip(*call.batch.arguments, strict=True)]


def oracle(call: Call) -> Targets:
    """The published loop with its losses in float64."""
    options = {"num_classes": call.batch.num_classes, "topk": call.topk}
    return [reference.paa_reassign(*arguments, **options) for arguments in zip(*call.batch.arguments, strict=True)]


def check(got: Targets, wanted: Targets) -> None:
    """Raise unless the targets are the oracle's."""
    for ours, theirs in zip(got, wanted, strict=True):
        if not all(torch.equal(a.cpu(), b) for a, b in zip(ours[:3], theirs[:3], strict=True)) or ours[3] != theirs[3]:
            raise AssertionError("a provider does not give the oracle's targets")


def reassign_limit(call: Call) -> Callable[[], Any]:
    """The least work of a reassignment: one copy of the three outputs into new memory, one exp and one log per candidate and iteration."""
    fit = paa_gpu.paa_reassign_batch(*call.batch.arguments, **call.options).fit
    batch = call.batch
    counts = [
        paa_gpu.select_candidates(*image, num_gt=num_gt, topk=call.topk).count
        for *image, num_gt in zip(batch.pos_losses, batch.pos_inds, batch.pos_gt_inds, batch.anchors, batch.num_gts, strict=True)
    ]
    transcendental = fit_limit(torch.cat(counts), fit.n_iter)
    targets = [[image.numpy() for image in column] for column in call.batch[1:4]]

    def run() -> list[Any]:
        copies = [np.concatenate(column) for column in targets]
        transcendental()
        return copies

    return run


# --- the fit --------------------------------------------------------------------------------------------------------------------


def scikit_learn_fit(x: torch.Tensor) -> Any:
    return [reference.fit((row - row.min()).numpy(), "diag") for row in x]


def gmm_gpu_fit(x: torch.Tensor) -> Any:
    """gmm-gpu on the CPU, from the same start, in float32: it raises on float64."""
    from gmm_gpu.gmm import GMM

    rows = x.shape[0]
    values = (x - x.amin(1, keepdim=True)).float()[:, :, None]
    mixture = GMM(
        2,
        device="cpu",
        dtype=torch.float32,
        means_init=torch.cat([values.amin(1, keepdim=True), values.amax(1, keepdim=True)], 1),
        weights_init=torch.full((rows, 2), 0.5),
        precisions_init=torch.ones(rows, 2, 1, 1),
        random_seed=1,
    )
    mixture.fit(values)
    return mixture


def fit_limit(count: torch.Tensor, n_iter: torch.Tensor) -> Callable[[], None]:
    """One exp and one log (numpy's) per value and iteration of each row, on one thread, in a cache."""
    rest = int((count * n_iter).sum())
    x = np.linspace(-20, 0, 4096)
    exp, log = np.empty_like(x), np.empty_like(x)

    def run() -> None:
        for start in range(0, rest, len(x)):
            part = slice(min(len(x), rest - start))
            np.exp(x[part], out=exp[part])
            np.log(exp[part], out=log[part])

    return run


# --- mixtures with the k-means start --------------------------------------------------------------------------------------------

#: DivideMix's arguments, in noisy-label learning the usual ones.
DIVIDEMIX = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}


def mixture_input(rows: list[torch.Tensor]) -> Any:
    """The library's input: rows of one length as a table."""
    return torch.stack(rows) if len({len(row) for row in rows}) == 1 else rows


def mixture_library(x: Any) -> tuple[paa_gpu.GaussianMixture1D, Any]:
    """The fit and the probabilities of the low component."""
    fit = paa_gpu.fit_gmm_1d(x, init="kmeans", **DIVIDEMIX)
    return fit, fit.low_probability(x)


def mixture_estimator(row: torch.Tensor) -> tuple[int, Any]:
    """The same with the estimator, in DivideMix's lines."""
    from paa_gpu.integrations.sklearn import GaussianMixture

    mixture = GaussianMixture(n_components=2, **DIVIDEMIX).fit(row[:, None])
    return mixture.n_iter_, mixture.predict_proba(row[:, None])[:, mixture.means_.argmin()]


def mixture_scikit_learn(rows: list[torch.Tensor]) -> list[Any]:
    """scikit-learn's estimator, row after row. "diag" is the fastest of its covariance types."""
    from sklearn.mixture import GaussianMixture

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows:
            column = row[:, None].numpy()
            mixture = GaussianMixture(n_components=2, covariance_type="diag", random_state=0, **DIVIDEMIX).fit(column)
            found.append(mixture.predict_proba(column)[:, mixture.means_.argmin()])
    return found


def two_means_start(x: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The start from two means: Lloyd's iteration from the row's mean to its fixed point, then scikit-learn's M-step."""
    x = x.astype(np.float64)
    boundary, before = x.mean(), np.inf
    while boundary != before:
        groups = x[x <= boundary], x[x > boundary]
        before, boundary = boundary, (groups[0].mean() + groups[1].mean()) / 2
    return {
        "weights_init": np.array([len(group) for group in groups]) / len(x),
        "means_init": np.array([[group.mean()] for group in groups]),
        "precisions_init": 1 / np.array([[[group.var() + DIVIDEMIX["reg_covar"]]] for group in groups]),
    }


def mixture_limit(rows: list[torch.Tensor], n_iter: torch.Tensor) -> Callable[[], None]:
    """One exp and one log per value and iteration, as for the fit, and the same again for reading it out."""
    return fit_limit(torch.tensor([len(row) for row in rows]), n_iter + 1)


# --- score voting ---------------------------------------------------------------------------------------------------------------


def published_voting(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`PAAHead.score_voting`: mmdetection's own code where it is installed, else our reference."""
    if not MMDET:
        return reference.score_voting(*arguments, published=True)
    return _mmdet_head(arguments[3].shape[1] - 1).score_voting(*arguments)


def check_voting(*arguments: Any) -> float:
    """Raise unless order, labels and scores are the published ones, and boxes agree within 0.001 pixels.

    Returns the largest difference.
    """
    (got, labels), (wanted, wanted_labels) = paa_gpu.score_voting(*arguments), published_voting(*arguments)
    difference = float((got - wanted).abs().max())
    if not (torch.equal(labels, wanted_labels) and torch.equal(got[:, 4], wanted[:, 4]) and difference <= 1e-3):
        raise AssertionError(f"score_voting does not give the published detections: {difference} pixels")
    return difference


def check_losses(batch: testing.HeadBatch) -> None:
    """Raise unless the losses of the candidates agree with the unfused form in float64 within 1e-6 of their size."""
    for got, wanted in zip(paa_gpu.candidate_losses(*batch), reference.candidate_losses(*batch), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


def check_assignment(*arguments: Any) -> None:
    """Raise unless the boxes of one image's anchors, and their overlaps, are those of the matrix, to the bit."""
    got, wanted = paa_gpu.assign_max_iou(*arguments), reference.assign_max_iou(*arguments)
    if not (torch.equal(got.gt_inds[0], wanted[0][0]) and torch.equal(got.max_overlaps[0], wanted[1][0])):
        raise AssertionError("assign_max_iou does not give the boxes of the matrix of overlaps")


# --- time -----------------------------------------------------------------------------------------------------------------------


def interleaved(
    calls: Sequence[Callable[[], Any]],
    rounds: int = 5,
    repeats: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> list[float]:
    """The median time of each call in seconds. In each of `rounds`, each call takes its turn and runs `repeats` times.

    So a call of a millisecond is not always timed after a loop of half a second, with cold caches and a sleeping core. A time
    begins and ends with an idle `device`.
    """
    wait = (lambda: torch.cuda.synchronize(device)) if torch.device(device).type == "cuda" else lambda: None
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    wait()
    for _ in range(rounds):
        for taken, call, count in zip(times, calls, repeats or [1] * len(calls), strict=True):
            for _ in range(count):
                start = time.perf_counter()
                call()
                wait()
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def move(value: Any, device: torch.device | str) -> Any:
    """The tensors of a call's arguments, in lists and tuples too, on a device."""
    return diagnose.map_tensors(lambda tensor: tensor.to(device), value)


def cuda_seconds(run: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, float]:
    """Medians of `run(*arguments)` on the GPU, with cold caches, and on the host that launches it."""
    there = move(list(arguments), "cuda")
    on_device, on_host = diagnose.Cuda().seconds(lambda: run(*there))
    return {"event_seconds": on_device, "host_seconds": on_host}
