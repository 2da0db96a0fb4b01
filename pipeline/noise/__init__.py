"""Noise at the image or at a named module of a timm model: what the project exists for."""
