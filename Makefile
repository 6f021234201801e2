# Two commands on a fresh machine: `make demo` and `make test`. Both set up what they need and can be run again and again.
#
# What each target of `make test` takes on a machine with 2 cores, warm, beside one other (it prints its own table; 38 minutes together):
#   lint 0:15   test-unit 1:25   test-model 4:20   test-runner 19:05   test-apiserver 19:00   test-mutation 3:05
#   test-chaos 3:50   test-scale 1:00   test-node 19:15     (cold: + 15 min of Go builds, 3 min of images, beside the others)

PYTHON ?= python3
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
export PATH := $(or $(MLX_OPERATOR_CACHE),$(HOME)/.cache/mlx-operator)/go/bin:/usr/sbin:/sbin:$(PATH)

.PHONY: help setup setup-cluster demo demo-down test lint format test-unit test-model test-runner test-apiserver test-mutation test-chaos \
  test-scale test-node model-check soak bench-serving bench-operator generate cluster-up cluster-down images

help: ## This text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup:
	@$(PYTHON) tests/setup.py
setup-cluster:
	@$(PYTHON) tests/setup.py --cluster

# Only what stands on the command line names a cluster; a KUBECONFIG of the environment does not.
NAMED = $(if $(filter command,$(firstword $(origin KUBECONFIG))),--kubeconfig=$(KUBECONFIG)) $(if $(CONTEXT),--context=$(CONTEXT)) \
  $(if $(OPERATOR_IMAGE),--operator-image=$(OPERATOR_IMAGE)) $(if $(RUNNER_IMAGE),--runner-image=$(RUNNER_IMAGE)) \
  $(if $(MODEL_IMAGE),--model-image=$(MODEL_IMAGE))

demo: setup-cluster ## A cluster, images, chart, a small model, two runners, one chat answer, kubectl describe
	@$(PY) -m examples.demo up $(NAMED)
demo-down: setup-cluster ## Remove what `make demo` made
	@$(PY) -m examples.demo down

test: setup-cluster ## Everything below, two layers at a time (ARGS="unit apiserver": only these)
	@$(PY) -m tests.layers $(ARGS)

lint: setup ## ruff, mypy --strict, import contracts
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check -q . || { echo "run 'make format'"; exit 1; }
	@MYPYPATH=api:operator:runner_image $(PY) -m mypy -p mlx_operator_api -p mlx_operator -p mlx_runner
	@MYPYPATH=api:operator:runner_image $(PY) -m mypy tests docs hack examples
	@PYTHONPATH=api:operator:runner_image .venv/bin/lint-imports
format: setup ## ruff format and safe fixes
	@$(PY) -m ruff check --fix -q . ; $(PY) -m ruff format -q .

# Programs and images are built before pytest starts: its time-outs are for tests, not for compilers.
test-unit: setup-cluster ## Planner, transition table, chart, everything pure; generated files are current
	@$(PY) -m tests.cluster.binaries helm >/dev/null
	$(PYTEST) tests/unit tests/cluster/tests -q
test-model: setup ## Model check: every state of plan(), the state machine and a cluster with one fault
	$(PYTEST) tests/model -q
test-runner: setup ## Real MLX on loopback, no cluster
	$(PYTEST) tests/runner -q
test-apiserver: setup-cluster ## Real etcd and kube-apiserver on loopback
	@$(PY) -m tests.cluster.binaries etcd kube-apiserver kube-controller-manager kubectl helm >/dev/null
	$(PYTEST) tests/apiserver -q
test-mutation: setup-cluster ## Every field of the CRD changed by itself: as if made so, or told clearly, and healed
	@$(PY) -m tests.cluster.binaries etcd kube-apiserver kube-controller-manager kubectl helm >/dev/null
	$(PYTEST) tests/mutation -q
test-chaos: setup-cluster ## Faults of the API server, two replicas, short random walks
	@$(PY) -m tests.cluster.binaries etcd kube-apiserver kube-controller-manager kubectl helm >/dev/null
	$(PYTEST) tests/chaos -q
soak: setup-cluster ## Random walks through all faults (ARGS="--minutes 60 --seed N"; a failure prints how to see it again)
	@$(PY) -m tests.cluster.binaries etcd kube-apiserver kube-controller-manager kubectl helm >/dev/null
	@$(PY) -m tests.chaos $(ARGS)
test-scale: setup-cluster ## 100 instances on a real API server: writes, idle, restart, mass death
	@$(PY) -m tests.cluster.binaries etcd kube-apiserver kube-controller-manager kubectl helm >/dev/null
	$(PYTEST) tests/scale -q
test-node: images ## Real containerd and kubelet: two nodes
	$(PYTEST) tests/node -q

model-check: setup ## Every state of three ranks and two faults, as long as it takes (ARGS="--ranks 2 --faults 2")
	@$(PY) -m tests.model $(ARGS)

bench-serving: setup ## Speed beside mlx_lm.server on the same weights (about 6 min; ARGS="--quick --shapes pipeline")
	@$(PY) -m tests.bench $(ARGS)

bench-operator: setup-cluster ## The same with 1000, its time, memory and CPU (ARGS="--instances 300 --kill 30")
	@$(PY) -m tests.cluster.binaries etcd kube-apiserver kube-controller-manager kubectl helm >/dev/null
	@$(PY) -m tests.scale $(ARGS)

generate: setup ## crds/, charts and docs from the models
	@$(PY) -m docs.generate

cluster-up: setup-cluster ## Only the two-node cluster
	@$(PY) -m tests.cluster up --nodes 2
cluster-down: setup-cluster
	@$(PY) -m tests.cluster down
images: setup-cluster ## Only the images
	@$(PY) -m tests.cluster.binaries >/dev/null
	@$(PY) -m tests.cluster.images all >/dev/null
