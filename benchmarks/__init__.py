"""Throughput measured beside the peers in one run, each figure with its n, spread, versions, commit and command."""
