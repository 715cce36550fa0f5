# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Every target sets up its own virtual environment first; PYTHON names the interpreter it is made with.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MODEL  ?= tiny
PARITY ?= ../shared/parity
DEMO   := src/stableavatar/assets/demo
# Where the embedded model is trained: data and checkpoints; every step goes on where it stopped, with the same CLIPS, ACTED,
# VARIED and MOVING (else give another WORK=). START=tiny begins with the weights that ship, in place of none. CLIPS puppets act
# what their seeds say, ACTED others act smiling and serious, VARIED others are less alike, and MOVING more of these nod, shake
# and tilt their heads; MINUTES are the autoencoder's, SHARPENED its decoder's alone, at the end, on latents that the trained
# transformer makes of MADE clips. QUICK=1 goes through every stage in moments, uncompiled, in a folder that it empties first,
# and leaves the package as it is.
QUICK  ?=
WORK    = $(if $(QUICK),runs/tiny-quick,runs/tiny)
CLIPS ?= $(if $(QUICK),8,3000)
ACTED ?= $(if $(QUICK),2,500)
VARIED ?= $(if $(QUICK),2,1000)
MOVING ?= $(if $(QUICK),1,334)
MINUTES ?= $(if $(QUICK),0.2,240)
SHARPENED ?= $(if $(QUICK),0.2,45)
MADE ?= $(if $(QUICK),2,400)
START  ?=
# recipes/tiny.yaml in that folder: the paths are those of the file, moved.
RECIPE  = recipes/tiny.yaml --set output=$(WORK) --set model.source=$(WORK)/encoders --set data.cache=$(WORK)/latents \
    --set 'data.puppets=[$(WORK)/puppets,$(WORK)/acted,$(WORK)/varied,$(WORK)/moving]' \
    $(if $(START),--set model.embedded.start=$(START)) $(if $(QUICK),--set trainer.steps=4 --set trainer.compile=false)
# How the decoder is trained at the end (docs/decisions/0013-decoder-from-made-latents.md).
DECODER = --image-steps 0 --detail-weight 150 --critic-share 0.15 --kernel-learning-rate 5e-4 \
    --learning-rate 2e-4
# Photographs that `make evaluate-tiny` animates beside the astronaut.
PORTRAITS ?= $(wildcard $(addprefix ../shared/samples/portraits/,boy.jpg echo_01.jpg hallo_0008.jpg woman_blazer.png))
# What `make bench` measures, by default all: transformer peak decode generate first-frame processes training.
PARTS  ?=

# Copies a folder so that it is all there or not: what a kill leaves of a copy does not count as made.
whole   = rm -rf $(2).part && cp -R $(1) $(2).part && mv $(2).part $(2)

.PHONY: help demo test test-large lint docs parity tiny evaluate-tiny evaluate-lora bench format clean
help:            ## what can be made
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)   ## out/demo.mp4: a portrait says a recording
	mkdir -p out
	$(BIN)/stableavatar generate $(DEMO)/portrait.png $(DEMO)/speech.flac -o out/demo.mp4 --model $(MODEL) --seed 1 --overwrite
	@echo "The video is out/demo.mp4. Play it with any player or browser, for example: xdg-open out/demo.mp4"

test: $(STAMP)   ## run every test
	-$(BIN)/stableavatar download --landmarks
	-$(BIN)/python -m stableavatar.evaluation.faces
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-large: $(STAMP) ## the tests that need DeepSpeed, torchao and W&B, in an environment of their own
	$(PYTHON) -m venv $(VENV)-large
	$(VENV)-large/bin/pip install -q -c constraints.txt -e '.[dev,large]'
	$(VENV)-large/bin/python -m pytest tests/test_training_processes.py tests/test_training_trainer.py tests/test_training_optimizers.py \
	    tests/test_training_tiny_transformer.py tests/test_training_recipes.py

lint: $(STAMP)   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(STAMP) ## every parity case under PARITY=folder against our model
	$(BIN)/python -m stableavatar.evaluation.parity $(PARITY)

evaluate-tiny: $(STAMP) ## the embedded model against its bars (25 to 45 minutes; QUICK=1: a subset in minutes)
	$(BIN)/stableavatar download --landmarks
	$(BIN)/python -m stableavatar.evaluation.faces
	$(BIN)/python -m stableavatar.evaluation.tiny --model $(MODEL) --processes 2 $(addprefix --portrait ,$(PORTRAITS)) \
	    $(if $(QUICK),--quick,--out docs/tiny.md $(if $(wildcard $(WORK)),--curves $(WORK)))

evaluate-lora: $(STAMP) ## what a LoRA of one unseen person gains, into docs/training.md
	$(BIN)/python -m stableavatar.evaluation.lora data --folder runs/tiny-lora/data
	$(BIN)/stableavatar cache-latents recipes/tiny-lora.yaml --passes 4 --output runs/tiny-lora/latents
	$(BIN)/stableavatar train recipes/tiny-lora.yaml --resume latest
	$(BIN)/python -m stableavatar.evaluation.lora measure --lora runs/tiny-lora/lora --out docs/training.md

docs: $(STAMP)   ## the pages of docs/ as a site in out/docs, links checked
	$(BIN)/mkdocs build --quiet

bench: $(STAMP)  ## speed and memory beside diffusers, into docs/performance.md (QUICK=1 prints small sizes)
	$(BIN)/python -m benchmarks.run $(if $(QUICK),--quick) $(PARTS)

tiny: $(STAMP)   ## train the embedded model anew, from puppets to weights (many hours on two cores; QUICK=1: only pass through it)
	$(if $(QUICK),rm -rf runs/tiny-quick)
	$(BIN)/python -m stableavatar.data.puppets store --folder $(WORK)/puppets --clips $(CLIPS)
	$(BIN)/python -m stableavatar.data.puppets store --folder $(WORK)/acted --seed $(CLIPS) --clips $(ACTED) \
	    --expressions smiling serious
	$(BIN)/python -m stableavatar.data.puppets store --folder $(WORK)/varied --seed $$(($(CLIPS) + $(ACTED))) --clips $(VARIED) --varied
	$(BIN)/python -m stableavatar.data.puppets store --folder $(WORK)/moving --seed $$(($(CLIPS) + $(ACTED) + $(VARIED))) \
	    --clips $(MOVING) --varied --expressions nodding "shaking the head" "tilting the head"
	mkdir -p $(WORK)/encoders
	test -e $(WORK)/encoders/vae || { $(BIN)/python -m stableavatar.training.tiny.autoencoder --resume \
	    --out $(WORK)/autoencoder --puppets $(WORK)/puppets --puppets $(WORK)/varied --minutes $(MINUTES) \
	    $(if $(START),--start-from src/stableavatar/assets/$(START)/vae) && \
	    $(call whole,$(WORK)/autoencoder/model,$(WORK)/encoders/vae); }
	test -e $(WORK)/encoders/speech_encoder || { $(BIN)/python -m stableavatar.training.tiny.speech_encoder \
	    --out $(WORK)/speech_encoder --puppets $(WORK)/puppets $(if $(QUICK),--minutes 0.2) && \
	    $(call whole,$(WORK)/speech_encoder/final,$(WORK)/encoders/speech_encoder); }
	test -e $(WORK)/encoders/text_encoder || { $(BIN)/python -m stableavatar.training.tiny.text_encoder \
	    --out $(WORK)/text_encoder $(if $(QUICK),--steps 20) && $(call whole,$(WORK)/text_encoder/final,$(WORK)/encoders/text_encoder); }
	$(BIN)/stableavatar cache-latents $(RECIPE) --output $(WORK)/latents
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m stableavatar train $(RECIPE) --resume latest
	$(BIN)/python -m stableavatar.training.tiny.made_latents --model $(WORK)/model --out $(WORK)/made --clips $(MADE) \
	    --puppets $(WORK)/puppets --puppets $(WORK)/varied
	$(BIN)/python -m stableavatar.training.tiny.autoencoder --resume --freeze-encoder --out $(WORK)/decoder \
	    --start-from $(WORK)/encoders/vae --puppets $(WORK)/puppets --puppets $(WORK)/varied --made $(WORK)/made \
	    $(DECODER) --minutes $(SHARPENED) --into $(WORK)/model
	$(BIN)/python -m stableavatar.training.tiny.meter --autoencoder $(WORK)/model/vae \
	    $(if $(QUICK),--identities 8 --steps 20 --out $(WORK)/meter.safetensors)
	$(if $(QUICK),$(BIN)/stableavatar generate $(DEMO)/portrait.png $(DEMO)/speech.flac -o $(WORK)/demo.mp4 --model $(WORK)/model --overwrite,\
	    rm -rf src/stableavatar/assets/tiny && cp -R $(WORK)/model src/stableavatar/assets/tiny)

clean:           ## remove what the targets made
	rm -rf $(VENV) $(VENV)-large out .pytest_cache .mypy_cache .ruff_cache
