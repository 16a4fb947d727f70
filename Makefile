# A new machine needs git, make and python3 with pip. `make demo` shows what raysl does; `make test` tests it.
# Everything is installed inside this folder, and again only when pyproject.toml or constraints.txt has changed.

.PHONY: demo test test-all quick check format docs bench chaos cluster-e2e gpu-check gpu-science clean
.NOTPARALLEL:

SCRIPTS := $(wildcard experiments/*.py benchmarks/*.py examples/*.py)
# Asking for the version and not only for the file: a pyenv shim exists even where it has nothing to run.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)

# k-means runs on faiss, whose wheels for GPUs are 1 GB larger.
FAISS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

demo: .venv/.installed
	@.venv/bin/raysl demo

# Two processes share the test files, each with a Ray of its own: while Ray starts in one, the other works.
test: .venv/.installed
	@echo "make: running the tests, without the slow ones"
	@.venv/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: .venv/.installed
	@echo "make: running all tests"
	@.venv/bin/python -m pytest

# Under a minute on two cores once mypy has its cache: lint, types, and tests of pure functions.
QUICK := tests/contrastive tests/pretext tests/stream/test_plan.py tests/storage/test_storage.py tests/test_rng.py tests/test_optim.py tests/test_repo_rules.py
quick: .venv/.installed
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy raysl
	@.venv/bin/python -m pytest -m "not slow and not ray" $(QUICK)

format: .venv/.installed
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

docs: .venv/.installed
	@$(UV) pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[docs]'
	@.venv/bin/mkdocs build --site-dir build/site

check: .venv/.installed
	@echo "make: checking format, lint and types"
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy raysl tests $(SCRIPTS)

# About 20 minutes on two quiet cores, and of little worth on a busy machine.
bench: .venv/.installed
	@.venv/bin/python benchmarks/speed.py --out results/bench

# About an hour and a half on two quiet cores. `python -m tests.chaos --help` says how to run less.
chaos: .venv/.installed
	@.venv/bin/python -m tests.chaos --faults 100 --out results/chaos

# Skipped, with the reason, where this machine cannot play a cloud: it takes root, namespaces, and the Debian packages
# openssh-server openssh-client rsync iproute2 sudo screen procps.
cluster-e2e: .venv/.installed
	@echo "make: cluster.yaml from up to down on simulated machines (about 10 minutes on two cores)"
	@.venv/bin/python -m pytest -s -rs tests/ray_cluster/test_end_to_end.py

# About ten minutes on a machine with a GPU; without one it runs small, and says what it could not do.
gpu-check: .venv/.installed
	@.venv/bin/raysl doctor --gpu --out build/gpu-check.json

# PIRL on CIFAR-10: ResNet-18, 200 epochs, kNN every 10 of them, by `make gpu-science CIFAR10=FOLDER`. A call trains for
# PIECE_S seconds at most and saves; the same call goes on. The folder has the splits train and test in any form that raysl reads.
PIECE_S := 600
SCIENCE := pretrain --run build/gpu-science --method pirl-jigsaw --epochs 200 --batch-size 256 --workers 1 --precision bf16 \
  --view.image-size 32 --backbone.name resnet18 --backbone.stem small --jigsaw.grid 2 --optim.lr 0.12 --optim.warmup 0.05 \
  --optim.weight-decay 5e-4 --bank.momentum 0.5 --pirl.head bn --pirl.temperature 0.2 --pirl.num-negatives 4096 \
  --probe-every 1953 --probes knn
gpu-science: .venv/.installed
	@test -n "$(CIFAR10)" || { echo "make: give the folder of CIFAR-10: make gpu-science CIFAR10=FOLDER" >&2; exit 1; }
	@timeout --signal=TERM $(PIECE_S) .venv/bin/raysl $(SCIENCE) \
	  --data "$(CIFAR10)#train" --train "$(CIFAR10)#train" --test "$(CIFAR10)#test" || test $$? -eq 143 -o $$? -eq 124

clean:
	rm -rf .venv .uv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without compiled bytecode every Ray worker would compile torch anew (PYTHONDONTWRITEBYTECODE may be set).
.venv/.installed: pyproject.toml constraints.txt | $(filter .uv/bin/uv,$(UV))
	@.venv/bin/python -c "" 2>/dev/null || { rm -rf .venv; \
	  echo "make: creating the virtual environment .venv"; \
	  $(UV) venv --quiet --no-python-downloads --python '>=3.11,<3.15' .venv || { \
	    echo "make: raysl needs Python 3.11 to 3.14, and $$(python3 --version 2>&1) is what python3 is here." >&2; \
	    echo "make: install one of them (for example: apt install python3.12) and run the same command again." >&2; \
	    exit 1; }; }
	@echo "make: installing raysl and what it needs into .venv (downloads 3.3 to 4.3 GB the first time)"
	@$(UV) pip uninstall --quiet --python .venv/bin/python $(if $(filter gpu,$(FAISS)),faiss-cpu,faiss-gpu)
	@UV_COMPILE_BYTECODE_TIMEOUT=600 $(UV) pip install --python .venv/bin/python --constraint constraints.txt --compile-bytecode --editable '.[dev,$(FAISS)]'
	@touch $@

# --target works on every pip: it needs no user site and is not refused on a system-managed Python.
.uv/bin/uv:
	@echo "make: there is no uv here; fetching it into .uv/ (nothing outside this folder is touched)"
	@PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore \
	  python3 -m pip install --quiet --upgrade --target .uv uv || { \
	  echo "make: python3 with pip is needed (for example: apt install python3-pip), or uv itself." >&2; exit 1; }
