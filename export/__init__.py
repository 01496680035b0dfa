"""From a trained student to files that a phone runs, and the proof that they compute the same.

`export_bundle` writes a bundle (ONNX, ExecuTorch, Core ML; see docs/export.md), `check_parity` compares one with a
recorded reference. Submodules are imported on first use, because each needs another extra.
"""

if __name__ != "pocketvlm.export":
    raise ImportError(
        "import this package as pocketvlm.export; a second copy under 'export' would duplicate every class"
    )
