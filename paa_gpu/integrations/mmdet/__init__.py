"""The PAA heads of mmdetection 2.11 to 2.28, 3.x and onedl-mmdetection, with assignment, losses and score voting by this library.

For a model that is built, `accelerate(model)`; in a configuration file

    custom_imports = dict(imports=["paa_gpu.integrations.mmdet"])
    model = dict(bbox_head=dict(type="PAAHeadGPU", ...))  # or "LADHeadGPU"; the arguments of the published head

A head with the published assigner, sampler, box coder and losses trains without waiting for the device: labels are assigned
straight from the levels' outputs. Any other head keeps what it has of its own, and its batch is reassigned in one call; `explain`
tells which, and why. Voting takes one call an image. What a subclass of the published heads overrides stays in force: the
accelerated class comes after it in the order of inheritance. So one that overrides

* `gmm_separation_scheme` has it called for every ground truth of the batch, with mmdetection's arguments: slower;
* `loss_by_feat` (`loss` in 2.x) or (LADHead) `get_label_assignment` has it, and in it the library's `paa_reassign`, image by
  image;
* `paa_reassign` has it called image by image; with `super().paa_reassign(...)` it reaches the library;
* `score_voting` has it.
"""

from .heads import PRESETS, Explanation, LADHeadGPU, PAAHeadGPU, accelerate, explain, restore

__all__ = ["PRESETS", "Explanation", "LADHeadGPU", "PAAHeadGPU", "accelerate", "explain", "restore"]
