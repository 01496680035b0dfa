"""Distillation: objectives, recipes, the training loop, evaluation and the run report.

A run is `recipe -> prepare (data, teacher outputs, views) -> loop -> student -> evaluation -> report`:

>>> from pocketvlm.distill.recipe import load_recipe                      # doctest: +SKIP
>>> from pocketvlm.distill.loop import distill_run                        # doctest: +SKIP
>>> distill_run(load_recipe("quick", ["train.steps=100"]), "runs/quick")  # doctest: +SKIP

Importing this package loads nothing; each module imports what it needs.
"""

if __name__ != "pocketvlm.distill":
    raise ImportError(
        "import this package as pocketvlm.distill; a second copy under 'distill' would duplicate every class"
    )
