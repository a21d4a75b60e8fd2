"""The operators. Each module has one: public function, checks, fake, gradient and the plain-torch reference."""

from .add_relu import add_relu, add_relu_ref
from .avg_pool_flatten import avg_pool_flatten, avg_pool_flatten_ref
from .batch_norm_relu import batch_norm_relu, batch_norm_relu_ref
from .batch_norm_relu_conv import batch_norm_relu_conv, batch_norm_relu_conv_ref
from .batch_norm_relu_projection import batch_norm_relu_projection, batch_norm_relu_projection_ref
from .batch_norm_statistics import batch_norm_statistics, batch_norm_statistics_ref
from .conv2d import conv2d, conv2d_ref
from .conv_bn_relu import conv_bn_relu, conv_bn_relu_ref
from .conv_bn_relu_max_pool import conv_bn_relu_max_pool, conv_bn_relu_max_pool_ref
from .conv_bn_relu_projection import conv_bn_relu_projection, conv_bn_relu_projection_ref
from .max_pool import max_pool, max_pool_ref
from .max_pool_with_indices import max_pool_with_indices, max_pool_with_indices_ref
from .update_running_stats import update_running_stats_

__all__ = [
    "add_relu",
    "add_relu_ref",
    "avg_pool_flatten",
    "avg_pool_flatten_ref",
    "batch_norm_relu",
    "batch_norm_relu_conv",
    "batch_norm_relu_conv_ref",
    "batch_norm_relu_projection",
    "batch_norm_relu_projection_ref",
    "batch_norm_relu_ref",
    "batch_norm_statistics",
    "batch_norm_statistics_ref",
    "conv2d",
    "conv2d_ref",
    "conv_bn_relu",
    "conv_bn_relu_max_pool",
    "conv_bn_relu_max_pool_ref",
    "conv_bn_relu_projection",
    "conv_bn_relu_projection_ref",
    "conv_bn_relu_ref",
    "max_pool",
    "max_pool_ref",
    "max_pool_with_indices",
    "max_pool_with_indices_ref",
    "update_running_stats_",
]
