"""Hydra configuration groups and presets (YAML), shipped as package data."""
