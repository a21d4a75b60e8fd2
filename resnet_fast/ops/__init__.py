"""The operators. Each module has one: public function, checks, fake, gradient and the plain-torch reference."""

from .add_relu import add_relu, add_relu_ref
from .conv_bn_relu import conv_bn_relu, conv_bn_relu_ref

__all__ = ["add_relu", "add_relu_ref", "conv_bn_relu", "conv_bn_relu_ref"]
