PYTHON = python3
VENV = .venv
# `make QUIET= …` shows what pip does.
QUIET = --quiet --disable-pip-version-check --no-warn-script-location
MODEL = checkpoints/nextflow-emoji
PROMPT = a rocket, 3d style

# The prompt reaches the command through the environment: no shell and no make reads what is in it.
export DEMO_PROMPT := $(value PROMPT)
unexport PROMPT

.PHONY: demo test browser notebooks lint docs

demo: $(VENV)/.installed-pipelines
	$(VENV)/bin/transformers-nextflow generate --model $(MODEL) --output demo.png --scale 4 -- "$$DEMO_PROMPT"

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile tests

# The demo in a headless browser: Debian's chromium, else Playwright's own.
browser: $(VENV)/.installed-browser
	command -v chromium >/dev/null || $(VENV)/bin/playwright install --with-deps chromium
	$(VENV)/bin/python -m pytest -q tests/browser

notebooks: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -q tests/notebooks

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check
	$(VENV)/bin/vulture

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# A stamp per set of packages: they are installed again only when their versions change.
# torch comes first and exactly pinned, so that nothing else picks another build of it.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing into $(VENV), some minutes"
	@$(VENV)/bin/pip install $(QUIET) "$$(grep ^torch== constraints.txt)"
	@$(VENV)/bin/pip install $(QUIET) --editable ".[$*]" --constraint constraints.txt
	@touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
