"""What is installed: from a wheel, in a fresh environment, imported from elsewhere."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USE = """
import sys, torch, paa_gpu, paa_gpu.kernels
from paa_gpu import data
assert all(sys.argv[1] in module.__file__ for module in (paa_gpu, paa_gpu.kernels)), (paa_gpu.__file__, paa_gpu.kernels.__file__)
recording = data.load()
assert len(data.paths()) == 1
assert paa_gpu.paa_reassign(*recording.arguments, num_classes=recording.num_classes)[3] == recording.published.sum()
for call in data.load_voting():
    assert (paa_gpu.score_voting(*call.arguments)[0] - call.out_bboxes).abs().max() < 1e-3
"""


def build(folder: Path, symlinks: bool) -> Path:
    """The wheel, made from the archive of the sources, made from what git tracks: no build leftovers of the checkout."""
    source = folder / "source"
    checkout = ["git", "-c", f"core.symlinks={str(symlinks).lower()}", "checkout-index", "--all", f"--prefix={source}/"]
    subprocess.run(checkout, cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, source], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), symlinks=True)


@pytest.mark.long
def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"paa_gpu"}
    for name in ("py.typed", "kernels/__init__.py", "cpu/em.py", "data/g01_OSBS_029_late.npz", "data/OSBS_029_800x800.jpg"):
        assert f"paa_gpu/{name}" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert any(name.endswith("LICENSE.deepforest.txt") for name in names)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000


@pytest.mark.long
def test_what_the_wheel_says_of_itself(wheel):
    """A lower bound for whatever it needs, which `make test-oldest` reads; a licence; no links, there is no public home."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    needs = [need for need in metadata.get_all("Requires-Dist") if not need.startswith("paa-gpu[")]
    assert len(needs) > 10
    assert [need for need in needs if not re.match(r"[\w-]+>=[\d.]+(;|$)", need)] == []
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_all("Project-URL") is None
    described = {classifier.partition(" :: ")[0] for classifier in metadata.get_all("Classifier")}
    assert described >= {"Development Status", "Intended Audience", "Operating System", "Programming Language", "Topic", "Typing"}


@pytest.mark.long
def test_a_checkout_without_symbolic_links(wheel, tmp_path):
    """As git makes it on Windows: the link `paa_gpu/kernels` is a file that holds its name. The same wheel all the same, and the
    checkout itself runs on the CPU."""
    other = build(tmp_path, symlinks=False)
    assert (tmp_path / "source" / "paa_gpu" / "kernels").is_file()
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(other) as linkless:
        assert sorted(linkless.namelist()) == sorted(archive.namelist())
    code = """
import torch, paa_gpu
paa_gpu.fit_gmm_1d(torch.rand(2, 9))
print(paa_gpu.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "source")}
    got = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert got.stdout.startswith(str(tmp_path / "source"))


@pytest.mark.long
def test_the_wheel_works_from_elsewhere(wheel, tmp_path):
    """In an environment of its own, which sees our dependencies but not the checkout."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], env=environment, check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run([python, "-c", USE, str(site)], cwd=tmp_path, env=environment, check=True)


def test_kernels_refuse_another_name():
    code = "import kernels"
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: this package must be imported as `paa_gpu.kernels`, got `kernels`" in got.stderr


def test_kernels_are_a_tracked_link():
    assert (ROOT / "paa_gpu" / "kernels").readlink() == Path("../kernels")
    tracked = subprocess.run(["git", "ls-files", "-s", "paa_gpu/kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout.startswith("120000 ")
