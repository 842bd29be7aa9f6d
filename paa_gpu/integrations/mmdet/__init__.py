"""The PAA heads of mmdetection 2.11 to 2.28, 3.x and onedl-mmdetection, with assignment, losses and score voting by this library.

Build a model and call `accelerate(model)`. Or write in a configuration file:

    custom_imports = dict(imports=["paa_gpu.integrations.mmdet"])
    model = dict(bbox_head=dict(type="PAAHeadGPU", ...))  # or "LADHeadGPU"; the arguments of the published head

A head with the published assigner, sampler, box coder and losses trains without waiting for the device. Its labels come directly
from the levels' outputs. Any other head keeps its own parts, and the library reassigns its batch in one call. `explain` says
which case applies, and why. Voting takes one call for each image.

A subclass of the published heads keeps the methods that it overrides. The accelerated class comes after it in the order of
inheritance. If a subclass overrides

* `gmm_separation_scheme`, it is called for every ground truth of the batch, with mmdetection's arguments. This is slower.
* `loss_by_feat` (`loss` in 2.x), or `get_label_assignment` of LADHead, it is called. `paa_reassign` in it calls the library,
  image by image.
* `paa_reassign`, it is called image by image. `super().paa_reassign(...)` calls the library.
* `score_voting`, it is called.
"""

from .heads import PRESETS, Explanation, LADHeadGPU, PAAHeadGPU, accelerate, explain, restore

__all__ = ["PRESETS", "Explanation", "LADHeadGPU", "PAAHeadGPU", "accelerate", "explain", "restore"]
