# Slow work whose results are committed. Each command continues where it stopped.
.PHONY: evidence protocols demo test

evidence: demo protocols

demo:
	pocketvlm demo --out runs/demo --overwrite
	cp runs/demo/demo.json benchmarks/results/demo.json

protocols:
	python benchmarks/protocols.py

test:
	pytest -n 2
