#include "conv_bn_relu_sm80_launch.cuh"

template int resnet_fast::launch_conv_bn_relu_sm80<float>(const ConvBnRelu& conv, ConvTile tile, void* stream);
