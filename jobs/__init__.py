"""Multi-node launches: fills a job file (Slurm, Kubernetes, one machine) for ``python -m pipeline train``, submits it.

Calls the other packages by their command lines and imports none of them, but ``pipeline.recipes`` for their names.
"""
