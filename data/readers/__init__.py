"""Readers of the layouts that people have: manifest, folders, sidecar texts, tar shards, and the field's own sets."""
