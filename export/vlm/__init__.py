"""Generative students as bundles that run without torch, and the proof that they say what the student says."""
