"""ImageNet's variants: V2, ReaL, -A, -R, Sketch and -C, each from its published layout."""

from pipeline.variants.robustness import Robustness, RobustnessConfig, Row, evaluate_variants
from pipeline.variants.table import print_robustness

__all__ = ["Robustness", "RobustnessConfig", "Row", "evaluate_variants", "print_robustness"]
