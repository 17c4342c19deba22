PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test quick demo lint
test: lint
	$(PYTEST)

quick: lint
	$(PYTEST) -m "not slow"

lint: .venv/installed
	.venv/bin/ruff check $$(git ls-files '*.py')
	.venv/bin/ruff format --check $$(git ls-files '*.py')

demo: .venv/installed
	.venv/bin/python reproduce.py --scale demo $(if $(ENCODER),--encoder-weights $(ENCODER))

.venv/installed: requirements.txt requirements-dev.txt
	@echo "installing into .venv: PyTorch with CUDA is 5.7 GB"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
