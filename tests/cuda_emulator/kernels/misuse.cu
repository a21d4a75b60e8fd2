// Kernels that do what they must not, one mistake each, for the emulator to name (test_primitives.py).
#include "ptx.cuh"
#include "runtime.cuh"

namespace {

namespace ptx = resnet_fast::ptx;
using resnet_fast::dynamic_shared;
using resnet_fast::store_shared;

constexpr int threads = 128, shared_bytes = 8192, barrier = 8184, columns = 64;  // of wgmma
alignas(128) uint32_t global[2048];

uint32_t at(int byte) { return ptx::shared_address(dynamic_shared()) + byte; }
bool first() { return threadIdx.x == 0; }

void init(int arrivals) {
  if (first()) {
    ptx::mbarrier_init(at(barrier), arrivals);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

void fill(int bytes) {
  for (int i = threadIdx.x * 4; i < bytes; i += threads * 4) store_shared(dynamic_shared() + i, 0u);
}

uint64_t descriptor(int byte) { return ptx::wgmma_descriptor(at(byte), 0, 1024, ptx::Swizzle::bytes_128); }

// Of 64 rows of 32 32-bit values, boxes of 4 rows; the second one as 8 images of 8 pixels, for filters of 3 pixels.
struct Maps {
  CUtensorMap tiled, im2col;
};

void mbarrier_without_init(const Maps&) { ptx::mbarrier_arrive(at(barrier)); }

void mbarrier_initialised_twice(const Maps&) {
  init(1);
  if (first()) ptx::mbarrier_init(at(barrier), 1);
}

void mbarrier_misaligned(const Maps&) { ptx::mbarrier_init(at(4), 1); }

void mbarrier_overwritten(const Maps&) {
  init(1);
  if (first()) store_shared(dynamic_shared() + barrier, 1u);
  __syncthreads();
  ptx::mbarrier_wait(at(barrier), 0);
}

void mbarrier_arrived_too_often(const Maps&) {
  init(1);
  if (!first()) return;
  ptx::mbarrier_arrive_expect_tx(at(barrier), 128);
  ptx::mbarrier_arrive(at(barrier));
}

void mbarrier_never_complete(const Maps&) {
  init(2);
  if (first()) ptx::mbarrier_arrive(at(barrier));
  ptx::mbarrier_wait(at(barrier), 0);
}

void mbarrier_of_too_many_bytes(const Maps&) {
  init(1);
  if (first()) ptx::mbarrier_arrive_expect_tx(at(barrier), 1 << 20);
}

void load(const CUtensorMap& map, int to, int bytes, int n = 2) {
  if (first()) {
    ptx::mbarrier_arrive_expect_tx(at(barrier), bytes);
    if (n == 2) ptx::tma_load(at(to), &map, at(barrier), {0, 0});
    if (n == 3) ptx::tma_load(at(to), &map, at(barrier), {0, 0, 0});
  }
  ptx::mbarrier_wait(at(barrier), 0);
}

void tma_misaligned(const Maps& maps) {
  init(1);
  load(maps.tiled, 64, 512);
}

void tma_beyond_shared_memory(const Maps& maps) {
  init(1);
  load(maps.tiled, 8192 - 256, 512);
}

void tma_without_init_fence(const Maps& maps) {
  if (first()) ptx::mbarrier_init(at(barrier), 1);
  __syncthreads();
  load(maps.tiled, 0, 512);
}

void tma_of_more_bytes_than_expected(const Maps& maps) {
  init(1);
  load(maps.tiled, 0, 256);
}

void tma_of_fewer_bytes_than_expected(const Maps& maps) {
  init(1);
  load(maps.tiled, 0, 1024);
}

void tma_of_another_rank(const Maps& maps) {
  init(1);
  load(maps.tiled, 0, 512, 3);
}

void tma_without_map(const Maps&) {
  init(1);
  load(CUtensorMap{}, 0, 512);
}

void tma_map_for_im2col(const Maps& maps) {
  init(1);
  load(maps.im2col, 0, 512, 3);
}

void tma_im2col_outside_its_box(const Maps& maps) {
  init(1);
  if (first()) ptx::tma_load_im2col(at(0), &maps.im2col, at(barrier), {0, 7, 0}, {0});
}

void tma_load_over_pending_store(const Maps& maps) {
  init(1);
  fill(512);
  ptx::fence_proxy_async();
  __syncthreads();
  if (!first()) return;
  ptx::tma_store(&maps.tiled, at(0), {0, 0});
  ptx::tma_store_commit();
  ptx::mbarrier_arrive_expect_tx(at(barrier), 512);
  ptx::tma_load(at(0), &maps.tiled, at(barrier), {0, 0});
}

void tma_store_without_fence(const Maps& maps) {
  fill(512);
  __syncthreads();
  if (first()) ptx::tma_store(&maps.tiled, at(0), {0, 0});
}

void tma_store_not_waited_for(const Maps& maps) {
  fill(512);
  ptx::fence_proxy_async();
  __syncthreads();
  if (!first()) return;
  ptx::tma_store(&maps.tiled, at(0), {0, 0});
  ptx::tma_store_commit();
}

void tma_store_overwritten(const Maps& maps) {
  fill(512);
  ptx::fence_proxy_async();
  __syncthreads();
  if (!first()) return;
  ptx::tma_store(&maps.tiled, at(0), {0, 0});
  ptx::tma_store_commit();
  store_shared(dynamic_shared(), 1u);
}

void cp_async_overwritten(const Maps&) {
  ptx::cp_async_16(at(threadIdx.x * 16), global, true);
  ptx::cp_async_commit();
  __syncwarp();
  store_shared(dynamic_shared() + (threadIdx.x ^ 1) * 16, 1u);
  ptx::cp_async_wait<0>();
}

void cp_async_not_waited_for(const Maps&) { ptx::cp_async_16(at(threadIdx.x * 16), global, true); }

void cp_async_misaligned(const Maps&) { ptx::cp_async_16(at(8), global, true); }

void stmatrix_misaligned(const Maps&) { ptx::stmatrix_x4(at(threadIdx.x * 8), {0, 0, 0, 0}); }

void address_beyond_shared_memory(const Maps&) { ptx::shared_address(dynamic_shared() + shared_bytes); }

void barrier_in_divergent_code(const Maps&) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
}

void barrier_missed_by_some(const Maps&) {
  if (threadIdx.x < 64) ptx::barrier_sync(1, 128);
}

void barrier_of_half_warps(const Maps&) {
  if (threadIdx.x % 32 < 16) ptx::barrier_sync(1, 64);
}

void barrier_zero(const Maps&) { ptx::barrier_sync(0, 128); }

void shuffle_of_half_a_warp(const Maps&) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1, 1);
}

void shuffle_and_vote_in_one_warp(const Maps&) {
  if (threadIdx.x % 32 < 16)
    __shfl_xor_sync(0xffffffffu, 1, 1);
  else
    __ballot_sync(0xffffffffu, 1);
}

// Two operands of zeros, and what is to be done with them.
template <typename Do>
void with_wgmma(Do run) {
  fill(8192);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[columns / 2] = {};
  ptx::wgmma_fence();
  run(d);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

void wgmma_of_different_operands(const Maps&) {
  with_wgmma([](auto& d) { ptx::wgmma_bf16(d, descriptor(0), descriptor(threadIdx.x < 64 ? 0 : 32), true); });
}

void wgmma_accumulators_written(const Maps&) {
  with_wgmma([](auto& d) {
    ptx::wgmma_bf16(d, descriptor(0), descriptor(0), true);
    d[3] = 0;
  });
}

void wgmma_without_fence(const Maps&) {
  float d[columns / 2] = {};
  fill(8192);
  ptx::fence_proxy_async();
  __syncthreads();
  ptx::wgmma_bf16(d, descriptor(0), descriptor(0), true);
}

void wgmma_without_proxy_fence(const Maps&) {
  float d[columns / 2] = {};
  fill(8192);
  __syncthreads();
  ptx::wgmma_fence();
  ptx::wgmma_bf16(d, descriptor(0), descriptor(0), true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

void wgmma_operand_overwritten(const Maps&) {
  with_wgmma([](auto& d) {
    ptx::wgmma_bf16(d, descriptor(0), descriptor(0), true);
    store_shared(dynamic_shared() + 5 * 128 + 5 * 16, 1u);
  });
}

void wgmma_not_waited_for(const Maps&) {
  float d[columns / 2] = {};
  fill(8192);
  ptx::fence_proxy_async();
  __syncthreads();
  ptx::wgmma_fence();
  ptx::wgmma_bf16(d, descriptor(0), descriptor(0), true);
  ptx::wgmma_commit();
}

void wgmma_by_one_warp(const Maps&) {
  if (threadIdx.x < 32) with_wgmma([](auto& d) { ptx::wgmma_bf16(d, descriptor(0), descriptor(0), true); });
}

void wgmma_off_the_pattern(const Maps&) {
  with_wgmma([](auto& d) { ptx::wgmma_bf16(d, descriptor(128), descriptor(0), true); });
}

void wgmma_of_a_base_offset(const Maps&) {
  with_wgmma([](auto& d) { ptx::wgmma_bf16(d, descriptor(0) | uint64_t(1) << 49, descriptor(0), true); });
}

template <auto body>
void kernel(const Maps maps) {
  body(maps);
}

struct Entry {
  const char* name;
  int (*run)(const Maps& maps);
};
template <auto body>
int run(const Maps& maps) {
  return resnet_fast::launch<kernel<body>>(1, threads, shared_bytes, nullptr, maps);
}
#define ENTRY(name) {#name, run<name>}
const Entry entries[] = {
    ENTRY(mbarrier_without_init),
    ENTRY(mbarrier_initialised_twice),
    ENTRY(mbarrier_misaligned),
    ENTRY(mbarrier_overwritten),
    ENTRY(mbarrier_arrived_too_often),
    ENTRY(mbarrier_never_complete),
    ENTRY(mbarrier_of_too_many_bytes),
    ENTRY(tma_misaligned),
    ENTRY(tma_beyond_shared_memory),
    ENTRY(tma_without_init_fence),
    ENTRY(tma_of_more_bytes_than_expected),
    ENTRY(tma_of_fewer_bytes_than_expected),
    ENTRY(tma_of_another_rank),
    ENTRY(tma_without_map),
    ENTRY(tma_map_for_im2col),
    ENTRY(tma_im2col_outside_its_box),
    ENTRY(tma_load_over_pending_store),
    ENTRY(tma_store_without_fence),
    ENTRY(tma_store_not_waited_for),
    ENTRY(tma_store_overwritten),
    ENTRY(cp_async_overwritten),
    ENTRY(cp_async_not_waited_for),
    ENTRY(cp_async_misaligned),
    ENTRY(stmatrix_misaligned),
    ENTRY(address_beyond_shared_memory),
    ENTRY(barrier_in_divergent_code),
    ENTRY(barrier_missed_by_some),
    ENTRY(barrier_of_half_warps),
    ENTRY(barrier_zero),
    ENTRY(shuffle_of_half_a_warp),
    ENTRY(shuffle_and_vote_in_one_warp),
    ENTRY(wgmma_of_different_operands),
    ENTRY(wgmma_accumulators_written),
    ENTRY(wgmma_without_fence),
    ENTRY(wgmma_without_proxy_fence),
    ENTRY(wgmma_operand_overwritten),
    ENTRY(wgmma_not_waited_for),
    ENTRY(wgmma_by_one_warp),
    ENTRY(wgmma_off_the_pattern),
    ENTRY(wgmma_of_a_base_offset),
};

}  // namespace

extern "C" {
int misuse_count() { return int(sizeof(entries) / sizeof(*entries)); }
const char* misuse_name(int which) { return entries[which].name; }
int run_misuse(int which) {
  Maps maps;
  const cuuint64_t sizes[3] = {32, 64}, strides[1] = {128}, of_images[3] = {32, 8, 8}, by_images[2] = {128, 1024};
  const cuuint32_t box[2] = {32, 4}, steps[3] = {1, 1, 1};
  const int lower[1] = {0}, upper[1] = {-2};
  if (cuTensorMapEncodeTiled(&maps.tiled, CU_TENSOR_MAP_DATA_TYPE_UINT32, 2, global, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return -1;
  if (cuTensorMapEncodeIm2col(&maps.im2col, CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, global, of_images, by_images, lower,
                              upper, 32, 4, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                              CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return -1;
  return entries[which].run(maps);
}
}
