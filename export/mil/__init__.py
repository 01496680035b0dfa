"""`coreml-mil`: the programs of saved Core ML packages, evaluated on any system."""

from pocketvlm.export.mil.program import NAME, NOT_MODELLED, PREDICT_SCRIPT, MilBackend, MilProgram, load_package

__all__ = ["NAME", "NOT_MODELLED", "PREDICT_SCRIPT", "MilBackend", "MilProgram", "load_package"]
