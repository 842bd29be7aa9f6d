"""What holds the compiled loops of CPU tensors together: the disk cache sees a change in any of their files."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding
import numba
import pytest
import torch
from numba.core.codegen import JITCodeLibrary

import paa_gpu
from paa_gpu.cpu import _loops
from paa_gpu.cpu._compilation import CompilationNotice
from paa_gpu.cpu._loops import CONSTANTS

FIT = """
import torch, paa_gpu
print(paa_gpu.fit_gmm_1d(torch.tensor([[0.0, 0.5, 1.0, 1.5]]), max_iter=1).lower_bound.item())
"""


LLOYD = """
import torch, paa_gpu
torch.manual_seed(0)
x = torch.rand(1, 2000, dtype=torch.float64) ** 3
print(paa_gpu.fit_gmm_1d(x, n_components=5, init="kmeans", max_iter=1).means[0, 0].item())
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "file", "old", "new"),
    [
        # the fit lies in `em.py` and calls the exponential of `_numeric.py`
        (FIT, "cpu/_numeric.py", "return integer(real(series)", "return real(2) * integer(real(series)"),
        (LLOYD, "_ops.py", "LLOYD_PASSES = 64, 50", "LLOYD_PASSES = 64, 1"),
    ],
    ids=["a function", "a constant"],
)
def test_the_disk_cache_sees_a_change_in_what_a_loop_uses(script, file, old, new, tmp_path):
    package = tmp_path / "paa_gpu"
    shutil.copytree(Path(paa_gpu.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def printed():
        return float(
            subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        )

    before, path = printed(), package / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert abs(printed() - before) > 1e-3


def test_the_disk_cache_sees_all_files_that_a_loop_may_take_constants_from():
    package = Path(paa_gpu.__file__).parent
    named = {
        name for path in (package / "cpu").glob("*.py") for name in re.findall(r"^from \.\.(\w+) import", path.read_text(), re.M)
    }
    assert {f"{name}.py" for name in named} == set(CONSTANTS)


ZIPPED = """
import sys
sys.path.insert(0, sys.argv[1])
from paa_gpu.cpu import _loops
print(_loops._VERSION)
"""


def test_a_package_in_a_zip_file_has_the_same_version(tmp_path):
    """Else numba would take the loops of an older one."""
    package, archive = Path(paa_gpu.__file__).parent, tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in package.rglob("*.py"):
            file.write(path, path.relative_to(package.parent))
    command = [sys.executable, "-c", ZIPPED, str(archive)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert printed.split() == [_loops._VERSION]


def run(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a script that starts without compiled loops."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), **environment}
    return subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)


FUNCTIONS = """
import paa_gpu
from numba.core.event import install_recorder
from paa_gpu import data

with install_recorder("numba:compile") as recorder:
    trees = data.load()
    paa_gpu.paa_reassign(*trees.arguments, num_gt=trees.num_gt, num_classes=trees.num_classes)
    assignment = len(recorder.buffer) // 2  # each begins and ends
    paa_gpu.score_voting(*data.load_voting()[0].arguments)
    print(assignment, len(recorder.buffer) // 2 - assignment)
"""


@pytest.mark.slow
def test_a_first_call_compiles_few_functions(tmp_path):
    """Each takes a tenth of a second or so, whatever is in it. So the time of a first call grows with their number, numba's own included."""
    assignment, voting = map(int, run(FUNCTIONS, tmp_path).stdout.split())
    assert 0 < assignment <= 36 and 0 < voting <= 26


def test_only_loops_have_machine_code(monkeypatch):
    """That of parts would be compiled for nobody."""
    finished, finish = [], JITCodeLibrary._finalize_specific

    def recorded(library):
        finished.append(library.name)
        finish(library)

    monkeypatch.setattr(JITCodeLibrary, "_finalize_specific", recorded)

    @_loops.inner
    def twice(x):
        return 2 * x

    @_loops.inner_with_sums
    def four_times(x):
        return twice(twice(x))

    @numba.njit
    def loop(x):
        return four_times(x) + twice(x)

    assert loop(3) == 18
    assert [name.rpartition(".")[2] for name in finished if "<locals>" in name] == ["loop"]  # not numba's runtime


OTHER_NUMBA = """
from numba.core import codegen
del codegen.JITCodeLibrary
"""


IN_THREE_LOOPS = """
import numpy as np, torch, paa_gpu
from paa_gpu import testing
from paa_gpu.separation import separate

batch = testing.make_batch([40, 60, 1, 50] * 3, np.random.default_rng(0))
rows = 0
for covariance_type in ("diag", "tied"):
    options = {"covariance_type": covariance_type, "precision": "float64"}
    whole = paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, **options).fit
    called = paa_gpu.paa_reassign_batch(
        *batch.arguments, **batch.options, **options, separation=lambda *columns: separate(*columns, "mmdet")
    ).fit
    alone = [
        paa_gpu.paa_reassign_batch(
            *([column[i]] for column in batch.arguments), num_classes=batch.num_classes, num_gts=[number], **options
        ).fit
        for i, number in enumerate(batch.num_gts)
    ]
    for i in range(7):
        for other in (called[i], torch.cat([fit[i] for fit in alone])):
            assert torch.equal(whole[i].nan_to_num(7), other.nan_to_num(7)), (options, i)
    rows += len(whole[0])
print(rows)
"""


@pytest.mark.slow
@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("avx2"), reason="this processor has no AVX2")
def test_loops_that_share_a_fit_have_the_same_bits(tmp_path):
    """A batch, its images alone, and a separation of the caller, whose fit is in a third loop.

    For Haswell, which has AVX2 but no AVX-512: with the latter, loops happen to order sums alike. Tests of the reassignment
    compare what this processor itself gets.
    """
    assert run(IN_THREE_LOOPS, tmp_path, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="").stdout == "906\n"


@pytest.mark.slow
def test_a_numba_that_names_its_compiler_otherwise(tmp_path):
    """Then parts get machine code, and results are the same."""
    assert run(OTHER_NUMBA + FIT, tmp_path / "other").stdout == run(FIT, tmp_path).stdout


NOTICE = """
import time, torch, paa_gpu
{setup}
started = time.monotonic()
paa_gpu.fit_gmm_1d(torch.tensor([[0.0, 0.5, 1.0, 1.5]]))
print(time.monotonic() - started)
"""


@pytest.mark.slow
def test_whoever_waits_for_the_compiler_is_told_once(tmp_path):
    """The first process compiles, longer than two seconds; the second one finds the loops on the disk and says nothing."""
    first = run(NOTICE.format(setup=""), tmp_path)
    assert float(first.stdout) > 2, "the compiler has become so fast that nobody waits: there is nothing to say"
    assert first.stderr.count("paa_gpu is compiling its loops") == 1
    assert str(tmp_path / "cache") in first.stderr
    assert not run(NOTICE.format(setup=""), tmp_path).stderr


@pytest.mark.parametrize(
    ("folder", "source", "said"),
    [
        ("/cache", __file__, "It happens once for each dtype. The result is kept in /cache."),
        ("/cache", "/package.zip/em.py", "It happens once for each dtype. The result is kept in /cache."),
        (None, __file__, "as there is no folder that it may write to. Set NUMBA_CACHE_DIR to one."),
        (None, "/package.pyz/em.py", "as numba finds no source files of the package on the disk."),
    ],
)
def test_what_is_said_of_the_folder(folder, source, said, caplog):
    function = SimpleNamespace(__code__=SimpleNamespace(co_filename=source))
    CompilationNotice()._say(SimpleNamespace(_cache=SimpleNamespace(cache_path=folder), py_func=function))
    (record,) = caplog.records
    assert record.getMessage().endswith(said)


COLLECTIONS = """
import gc, numba, torch, paa_gpu
from paa_gpu.cpu import em

numba.njit(lambda: 0)()  # numba imports the rest of itself

def collections():
    return sum(generation["collections"] for generation in gc.get_stats())

rows, before = torch.tensor([[0.0, 0.5, 1.0, 1.5]]), collections()
paa_gpu.fit_gmm_1d(rows)
print(collections() - before, gc.isenabled())
gc.disable()
paa_gpu.fit_gmm_1d(rows, precision="float32")
print(sum(em.fit_rows.stats.cache_misses.values()), gc.isenabled())
"""


@pytest.mark.slow
def test_no_garbage_is_collected_while_a_loop_is_compiled(tmp_path):
    """Before and after, garbage is collected or not, as the process has it. One collection may come between two loops."""
    number, on, compiled, still_on = run(COLLECTIONS, tmp_path).stdout.split()
    assert int(number) < 3 and on == "True"
    assert compiled == "2" and still_on == "False"


@pytest.mark.long
def test_the_word_is_silenced_as_any_other(tmp_path):
    assert not run(NOTICE.format(setup="import logging; logging.getLogger('paa_gpu').setLevel('ERROR')"), tmp_path).stderr


@pytest.mark.slow
def test_where_no_folder_is_writable_each_process_compiles(tmp_path):
    """As in a read-only container: every folder that numba tries refuses."""
    script = """
import tempfile
def refuse(*args, **kwargs):
    raise PermissionError("read-only")
tempfile.TemporaryFile = refuse  # with it, numba tries whether a folder is writable
""" + NOTICE.format(setup="")
    result = run(script, tmp_path)
    assert "Set NUMBA_CACHE_DIR" in result.stderr
    assert not list(tmp_path.rglob("*.nbc"))


@pytest.mark.slow
def test_a_user_without_a_home_gets_no_folder_that_is_called_so(tmp_path):
    script = f"""
import os, tempfile
def refuse(*args, dir, **kwargs):
    if not dir.startswith("~"):
        raise PermissionError("read-only")
tempfile.TemporaryFile, os.path.expanduser = refuse, lambda path: path
os.environ.pop("XDG_CACHE_HOME", None)
os.chdir({str(tmp_path)!r})
""" + NOTICE.format(setup="")
    assert "Set NUMBA_CACHE_DIR" in run(script, tmp_path).stderr
    assert not (tmp_path / "~").exists()


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file becomes longer, as where the disk is full
"""


@pytest.mark.slow
def test_where_the_disk_is_full_each_process_compiles(tmp_path):
    pytest.importorskip("resource", reason="this system has no limit for files")
    result = run(FULL + FIT, tmp_path)
    assert result.stdout == run(FIT, tmp_path).stdout
    assert result.stderr.count("paa_gpu cannot keep its compiled loops") == 1 and str(tmp_path / "cache") in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_files_that_were_cut_off_are_written_again(suffix, tmp_path):
    wanted = run(FIT, tmp_path).stdout
    for path in (tmp_path / "cache").rglob(f"*.{suffix}"):
        path.write_bytes(path.read_bytes()[:-20])
    misses = "from paa_gpu.cpu import em\nprint(sum(em.fit_rows.stats.cache_misses.values()))"
    assert run(FIT + misses, tmp_path).stdout == wanted + "1\n"
    assert run(FIT + misses, tmp_path).stdout == wanted + "0\n"


SUPPRESS = """
import torch, paa_gpu
for dtype in (torch.float32, torch.float64):
    found = paa_gpu.batched_nms(torch.ones(1, 3, 4, dtype=dtype), torch.ones(1, 3, 2, dtype=dtype), None, 0.5, max_per_img=2)
    print(found.count.item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["nbi", "2.nbc"])
def test_files_that_were_cut_off_on_a_full_disk(suffix, tmp_path):
    """The next process finds nothing, or what is right."""
    pytest.importorskip("resource", reason="this system has no limit for files")
    wanted = run(SUPPRESS, tmp_path).stdout
    for path in (tmp_path / "cache").rglob(f"*.{suffix}"):
        path.write_bytes(path.read_bytes()[:-20])
    assert run(FULL + SUPPRESS, tmp_path).stdout == wanted
    assert run(SUPPRESS, tmp_path).stdout == wanted


@pytest.mark.slow
def test_a_file_that_holds_another_loop_is_written_again(tmp_path):
    """Two processes that compile for different types at once may both take the first free number, and one file has both names."""
    wanted = run(SUPPRESS, tmp_path).stdout
    found = list((tmp_path / "cache").rglob("*.2.nbc"))
    assert found
    for path in found:
        shutil.copy(path.with_name(path.name.replace(".2.nbc", ".1.nbc")), path)
    assert run(SUPPRESS, tmp_path).stdout == wanted  # writes the one, and removes the other
    assert run(SUPPRESS, tmp_path).stdout == wanted
    misses = "from paa_gpu.cpu import nms\nprint(sum(sum(loop.stats.cache_misses.values()) for loop in vars(nms).values() if hasattr(loop, 'stats')))"
    assert run(SUPPRESS + misses, tmp_path).stdout == wanted + "0\n"


FORK = """
import gc, os, threading, time, torch, paa_gpu
x = torch.rand(3, 45, dtype=torch.float64)
thread = threading.Thread(target=paa_gpu.fit_gmm_1d, args=[x])
thread.start()
while gc.isenabled():
    time.sleep(0.001)
if os.fork() == 0:
    from paa_gpu.cpu import _compilation
    print(gc.isenabled(), _compilation.listener._depth, flush=True)
    os._exit(0)
os.wait()
thread.join()
print(gc.isenabled())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_is_forked_while_a_loop_is_compiled_collects_garbage(tmp_path):
    assert run(FORK, tmp_path).stdout.split() == ["True", "0", "True"]


def test_functions_of_others_may_have_no_module():
    """They are compiled as if this package were not there."""
    paa_gpu.fit_gmm_1d(torch.tensor([[0.0, 0.5, 1.0, 1.5]]))
    namespace = {}
    exec("def successor(x):\n    return x + 1", namespace)
    assert namespace["successor"].__module__ is None
    assert numba.njit(namespace["successor"])(1) == 2


@pytest.mark.long
def test_several_processes_compile_at_once(tmp_path):
    """They share one folder, and each gets its result."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", FIT], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = {process.communicate(timeout=300)[0] for process in started}
    assert len(answers) == 1 and all(process.returncode == 0 for process in started)
    assert run(NOTICE.format(setup=""), tmp_path, NUMBA_CACHE_DIR=str(tmp_path)).stderr == ""


LAYOUTS = """
from numba import types
from numba.core.event import Listener, register
from paa_gpu import ahead

def arrays(type):
    return [type] if isinstance(type, types.Array) else [a for each in type for a in arrays(each)] if hasattr(type, "types") else []

class Compiled(Listener):
    def on_start(self, event):
        function = event.data["dispatcher"].py_func
        if function.__module__.startswith("paa_gpu"):
            layouts = {array.layout for type in event.data["args"] for array in arrays(type)}
            print("loop", function.__qualname__, *sorted(layouts - {"C"}))

    def on_end(self, event):
        pass

register("numba:compile", Compiled())
for call in ahead.calls():
    call.run(*call.arguments)
"""


@pytest.mark.slow
def test_the_loops_know_that_their_arrays_are_contiguous(tmp_path):
    """Else they do not fill vector registers and take four times as long. A slice of columns is what makes numba forget it. Only a
    process that compiles knows the types of inner loops. `sum_of` adds in order, one value at a time, whatever it is given."""
    loops = [line.split()[1:] for line in run(LAYOUTS, tmp_path).stdout.splitlines() if line.startswith("loop ")]
    assert len(loops) > 60 and {name for name, *others in loops if others} == {"sum_of"}
