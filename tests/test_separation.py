"""The separation schemes on a row small enough to read: losses 1 to 6, foreground and scores given."""

from __future__ import annotations

import extended_em
import numpy as np
import pytest
import torch

import paa_gpu
from paa_gpu.separation import SCHEMES, separate

#                      1      2      3      4     5     6
FOREGROUND = [True, False, True, True, False, False]
SCORE = [0.1, 0.2, 0.9, 0.3, 0.0, 0.8]  # highest foreground: 3; highest background: 6


def run(foreground, score, scheme, mask=None):
    assignment = torch.tensor([foreground])
    mask = torch.ones_like(assignment) if mask is None else torch.tensor([mask])
    positive, ignored = separate(assignment, torch.tensor([score], dtype=torch.float64), None, mask, scheme)
    assert not (positive & ignored).any()
    return [i + 1 for i in range(len(score)) if positive[0, i]], [i + 1 for i in range(len(score)) if ignored[0, i]]


CASES = [
    # scheme, positive, ignored
    ("mmdet", [1, 3], []),
    ("paper", [1, 2, 3], []),
    ("a", [1, 3, 4], []),
    ("b", [1, 2, 3], [4, 5]),
    ("d", [1, 3], [4]),
]


@pytest.mark.parametrize(("scheme", "positive", "ignored"), CASES)
def test_schemes(scheme, positive, ignored):
    assert run(FOREGROUND, SCORE, scheme) == (positive, ignored)


def test_every_scheme_is_tested():
    assert set(SCHEMES) == {scheme for scheme, _, _ in CASES}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_foreground(scheme):
    assert run([False] * 3, [0.1, 0.2, 0.3], scheme) == ([1, 2, 3] if scheme == "paper" else [], [])


@pytest.mark.parametrize(
    ("scheme", "positive", "ignored"), [("mmdet", [1, 2], []), ("a", [1, 2, 3], []), ("b", [1, 2], [3]), ("d", [1, 2], [3])]
)
def test_without_background(scheme, positive, ignored):
    assert run([True] * 3, [0.1, 0.3, 0.2], scheme) == (positive, ignored)


def test_scheme_b_with_the_best_background_before_the_threshold():
    assert run([True, False, True, False], [0.1, 0.9, 0.8, 0.2], "b") == ([1, 2, 3], [])


def test_scores_within_the_tolerance_tie_and_the_first_wins():
    score = [0.5, 0.5 + 0.9e-9, 0.5 + 0.8e-9]
    assert run([True] * 3, score, "mmdet") == ([1], [])
    assert run([True] * 3, [0.5, 0.5 + 2e-9, 0.5], "mmdet") == ([1, 2], [])
    # the best background candidate of "b" likewise: 2 ties with 4
    assert run([True, False, False, False], [0.9, 0.5, 0.1, 0.5 + 0.5e-9], "b") == ([1], [])


def test_padding_and_rows_without_a_fit():
    for scheme in SCHEMES:
        positive, ignored = run([True] * 4, [0.1, 0.2, 9.0, 9.0], scheme, mask=[True, True, False, False])
        assert set(positive) <= {1, 2} and not set(ignored) & {3, 4}
        assert run([True] * 2, [0.1, 0.2], scheme, mask=[False, False]) == ([], [])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for scheme in SCHEMES:
        positive, ignored = separate(mask, torch.zeros(shape), None, mask, scheme)
        assert positive.shape == ignored.shape == shape


@pytest.mark.parametrize("separation", ["mmdet", "b"])
def test_the_first_of_scores_that_tie(separation, rng):
    """The second score is higher, by less than 1e-9. The threshold is the first one."""
    ties = 0
    for _ in range(20):
        pair = rng.uniform(0.1, 1) + np.array([0, 0.1])
        row = np.concatenate([pair, pair[1] + rng.uniform(2.5, 3.5) + np.array([0, 1.4])])
        fit = extended_em.fit(row)
        log_p = extended_em.log_densities(row.astype(extended_em.REAL), fit.weights, fit.means, fit.variances)
        first, second, *_ = np.logaddexp(log_p[:, 0], log_p[:, 1])
        if not 1e-14 < second - first < 0.9e-9:
            continue
        ties += 1
        zeros = torch.zeros(4, dtype=torch.int64)
        columns = [torch.from_numpy(row)], [zeros], [torch.ones(4)], [torch.ones(4, 4)], [torch.arange(4)], [zeros], [4]
        got = paa_gpu.paa_reassign_batch(*columns, num_classes=1, num_gts=[1], separation=separation)
        assert got.positive[0].tolist()[:2] == [True, False]
    assert ties >= 5


def test_an_ignored_candidate_has_no_label_weight():
    """The only one of its image, in the first image and behind it."""
    losses, gts = torch.tensor([0.31, 0.35, 2.9, 0.4, 3.1]), torch.zeros(5, dtype=torch.int64)
    image = losses, torch.full((6,), 3), torch.ones(6), torch.ones(6, 4), torch.tensor([0, 1, 3, 4, 5]), gts
    columns = [[tensor, tensor] for tensor in image]
    got = paa_gpu.paa_reassign_batch(*columns, [4, 2], num_classes=80, num_gts=[1, 1], separation="d")
    for label, label_weight, ignored in zip(got.label, got.label_weight, got.ignored, strict=True):
        assert ignored.tolist() == [False, False, False, True, False]
        assert label_weight.tolist() == [1, 1, 1, 1, 0, 1]
        assert label.tolist() == [3, 3, 3, 80, 80, 80]


def test_scores_of_float32_tie_only_where_they_are_equal():
    score, all_of_them = torch.tensor([[1e-10, 2e-10]]), torch.ones(1, 2, dtype=torch.bool)
    assert separate(all_of_them, score, None, all_of_them)[0].tolist() == [[True, True]]
    assert separate(all_of_them, score.double(), None, all_of_them)[0].tolist() == [[True, False]]


def test_a_callable_gets_no_more_columns_than_an_image_needs():
    """The most of any image: the fewer of its potential positives and of what its levels have room for."""
    shapes = []

    def scheme(assignment, score, loss, mask):
        shapes.append(loss.shape)
        return mask, torch.zeros_like(mask)

    images = [
        (
            torch.rand(some),
            torch.zeros(of).long(),
            torch.ones(of),
            torch.ones(of, 4),
            torch.arange(some),
            torch.zeros(some).long(),
        )
        for some, of in ((30, 30), (3, 5))
    ]
    options = {"num_classes": 1, "topk": 2, "num_gts": [1, 1], "separation": scheme}
    paa_gpu.paa_reassign_batch(*map(list, zip(*images, strict=True)), [[30], [1] * 5], **options)
    assert shapes == [(2, 3)]
