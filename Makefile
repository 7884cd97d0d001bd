# make demo, make test: both make the environment in $(VENV) first, where it is not there yet.
#
# Choices, all on the command line: PYTHON=python3.12, VENV=/path, CONSTRAINTS=/dev/null (newest versions),
# JOBS=4 (test processes), ARGS="-k conv" (passed on to pytest, the demo or the benchmark).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
OLDEST_VENV ?= .venv-oldest-triton
OLDEST_TRITON ?= triton==3.6.0
OLDEST_TORCH ?= torch==2.13.0
JOBS ?= 2
ARGS ?=

RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed
OLDEST_RUN = $(OLDEST_VENV)/bin/python
OLDEST_STAMP = $(OLDEST_VENV)/.installed
# One thread in each test process: the processes already fill the cores.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest

.PHONY: always help install demo test test-slow test-oldest-triton aot aot-sample lint format bench figures figures-in-pages \
	docs dist clean

help:
	@echo "make demo | test | test-slow | test-oldest-triton | aot | aot-sample | lint | format | bench | figures | figures-in-pages | docs | dist | clean"

install: $(STAMP)

# setuptools and wheel come first: the package itself is then built without an isolated environment.
$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --disable-pip-version-check "setuptools>=77" wheel
	$(RUN) -m pip install -qq --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e ".[test]"
	@touch $@

# Some builds of torch pin another Triton: it is put in afterwards, without a look at that pin.
$(OLDEST_STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_RUN) -m pip install -qq --disable-pip-version-check \
		$(OLDEST_TORCH) numpy rich typer pytest pytest-xdist hypothesis expecttest "setuptools>=77" wheel
	$(OLDEST_RUN) -m pip install -qq --disable-pip-version-check --no-deps $(OLDEST_TRITON)
	$(OLDEST_RUN) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(RUN) examples/demo.py $(ARGS)

test: $(STAMP)
	$(PYTEST) -n $(JOBS) -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -n $(JOBS) -m slow $(ARGS)

# The emulator does not know add.s16x2, which Triton 3.6 makes of a mask's bits, and takes for a race that in a
# layout conversion of Triton 3.6 several warps store one value to one place.
OLDEST_LEFT_OUT = "tests/kernels/test_batch_norm_training.py::test_mask_holds_the_derivative[sm_90-pixels-relu6]" \
	"tests/kernels/test_attention.py::test_strictly[sm_80_strict]"

# The kernels and the ops on them once more, with the oldest supported Triton.
test-oldest-triton: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST_RUN) -m pytest -n $(JOBS) -m "not slow" tests/kernels tests/fused \
		$(addprefix --deselect ,$(OLDEST_LEFT_OUT)) $(ARGS)

# Compiles every kernel, shipped configuration and architecture ahead of time, and records what came out.
aot: $(STAMP)
	$(RUN) -m fastnets.bench.static --full $(ARGS)

# Three hundred cases of those, always the same.
aot-sample: $(STAMP)
	$(RUN) -m fastnets.bench.static --sample 300 --quiet $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

PAGES = README.md docs/cpu.md

# Layers by pytest-benchmark: ARGS="--benchmark-autosave", and later ARGS="--benchmark-compare".
bench: $(STAMP)
	$(RUN) -m pytest bench/benchmark_operations.py $(ARGS)

# The figures of the pages, measured afresh (two hours on two cores), then put into their tables. One alone:
# make docs/cpu-stock.json figures-in-pages
FIGURES = docs/cpu-zoo.json docs/cpu-families.json docs/cpu-stock.json docs/cpu-keep-pages.json
ZOO = lenet5 alexnet vgg11_bn googlenet resnet18 resnet50 densenet121 mobilenet_v2 mobilenet_v3_large efficientnet_b0 \
	convnext_tiny vit_s_16
FAMILIES = lenet5_relu alexnet_2012 vgg11 nin googlenet_2014 inception_v3 resnet18 resnet18_fpn resnext50_32x4d \
	densenet121 squeezenet1_1 shufflenet_v2_x1_0 mnasnet1_0 regnet_y_400mf mobilenet_v1 mobilenet_v2 \
	mobilenet_v3_small efficientnet_b0 efficientnet_lite0 efficientnet_v2_s convnext_tiny swin_t
BENCH = $(RUN) -m fastnets bench --device cpu $(ARGS) -o $@

docs/cpu-zoo.json: WHAT = $(ZOO) -b 1,8 --variants eager,channels-last,compile,onnxruntime,openvino,fastnets,fastnets-measured
docs/cpu-families.json: WHAT = $(FAMILIES) -b 1,8 --variants eager,compile,fastnets
docs/cpu-stock.json: WHAT = resnet50 mobilenet_v2 -b 8
docs/cpu-keep-pages.json: WHAT = resnet50 mobilenet_v2 -b 8 --allocator keep-pages
$(FIGURES): $(STAMP) always
	$(RUN) -m pip install -qq --disable-pip-version-check onnxruntime onnxscript openvino
	$(BENCH) $(WHAT)

figures: $(FIGURES)
	$(MAKE) figures-in-pages

figures-in-pages: $(STAMP)
	$(RUN) -m fastnets.bench.figures $(PAGES)

# The site, in out/site. Building it fetches nothing.
docs: $(STAMP)
	$(RUN) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27"
	rm -rf out/package && $(RUN) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation \
		--target out/package .
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

dist: $(STAMP)
	$(RUN) -m pip install -qq --disable-pip-version-check build
	$(RUN) -m build --no-isolation

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
