"""A score threshold for each class from its own scores: `python examples/teacher_thresholds.py`.

Semi-supervised detectors such as Consistent-Teacher let a teacher label images. The teacher's confident boxes become ground
truths of the student. What is confident differs from class to class. This example fits a mixture of two Gaussians to the
scores of every class, all classes in one call. The threshold of a class is the most likely score of its upper component. The
start of the fit is Consistent-Teacher's. The scores are those of a recorded detector, before NMS: with 80 classes in a
checkout, with one class otherwise. Most of them are low, so the thresholds are low too. Detections after NMS give higher ones.
"""

import argparse

import torch
from torch import Tensor

import paa_gpu
from paa_gpu import data

FEWEST = 4  # a class with fewer scores keeps the default threshold
DEFAULT = 0.5


def thresholds(scores: list[Tensor]) -> Tensor:
    """The threshold of each class from its scores [K_c]: Tensor[C]."""
    fit = paa_gpu.fit_gmm_1d([row.double() for row in scores])
    labels, densities = fit.predict(scores), fit.score_samples(scores)
    result = torch.full((len(scores),), DEFAULT)
    for i, (row, label, density) in enumerate(zip(scores, labels, densities, strict=True)):
        upper = label == 1
        if len(row) >= FEWEST and upper.any():
            result[i] = row[density.masked_fill(~upper, -torch.inf).argmax()]
    return result


def main(argv: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score-thr", type=float, default=0.05, help="lower scores are no detections")
    options = parser.parse_args(argv)
    call = data.load_voting(data.voting_paths()[-1])[0]
    classes = call.mlvl_nms_scores.T
    scores = [row[row > options.score_thr] for row in classes]
    found = thresholds(scores)
    print(f"{'class':>5} {'scores':>7} {'threshold':>10} {'kept':>5}")
    for i, (row, threshold) in enumerate(zip(scores, found.tolist(), strict=True)):
        if len(row):
            print(f"{i:5} {len(row):7} {threshold:10.3f} {int((row >= threshold).sum()):5}")
    return found


if __name__ == "__main__":
    main()
