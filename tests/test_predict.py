"""Detections of the head: the same padded or in lists, as torchvision's NMS and voting make them; what waits; what compiles."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from synchronisations import Synchronisations
from test_head import SIZE, make_features, make_head
from test_nms import kept
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import paa_gpu

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [SIZE, (50, 70), SIZE]
#: Scores of a head of random weights are all near 0.07: half of them.
OPTIONS = {"score_thr": 0.0707, "nms_pre": 40, "max_per_img": 20}

OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)


def image_by_image(head, features, sizes, factors=None):
    """From the boxes before NMS on: torchvision class by class, then the drop-in for one image."""
    boxes, scores = head._decode(*head(features), sizes)
    if factors is not None:
        boxes = boxes / torch.tensor([[factor if isinstance(factor, tuple) else (factor,) * 2] for factor in factors]).repeat(
            1, 1, 2
        )
    for own, score in zip(boxes, scores, strict=True):
        flat, labels = own.repeat_interleave(3, 0), torch.arange(3).repeat(len(own))
        index = kept(flat, score.flatten(), labels, head.iou_threshold, head.score_thr, max_per_img=head.max_per_img)
        det, label = torch.cat([flat[index], score.flatten()[index, None]], 1), labels[index]
        yield paa_gpu.score_voting(det, label, own, score, head.score_thr) if head.score_voting else (det, label)


@pytest.mark.parametrize("options", [{}, {"score_voting": False}, {"max_per_img": 0, "nms_pre": 0}, {"score_thr": 0.9}], ids=str)
@torch.no_grad()
def test_detections(options):
    head, features = make_head(**{**OPTIONS, **options}), make_features(3)
    factors = [2.0, (0.5, 0.8), 1]
    found = head.predict(features, SIZES, factors)
    padded = head.predict(features, torch.tensor(SIZES), factors, padded=True)
    room = head.max_per_img or padded["count"].new_tensor(head._decode(*head(features), SIZES)[1].shape[1] * 3)
    assert padded["boxes"].shape == (3, room, 4) and padded["labels"].shape == padded["scores"].shape == (3, room)
    for i, (bboxes, labels) in enumerate(image_by_image(head, features, SIZES, factors)):
        number = len(labels)
        assert (number > 0) == (head.score_thr < 0.9) and padded["count"][i] == number
        wanted = {"boxes": bboxes[:, :4], "scores": bboxes[:, 4], "labels": labels}
        for name, rows in wanted.items():
            assert torch.equal(found[i][name], padded[name][i, :number])
            # What is behind the detections of an image may change the order in which voters are summed.
            torch.testing.assert_close(found[i][name], rows, rtol=0, atol=1e-4 * (name == "boxes"))
        assert not padded["boxes"][i, number:].any() and not padded["scores"][i, number:].any()
        assert (padded["labels"][i, number:] == -1).all()


def published_boxes(head, features, size):
    """The boxes and scores of one image before NMS, level by level, as mmdetection's `_predict_by_feat_single` and
    `DeltaXYWHBBoxCoder` have them."""
    found = []
    for stride, cls_score, delta, iou in zip(head.strides, *head(features), strict=True):
        channels = [level[0].permute(1, 2, 0).flatten(0, 1) for level in (cls_score, delta, iou)]
        score = (channels[0].sigmoid() * channels[2].sigmoid()).sqrt()
        height, width = cls_score.shape[2:]
        y, x = (axis.flatten() * stride for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        dx, dy, dw, dh = (channels[1] * torch.tensor(head.target_stds)).unbind(1)
        side, most = stride * head.anchor_scale, abs(np.log(16 / 1000))
        centre_x, centre_y = x + dx * side, y + dy * side
        half_w, half_h = side * dw.clamp(-most, most).exp() / 2, side * dh.clamp(-most, most).exp() / 2
        boxes = torch.stack([centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h], 1)
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([size[1], size[0], size[1], size[0]]))
        best = score.max(1).values.topk(min(head.nms_pre, len(score))).indices if head.nms_pre else torch.arange(len(score))
        found.append((boxes[best], score[best]))
    return (torch.cat(part) for part in zip(*found, strict=True))


@pytest.mark.parametrize("nms_pre", [0, 7])
@torch.no_grad()
def test_boxes_are_decoded_and_clipped_and_the_best_taken(nms_pre):
    head, features = make_head(**{**OPTIONS, "nms_pre": nms_pre}), make_features(1)
    size = (SIZE[0] - 20, SIZE[1] - 30)
    boxes, scores = published_boxes(head, features, size)
    assert (boxes[:, 2] == size[1]).any() and (boxes[:, 3] == size[0]).any() and (boxes[:, :2] == 0).any()
    got_boxes, got_scores = head._decode(*head(features), [size])
    torch.testing.assert_close(got_boxes[0], boxes, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got_scores[0], scores)


def test_padded_nothing_waits():
    head, features = make_head(**OPTIONS), make_features(3)
    with Synchronisations() as mode:
        head.predict(features, SIZES, [1.5] * 3, padded=True)
    assert mode.count == 0


def indexes_fake_tensors() -> bool:
    """torch 2.9 asks for a driver when a CUDA tensor without values is indexed."""
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda")[0]
        except RuntimeError:
            return False
    return True


@pytest.mark.skipif(
    not indexes_fake_tensors(), reason="this torch cannot index a CUDA tensor without values, unless there is a GPU"
)
def test_padded_reads_no_value():
    """CUDA tensors without values go all the way."""
    head = make_head(**OPTIONS)
    with FakeTensorMode(), torch.device("cuda"):
        features = [torch.empty(level.shape) for level in make_features(2)]
        outputs = [[torch.empty(2, channels, *level.shape[2:]) for level in features] for channels in (3, 4, 1)]
        head.forward = lambda _: outputs
        got = head.predict(features, [SIZE, SIZE], padded=True)
    assert {name: (tuple(rows.shape), rows.device.type) for name, rows in got.items()} == {
        "boxes": ((2, 20, 4), "cuda"), "scores": ((2, 20), "cuda"), "labels": ((2, 20), "cuda"), "count": ((2,), "cuda"),
    }  # fmt: skip


def test_the_list_waits_once():
    """For all counts."""
    head, features = make_head(**OPTIONS), make_features(3)
    with Synchronisations() as mode:
        head.predict(features, SIZES)
    assert mode.count == 1


class Detector(nn.Module):
    """A head over the pixels of an image."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, images, sizes):
        return self.head.predict([functional.avg_pool2d(images, stride) for stride in self.head.strides], sizes, padded=True)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_program_of_other_sizes(strict):
    """Below `nms_pre` and above, but for torch 2.9; also after a decomposition, which keeps graphs that the library left."""
    detector = Detector(make_head(**OPTIONS)).eval()
    auto = torch.export.Dim.AUTO
    shapes = {"images": {0: auto, 2: auto, 3: auto}, "sizes": {0: auto}}
    channels = detector.head.cls_convs[0].conv.in_channels
    small, large = ((torch.rand(n, channels, *size), torch.tensor([size] * n)) for n, size in ((2, (32, 48)), (3, (96, 160))))
    program = torch.export.export(detector, small, dynamic_shapes=shapes, strict=strict)
    for arguments in (small, large)[: 1 if OLD_TORCH else 2]:
        wanted = detector(*arguments)
        for each in (program, program.run_decompositions()):
            got = each.module()(*arguments)
            # Candidates that are sorted although all take part are summed in another order.
            torch.testing.assert_close(got.pop("boxes"), wanted["boxes"], rtol=0, atol=1e-5)
            assert all(torch.equal(rows, wanted[name]) for name, rows in got.items())


def test_a_transform_leaves_nothing_behind():
    """Its tensors look like others, and their memory is not."""
    used, features = make_head(**OPTIONS), make_features(3)
    unused = copy.deepcopy(used)

    def count(*features):
        return used.predict(list(features), SIZES, padded=True)["count"]

    wanted = unused.predict(features, SIZES, padded=True)
    assert torch.equal(torch.func.functionalize(count)(*features), wanted["count"])
    got = used.predict(features, SIZES, padded=True)
    assert all(torch.equal(got[name], rows) for name, rows in wanted.items())


@pytest.mark.parametrize("sizes", [[], torch.empty(0, 2)], ids=["list", "tensor"])
def test_a_batch_without_images(sizes):
    head, features = make_head(**OPTIONS), make_features(0)
    assert head.predict(features, sizes) == head.predict(features, sizes, sizes) == []
    assert head.predict(features, sizes, padded=True)["boxes"].shape == (0, 20, 4)


DTYPES = "float16, bfloat16, float32, float64, int64 or int32"


@pytest.mark.parametrize(
    ("sizes", "factors", "error", "message"),
    [
        ([SIZE], [(1, 2, 3)], ValueError, "`scale_factors[0]` must be a number or (in x, in y), got (1, 2, 3)"),
        ([SIZE], [np.ones(2)], TypeError, "`scale_factors[0]` must be a number, got numpy.ndarray"),
        ([SIZE], [(1.0, None)], TypeError, "`scale_factors[0]` must be a number, got NoneType"),
        ([SIZE], [0], ValueError, "`scale_factors[0]` must be positive, got 0"),
        ([SIZE], [(2.0, -1.0)], ValueError, "`scale_factors[0]` must be positive, got -1.0"),
        ([SIZE], [np.float32(0)], ValueError, "`scale_factors[0]` must be positive, got 0.0"),
        ([SIZE], [np.int64(-2)], ValueError, "`scale_factors[0]` must be positive, got -2"),
        ([SIZE], [np.float32("nan")], ValueError, "`scale_factors[0]` must be positive, got nan"),
        ([SIZE], [torch.tensor(0.0)], ValueError, "`scale_factors[0]` must be positive, got 0.0"),
        ([SIZE], [torch.tensor([-1])], ValueError, "`scale_factors[0]` must be positive, got -1"),
        ([SIZE], [torch.ones(2)], ValueError, "`scale_factors[0]` must be a number, got a tensor of shape [2]"),
        ([SIZE], [1.0, 2.0], ValueError, "`scale_factors` must have 1 entry as the batch has, got 2"),
        ([SIZE], torch.ones(()), ValueError, "`scale_factors` must have shape [1] or [1, 2], got []"),
        ([SIZE], torch.ones(1, 3), ValueError, "`scale_factors` must have shape [1, 2], got [1, 3]"),
        ([SIZE], torch.ones(2), ValueError, "`scale_factors` must have shape [1], got [2]"),
        ([SIZE], torch.ones(1).bool(), TypeError, f"`scale_factors` must be {DTYPES}, got bool"),
        ([SIZE], torch.ones(1, device="meta"), ValueError, "`scale_factors` must be on cpu as the other tensors are, got meta"),
        ([SIZE], torch.tensor([0.0]), ValueError, "`scale_factors` must be positive, got 0.0 at position 0"),
        ([SIZE], torch.tensor([[1, torch.nan]]), ValueError, "`scale_factors` must be positive, got [1.0, nan] at position 0"),
        ([(None, 3)], None, TypeError, "`image_sizes[0]` must be a number, got NoneType"),
        ([(3, torch.tensor(-1))], None, ValueError, "`image_sizes[0]` must be at least 0, got -1"),
        (torch.tensor([[torch.nan, 3]]), None, ValueError, "`image_sizes` must be at least 0, got [nan, 3.0] at position 0"),
    ],
    ids=str,
)
def test_wrong_sizes(sizes, factors, error, message):
    with pytest.raises(error) as raised:
        make_head().predict(make_features(1), sizes, factors)
    assert str(raised.value) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=str)
def test_factors_in_a_tensor(dtype):
    head, features = make_head(**OPTIONS), make_features(3)
    for factors in ([2.0, 1.0, 3.0], [(2.0, 1.0), (1.0, 4.0), (3.0, 3.0)]):
        wanted = head.predict(features, SIZES, factors, padded=True)
        got = head.predict(features, SIZES, torch.tensor(factors, dtype=dtype), padded=True)
        assert all(torch.equal(got[name], rows) for name, rows in wanted.items())


@torch.no_grad()
def test_numbers_of_numpy_and_torch():
    head, features = make_head(**OPTIONS), make_features(2)
    wanted = head.predict(features, [SIZE, SIZE], [2.0, (1.0, 2.0)], padded=True)
    sizes = [tuple(np.array(SIZE)), tuple(torch.tensor(SIZE))]
    got = head.predict(features, sizes, [torch.tensor(2.0), (np.float32(1), np.int64(2))], padded=True)
    assert all(torch.equal(got[name], rows) for name, rows in wanted.items())


@pytest.mark.slow
@pytest.mark.skipif(OLD_TORCH, reason="the program that torch 2.9 exports checks its sizes by a name that it does not have")
def test_sizes_that_are_not_known_yet():
    """`torch.export` without Dynamo has symbols for them."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = make_head(**OPTIONS)

        def forward(self, *features):
            height, width = (size * self.head.strides[0] for size in features[0].shape[2:])
            return self.head.predict(list(features), [(height, width)], padded=True)

    model, features = Model().eval(), tuple(make_features(1))
    program = torch.export.export(
        model, features, dynamic_shapes=(tuple([{2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}] * 2),), strict=False
    )
    for name, rows in model(*features).items():
        # The program sums and multiplies in another order: boxes within 1e-5 pixels.
        torch.testing.assert_close(program.module()(*features)[name], rows, rtol=0, atol=1e-5 * (name == "boxes"))


def test_wrong_inputs():
    head, features = make_head(), make_features(2)
    with pytest.raises(ValueError, match=r"`image_sizes` must have shape \[2, 2\], got \[3, 2\]"):
        head.predict(features, torch.tensor(SIZES))
    with pytest.raises(TypeError, match="`padded` must be a bool, got int"):
        head.predict(features, SIZES[:2], padded=1)
