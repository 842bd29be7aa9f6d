"""`python -m paa_gpu`: what it says and draws, and how it does without the optional packages."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from paa_gpu import __main__, data, testing


def test_the_demonstration(tmp_path, capsys):
    out = tmp_path / "picture.png"
    __main__.main(["--out", str(out)])
    text = capsys.readouterr().out
    recording = data.load()
    assert f"image {recording.name}" in text
    assert f"{recording.num_gt} boxes, {len(recording.pos_inds)} potential positives" in text
    assert f"{recording.published.sum()} positives" in text
    assert "label equal, label_weight equal, bbox_weight equal" in text
    assert "score voting of image" in text and "in float64: at most" in text
    for name in ("paa_reassign", "fit_gmm_1d", "select_candidates", "score_voting"):
        assert name in text
    for path in (out, tmp_path / "picture_voting.png"):
        with Image.open(path) as picture:
            assert picture.width > 1000
            assert picture.height > 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--device", "gpu"], "must be cpu, or a GPU such as cuda:0, got 'gpu'"),
        (["check", "--device", "cuda"], "torch finds 0 CUDA devices here, got 'cuda'"),
        (["check", "--device", "cuda:"], "must be cpu, or a GPU such as cuda:0, got 'cuda:'"),
        (["compile", "--device", "cuda:1"], "torch finds 0 CUDA devices here, got 'cuda:1'"),
        (["--out", "no/such/folder/picture.png"], "must be a file in a folder that exists, got 'no/such/folder/picture.png'"),
        (["check", "--repeats", "-3"], "must be a positive integer, got '-3'"),
        (["check", "--repeats", "0"], "must be a positive integer, got '0'"),
        (
            ["--out", "picture.xyz"],
            "must end in one of .png, .jpg, .jpeg, .pdf, .svg, .svgz, .webp, .tif, .tiff, .eps, .ps, got 'picture.xyz'",
        ),
        (["check", "--device", "cuda:\u00b2"], "must be cpu, or a GPU such as cuda:0, got 'cuda:\u00b2'"),
        (["--out", 300 * "a"], f"must be a file in a folder that exists, got '{300 * 'a'}': "),
        (["--out", "/"], "must be a file in a folder that exists, got '/'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        __main__.main(arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_whoever_reads_may_stop(tmp_path):
    """`python -m paa_gpu check | head -1`"""
    command = [sys.executable, "-m", "paa_gpu", "check", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="whoever may write to every folder is not refused")
def test_a_folder_that_may_not_be_written_to(tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        __main__.main(["--out", str(tmp_path / "picture.png")])
    assert "must be a file in a folder that may be written to" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float64), ("cpu", torch.float64)])
def test_recordings_and_random_inputs_under_other_defaults_of_torch(device, dtype):
    """They lie on the CPU, as their documentation says."""

    def inputs():
        rng = np.random.default_rng(0)
        recording, batch = data.load(), testing.make_batch([3, 0], rng)
        head, votes = testing.make_head_batch([9], rng), testing.make_predictions([(2, 0), (3, 9)], rng)
        return [*recording.arguments[:6], *recording.anchors, *itertools.chain(*batch[:6], *head, *votes)]

    wanted = inputs()
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        got = inputs()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, wanted, strict=True):
        assert (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)


def test_random_inputs_that_do_not_exist():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^`shape` must be one of bimodal, unimodal, .*, got 'bell'$"):
        testing.make_losses("bell", 9, rng)
    with pytest.raises(ValueError, match=r"^`num_gts` must have an entry for each image, got none$"):
        testing.make_batch([], rng)


def test_another_image(tmp_path, capsys):
    number = next(i for i, path in enumerate(data.paths()) if path.stem == "g03_YELL_541_late")
    __main__.main(["--out", str(tmp_path / "picture.png"), "--image", str(number)])
    assert "g03_YELL_541_late" in capsys.readouterr().out
    assert (tmp_path / "picture.png").exists()


def test_an_image_without_boxes(tmp_path, capsys):
    number = next(i for i, path in enumerate(data.paths()) if path.stem.startswith("g12"))
    __main__.main(["--out", str(tmp_path / "picture.png"), "--image", str(number)])
    assert "no boxes: no picture" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "message"),
    [("sklearn", "scikit-learn is not installed"), ("matplotlib", "matplotlib or Pillow is not installed")],
)
def test_without_optional_packages(missing, message, tmp_path):
    code = f"""
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)
sys.modules[{missing!r}] = None
from paa_gpu.__main__ import main
main(["--out", {str(tmp_path / "picture.png")!r}])
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in got.stdout
