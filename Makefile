# Every target builds .venv first and uses nothing outside it. PYTHON may name any Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo compare test soak test-quantized lint bench clean

demo: .venv/demo.done
	$(BIN)/flowstream demo

# All methods on the demo's model: 20 to 40 minutes on two cores. Stopped, it goes on where it was.
compare: .venv/demo.done
	$(PIP) --editable '.[train]'
	$(BIN)/flowstream compare --lrs 4e-4,1.6e-3 --seeds 6

# Three tests at a time, each on one core: on two cores, since those of many ranks mostly wait. Neighbours stay together,
# which share what they are tried on.
test: .venv/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

# What a test does ten times with a fixed seed, a hundred times with another each time; what it does here and there,
# everywhere.
soak: .venv/test.done
	FLOWSTREAM_NUM_KILLS=100 FLOWSTREAM_NUM_RANK_KILLS=50 FLOWSTREAM_EVERY_STOP=1 \
		$(BIN)/python -m pytest tests/test_kill.py tests/sources tests/distributed/test_killed_ranks.py
	$(BIN)/python -m pytest -m soak

lint: .venv/test.done .venv/lint.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Heavier than its use in every run: bitsandbytes takes 125 MB.
test-quantized: .venv/test.done
	$(PIP) --editable '.[bitsandbytes]'
	$(BIN)/python -m pytest tests/scoring/test_quantized.py

bench: .venv/test.done
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/digest.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/state.py
	$(BIN)/python benchmarks/meetings.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/temperature.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/trainers.py
	$(BIN)/python benchmarks/vision.py
	$(BIN)/python benchmarks/rehearsal.py
	$(BIN)/python benchmarks/gpu_overlap.py

clean:
	rm -rf .venv

# In groups: torch alone first, so that nothing pulls in a newer one, and then few extras at a time.
.venv/core.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/demo.done: .venv/core.done
	$(PIP) --editable '.[demo]'
	touch $@

.venv/test.done: .venv/demo.done
	$(PIP) --editable '.[datasets,torchdata]'
	$(PIP) --editable '.[accelerate,peft,trl]'
	$(PIP) --editable '.[lightning]'
	$(PIP) --editable '.[train]'
	$(PIP) --editable '.[test]'
	touch $@

.venv/lint.done: .venv/core.done
	$(PIP) --editable '.[lint]'
	touch $@
