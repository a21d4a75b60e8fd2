// y = relu(conv(x, w)) in bfloat16 with everything that sm_90a has for it: TMA fetches pixels as im2col and weights as
// boxes, a ring of mbarriers leads from one producer thread to two warpgroups of wgmma, whose results go through
// stmatrix and TMA stores. It proves the emulator; the project's own kernels are in csrc/cuda.
#include <cuda_bf16.h>

#include "ptx.cuh"
#include "runtime.cuh"

namespace {

namespace ptx = resnet_fast::ptx;

constexpr int pixels = 128, channels = 128, depth = 64;  // of y's tile, and of x and w at a time
constexpr int stages = 3, consumers = 2, threads = 128 * (1 + consumers);
constexpr int row_bytes = 128;  // of 64 values, the span of the swizzle
constexpr int x_bytes = pixels * row_bytes, w_bytes = channels * row_bytes, stage_bytes = x_bytes + w_bytes;
constexpr int staging_rows = pixels / consumers, staging_bytes = staging_rows * row_bytes;
constexpr int barriers_at = stages * stage_bytes + consumers * staging_bytes;
constexpr int shared_bytes = barriers_at + 2 * stages * 8;

struct Shape {
  int out_height, out_width, chunks, taps_x, taps, stride, padding;  // chunks: of `depth` channels
  int tiles_x, tiles;                                                // of channels, and in all
};

// The place in the ring, and the parity of its round.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Shared {
  uint32_t base;

  __device__ uint32_t x(int stage) const { return base + stage * stage_bytes; }
  __device__ uint32_t w(int stage) const { return x(stage) + x_bytes; }
  __device__ uint32_t staging(int consumer) const { return base + stages * stage_bytes + consumer * staging_bytes; }
  __device__ uint32_t full(int stage) const { return base + barriers_at + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(stage) + stages * 8; }
};

[[maybe_unused]] __device__ void produce(const CUtensorMap& x, const CUtensorMap& w, const Shape& shape,
                                         const Shared& shared) {
  Ring ring;
  for (int tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    const int pixel = tile / shape.tiles_x * pixels, channel = tile % shape.tiles_x * channels;
    const int image = pixel / (shape.out_height * shape.out_width), rest = pixel % (shape.out_height * shape.out_width);
    const int row = rest / shape.out_width * shape.stride - shape.padding;
    const int column = rest % shape.out_width * shape.stride - shape.padding;
    for (int step = 0; step < shape.taps * shape.chunks; ++step, ring.advance()) {
      const int tap = step / shape.chunks, chunk = step % shape.chunks;
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(shared.full(ring.stage), stage_bytes);
      ptx::tma_load_im2col(shared.x(ring.stage), &x, shared.full(ring.stage), {chunk * depth, column, row, image},
                           {tap % shape.taps_x, tap / shape.taps_x});
      ptx::tma_load(shared.w(ring.stage), &w, shared.full(ring.stage), {step * depth, channel});
    }
  }
}

__device__ uint32_t relu_pack(float low, float high) {
  const __nv_bfloat16 a = __float2bfloat16_rn(fmaxf(low, 0.0f)), b = __float2bfloat16_rn(fmaxf(high, 0.0f));
  return uint32_t(*reinterpret_cast<const uint16_t*>(&a)) | uint32_t(*reinterpret_cast<const uint16_t*>(&b)) << 16;
}

// 64 channels at a time through the warpgroup's staging buffer.
__device__ void store(const CUtensorMap& y, const float (&sum)[channels / 2], uint32_t staging, int consumer, int pixel,
                      int channel) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < channels / 64; ++part) {
    if (thread == 0) ptx::tma_store_wait_read<0>();
    ptx::barrier_sync(1 + consumer, 128);  // the buffer is free
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float* from = &sum[part * 32 + i * 4];
      const uint32_t values[4] = {relu_pack(from[0], from[1]), relu_pack(from[2], from[3]), relu_pack(from[4], from[5]),
                                  relu_pack(from[6], from[7])};
      const uint32_t row = warp * 16 + lane % 16, unit = i + lane / 16;
      ptx::stmatrix_x4(staging + row * row_bytes + (unit ^ row % 8) * 16, values);
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(1 + consumer, 128);  // it is full
    if (thread == 0) {
      ptx::tma_store(&y, staging, {channel + part * 64, pixel + consumer * staging_rows});
      ptx::tma_store_commit();
    }
  }
}

[[maybe_unused]] __device__ void consume(const CUtensorMap& y, const Shape& shape, const Shared& shared, int consumer) {
  const bool elected = threadIdx.x % 128 == 0;
  Ring ring;
  for (int tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    float sum[channels / 2];
#pragma unroll
    for (int i = 0; i < channels / 2; ++i) sum[i] = 0.0f;
    int previous = 0;
    for (int step = 0; step < shape.taps * shape.chunks; ++step, ring.advance()) {
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < depth / 16; ++k) {
        const uint32_t a = shared.x(ring.stage) + consumer * staging_bytes + k * 32, b = shared.w(ring.stage) + k * 32;
        ptx::wgmma_bf16(sum, ptx::wgmma_descriptor(a, 0, 8 * row_bytes, ptx::Swizzle::bytes_128),
                        ptx::wgmma_descriptor(b, 0, 8 * row_bytes, ptx::Swizzle::bytes_128), true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the previous step's
      if (elected && step > 0) ptx::mbarrier_arrive(shared.empty(previous));
      previous = ring.stage;
    }
    ptx::wgmma_wait<0>();
    if (elected) ptx::mbarrier_arrive(shared.empty(previous));
    ptx::wgmma_ready(sum);
    store(y, sum, shared.staging(consumer), consumer, tile / shape.tiles_x * pixels, tile % shape.tiles_x * channels);
  }
  if (elected) ptx::tma_store_wait_read<0>();
}

__global__ void __launch_bounds__(threads, 1)
    hopper_conv_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                       const __grid_constant__ CUtensorMap y, const __grid_constant__ Shape shape) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Shared shared{ptx::shared_address(resnet_fast::dynamic_shared())};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::mbarrier_init(shared.full(stage), 1);
      ptx::mbarrier_init(shared.empty(stage), consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == consumers) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x % 128 == 0) produce(x, w, shape, shared);
  } else {
    ptx::setmaxnreg_inc<232>();
    consume(y, shape, shared, warpgroup);
  }
#endif
}

CUresult encode_pixels(CUtensorMap* map, void* x, int images, int height, int width, int channels, int taps, int stride,
                       int padding) {
  const cuuint64_t sizes[4] = {cuuint64_t(channels), cuuint64_t(width), cuuint64_t(height), cuuint64_t(images)};
  const cuuint64_t strides[3] = {sizes[0] * 2, sizes[0] * sizes[1] * 2, sizes[0] * sizes[1] * sizes[2] * 2};
  const int lower[2] = {-padding, -padding}, upper[2] = {padding - (taps - 1), padding - (taps - 1)};
  const cuuint32_t steps[4] = {1, cuuint32_t(stride), cuuint32_t(stride), 1};
  return cuTensorMapEncodeIm2col(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x, sizes, strides, lower, upper, depth,
                                 pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

CUresult encode_matrix(CUtensorMap* map, void* data, int64_t rows, int64_t columns, int box_rows) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[2] = {depth, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, sizes, strides, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace

// x [images, height, width, channels], w [out_channels, taps, taps, channels], y [images, ..., ..., out_channels];
// channels a multiple of 64, out_channels of 8. Returns a cudaError_t, or -1 if a tensor map could not be made.
extern "C" int hopper_conv(void* x, void* w, void* y, int images, int height, int width, int channels, int out_channels,
                           int taps, int stride, int padding, int blocks) {
  Shape shape{};
  shape.out_height = (height + 2 * padding - taps) / stride + 1;
  shape.out_width = (width + 2 * padding - taps) / stride + 1;
  shape.chunks = channels / depth, shape.taps_x = taps, shape.taps = taps * taps;
  shape.stride = stride, shape.padding = padding;
  const int rows = images * shape.out_height * shape.out_width;
  shape.tiles_x = (out_channels + ::channels - 1) / ::channels;
  shape.tiles = (rows + pixels - 1) / pixels * shape.tiles_x;
  CUtensorMap map_x, map_w, map_y;
  if (encode_pixels(&map_x, x, images, height, width, channels, taps, stride, padding) != CUDA_SUCCESS ||
      encode_matrix(&map_w, w, out_channels, int64_t(taps) * taps * channels, ::channels) != CUDA_SUCCESS ||
      encode_matrix(&map_y, y, rows, out_channels, staging_rows) != CUDA_SUCCESS)
    return -1;
  return resnet_fast::launch<hopper_conv_kernel>(blocks < shape.tiles ? blocks : shape.tiles, threads, shared_bytes,
                                                 nullptr, map_x, map_w, map_y, shape);
}
