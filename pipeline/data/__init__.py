"""Shards -> batches of (uint8 images, labels, sample ids), in an order that is a pure function of seed and position."""
