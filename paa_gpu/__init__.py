"""Probabilistic anchor assignment (PAA): reassignment and score voting for a whole batch of images, on the GPU and the CPU."""

from . import _interpreter  # noqa: F401  # first: it refuses a Python on which the rest would not be safe
from .assign import Assignment, assign_max_iou
from .distributed import reduce_mean
from .em import fit_gmm_1d
from .fusion import FusedBoxes, weighted_boxes_fusion
from .head import PAAHead, levels_to_images
from .losses import candidate_losses
from .mixture import GaussianMixture1D
from .nms import Detections, batched_nms
from .reassign import Reassignment, paa_reassign, paa_reassign_batch
from .topk import Candidates, select_candidates
from .voting import score_voting, score_voting_batch

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "Candidates",
    "Detections",
    "FusedBoxes",
    "GaussianMixture1D",
    "PAAHead",
    "Reassignment",
    "assign_max_iou",
    "batched_nms",
    "candidate_losses",
    "fit_gmm_1d",
    "levels_to_images",
    "paa_reassign",
    "paa_reassign_batch",
    "reduce_mean",
    "score_voting",
    "score_voting_batch",
    "select_candidates",
    "weighted_boxes_fusion",
]
