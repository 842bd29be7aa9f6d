"""`python -m paa_gpu`: what runs where on this machine, and the demonstration."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import __version__, ahead, data, diagnose, paa_reassign_batch, reference, score_voting, select_candidates
from ._dispatch import OPERATORS

#: Formats that matplotlib writes with Pillow, and none, which is .png.
PICTURES = ("", ".png", ".jpg", ".jpeg", ".pdf", ".svg", ".svgz", ".webp", ".tif", ".tiff", ".eps", ".ps")

PACKAGES = ("torch", "triton", "numba", "numpy", "scikit-learn")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print, write the pictures, and return the exit status."""
    recordings = data.paths()
    description = "Without a command: what runs where on this machine, and the demonstration."
    parser = argparse.ArgumentParser(prog="python -m paa_gpu", description=description)
    parser.add_argument(
        "--out", type=_picture, default=Path("demo.png"),
        help="the picture to write (default: %(default)s); a second picture, of score voting, goes beside it",
    )  # fmt: skip
    parser.add_argument(
        "--image", type=int, default=0, choices=range(len(recordings)), metavar="N",
        help=f"which recording, 0 to {len(recordings) - 1}; 0 is in the package, a checkout has the others",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="[check | compile]")
    check = commands.add_parser("check", help="check every operation on this machine, and print a table to paste into a report")
    check.add_argument(
        "--device", type=_device, help="cpu, or a GPU such as cuda:1 (default: the current GPU, or the CPU if there is none)"
    )
    check.add_argument(
        "--repeats", type=_count, default=1000, help="calls that must give equal bits on the GPU (default: %(default)s)"
    )
    compile_all = commands.add_parser(
        "compile", help="compile now what calls of every kind need, so that later ones start at once"
    )
    compile_all.add_argument("--device", type=_device, default="cpu", help="cpu, or a GPU such as cuda:0 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "compile":
        return ahead.run_compile(options.device)
    report_versions()
    if options.command == "check":
        print()
        return diagnose.run_check(options.device, options.repeats)
    report_implementations()
    path = recordings[options.image]
    recording = data.load(path)
    demonstrate(recording, options.out)
    demonstrate_voting(recording, data.load_voting(path)[-1], options.out.with_stem(options.out.stem + "_voting"))
    return 0


def _picture(text: str) -> Path:
    """A file of an existing folder; without a suffix, a .png."""
    path = Path(text)
    try:
        fits = bool(path.name) and not path.is_dir() and path.parent.is_dir()
    except OSError as error:  # a name that is too long
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}: {error.strerror}") from None
    if not fits:
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that may be written to, got {text!r}")
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(filter(None, PICTURES))}, got {text!r}")
    return path if path.suffix else path.with_suffix(".png")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    """The CPU, or a CUDA device that is here."""
    kind, colon, number = text.partition(":")
    if text != "cpu" and (kind != "cuda" or (colon and not number.isdecimal())):
        raise argparse.ArgumentTypeError(f"must be cpu, or a GPU such as cuda:0, got {text!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch finds {torch.cuda.device_count()} CUDA devices here, got {text!r}")
    return text


def report_versions() -> None:
    """The packages and devices of this machine."""
    print(f"paa_gpu {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            print(f"  {package:<13}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package:<13}not installed")
    print(f"  {'CPU':<13}{torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"  {'CUDA':<13}{', '.join(devices) or 'no device'}")


def report_implementations() -> None:
    """Which implementation each operator would use here."""
    triton = "Triton kernels" if importlib.util.find_spec("triton") else "none: Triton is not installed"
    if not torch.cuda.is_available():
        triton += " (no device here)"
    width = max(map(len, OPERATORS)) + 2
    print(f"\n{'operator':<{width}}{'CPU tensors':<24}CUDA tensors")
    for name in OPERATORS:
        print(f"{name:<{width}}{'numba loops':<24}{triton}")


def demonstrate(recording: data.Recording, out: Path) -> None:
    """Reassign one real image, compare with scikit-learn, draw."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns: Any = [*([tensor.to(device)] for tensor in recording.arguments[:6]), recording.anchors]
    options: dict[str, Any] = {"num_classes": recording.num_classes}

    def reassign() -> Any:
        result = paa_reassign_batch(*columns, num_gts=[recording.num_gt], **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    result, ours = median_time(reassign, 20)
    losses, inds, gts = (columns[i][0] for i in (0, 4, 5))
    candidates = select_candidates(losses, inds, gts, recording.anchors, num_gt=recording.num_gt)
    print(f"\nimage {recording.name} on {device}: {recording.num_gt} boxes, {len(recording.pos_inds)} potential positives,")
    print(f"{int(candidates.count.sum())} candidates, {int(result.num_pos)} positives")
    print(f"  paa_gpu              {ours * 1e3:10.2f} ms")
    if importlib.util.find_spec("sklearn"):
        published, loop = median_time(lambda: reference.paa_reassign(*recording.arguments, published=True, **options), 3)
        oracle = reference.paa_reassign(*recording.arguments, **options)
        agreement = [
            "equal" if torch.equal(targets[0].cpu(), wanted) else "DIFFERENT"
            for targets, wanted in zip(result[:3], oracle[:3], strict=True)
        ]
        print(f"  published loop       {loop * 1e3:10.2f} ms, {loop / ours:.0f} times as long ({published[3]} positives)")
        print(f"  against scikit-learn in float64: label {agreement[0]}, label_weight {agreement[1]}, bbox_weight {agreement[2]}")
    else:
        print("  scikit-learn is not installed: neither compared nor timed (pip install scikit-learn)")
    if not importlib.util.find_spec("matplotlib") or not importlib.util.find_spec("PIL"):
        print("  matplotlib or Pillow is not installed: no picture (pip install matplotlib pillow)")
    elif recording.num_gt == 0:
        print("  no boxes: no picture")
    else:
        from .plot import plot_recording

        result, candidates = diagnose.map_tensors(torch.Tensor.cpu, [result, candidates])
        plot_recording(recording, result, candidates, out)
        print(f"  picture: {out}")


def demonstrate_voting(recording: data.Recording, call: data.Voting, out: Path) -> None:
    """Vote for the detections of the image, compare with the published loop, draw."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments: Any = [*(tensor.to(device) for tensor in call.arguments[:4]), call.score_thr]
    options: Any = {"keep_order": True}

    def vote() -> Any:
        result = score_voting(*arguments, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    result, ours = median_time(vote, 20)
    voted, labels = diagnose.map_tensors(torch.Tensor.cpu, list(result))
    _, loop = median_time(lambda: reference.score_voting(*call.arguments, published=True), 3)
    oracle, _ = reference.score_voting(*call.arguments, keep_order=True)
    print(f"\nscore voting of image {recording.name} on {device}: {len(voted)} detections, {len(call.mlvl_bboxes)} boxes, "
          f"scores above {call.score_thr}")  # fmt: skip
    print(f"  paa_gpu              {ours * 1e3:10.2f} ms")
    print(f"  published loop       {loop * 1e3:10.2f} ms, {loop / ours:.0f} times as long")
    print(f"  against the loop in float64: at most {float((voted - oracle).abs().max()):.1e} pixels")
    if importlib.util.find_spec("matplotlib") and importlib.util.find_spec("PIL"):
        from .plot import plot_voting

        plot_voting(recording, call, voted, labels, out)
        print(f"  picture: {out}")


def median_time(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result of a call and the median of its times in seconds, after one call to warm up."""
    result, times = call(), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
