"""From mmdetection's configuration of PAA to training with this library: `python examples/mmdet_paa.py [steps]`.

It trains on the picture of trees in the package. The backbone is small, so it also works on a CPU. With mmengine's Runner it is
one line too: call `accelerate(runner.model)` before `runner.train()`.
"""

import sys
from pathlib import Path

import mmdet
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData

from paa_gpu import data
from paa_gpu.integrations.mmdet import accelerate

register_all_modules()
model = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs/paa/paa_r50_fpn_1x_coco.py").model
model.backbone.update(depth=18, init_cfg=None)
model.neck.in_channels = [64, 128, 256, 512]
model.bbox_head.num_classes = 1
detector = accelerate(MODELS.build(model))  # the one line

trees = data.load()
image = torch.from_numpy(np.array(data.picture(trees))).permute(2, 0, 1)[:, ::2, ::2]
image = image.flip(0)  # mmdetection reads pictures as BGR
boxes = InstanceData(bboxes=torch.from_numpy(trees.gt["bboxes"]) / 2, labels=torch.zeros(trees.num_gt, dtype=torch.int64))
sample = DetDataSample(metainfo={"img_shape": image.shape[1:], "scale_factor": (1.0, 1.0)}, gt_instances=boxes)
optimizer = OptimWrapper(torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9))
for step in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
    losses = detector.train_step({"inputs": [image], "data_samples": [sample]}, optimizer)
    print(step, {name: round(loss.item(), 3) for name, loss in losses.items()})
