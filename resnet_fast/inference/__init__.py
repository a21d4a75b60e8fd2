from .model import OptimizedModel, optimize_for_inference

__all__ = ["OptimizedModel", "optimize_for_inference"]
