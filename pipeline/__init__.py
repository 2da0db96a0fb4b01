"""Training and evaluating timm models with NoisyNN's noise, on one process or many."""
