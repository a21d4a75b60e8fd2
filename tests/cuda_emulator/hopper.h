// What the twins of sm_90's instructions share: shared memory as the asynchronous proxy sees it, which is what TMA and
// wgmma work through, and barriers of transactions.
//
// Ordinary instructions ("the generic proxy") write to block.shared. TMA and wgmma read a second copy, which the
// former reach only by the writing thread's fence.proxy.async; a fence by another thread that has waited for the
// writer, which the memory model allows too, counts for nothing here. What the emulator sees written is what goes
// through store_shared, stmatrix and cp.async: bytes for TMA and wgmma must be written so, for plain C++ stores never
// reach the second copy. Not modelled: that TMA may overwrite bytes only after a fence if the generic proxy has written
// them.
#pragma once

#include "engine.h"

namespace emulator {

// `bytes` of shared memory from an address of ptx::shared_address; their alignment is that of `alignment`.
char* shared_at(uint32_t address, size_t bytes, size_t alignment, const char* what);

// The same place as the asynchronous proxy sees it.
char* async_view(const char* shared);

// What is still to be read or written asynchronously. Writing where something is still to be read or written, and
// reading where something is still to be written, are errors: the operation may happen any time until it is waited for.
void check_reads(const char* shared, size_t bytes, const char* what);
void check_writes(const char* shared, size_t bytes, const char* what);
void begin_reads(const char* shared, size_t bytes, const char* what);
void end_reads(const char* shared, size_t bytes);
void begin_writes(const char* shared, size_t bytes, const char* what);
void end_writes(const char* shared, size_t bytes);

// An error if a byte has been written without a fence.
void check_fenced(const char* shared, size_t bytes, const char* what);

// `bytes` arrive at the barrier by an operation that was issued in the barrier's phase `phase`.
uint64_t mbarrier_phase_for_tma(uint32_t barrier);
void mbarrier_complete_tx(uint32_t barrier, uint32_t bytes, uint64_t phase);

// wgmmas that could execute now do so by chance.
void wgmma_land_some();

}  // namespace emulator
