# Each target sets up what it needs in .venv; `make demo` needs the six run-time packages alone.
PYTHON ?= python3
# For latents of 16x16 (the defaults are the paper's for SD1.5): see README.md.
SMALL = --data demo/data --lr 5e-4 --beta 1000 --batch-size 32 --steps 60 --dtype bfloat16
.PHONY: demo results test test-avx2 bench bench-gpu lint clean

# The whole job, in four minutes on two cores. Drawing the pool takes the longest by far: for show it is drawn for six
# prompts, and training goes on from the pairs of 640 prompts that ship with the checkpoint (paper_people/pairs.py).
demo: .venv/core
	.venv/bin/python build_dataset.py --limit 6 --steps 10 --out demo/pool
	.venv/bin/python -m paper_people.pairs --out demo/data
	.venv/bin/python train.py --out demo/run $(SMALL) --lambda-stat 4e5
	.venv/bin/python evaluate.py --lora demo/run/lora.safetensors --run demo/run --steps 10 --dtype bfloat16 --out demo/eval
	@echo "Look at demo/eval/sheet.png (before over after) and open demo/eval/report.html"

# RESULTS.md and README's table, from the rows that are committed; those that are missing are made: hours.
results: .venv/core
	.venv/bin/python -m benchmarks.results

# Two at a time, each with one thread: tests are too small for two.
test: .venv/test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The numerics on the kernels of a processor without AVX-512 and AMX, with one thread.
test-avx2: .venv/test
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 \
	tests/test_sampling.py tests/test_networks.py tests/test_losses.py tests/test_family.py tests/test_policy.py \
	tests/test_reward_gradients.py tests/test_lora.py tests/test_lan.py

bench: .venv/test
	.venv/bin/python benchmarks/sampling_step.py
	.venv/bin/python benchmarks/loading.py
	.venv/bin/python benchmarks/train_step.py

# Ten minutes where a GPU is at hand: whether all is right on it, and how fast; in gpu.md.
bench-gpu: .venv/test
	.venv/bin/python benchmarks/gpu.py

lint: .venv/test
	.venv/bin/ruff check .

.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv/test: .venv/core
	.venv/bin/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv demo out
