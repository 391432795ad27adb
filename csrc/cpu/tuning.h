// The numbers that the CPU backend decides by: facts of the machine, and thresholds with the measurement behind each.
// <cstdint> only.
#pragma once
#include <cstdint>

namespace bnfused::cpu {

// ---- facts of the machine

// Values in the widest vector of any instruction set. Arrays of coefficients are padded by as much.
constexpr int64_t kMaxLanes = 16;
// Bytes of a cache line. Streaming stores want every run to start on one, and no vector should straddle two.
constexpr int64_t kLineBytes = 64;
// The second cache of a core, about. What one thread takes at a time is read from memory once where it fits here.
constexpr int64_t kCacheBytes = 1024 * 1024;

// ---- work for the threads

// Fewer values than this are done on one thread: waking a second one costs as much as they do.
constexpr int64_t kSerialValues = 32768;
// One thread folds the statistics of this many channels into coefficients before a second one is woken. A channel costs
// a square root and two divisions.
constexpr int64_t kChannelGrain = 512;
// The numbers of this many channels are computed in one go, so that the compiler does it in vectors. Where a channel
// has few values, its square root and its divisions take longer than its values.
constexpr int kChannelsAtOnce = 32;

// ---- blocks of sums

// Values of one channel that are summed around one shift, and stay in L2 for a second look. Each block waits for the
// mean of the blocks before it (28 x 28 planes, batch 8, forward: blocks of 4096 take 9 % longer in all).
constexpr int64_t kBlockValues = 32768;
// Rows that are summed around one shift, and stay in L1. The leaves read such a block from two, four or eight places
// (kPlaces in leaves_sums.h). 131 is a prime: for the usual widths these places are then no multiple of 4 KiB apart,
// and do not fall into the same sets of L1.
constexpr int64_t kBlockRows = 4 * 131;

// ---- stores, and what is fetched ahead

// Outputs of at least this size bypass the caches. Measured with a producer before and a consumer after: at 12 MB
// bypassing wins 1.2 to 1.7 times on a Zen 5 core and is even on Sapphire Rapids; at 6.4 MB it is even on Zen 5, where
// the forward by itself (bfloat16, channels_last, add and ReLU) takes half the time; at 3 MB the consumer finds y in
// the last-level cache, and bypassing only moves the cost.
constexpr int64_t kStreamFromBytes = 6 * 1024 * 1024;
// Rows that are streamed: x is fetched this far ahead of the stores (25 MB, 1 KiB rows: 0.82 instead of 0.87 ms).
constexpr int64_t kStreamAheadBytes = 16384;
// A channel up to this size is fetched while the channel before it is written. A larger one would push out what is
// still needed.
constexpr int64_t kPrefetchUpToBytes = 512 * 1024;
// Where planes are short, a prefetch goes at least this far, to arrive in time (7 x 7 planes: the backward of 32 x 512
// channels takes 0.31 instead of 0.41 ms).
constexpr int64_t kPrefetchAheadBytes = 1024;

// ---- short planes

// Planes of up to this many values cost more at their ends than between them (batch 8, forward: in groups, 7 x 7 is 1.7
// to 2 times as fast, 10 x 10 1.2 to 1.5 times, 14 x 14 as fast as without).
constexpr int64_t kShortPlane = 128;
// Fewer channels than this are too few for the threads once they are grouped.
constexpr int64_t kGroupedChannels = 64;
// Columns of a group, at most: their coefficients share L1 with the values that are read.
constexpr int64_t kGroupColumns = 1600;

// ---- rows

// Fewer channels than this are taken several rows at a time. The sums of several rows still fit L1 then.
constexpr int64_t kFewChannels = 256;
// Columns that such rows have at least: four vectors of AVX-512, whose sums registers can hold.
constexpr int64_t kColumns = 64;
// The same in the last pass of the backward, so that a row is worth its loop (C = 64: 46 instead of 34 GB/s).
constexpr int64_t kGradApplyColumns = 256;
// The rows of a tensor of at least this size come from memory, those of a smaller one mostly from the last-level cache.
constexpr int64_t kMemoryFromBytes = 8 * 1024 * 1024;
// Rows are written back to front in pieces of this many bytes, so that the rows that the first pass read last are still
// in the cache. At each start of a piece the hardware's prefetch has to find its stride again (26 MB, 1 KiB rows: 33
// GB/s with 64 KiB, 43 with 256, 47 with 1024).
constexpr int64_t kPieceBytes = 1024 * 1024;
// Coefficients of more bytes than this leave L1 between one row and the next. Streamed rows, which go one by one, are
// then written a strip of columns at a time. Measured (Zen 5, one thread, 6 to 32 MB): no gain at 24 to 40 KiB; from 48
// KiB on most often 1.2 times, from 1.0 (float32 in 16 MB and more, backward or with a residual) to 1.8 times
// (bfloat16, eval with residual and ReLU).
constexpr int64_t kCoefficientBytes = 40 * 1024;
constexpr int64_t kStripBytes = 4096;

}  // namespace bnfused::cpu
