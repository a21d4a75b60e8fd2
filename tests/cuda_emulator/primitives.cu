// One small kernel for each instruction of csrc/cuda/ptx.cuh: it reads a buffer of any bits and writes another, so that
// a GPU and the emulator can be compared, and the emulator with a model of what the PTX ISA says (test_primitives.py).
//
// With nvcc those of sm_90a are there if PRIMITIVES_SM90 is defined.
#include <algorithm>
#include <type_traits>

#include "ptx.cuh"
#include "runtime.cuh"

#if !defined(__CUDACC__) || defined(PRIMITIVES_SM90)
#define HAS_SM90 1
#else
#define HAS_SM90 0
#endif

namespace {

namespace ptx = resnet_fast::ptx;
using resnet_fast::dynamic_shared;
using resnet_fast::load_shared;
using resnet_fast::store_shared;

struct Maps {
#if HAS_SM90
  CUtensorMap load, store;
#endif
};

// Every primitive is a struct like this one, with run() and the numbers that it changes.
struct Primitive {
  static constexpr int threads = 32, shared_bytes = 0;
  static bool make_maps(Maps&, void*, void*) { return true; }
};

template <typename P>
__global__ void __launch_bounds__(P::threads, 1)
    primitive_kernel(const __grid_constant__ Maps maps, const uint32_t* in, uint32_t* out) {
  P::run(maps, in, out);
}

template <typename P>
int launch_primitive(void* in, void* out) {
  Maps maps{};
  if (!P::make_maps(maps, in, out)) return -1;
  return resnet_fast::launch<primitive_kernel<P>>(1, P::threads, P::shared_bytes, nullptr, maps,
                                                  static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out));
}

// Words from and to shared memory, by all threads of the block.
__device__ void fill_shared(uint32_t at, const uint32_t* in, int words) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) store_shared(dynamic_shared() + at + i * 4, in[i]);
}
[[maybe_unused]] __device__ void dump_shared(uint32_t* out, uint32_t at, int words) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = load_shared<uint32_t>(dynamic_shared() + at + i * 4);
}

// --- sm_80 ---

struct Shuffles : Primitive {
  static constexpr int in_bytes = 128, out_bytes = 4 * 128;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    out[lane] = __shfl_sync(0xffffffffu, in[lane], lane * 7 + 3);
    out[32 + lane] = __shfl_xor_sync(0xffffffffu, in[lane], 5);
    out[64 + lane] = __shfl_down_sync(0xffffffffu, in[lane], 3);
    out[96 + lane] = __shfl_up_sync(0xffffffffu, in[lane], 2);
  }
};

struct Votes : Primitive {
  static constexpr int in_bytes = 128, out_bytes = 3 * 128;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    out[lane] = __ballot_sync(0xffffffffu, in[lane] & 1);
    out[32 + lane] = __any_sync(0xffffffffu, in[lane] % 64 == 0) != 0;
    out[64 + lane] = __all_sync(0xffffffffu, in[lane] % 64 != 0) != 0;
  }
};

// Three groups of copies, of which every fifth thread's are of zeros; a neighbour's are read back.
struct CpAsync : Primitive {
  static constexpr int threads = 64, groups = 3, shared_bytes = threads * groups * 16;
  static constexpr int in_bytes = shared_bytes, out_bytes = shared_bytes;
  static __device__ void read(uint32_t* out, int group) {
    const int from = group * threads + (threadIdx.x + 1) % threads;
    for (int i = 0; i < 4; ++i)
      out[(group * threads + threadIdx.x) * 4 + i] = load_shared<uint32_t>(dynamic_shared() + from * 16 + i * 4);
  }
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    for (int group = 0; group < groups; ++group) {
      const int i = group * threads + threadIdx.x;
      ptx::cp_async_16(ptx::shared_address(dynamic_shared() + i * 16), in + i * 4, threadIdx.x % 5 != 0);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<1>();
    __syncthreads();
    read(out, 0);
    read(out, 1);
    ptx::cp_async_wait<0>();
    __syncthreads();
    read(out, 2);
  }
};

template <bool transposed>
struct LdMatrix : Primitive {
  static constexpr int shared_bytes = 512, in_bytes = 512, out_bytes = 512;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    fill_shared(0, in, 128);
    __syncwarp();
    const uint32_t row = ptx::shared_address(dynamic_shared() + threadIdx.x * 5 % 32 * 16);
    uint32_t words[4];
    if constexpr (transposed)
      ptx::ldmatrix_x4_trans(words, row);
    else
      ptx::ldmatrix_x4(words, row);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = words[i];
  }
};

// a [32][4], b [32][2] and c [32][4] in the order of lanes.
enum class Type { bf16, fp16, tf32 };
template <Type type>
struct Mma : Primitive {
  static constexpr int in_bytes = 32 * 10 * 4, out_bytes = 32 * 4 * 4;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    const int lane = threadIdx.x;
    uint32_t a[4], b[2];
    float c[4];
    for (int i = 0; i < 4; ++i) a[i] = in[lane * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = in[128 + lane * 2 + i];
    for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(in[192 + lane * 4 + i]);
    if constexpr (type == Type::bf16) ptx::mma_bf16(c, a, b);
    if constexpr (type == Type::fp16) ptx::mma_fp16(c, a, b);
    if constexpr (type == Type::tf32) ptx::mma_tf32(c, a, b);
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = __float_as_uint(c[i]);
  }
};

struct RoundToTf32 : Primitive {
  static constexpr int in_bytes = 1024 * 4, out_bytes = 1024 * 4;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    for (int i = threadIdx.x; i < 1024; i += 32) out[i] = ptx::round_to_tf32(in[i]);
  }
};

// Two pairs of warps each exchange words at a barrier of their own.
struct BarrierSync : Primitive {
  static constexpr int threads = 128, in_bytes = 512, out_bytes = 512, shared_bytes = 512;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    const int thread = threadIdx.x;
    for (int round = 0; round < 3; ++round) {
      store_shared(dynamic_shared() + thread * 4, in[thread] + round);
      ptx::barrier_sync(1 + thread / 64, 64);
      const uint32_t word = load_shared<uint32_t>(dynamic_shared() + (thread ^ 37) * 4);
      ptx::barrier_sync(1 + thread / 64, 64);
      if (round == 2) out[thread] = word;
    }
  }
};

#if HAS_SM90

// --- sm_90: barriers of transactions, matrices ---

// A ring of two slots, from one warp to another.
struct MBarrier : Primitive {
  static constexpr int threads = 64, rounds = 6, in_bytes = rounds * 128, out_bytes = rounds * 128;
  static constexpr int shared_bytes = 2 * 128 + 4 * 8;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    const uint32_t full = ptx::shared_address(dynamic_shared() + 256), empty = full + 16;
    if (threadIdx.x == 0)
      for (int i = 0; i < 4; ++i) ptx::mbarrier_init(full + i * 8, 32);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int round = 0; round < rounds; ++round) {
      const int slot = round % 2;
      const uint32_t parity = round / 2 % 2;
      if (threadIdx.x < 32) {
        ptx::mbarrier_wait(empty + slot * 8, parity ^ 1);
        store_shared(dynamic_shared() + slot * 128 + lane * 4, in[round * 32 + lane]);
        ptx::mbarrier_arrive(full + slot * 8);
      } else {
        ptx::mbarrier_wait(full + slot * 8, parity);
        out[round * 32 + lane] = load_shared<uint32_t>(dynamic_shared() + slot * 128 + (31 - lane) * 4);
        ptx::mbarrier_arrive(empty + slot * 8);
      }
    }
  }
};

struct StMatrix : Primitive {
  static constexpr int shared_bytes = 512, in_bytes = 512, out_bytes = 512;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = in[threadIdx.x * 4 + i];
    ptx::stmatrix_x4(ptx::shared_address(dynamic_shared() + threadIdx.x * 5 % 32 * 16), words);
    __syncwarp();
    dump_shared(out, 0, 128);
  }
};

struct SetMaxNReg : Primitive {
  static constexpr int threads = 384, in_bytes = threads * 4, out_bytes = threads * 4;
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    if (threadIdx.x < 128)
      ptx::setmaxnreg_dec<40>();
    else
      ptx::setmaxnreg_inc<232>();
    out[threadIdx.x] = in[threadIdx.x];
  }
};

// --- sm_90: TMA, of a tensor that is smaller than the box reaches ---

constexpr int span_of(CUtensorMapSwizzle swizzle) { return swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 64 : 16 << swizzle; }
constexpr int sizes[5] = {72, 13, 4, 3, 2}, box[5] = {0, 11, 3, 2, 2}, first[5] = {0, -1, 2, -1, 1};
constexpr int product(const int (&of)[5], int rank, int begin = 0) {
  int out = 1;
  for (int d = begin; d < rank; ++d) out *= of[d];
  return out;
}

template <int rank, CUtensorMapSwizzle swizzle_, int element_bytes>
struct Tensor : Primitive {
  static constexpr CUtensorMapSwizzle swizzle = swizzle_;
  static constexpr int row_bytes = span_of(swizzle), row = row_bytes / element_bytes;
  static constexpr int tensor_bytes = product(sizes, rank) * element_bytes;
  // The box ends beyond the row, in the middle of 16 bytes.
  static constexpr int channel = sizes[0] - row / 2 - 4 / element_bytes;
  static constexpr int threads = 128;

  static constexpr CUtensorMapDataType type =
      element_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

  static bool encode(CUtensorMap* map, void* tensor) {
    cuuint64_t dims[5], strides[5];
    cuuint32_t of_box[5], steps[5] = {1, 1, 1, 1, 1};
    for (int d = 0; d < rank; ++d) {
      dims[d] = sizes[d], of_box[d] = d == 0 ? row : box[d];
      strides[d] = (d == 0 ? element_bytes : strides[d - 1]) * sizes[d];
    }
    return cuTensorMapEncodeTiled(map, type, rank, tensor, dims, strides, of_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }

  // One thread's load of `bytes` to shared memory at `to`, for which all wait. `issue` gets the barrier.
  template <typename Issue>
  static __device__ void load(uint32_t barrier, int bytes, Issue issue) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barrier, 1);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(barrier, bytes);
      issue();
    }
    ptx::mbarrier_wait(barrier, 0);
  }
};

// `shift`: of the box from a multiple of 1024 bytes, where swizzles begin anew.
template <int rank, CUtensorMapSwizzle swizzle, int shift = 0, int element_bytes = 2>
struct TmaLoad : Tensor<rank, swizzle, element_bytes> {
  using T = Tensor<rank, swizzle, element_bytes>;
  static constexpr int bytes = T::row_bytes * product(box, rank, 1), in_bytes = T::tensor_bytes, out_bytes = bytes;
  static constexpr int shared_bytes = (shift + bytes + 127) / 128 * 128 + 8;

  static bool make_maps(Maps& maps, void* in, void*) { return T::encode(&maps.load, in); }
  static __device__ void run(const Maps& maps, const uint32_t*, uint32_t* out) {
    const uint32_t base = ptx::shared_address(dynamic_shared()), to = base + shift, barrier = base + shared_bytes - 8;
    if (threadIdx.x == 0) ptx::tma_prefetch_map(&maps.load);
    T::load(barrier, bytes, [&] {
      if constexpr (rank == 1) ptx::tma_load(to, &maps.load, barrier, {T::channel});
      if constexpr (rank == 2) ptx::tma_load(to, &maps.load, barrier, {T::channel, first[1]});
      if constexpr (rank == 3) ptx::tma_load(to, &maps.load, barrier, {T::channel, first[1], first[2]});
      if constexpr (rank == 4) ptx::tma_load(to, &maps.load, barrier, {T::channel, first[1], first[2], first[3]});
      if constexpr (rank == 5)
        ptx::tma_load(to, &maps.load, barrier, {T::channel, first[1], first[2], first[3], first[4]});
    });
    dump_shared(out, shift, bytes / 4);
  }
};

template <int rank, CUtensorMapSwizzle swizzle>
struct TmaStore : Tensor<rank, swizzle, 2> {
  using T = Tensor<rank, swizzle, 2>;
  static constexpr int bytes = T::row_bytes * product(box, rank, 1), in_bytes = bytes, out_bytes = T::tensor_bytes;
  static constexpr int shared_bytes = bytes;

  static bool make_maps(Maps& maps, void*, void* out) { return T::encode(&maps.store, out); }
  static __device__ void run(const Maps& maps, const uint32_t* in, uint32_t*) {
    const uint32_t from = ptx::shared_address(dynamic_shared());
    fill_shared(0, in, bytes / 4);
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    if constexpr (rank == 1) ptx::tma_store(&maps.store, from, {T::channel});
    if constexpr (rank == 2) ptx::tma_store(&maps.store, from, {T::channel, first[1]});
    if constexpr (rank == 3) ptx::tma_store(&maps.store, from, {T::channel, first[1], first[2]});
    if constexpr (rank == 4) ptx::tma_store(&maps.store, from, {T::channel, first[1], first[2], first[3]});
    if constexpr (rank == 5) ptx::tma_store(&maps.store, from, {T::channel, first[1], first[2], first[3], first[4]});
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
    ptx::tma_store_wait<0>();
  }
};

// Every second column of a 3x3 (3, 3x3x3) filter with a border of 1, from some pixel on to beyond the last image. The
// last dimension of a tensor is that of the images.
template <int rank, CUtensorMapSwizzle swizzle, int shift = 0>
struct TmaIm2col : Tensor<rank, swizzle, 2> {
  using T = Tensor<rank, swizzle, 2>;
  static constexpr int pixels = rank == 3 ? 16 : rank == 4 ? 64 : 80, bytes = pixels * T::row_bytes;
  static constexpr int in_bytes = T::tensor_bytes, out_bytes = bytes, shared_bytes = shift + bytes + 8;

  static bool make_maps(Maps& maps, void* in, void*) {
    cuuint64_t dims[5], strides[5];
    cuuint32_t steps[5] = {1, 2, 1, 1, 1};
    const int lower[3] = {-1, -1, -1}, upper[3] = {-1, -1, -1};
    for (int d = 0; d < rank; ++d) {
      dims[d] = sizes[d];
      strides[d] = (d == 0 ? 2 : strides[d - 1]) * sizes[d];
    }
    return cuTensorMapEncodeIm2col(&maps.load, T::type, rank, in, dims, strides, lower, upper, T::row, pixels, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }
  static __device__ void run(const Maps& maps, const uint32_t*, uint32_t* out) {
    const uint32_t base = ptx::shared_address(dynamic_shared()), to = base + shift, barrier = base + shared_bytes - 8;
    T::load(barrier, bytes, [&] {
      if constexpr (rank == 3) ptx::tma_load_im2col(to, &maps.load, barrier, {T::channel, 1, 0}, {2});
      if constexpr (rank == 4) ptx::tma_load_im2col(to, &maps.load, barrier, {T::channel, 1, 0, 0}, {2, 1});
      if constexpr (rank == 5) ptx::tma_load_im2col(to, &maps.load, barrier, {T::channel, 1, 0, -1, 1}, {2, 1, 0});
    });
    dump_shared(out, shift, bytes / 4);
  }
};

// --- sm_90a: wgmma ---
//
// in: a [64] rows, or [128][4] registers, then b [n] rows, as they lie in shared memory, then d [128][n / 2] in the
// order of threads. Rows are as long as the swizzle's span (32 bytes without one) and all of them is multiplied.
template <Type type, int n, ptx::Swizzle swizzle = ptx::Swizzle::bytes_128, bool a_in_registers = false,
          bool accumulate = true, bool columns_apart = false>
struct Wgmma : Primitive {
  static constexpr int span = swizzle == ptx::Swizzle::none || a_in_registers ? 32 : 16 << (4 - int(swizzle));
  static constexpr int threads = 128, a_bytes = a_in_registers ? 128 * 16 : 64 * span, b_bytes = n * span;
  static constexpr int in_bytes = a_bytes + b_bytes + 64 * n * 4, out_bytes = 64 * n * 4;
  static constexpr int shared_bytes = (a_bytes + 1023) / 1024 * 1024 + b_bytes;
  // Without a swizzle the two halves of a row lie side by side, or all first halves before all second ones.
  static constexpr int stride = swizzle == ptx::Swizzle::none ? (columns_apart ? 128 : 256) : 8 * span;

  template <typename A>
  static __device__ void multiply(float (&d)[n / 2], const A& a, uint64_t b, bool add) {
    if constexpr (type == Type::bf16) ptx::wgmma_bf16(d, a, b, add);
    if constexpr (type == Type::fp16) ptx::wgmma_fp16(d, a, b, add);
    if constexpr (type == Type::tf32) ptx::wgmma_tf32(d, a, b, add);
  }
  static __device__ void run(const Maps&, const uint32_t* in, uint32_t* out) {
    const uint32_t a = ptx::shared_address(dynamic_shared()), b = a + shared_bytes - b_bytes;
    if (!a_in_registers) fill_shared(0, in, a_bytes / 4);
    fill_shared(shared_bytes - b_bytes, in + a_bytes / 4, b_bytes / 4);
    ptx::fence_proxy_async();
    __syncthreads();
    float d[n / 2];
    uint32_t registers[4];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) d[i] = __uint_as_float(in[(a_bytes + b_bytes) / 4 + threadIdx.x * (n / 2) + i]);
    for (int i = 0; i < 4; ++i) registers[i] = in[threadIdx.x * 4 + i];
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < span; k += 32) {
      const uint64_t of_b = ptx::wgmma_descriptor(b + k, columns_apart ? n * 16 : 128, stride, swizzle);
      if constexpr (a_in_registers) {
        multiply(d, registers, of_b, accumulate || k > 0);
      } else {
        const uint64_t of_a = ptx::wgmma_descriptor(a + k, columns_apart ? 64 * 16 : 128, stride, swizzle);
        multiply(d, of_a, of_b, accumulate || k > 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_ready(d);
#pragma unroll
    for (int i = 0; i < n / 2; ++i) out[threadIdx.x * (n / 2) + i] = __float_as_uint(d[i]);
  }
};

#endif  // HAS_SM90

struct Entry {
  const char* name;
  int in_bytes, out_bytes;
  int (*run)(void* in, void* out);
};
template <typename P>
constexpr Entry entry(const char* name) {
  return {name, P::in_bytes, P::out_bytes, launch_primitive<P>};
}

#if HAS_SM90
constexpr auto none = CU_TENSOR_MAP_SWIZZLE_NONE, by_32 = CU_TENSOR_MAP_SWIZZLE_32B, by_64 = CU_TENSOR_MAP_SWIZZLE_64B,
               by_128 = CU_TENSOR_MAP_SWIZZLE_128B;
constexpr auto bf16 = Type::bf16, fp16 = Type::fp16, tf32 = Type::tf32;
constexpr auto plain = ptx::Swizzle::none, of_32 = ptx::Swizzle::bytes_32, of_64 = ptx::Swizzle::bytes_64,
               of_128 = ptx::Swizzle::bytes_128;
#define WGMMAS(n)                                                                                               \
  entry<Wgmma<bf16, n>>("wgmma bf16 " #n " 128 shared"), entry<Wgmma<fp16, n>>("wgmma fp16 " #n " 128 shared"), \
      entry<Wgmma<tf32, n>>("wgmma tf32 " #n " 128 shared"),                                                    \
      entry<Wgmma<bf16, n, of_32, true>>("wgmma bf16 " #n " 32 registers"),                                     \
      entry<Wgmma<fp16, n, of_32, true>>("wgmma fp16 " #n " 32 registers"),                                     \
      entry<Wgmma<tf32, n, of_32, true>>("wgmma tf32 " #n " 32 registers")
#endif

// The names say what test_primitives.py needs to know.
const Entry entries[] = {
    entry<Shuffles>("shuffles"),
    entry<Votes>("votes"),
    entry<CpAsync>("cp_async"),
    entry<LdMatrix<false>>("ldmatrix"),
    entry<LdMatrix<true>>("ldmatrix_trans"),
    entry<Mma<Type::bf16>>("mma bf16"),
    entry<Mma<Type::fp16>>("mma fp16"),
    entry<Mma<Type::tf32>>("mma tf32"),
    entry<RoundToTf32>("round_to_tf32"),
    entry<BarrierSync>("barrier_sync"),
#if HAS_SM90
    entry<MBarrier>("mbarrier"),
    entry<StMatrix>("stmatrix"),
    entry<SetMaxNReg>("setmaxnreg"),
    // rank, bytes of the swizzle, shift, bytes of an element
    entry<TmaLoad<1, none>>("tma_load 1 0 0 2"),
    entry<TmaLoad<2, none>>("tma_load 2 0 0 2"),
    entry<TmaLoad<2, by_32>>("tma_load 2 32 0 2"),
    entry<TmaLoad<2, by_64>>("tma_load 2 64 0 2"),
    entry<TmaLoad<2, by_128>>("tma_load 2 128 0 2"),
    entry<TmaLoad<2, by_128, 384>>("tma_load 2 128 384 2"),
    entry<TmaLoad<2, by_128, 0, 4>>("tma_load 2 128 0 4"),
    entry<TmaLoad<3, by_128, 640>>("tma_load 3 128 640 2"),
    entry<TmaLoad<4, by_64, 128>>("tma_load 4 64 128 2"),
    entry<TmaLoad<5, by_32, 128>>("tma_load 5 32 128 2"),
    entry<TmaLoad<5, none>>("tma_load 5 0 0 2"),
    // rank, bytes of the swizzle
    entry<TmaStore<1, none>>("tma_store 1 0"),
    entry<TmaStore<2, by_128>>("tma_store 2 128"),
    entry<TmaStore<3, by_64>>("tma_store 3 64"),
    entry<TmaStore<4, by_32>>("tma_store 4 32"),
    entry<TmaStore<5, by_128>>("tma_store 5 128"),
    // rank, bytes of the swizzle, shift
    entry<TmaIm2col<3, by_128>>("tma_im2col 3 128 0"),
    entry<TmaIm2col<4, by_128>>("tma_im2col 4 128 0"),
    entry<TmaIm2col<4, by_64, 384>>("tma_im2col 4 64 384"),
    entry<TmaIm2col<4, none>>("tma_im2col 4 0 0"),
    entry<TmaIm2col<5, by_128>>("tma_im2col 5 128 0"),
    // type, n, bytes of the swizzle, a in shared memory or registers
    WGMMAS(8),
    WGMMAS(16),
    WGMMAS(32),
    WGMMAS(64),
    WGMMAS(96),
    WGMMAS(128),
    WGMMAS(192),
    WGMMAS(256),
    entry<Wgmma<bf16, 64, of_64>>("wgmma bf16 64 64 shared"),
    entry<Wgmma<fp16, 64, of_32>>("wgmma fp16 64 32 shared"),
    entry<Wgmma<tf32, 64, of_64>>("wgmma tf32 64 64 shared"),
    entry<Wgmma<bf16, 64, plain>>("wgmma bf16 64 0 shared"),
    entry<Wgmma<bf16, 64, plain, false, true, true>>("wgmma bf16 64 0 shared columns_apart"),
    entry<Wgmma<bf16, 64, of_128, false, false>>("wgmma bf16 64 128 shared overwrite"),
#endif
};

}  // namespace

extern "C" {
int primitive_count() { return int(sizeof(entries) / sizeof(*entries)); }
const char* primitive_name(int which) { return entries[which].name; }
int primitive_in_bytes(int which) { return entries[which].in_bytes; }
int primitive_out_bytes(int which) { return entries[which].out_bytes; }
// 0, a cudaError_t, or -1 if a tensor map could not be made. `in` and `out` are 16-byte aligned.
int run_primitive(int which, void* in, void* out) { return entries[which].run(in, out); }
}
