PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: zoo sample test test-browser test-hard test-hub fuzz audit sbom docs lint types unit format clean

sample: $(INSTALLED)  ## the main job: base, best-of-8 and steered images for three prompts, requirements ticked
	$(BIN)/steer sample "four yellow crosses" "three blue stars" "a yellow star below a black cross" \
		--steps 20 --guidance 4 --particles 16 --best-of 8 --checklist scene --out out/sample
	@echo "look at out/sample/grid.png and out/sample/ancestry.png"

test: $(INSTALLED)  ## everything that needs no browser: lint beside types, then unit
	$(MAKE) --jobs 2 lint types
	$(MAKE) unit

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python docs/vocabulary.py

docs: $(INSTALLED)  ## the site in site/; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

types: $(INSTALLED)
	$(BIN)/mypy -p steer

unit: $(INSTALLED)  ## two workers of one thread each: twice as fast as one of two; pytest keeps the bytecode of rewritten tests
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-browser: $(INSTALLED)  ## the app in a real browser (Debian's chromium, or CHROMIUM=path), and in a flood
	$(BIN)/python -m pytest -m browser tests/test_browser_demo.py tests/test_demo_hostile.py

test-hard: $(INSTALLED)  ## kills, full disks, corrupt and hostile files, long runs, products of parameters: 45 minutes; figures in out/reliability.json
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m hard tests

test-hub: $(INSTALLED)  ## with a network: loads the rewards of the hub and pipelines, compares with published scores
	STEER_HUB=1 $(BIN)/python -m pytest tests/test_hub.py -v

ZOO ?=

zoo: $(INSTALLED)  ## all checks of the zoo, an hour: tests/zoo/matrix.json, docs/pipelines.md; ZOO=--missing: the rest
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m zoo.matrix zoo/matrix.json $(ZOO) && ../$(BIN)/python -m zoo.page

FUZZED ?= config config-words reward reward-file prompts choices manifest png recipe report calibration parquet
SECONDS_EACH ?= 300

fuzz: $(INSTALLED)  ## coverage-guided, an hour: what is new goes to build/fuzz/corpus, what is wrong to build/fuzz
	$(BIN)/python -m pip install --quiet --no-deps --target build/fuzz/atheris 'atheris>=3'
	for parser in $(FUZZED); do \
		mkdir -p build/fuzz/corpus/$$parser && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=build/fuzz/atheris \
		$(BIN)/python tests/hard/fuzz.py $$parser --seconds $(SECONDS_EACH) --corpus build/fuzz/corpus/$$parser \
		-artifact_prefix=$(CURDIR)/build/fuzz/$$parser- || exit 1; \
	done

audit: $(INSTALLED)  ## known vulnerabilities of what is installed; it and sbom have an environment of their own
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet 'pip-audit>=2.9'
	build/audit/bin/pip-audit --skip-editable --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

sbom: $(INSTALLED)  ## out/sbom.json: what is installed, as CycloneDX
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet 'cyclonedx-bom>=7'
	mkdir -p out
	build/audit/bin/cyclonedx-py environment $(BIN)/python --output-file out/sbom.json

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build out site *.egg-info
