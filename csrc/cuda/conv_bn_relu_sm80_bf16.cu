#include "conv_bn_relu_sm80_launch.cuh"

template int resnet_fast::launch_conv_bn_relu_sm80<__nv_bfloat16>(const ConvBnRelu& conv, ConvTile tile, void* stream);
