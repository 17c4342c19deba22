PYTHON ?= python3

.PHONY: test demo
test: .venv/installed
	.venv/bin/python -m pytest

demo: .venv/installed
	.venv/bin/python demo.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
