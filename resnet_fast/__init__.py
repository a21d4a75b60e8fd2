"""resnet_fast: fused convolution + BatchNorm + ReLU kernels behind torchvision's ResNets.

>>> from resnet_fast.models import resnet50, ResNet50_Weights   # instead of torchvision.models
"""

from . import ops
from .backends import Backend, backends, use_backend
from .inference import OptimizedModel, optimize_for_inference
from .nn.explain import explain
from .ops.weight_cache import CacheInfo, cache_info, clear_cache

__version__ = "0.1.0"
__all__ = [
    "Backend",
    "CacheInfo",
    "OptimizedModel",
    "__version__",
    "backends",
    "cache_info",
    "clear_cache",
    "explain",
    "ops",
    "optimize_for_inference",
    "use_backend",
]
