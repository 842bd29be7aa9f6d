# Everything a checkout needs: `make demo` and `make test` set up a virtual environment by themselves.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.installed
# mmdetection and what it needs, on top of what $(VENV) has: 3.3.0, and other versions each in an environment of its own.
MMDET_VENV ?= .venv-mmdet
MMDET_OTHERS = 2.14.0 2.11.0 onedl
MMDET_BIN = $(MMDET_VENV)/bin
MMDET_READY = $(MMDET_VENV)/.installed

# The same for DeepForest, and what measures AP.
TORCHVISION_VENV ?= .venv-torchvision
TORCHVISION_BIN = $(TORCHVISION_VENV)/bin
TORCHVISION_READY = $(TORCHVISION_VENV)/.installed

# The lower bounds of setup.py.
OLDEST_VENV ?= .venv-oldest
OLDEST_BIN = $(OLDEST_VENV)/bin
OLDEST_READY = $(OLDEST_VENV)/.installed

.PHONY: demo docs gpu test test-slow test-fast test-long test-ptxrun test-fakecuda test-mmdet test-mmdet-all test-torchvision test-oldest test-pythons fuzz lint release-check bench bench-quick bench-mmdet clean

demo: $(READY)
	$(BIN)/python -m paa_gpu --out demo.png

docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs build/docs

# Three ways to run the kernels without a GPU: compiled and interpreted by tests of their own, and the tests of the public functions
# on compiled kernels. With a GPU, `pytest --execution cuda` takes the same tests there.
PUBLIC = tests/test_topk.py tests/test_em.py tests/test_starts.py tests/test_reassign.py tests/test_voting.py tests/test_losses.py \
	tests/test_assign.py tests/test_mixture.py tests/test_nms.py tests/test_fusion.py
KERNELS = $(wildcard tests/test_*_kernels.py) tests/test_launch.py

# Of both, those of the assignment: `make test` has ten minutes.
MAIN_PUBLIC = tests/test_reassign.py
MAIN_KERNELS = tests/test_reassign_kernels.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not long and not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not long and not slow" $(MAIN_KERNELS)
	$(BIN)/python -m pytest -n 2 -m "not long and not slow" --execution 75 $(MAIN_PUBLIC)

# What `make test` leaves out and CI has time for.
test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m "slow and not long"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not long and not slow" $(filter-out $(MAIN_KERNELS), $(KERNELS))
	$(BIN)/python -m pytest -n 2 -m "not long" --execution 80 $(filter-out $(MAIN_PUBLIC), $(PUBLIC))

FAST = -n 2 -m "not long and not slow" --ignore-glob="*_kernels.py" --ignore=tests/test_compile.py --ignore=tests/ptxrun
test-fast: $(READY)
	$(BIN)/python -m pytest $(FAST)

# With Triton before 3.8 the kernels have to compile; their budgets, of registers and the like, hold from 3.8 on.
test-oldest: $(OLDEST_READY)
	$(OLDEST_BIN)/python -m pytest $(FAST)
	$(OLDEST_BIN)/python -m pytest -n 2 -m "not long and not slow" tests/test_compile.py

# Every Python of setup.py that this machine has, on the PATH or under pyenv, with the newest of everything else.
PYTHONS ?= 3.10 3.11 3.12 3.13
FIND_PYTHON = for found in $$(type -ap python$* || true) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$*.*/bin/python$*; do \
	  $$found -c "" 2> /dev/null && echo $$found && break; done
test-pythons: $(PYTHONS:%=test-python-%)

test-python-%: SHELL = /bin/bash
test-python-%: setup.py
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "Python $*: not on this machine, not tested"; exit 0; fi; \
	set -e; \
	if [ ! setup.py -ot .venv-python$*/.installed ]; then \
	  $$python -m venv .venv-python$*; \
	  .venv-python$*/bin/python -m pip install --quiet --editable ".[test]"; \
	  touch .venv-python$*/.installed; \
	fi; \
	.venv-python$*/bin/python --version; \
	.venv-python$*/bin/python -m pytest $(FAST)

test-long: $(READY)
	$(BIN)/python -m pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 $(KERNELS)
	for way in 75 80 86 89 90 100 120; do \
	  $(BIN)/python -m pytest -n 2 -m "not long" --execution $$way $(PUBLIC) || exit 1; \
	done
	# The kernels again, with stores that other programs see late and in any order.
	$(BIN)/python -m pytest -n 2 -m "not long" --ptxrun weak=1 $(KERNELS)
	PYTHONPATH=tests $(BIN)/python -m fakecuda -m pytest -p fakecuda.plugin -n 2 \
	  tests/fakecuda/tests tests/test_cuda.py tests/test_cuda_models.py
	# The CPU's loops with every index checked; numba's cache does not tell such code from the usual one.
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=build/numba-boundscheck $(BIN)/python -m pytest -n 2 -m "not long" $(PUBLIC)

# On the day a GPU is there: all that it can show, into bench/results/<device>. `make gpu GPU=--dry-run` prints the commands,
# `make gpu READY= BIN=/usr/bin` takes a Python that has everything, and `GPU="--steps check --limit 200"` takes what there is time for.
gpu: $(READY)
	PYTHONPATH=tests:tests/mmdet$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m bench.gpu --public $(PUBLIC) tests/test_layouts.py $(GPU)

test-ptxrun: $(READY)
	$(BIN)/python -m pytest -n 2 tests/ptxrun

# What is around a launch, on CUDA devices in the memory of the host. `test-long` also takes what has much to compile or to compute.
# What starts a Python of its own is left to a GPU.
test-fakecuda: $(READY)
	PYTHONPATH=tests $(BIN)/python -m fakecuda -m pytest -p fakecuda.plugin -n 2 -m "not long" \
	  -k "not many_blocks and not compiled_prediction and not long_rows and not going_on" tests/fakecuda/tests tests/test_cuda.py tests/test_cuda_models.py \
	  tests/test_examples.py

# Minutes, at random: the seed that it prints repeats it, with `make fuzz SEED=...`.
SEED ?= $(shell date +%s)
fuzz: $(READY)
	$(BIN)/python -m pytest -s tests/test_properties.py --hypothesis-profile=fuzz --hypothesis-seed=$(SEED)

# More threads than one make scikit-learn slower and erratic.
test-mmdet: $(MMDET_READY) .venv-mmdet-2.28.2/.installed
	OMP_NUM_THREADS=1 $(MMDET_BIN)/python -m pytest -n 2 tests/mmdet
	PYTHONPATH=tests:tests/mmdet $(MMDET_BIN)/python -m fakecuda -m pytest -p fakecuda.plugin tests/mmdet/test_cuda.py
	OMP_NUM_THREADS=1 .venv-mmdet-2.28.2/bin/python -m pytest -n 2 tests/mmdet

test-mmdet-all: test-mmdet $(MMDET_OTHERS:%=.venv-mmdet-%/.installed)
	for version in $(MMDET_OTHERS); do \
	  OMP_NUM_THREADS=1 .venv-mmdet-$$version/bin/python -m pytest -n 2 tests/mmdet || exit 1; \
	done

test-torchvision: $(TORCHVISION_READY)
	$(TORCHVISION_BIN)/python -m pytest -n 2 tests/torchvision

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What would be published: the archive of the sources, and the wheel made from it, which has to work in an environment of its own.
release-check: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_package.py

# gmm-gpu asks for numpy below 2, which it does not need: it goes into a folder of its own, without what it asks for.
bench: $(READY) .bench/gmm_gpu
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.ratios
	PYTHONPATH=tests $(BIN)/python -m bench.work
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.host
	OMP_NUM_THREADS=1 PYTHONPATH=.bench $(BIN)/python -m pytest bench --benchmark-only \
	  --benchmark-min-rounds=3 --benchmark-max-time=0.25 --benchmark-json=bench/results/suite.json
	PYTHONPATH=tests $(BIN)/python -m bench.scaling --out bench/results/scaling.json
	$(BIN)/python -m bench.plot bench/results/suite.json bench/results/scaling.json

bench-quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-only --benchmark-max-time=0.1 --benchmark-min-rounds=1

.bench/gmm_gpu: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target .bench gmm-gpu

# Against mmdetection's own code, instead of our copy of its loops. On a machine with other work: `make bench-mmdet LOADED=--loaded`.
bench-mmdet: $(MMDET_READY)
	PYTHONPATH=tests/mmdet OMP_NUM_THREADS=1 $(MMDET_BIN)/python -m bench.ratios
	PYTHONPATH=tests/mmdet:tests OMP_NUM_THREADS=1 $(MMDET_BIN)/python -m bench.head $(LOADED)

$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(OLDEST_READY): setup.py
	$(PYTHON) -m venv $(OLDEST_VENV)
	grep -oE '[a-z-]+>=[0-9.]+' setup.py | sed 's/>=/==/' > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_BIN)/python -m pip install --quiet --editable ".[test]" --constraint $(OLDEST_VENV)/constraints.txt
	touch $@

# mmcv 1.x builds with setuptools below 81, and without its operators, which stand_in.py replaces.
define mmdet_environment
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth
	$(@D)/bin/python -m pip install --quiet --upgrade "setuptools>=77,<81" wheel
	MMCV_WITH_OPS=0 $(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --requirement $<
	touch $@
endef

$(MMDET_READY): tests/mmdet/requirements.txt $(READY)
	$(mmdet_environment)

.venv-mmdet-%/.installed: tests/mmdet/requirements-%.txt $(READY)
	$(mmdet_environment)

$(TORCHVISION_READY): tests/torchvision/requirements.txt $(READY)
	$(PYTHON) -m venv $(TORCHVISION_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(TORCHVISION_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth
	$(TORCHVISION_BIN)/python -m pip install --quiet --requirement tests/torchvision/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(MMDET_VENV) .venv-mmdet-* $(TORCHVISION_VENV) $(OLDEST_VENV) .venv-python* .bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo.png demo_voting.png
