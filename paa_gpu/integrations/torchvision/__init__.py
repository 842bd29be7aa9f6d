"""torchvision's detectors, and models that contain them: matching without the matrix of overlaps, and RetinaNet trained by PAA.

    accelerate(model)   # RetinaNet, SSD, SSDLite, Faster, Mask and Keypoint R-CNN: the same matches, in memory O(A + G)
    use_paa(model)      # RetinaNet: probabilistic anchor assignment instead of IoU thresholds; no new parameter
    restore(model)      # as it was

Modules change their class in place. Parameters, buffers, hooks and `state_dict` stay. `deepcopy` and pickling work. A subclass of
torchvision's classes keeps the methods that it overrides. Their `super()` calls this library. A scripted module cannot change its
class, so restore a model before `torch.jit.script`.

There is no PAA for FCOS. FCOS defines its centerness only inside a ground truth. An anchor with an IoU of 0.1 may have its centre
outside.
"""

try:
    import torchvision.models.detection  # noqa: F401
except ImportError as error:
    raise ImportError("paa_gpu.integrations.torchvision needs torchvision: pip install torchvision") from error
from .matching import AcceleratedRetinaNet, AcceleratedRoIHeads, AcceleratedRPN, AcceleratedSSD
from .models import accelerate, restore, use_paa
from .paa import PAAOptions, RetinaNetPAA

__all__ = [
    "AcceleratedRPN", "AcceleratedRetinaNet", "AcceleratedRoIHeads", "AcceleratedSSD", "PAAOptions", "RetinaNetPAA",
    "accelerate", "restore", "use_paa",
]  # fmt: skip
