"""Side-by-side runs, one module per question: `python -m benchmarks.NAME` from the repository's root."""
