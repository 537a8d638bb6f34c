# make run   sets up and runs the pocket suite's main job: DOLFIN over ten clients on handwritten digits
# make test  sets up and runs the whole test suite
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
PY := $(VENV)/bin/python
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run test lint clean

run: $(VENV)/.run
	$(PY) main.py --model dolfin --dataset seq-digits --fl --savecheck task --loadcheck auto
	$(PY) main.py --model fedavg --model_config lora --dataset seq-digits --fl --savecheck task --loadcheck auto
	$(PY) -m utils.compare results/seq-digits --plot results/seq-digits.png
	@echo "runs (CSV, log, checkpoint): results/seq-digits/<model>/<run>/   plot: results/seq-digits.png"

test: $(VENV)/.test
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else "Herd needs Python 3.10, 3.11 or 3.12; %s is %d.%d: make PYTHON=python3.11 ..." % (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.run: requirements.txt $(VENV)/.venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

TESTED := requirements.txt requirements-dev.txt requirements-ray.txt requirements-spiking.txt requirements-tensorboard.txt

$(VENV)/.test: $(TESTED) $(VENV)/.run
	$(PY) -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$(TESTED))
	touch $@

clean:
	rm -rf $(VENV) results .pytest_cache .ruff_cache
