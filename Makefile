# Slow work whose results are committed. `make -k evidence` goes on past a step that fails.
.PHONY: evidence readme demo protocols parity text step-cost inherited ablation elastic task plans gpu-constants cache-build stream throughput memory matrix quantized edge web test

evidence: readme demo protocols parity text step-cost inherited

readme:
	python -m benchmarks.readme_road

# a demo whose bundle fails parity, or cannot be decided, has a result all the same: it is kept, and the target fails
demo:
	rm -f runs/demo/demo.json
	pocketvlm demo --out runs/demo --overwrite; code=$$?; \
	cp runs/demo/demo.json benchmarks/results/demo.json && exit $$code

protocols:
	python -m benchmarks.protocols

parity:
	python -m benchmarks.pooled_parity

text:
	python -m benchmarks.text_vocabulary

# a thousand short runs: hours on two cores, so not part of `evidence`; it continues where it stopped
ablation:
	python -m benchmarks.ablation --stage all

# 648 short runs over the ablation's packs: hours on two cores, minutes on a GPU
elastic:
	python -m benchmarks.elastic --stage all

inherited:
	python -m benchmarks.inherited

# pictures of another style: `assets` of the unpacked npm package @lobehub/fluent-emoji-3d
task:
	python -m benchmarks.task_student --other $(OTHER)

# the web app in headless Chromium: node, chromium and a bundle with onnx fp32 and int8
web:
	cd mobile_demo/web && npm ci && npm run build
	python -m benchmarks.web $(BUNDLE)

cache-build:
	python -m benchmarks.cache_build

# what a stream costs: continuing at 1,000 shards, draft decoding
stream:
	python -m benchmarks.stream

step-cost:
	python -m benchmarks.step_cost

# constants of this machine's cores for `pocketvlm plan`, and the worked examples of docs/scaling.md
plans:
	python -m benchmarks.device_constants
	python -m benchmarks.scaling_examples

# the same of this machine's GPU, and runs beside what plans say of them: two minutes
gpu-constants:
	python -m benchmarks.device_constants --device cuda
	python -m benchmarks.plan_check --device cuda

# beside open_clip's own loop: an hour on one idle core
throughput:
	python -m benchmarks.train_throughput

memory:
	python -m benchmarks.contrastive_memory
	python -m benchmarks.shared_loss

# fold 0's runs of benchmarks.named_students (NAMED: their folder) on every target and precision that the committed table
# does not have of trained weights yet; takes hours, goes on where it stopped
NAMED ?= runs/named
STUDENTS = mnv4-035 mnv4-050 lite0-minilm2 effnet-lite0 vit-tiny repvit-m0.9 fastvit-t8
matrix:
	mkdir -p runs/matrix
	test -f runs/matrix/matrix.json || cp benchmarks/results/matrix.json runs/matrix/matrix.json
	pocketvlm matrix --students $(foreach s,$(STUDENTS),$(s)=$(NAMED)/$(s)-f0) --data 'openmoji?pool=student&fold=0' \
	  --judge 'openmoji?pool=test&fold=0&flags=exclude' --out runs/matrix
	cp runs/matrix/matrix.json benchmarks/results/matrix.json && cp runs/matrix/matrix.json export/matrix.json

# trained runs of every named student (hours on two cores), what int8 costs them, and other tools' int8 beside ours, which
# wants `pip install nncf==3.4.0 openvino==2026.4.1` and an idle machine
quantized:
	python -m benchmarks.named_students
	python -m benchmarks.int8
	python -m benchmarks.quantizers

# beside fastembed, in an environment of its own: make edge BUNDLE=bundle/ FASTEMBED=/path/to/its/python
edge:
	python -m benchmarks.edge $(BUNDLE) --fastembed $(FASTEMBED)
	python -m benchmarks.edge_flood $(BUNDLE)

test:
	pytest -n 2
