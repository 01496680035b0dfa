"""Readers of the layouts that people already have: manifest, class folder, sidecar texts, plain folder, tar shards."""
