// Twins of TMA: tensor maps, copies of boxes and of im2col's pixels from and to global memory.
#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "emulated_ptx.h"
#include "hopper.h"

namespace emulator {
namespace {

constexpr uint64_t encoded = 0x70616d726f736e65;

struct TensorMap {
  uint64_t mark;
  char* base;
  uint64_t strides[4];  // bytes; that of the first dimension is an element
  uint32_t last[5];     // sizes less one
  uint16_t box[5];      // im2col: channels, pixels
  int16_t lower[3], upper[3];
  uint8_t steps[5];  // from element to element, by dimension
  uint8_t rank, element_bytes, swizzle, im2col;

  int64_t size(int d) const { return int64_t(last[d]) + 1; }
  int row_bytes() const { return box[0] * element_bytes; }
  int extent(int d) const { return (box[d] + steps[d] - 1) / steps[d]; }
  int rows() const {
    int product = 1;
    for (int d = 1; d < rank; ++d) product *= extent(d);
    return im2col ? box[1] : product;
  }
  int bytes() const { return rows() * row_bytes(); }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      return 0;
  }
}

int span_of(int swizzle) { return swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << swizzle; }

// What both kinds of maps have; `channels` is the inner size of the box.
CUresult encode(TensorMap& map, CUtensorMapDataType type, uint32_t rank, void* base, const uint64_t* sizes,
                const uint64_t* strides, uint32_t channels, const uint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_NOT_SUPPORTED;
  map = {};
  map.element_bytes = uint8_t(bytes_of(type));
  if (map.element_bytes == 0) return CUDA_ERROR_NOT_SUPPORTED;
  if (swizzle < CU_TENSOR_MAP_SWIZZLE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_NOT_SUPPORTED;
  if (channels == 0 || channels > 256 || channels * map.element_bytes % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (span_of(swizzle) != 0 && int(channels * map.element_bytes) > span_of(swizzle)) return CUDA_ERROR_INVALID_VALUE;
  for (uint32_t d = 0; d < rank; ++d) {
    if (sizes[d] == 0 || sizes[d] > uint64_t(1) << 32) return CUDA_ERROR_INVALID_VALUE;
    if (d > 0 && (steps[d] == 0 || steps[d] > 8)) return CUDA_ERROR_INVALID_VALUE;
    map.last[d] = uint32_t(sizes[d] - 1);
    map.steps[d] = uint8_t(d == 0 ? 1 : steps[d]);
  }
  for (uint32_t d = 0; d + 1 < rank; ++d) {
    if (strides[d] % 16 != 0 || strides[d] >= uint64_t(1) << 40) return CUDA_ERROR_INVALID_VALUE;
    map.strides[d] = strides[d];
  }
  map.mark = encoded;
  map.base = static_cast<char*>(base);
  map.rank = uint8_t(rank);
  map.swizzle = uint8_t(swizzle);
  map.box[0] = uint16_t(channels);
  return CUDA_SUCCESS;
}

TensorMap decode(const CUtensorMap* map, int n) {
  TensorMap out;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("a tensor map at a misaligned address");
  memcpy(&out, map, sizeof(out));
  if (out.mark != encoded) fail("TMA with a tensor map that nobody has encoded");
  if (n != 0 && n != out.rank) fail("TMA with %d coordinates and a tensor map of %d dimensions", n, out.rank);
  // What the hardware does with rows that do not fill the swizzle's span is not documented.
  if (n != 0 && out.swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && out.row_bytes() != span_of(out.swizzle))
    fail("TMA with rows of %d bytes and a swizzle of %d, which is not emulated", out.row_bytes(), span_of(out.swizzle));
  return out;
}

// Where 16 bytes of a box lie: of each row of the swizzle's span their number is XORed with the row's, both of which
// are bits of the address.
uint32_t swizzled(uint32_t address, int swizzle) {
  const uint32_t mask = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : span_of(swizzle) - 16;
  return address ^ (address >> 3 & mask);
}

struct Box {
  TensorMap map;
  int at[5];
  int offset[3];
  uint32_t shared;
};

// The k-th row's place in global memory, its channels from 0 on; null outside the tensor.
char* row_address(const TensorMap& map, const int64_t* at) {
  char* address = map.base;
  for (int d = 1; d < map.rank; ++d) {
    if (at[d] < 0 || at[d] >= map.size(d)) return nullptr;
    address += at[d] * int64_t(map.strides[d - 1]);
  }
  return address;
}

template <typename Function>
void for_rows_of_box(const Box& box, Function function) {
  const TensorMap& map = box.map;
  for (int row = 0; row < map.rows(); ++row) {
    int64_t at[5];
    for (int d = 1, rest = row; d < map.rank; rest /= map.extent(d), ++d)
      at[d] = box.at[d] + int64_t(rest % map.extent(d)) * map.steps[d];
    function(row, row_address(map, at));
  }
}

// From the first pixel on through the bounding box, whose corners are relative to the image's.
template <typename Function>
void for_rows_of_pixels(const Box& box, Function function) {
  const TensorMap& map = box.map;
  const int images = map.rank - 1;  // the dimension after those of a pixel
  int64_t pixel[5];
  for (int d = 1; d < map.rank; ++d) pixel[d] = box.at[d];
  for (int row = 0; row < map.rows(); ++row) {
    int64_t at[5];
    for (int d = 1; d < images; ++d) at[d] = pixel[d] + box.offset[d - 1];
    at[images] = pixel[images];
    function(row, row_address(map, at));
    int d = 1;
    for (; d < images; ++d) {
      pixel[d] += map.steps[d];
      if (pixel[d] < map.size(d) + map.upper[d - 1]) break;
      pixel[d] = map.lower[d - 1];
    }
    if (d == images) ++pixel[images];
  }
}

template <typename Function>
void for_rows(const Box& box, Function function) {
  if (box.map.im2col)
    for_rows_of_pixels(box, function);
  else
    for_rows_of_box(box, function);
}

// Of a row's bytes those that the tensor has, from the first channel on.
struct Range {
  int64_t begin, end;
};
Range inside(const Box& box) {
  const int64_t first = box.at[0], size = box.map.element_bytes;
  const int64_t begin = std::max<int64_t>(0, -first), end = std::min<int64_t>(box.map.box[0], box.map.size(0) - first);
  return {begin * size, std::max(begin, end) * size};
}

struct Unit {
  uint64_t words[2];
};

void land_load(const Box& box, uint32_t barrier, uint64_t phase) {
  const Range range = inside(box);
  const int64_t first = int64_t(box.at[0]) * box.map.element_bytes;
  const int row_bytes = box.map.row_bytes();
  for_rows(box, [&](int row, const char* global) {
    if (global != nullptr && range.begin < range.end) note_read(global + first + range.begin, range.end - range.begin);
    for (int byte = 0; byte < row_bytes; byte += 16) {
      Unit unit{};
      const int64_t begin = std::max<int64_t>(byte, range.begin), end = std::min<int64_t>(byte + 16, range.end);
      if (global != nullptr && begin < end)
        memcpy(reinterpret_cast<char*>(&unit) + (begin - byte), global + first + begin, end - begin);
      char* to = block.shared + swizzled(box.shared + row * row_bytes + byte, box.map.swizzle);
      memcpy(to, &unit, 16);
      memcpy(async_view(to), &unit, 16);
    }
  });
  note_write(block.shared + box.shared, box.map.bytes());
  end_writes(block.shared + box.shared, box.map.bytes());
  mbarrier_complete_tx(barrier, box.map.bytes(), phase);
}

void issue_load(const Box& box, uint32_t barrier) {
  Unseen unseen;
  char* to = shared_at(box.shared, box.map.bytes(), 128, "a TMA load");
  const uint64_t phase = mbarrier_phase_for_tma(barrier);
  begin_writes(to, box.map.bytes(), "a TMA load");
  poison(to, box.map.bytes());
  poison(async_view(to), box.map.bytes());
  launch_async([=] { land_load(box, barrier, phase); }, "a TMA load");
}

// A thread's stores since its last commit, or between two.
struct Group {
  int reading = 0, writing = 0;
  char have_read, have_written;  // objects for ThreadSanitizer
};
using Groups = std::deque<std::shared_ptr<Group>>;  // the last one is still open
Groups groups[1024];

Groups& mine() {
  Groups& of_thread = groups[current->linear];
  if (of_thread.empty()) of_thread.push_back(std::make_shared<Group>());
  return of_thread;
}

const bool registered = [] {
  at_block_start([] {
    for (Groups& of_thread : groups) of_thread.clear();
  });
  at_thread_exit([] {
    for (const auto& group : groups[current->linear])
      if (group->reading > 0) fail("the thread returns while its TMA stores have still to read shared memory");
  });
  return true;
}();

void land_write(const Box& box, const std::vector<char>& data, const std::shared_ptr<Group>& group) {
  const Range range = inside(box);
  const int64_t first = int64_t(box.at[0]) * box.map.element_bytes, bytes = range.end - range.begin;
  for_rows(box, [&](int row, char* global) {
    if (global == nullptr || bytes == 0) return;
    note_write(global + first + range.begin, bytes);
    memcpy(global + first + range.begin, data.data() + row * box.map.row_bytes() + range.begin, bytes);
  });
  note_release(&group->have_written);
  --group->writing;
  progress();
}

void land_read(const Box& box, const std::shared_ptr<Group>& group) {
  const char* from = block.shared + box.shared;
  const int bytes = box.map.bytes();
  check_fenced(from, bytes, "a TMA store");
  note_read(from, bytes);
  std::vector<char> data(bytes);
  for (int byte = 0; byte < bytes; byte += 16)
    memcpy(data.data() + byte, async_view(block.shared + swizzled(box.shared + byte, box.map.swizzle)), 16);
  end_reads(from, bytes);
  note_release(&group->have_read);
  --group->reading;
  progress();
  launch_async([=] { land_write(box, data, group); }, "a TMA store", true);
}

Box make_box(const CUtensorMap* map, uint32_t shared, int n, const int* at) {
  Box box{decode(map, n), {}, {}, shared};
  std::copy(at, at + n, box.at);
  return box;
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* tensorMap, CUtensorMapDataType tensorDataType,
                                           cuuint32_t tensorRank, void* globalAddress, const cuuint64_t* globalDim,
                                           const cuuint64_t* globalStrides, const cuuint32_t* boxDim,
                                           const cuuint32_t* elementStrides, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill oobFill) {
  if (tensorMap == nullptr || tensorRank == 0 || tensorRank > 5) return CUDA_ERROR_INVALID_VALUE;
  TensorMap map;
  const CUresult result = encode(map, tensorDataType, tensorRank, globalAddress, globalDim, globalStrides, boxDim[0],
                                 elementStrides, interleave, swizzle, oobFill);
  if (result != CUDA_SUCCESS) return result;
  for (uint32_t d = 1; d < tensorRank; ++d) {
    if (boxDim[d] == 0 || boxDim[d] > 256) return CUDA_ERROR_INVALID_VALUE;
    map.box[d] = uint16_t(boxDim[d]);
  }
  memcpy(tensorMap, &map, sizeof(map));
  return CUDA_SUCCESS;
}

extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap* tensorMap, CUtensorMapDataType tensorDataType,
                                            cuuint32_t tensorRank, void* globalAddress, const cuuint64_t* globalDim,
                                            const cuuint64_t* globalStrides, const int* pixelBoxLowerCorner,
                                            const int* pixelBoxUpperCorner, cuuint32_t channelsPerPixel,
                                            cuuint32_t pixelsPerColumn, const cuuint32_t* elementStrides,
                                            CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill oobFill) {
  if (tensorMap == nullptr || tensorRank < 3 || tensorRank > 5) return CUDA_ERROR_INVALID_VALUE;
  if (pixelsPerColumn == 0 || pixelsPerColumn > 1024) return CUDA_ERROR_INVALID_VALUE;
  TensorMap map;
  const CUresult result = encode(map, tensorDataType, tensorRank, globalAddress, globalDim, globalStrides,
                                 channelsPerPixel, elementStrides, interleave, swizzle, oobFill);
  if (result != CUDA_SUCCESS) return result;
  const int limit = tensorRank == 3 ? 32768 : tensorRank == 4 ? 128 : 16;
  for (uint32_t d = 0; d + 2 < tensorRank; ++d) {
    // The corners come in the order of the other arrays, x first. CUDA's header says {D, H, W}; CUTLASS passes x first.
    const int lower = pixelBoxLowerCorner[d], upper = pixelBoxUpperCorner[d];
    if (std::min(lower, upper) < -limit || std::max(lower, upper) >= limit) return CUDA_ERROR_INVALID_VALUE;
    if (map.size(d + 1) + upper - lower <= 0) return CUDA_ERROR_INVALID_VALUE;
    map.lower[d] = int16_t(lower), map.upper[d] = int16_t(upper);
  }
  map.box[1] = uint16_t(pixelsPerColumn);
  map.im2col = 1;
  memcpy(tensorMap, &map, sizeof(map));
  return CUDA_SUCCESS;
}

namespace resnet_fast::ptx {

void tma_prefetch_map(const CUtensorMap* map) { decode(map, 0); }

void tma_load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int n, const int* at) {
  const Box box = make_box(map, to, n, at);
  if (box.map.im2col) fail("a tiled TMA load with a tensor map for im2col");
  issue_load(box, barrier);
}

void tma_load_pixels(uint32_t to, const CUtensorMap* map, uint32_t barrier, int n, const int* at, const int* offset) {
  Box box = make_box(map, to, n, at);
  if (!box.map.im2col) fail("an im2col TMA load with a tiled tensor map");
  const int limit = n == 3 ? 65536 : n == 4 ? 256 : 32;
  for (int d = 0; d < n - 2; ++d) {
    const int first = at[d + 1];
    if (offset[d] < 0 || offset[d] >= limit) fail("an im2col TMA load with an offset of %d", offset[d]);
    if (first < box.map.lower[d] || first >= box.map.size(d + 1) + box.map.upper[d])
      fail("an im2col TMA load begins at %d, outside the bounding box of its tensor map", first);
    box.offset[d] = offset[d];
  }
  issue_load(box, barrier);
}

void tma_store_box(const CUtensorMap* map, uint32_t from, int n, const int* at) {
  Unseen unseen;
  const Box box = make_box(map, from, n, at);
  if (box.map.im2col) fail("a tiled TMA store with a tensor map for im2col");
  const char* shared = shared_at(from, box.map.bytes(), 128, "a TMA store");
  check_fenced(shared, box.map.bytes(), "a TMA store");
  begin_reads(shared, box.map.bytes(), "a TMA store");
  const auto group = mine().back();
  ++group->reading, ++group->writing;
  launch_async([=] { land_read(box, group); }, "a TMA store");
}

void tma_store_commit() {
  Unseen unseen;
  mine();
  groups[current->linear].push_back(std::make_shared<Group>());
}

void tma_store_wait_groups(int n, bool only_read) {
  Groups* of_thread;
  {
    Unseen unseen;
    of_thread = &mine();
  }
  const int closed = int(of_thread->size()) - 1 - n;
  for (int i = 0; i < closed; ++i) {
    Group& group = *(*of_thread)[i];
    wait_until([&] { return group.reading == 0 && (only_read || group.writing == 0); }, "TMA stores");
    note_acquire(only_read ? &group.have_read : &group.have_written);
  }
  Unseen unseen;
  for (int i = 0; i < closed && of_thread->front()->writing == 0; ++i) {
    note_acquire(&of_thread->front()->have_written);
    of_thread->pop_front();
  }
}

}  // namespace resnet_fast::ptx
