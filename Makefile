# Slow work whose results are committed. `make -k evidence` goes on past a step that fails.
.PHONY: evidence readme demo protocols parity text step-cost test

evidence: readme demo protocols parity text step-cost

readme:
	python benchmarks/readme_road.py

# a demo whose bundle fails parity, or cannot be decided, has a result all the same: it is kept, and the target fails
demo:
	rm -f runs/demo/demo.json
	pocketvlm demo --out runs/demo --overwrite; code=$$?; \
	cp runs/demo/demo.json benchmarks/results/demo.json && exit $$code

protocols:
	python benchmarks/protocols.py

parity:
	python benchmarks/pooled_parity.py

text:
	python benchmarks/text_vocabulary.py

step-cost:
	python benchmarks/step_cost.py

test:
	pytest -n 2
