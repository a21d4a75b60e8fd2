"""The operators. Each module has one: public function, checks, fake, gradient and the plain-torch reference."""

from .add_relu import add_relu, add_relu_ref
from .avg_pool_flatten import avg_pool_flatten, avg_pool_flatten_ref
from .conv_bn_relu import conv_bn_relu, conv_bn_relu_ref
from .conv_bn_relu_max_pool import conv_bn_relu_max_pool, conv_bn_relu_max_pool_ref
from .conv_bn_relu_projection import conv_bn_relu_projection, conv_bn_relu_projection_ref
from .max_pool import max_pool, max_pool_ref

__all__ = [
    "add_relu",
    "add_relu_ref",
    "avg_pool_flatten",
    "avg_pool_flatten_ref",
    "conv_bn_relu",
    "conv_bn_relu_max_pool",
    "conv_bn_relu_max_pool_ref",
    "conv_bn_relu_projection",
    "conv_bn_relu_projection_ref",
    "conv_bn_relu_ref",
    "max_pool",
    "max_pool_ref",
]
