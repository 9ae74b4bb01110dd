// Sparse convolution as a gather. A block owns a tile of target pixels and some rows (target channels), a few of them a
// warp. A warp reads 32 non-zeros, a lane each, turns their columns into offsets in shared memory, hands them round,
// and every lane adds value * source for its own kSlots pixels, whose sums stay in registers until the last channel.
// With taps, the block first copies the tile's source, zeros around it included, into shared memory, so that all slots
// of a lane are a fixed distance apart (tile.h) and no tap needs a test; 1 x 1 reads the source itself, through L1.
// Bound by those reads: a word a lane for each multiply-add, 32 of them a cycle and multiprocessor. The gradient of the
// values turns that round: the tile of grad_target lies in registers, and a sum per non-zero is reduced across the
// warp, eight at a time, into partial sums that a second kernel adds in a fixed order.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "launch.h"
#include "tile.h"

namespace sparsekit::cuda {
namespace {

constexpr int kThreads = kLanes * kWarps, kMostRows = 16;
constexpr int kBlocks = 3;  // that a multiprocessor runs at once
constexpr unsigned kAll = 0xffffffffu;

// Whether the sums of a lane fit its registers.
constexpr bool fits(int slots, int rows) { return slots * rows <= 32; }

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(Half v) { return __half2float(v); }
__device__ inline float to_float(BFloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline Half from_float<Half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// A non-zero: where the first slot's source is in shared memory, in floats, and its value.
struct alignas(8) Entry {
  int32_t offset;
  float value;
};

// Two non-zeros, which a warp reads at once.
struct alignas(16) Entries {
  Entry v[2];
};

// A tile within the walk: its first image, row and column, or its first pixel of all where there are no taps.
struct Corner {
  int32_t image, row, col;
  int64_t pixel;
};

__device__ inline Corner corner_of(const Tile& t, int64_t tile, int slots) {
  if (!t.has_taps) return {0, 0, 0, tile * slots};
  const int32_t row_of_tiles = static_cast<int32_t>(tile / t.tiles_x);
  return {row_of_tiles / t.tiles_y * t.images, row_of_tiles % t.tiles_y * t.rows,
          static_cast<int32_t>(tile % t.tiles_x) * t.cols, 0};
}

// Where element e of a channel's planes comes from in the source's first channel; negative is a zero.
template <bool kTaps>
__device__ int32_t source_of(const Walk& w, const Tile& t, const Corner& at, int32_t e) {
  if constexpr (kTaps) {
    const int32_t residue = e / t.plane, place = e % t.plane;
    const int32_t image = min(place / t.image_pitch, t.images - 1), rest = place - image * t.image_pitch;
    const int32_t y = (at.row + rest / t.pitch + t.low_y) * w.step_y + t.residue_y[residue];
    const int32_t x = (at.col + rest % t.pitch + t.low_x) * w.step_x + t.residue_x[residue];
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(w.source_h) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(w.source_w) && at.image + image < w.batch;
    return inside ? static_cast<int32_t>((at.image + image) * w.source_image) + y * w.source_w + x : -1;
  } else {
    const int64_t pixel = at.pixel + e, plane = static_cast<int64_t>(w.rows) * w.cols;
    const int32_t image = static_cast<int32_t>(pixel / plane), rest = static_cast<int32_t>(pixel % plane);
    if (image >= w.batch) return -1;
    const int32_t y = rest / w.cols * w.step_y + w.dy[0], x = rest % w.cols * w.step_x + w.dx[0];
    return static_cast<int32_t>(image * w.source_image) + y * w.source_w + x;
  }
}

// Where slot s goes in the target's first channel; negative is nowhere.
template <bool kTaps>
__device__ int32_t target_of(const Walk& w, const Tile& t, const Corner& at, int32_t s) {
  int32_t image, j, i;
  if constexpr (kTaps) {
    image = at.image + s / t.image_pitch;
    const int32_t rest = s % t.image_pitch, row = rest / t.pitch, col = rest % t.pitch;
    j = at.row + row, i = at.col + col;
    if (s / t.image_pitch >= t.images || row >= t.rows || col >= t.cols || image >= w.batch || j >= w.rows ||
        i >= w.cols)
      return -1;
  } else {
    const int64_t pixel = at.pixel + s, plane = static_cast<int64_t>(w.rows) * w.cols;
    image = static_cast<int32_t>(pixel / plane);
    j = static_cast<int32_t>(pixel % plane) / w.cols, i = static_cast<int32_t>(pixel % plane) % w.cols;
    if (image >= w.batch) return -1;
  }
  return static_cast<int32_t>(image * w.target_image) + w.target_offset + j * w.target_row + i * w.target_col;
}

// Copies `channels` channels of the tile's source from `first` on, a warp a channel, and zeros behind them, where the
// slots of the last channel may still reach. `from` is source_of every element. The whole block does. Loads are issued
// kAhead x kAtOnce at a time, before the first store: a compiler may not move them across stores by itself.
template <class T>
__device__ void stage(const Tile& t, const int32_t* from, const T* source, int32_t plane, int32_t first,
                      int32_t channels, int32_t reach, float* staged) {
  constexpr int kAtOnce = 4, kAhead = 2;
  const int32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  source += static_cast<int64_t>(first) * plane;
  for (int32_t begin = lane; begin < t.elements; begin += kAtOnce * kLanes) {
    int32_t at[kAtOnce];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) at[b] = begin + b * kLanes < t.elements ? from[begin + b * kLanes] : -1;
    for (int32_t c = warp; c < channels; c += kAhead * kWarps) {
      float value[kAhead][kAtOnce];
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b)
          value[a][b] =
              at[b] < 0 || c + a * kWarps >= channels ? 0.0f : to_float(source[at[b] + (c + a * kWarps) * plane]);
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b)
          if (c + a * kWarps < channels && begin + b * kLanes < t.elements)
            staged[(c + a * kWarps) * t.elements + begin + b * kLanes] = value[a][b];
    }
  }
  for (int32_t e = threadIdx.x; e < reach; e += kThreads) staged[channels * t.elements + e] = 0.0f;
}

// Shared memory: where the tile's elements come from, then what is staged.
__device__ inline void find_sources(const Walk& w, const Tile& t, const Corner& at, int32_t* from) {
  for (int32_t e = threadIdx.x; e < t.elements; e += kThreads) from[e] = source_of<true>(w, t, at, e);
}

// A non-zero as it lies in memory, a lane each; loaded ahead of its use.
struct Fetched {
  int32_t col;
  float value;
};

// Non-zeros j to j + 31 of a row that ends at `end`; columns of what is behind it are the largest there is.
template <class T, bool kValues>
__device__ inline Fetched fetch(const Weight& weight, int32_t j, int32_t end) {
  j += threadIdx.x % kLanes;
  if (j >= end) return {0x7fffffff, 0.0f};
  Fetched f{weight.col[j], 0.0f};
  if constexpr (kValues)
    f.value = to_float(static_cast<const T*>(weight.values)[weight.permutation ? weight.permutation[j] : j]);
  return f;
}

// Those of the warp's non-zeros whose columns are in [base, limit) as entries, less those whose tap is of another
// class. `read` counts the former, the result the latter.
template <bool kTaps>
__device__ int translate(const Walk& w, const Tile& t, uint32_t magic, const Fetched& f, int32_t base, int32_t limit,
                         Entry* entries, int& read) {
  const int lane = threadIdx.x % kLanes;
  bool used = f.col < limit;
  read = __popc(__ballot_sync(kAll, used));
  const int32_t local = used ? f.col - base : 0;
  Entry e{0, f.value};
  unsigned all = 0;
  if constexpr (kTaps) {
    const int32_t channel = w.taps == 1 ? local : static_cast<int32_t>(__umulhi(local, magic));
    const int32_t tap = local - channel * w.taps;
    used = used && (w.used >> tap & 1);
    e.offset = channel * t.elements + t.offsets[tap];
    all = __ballot_sync(kAll, used);
  } else {
    e.offset = local * (w.source_h * w.source_w);
  }
  __syncwarp();  // the entries of before have been read
  if (used) entries[kTaps ? __popc(all & ((1u << lane) - 1)) : lane] = e;
  __syncwarp();
  return kTaps ? __popc(all) : read;
}

// A block's share of the rows, which never crosses the end of a group.
struct Rows {
  int32_t first, end, channel;  // of the warp; first source channel of the group
};

__device__ inline Rows rows_of(const Walk& w, int32_t block, int32_t rows_of_warp) {
  const int32_t of_group = (w.group_rows + rows_of_warp * kWarps - 1) / (rows_of_warp * kWarps);
  const int32_t group = block / of_group, end = (group + 1) * w.group_rows;
  const int32_t first =
      group * w.group_rows + (block % of_group * kWarps + static_cast<int32_t>(threadIdx.x) / kLanes) * rows_of_warp;
  return {min(first, end), min(first + rows_of_warp, end), group * w.group_channels};
}

// What the lanes' slots read: of what is staged where there are taps, else of the source itself, where rows of a block
// find in L1 what others read, and what none of them needs is never read.
template <class T, int kSlots, bool kTaps>
struct Slots {
  const T* source;
  const float* staged;
  int32_t base[kTaps ? 1 : kSlots];

  __device__ Slots(const Walk& w, const Tile& t, const Corner& at, const T* source, const float* staged, int lane)
      : source(source), staged(staged + lane) {
    if constexpr (!kTaps) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) base[s] = max(source_of<kTaps>(w, t, at, s * kLanes + lane), 0);
    }
  }

  __device__ float read(int32_t offset, int s) const {
    if constexpr (kTaps)
      return staged[offset + s * kLanes];
    else
      return to_float(source[base[s] + offset]);
  }
};

template <class T, int kSlots, int kRows, bool kTaps>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(const Walk w, const Tile t, const Weight weight, const T* __restrict__ source,
                  const T* __restrict__ bias, const T* __restrict__ residual, bool relu, T* __restrict__ target,
                  int32_t chunk, uint32_t magic, int32_t row_blocks) {
  __shared__ Entries shared[kWarps][kLanes / 2];
  int32_t* const from = reinterpret_cast<int32_t*>(shared_floats());
  float* const staged = shared_floats() + t.elements;
  const int lane = threadIdx.x % kLanes;
  Entries* const pairs = shared[threadIdx.x / kLanes];
  Entry* const entries = pairs->v;
  // Blocks that run at the same time share their tile, so that its pixels are read from memory once.
  const Corner at = corner_of(t, blockIdx.x / row_blocks, kSlots * kLanes);
  const Rows rows = rows_of(w, blockIdx.x % row_blocks, kRows);
  if constexpr (kTaps) find_sources(w, t, at, from);
  const Slots<T, kSlots, kTaps> slots(w, t, at, source + static_cast<int64_t>(rows.channel) * w.source_h * w.source_w,
                                      staged, lane);
  float sum[kRows][kSlots];
  // Lane r holds where row r is, and where it ends.
  const bool holds = lane < kRows && rows.first + lane < rows.end;
  int32_t held_next = holds ? weight.crow[rows.first + lane] : 0;
  const int32_t held_end = holds ? weight.crow[rows.first + lane + 1] : 0;
  const auto fetch_row = [&](int r) {
    return fetch<T, true>(weight, __shfl_sync(kAll, held_next, r), __shfl_sync(kAll, held_end, r));
  };
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int s = 0; s < kSlots; ++s) sum[r][s] = 0.0f;
  const int32_t channels = w.used ? w.group_channels : 0;
  for (int32_t first = 0; first < channels; first += chunk) {
    const int32_t count = min(chunk, channels - first), base = first * w.taps, limit = (first + count) * w.taps;
    Fetched ahead = fetch_row(0);
    if constexpr (kTaps) {
      __syncthreads();  // what is staged has been read, and the sources are found
      stage(t, from, source, w.source_h * w.source_w, rows.channel + first, count, kSlots * kLanes, staged);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int read = kLanes;
      while (read == kLanes) {
        const int found = translate<kTaps>(w, t, magic, ahead, base, limit, entries, read);
        if (lane == r) held_next += read;
        if (read == kLanes)
          ahead = fetch_row(r);
        else if (r + 1 < kRows)
          ahead = fetch_row(r + 1);
        int k = 0;
        for (; k + 1 < found; k += 2) {
          const Entries e = pairs[k / 2];
          float x[2][kSlots];
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int s = 0; s < kSlots; ++s) x[i][s] = slots.read(e.v[i].offset, s);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int s = 0; s < kSlots; ++s) sum[r][s] = fmaf(e.v[i].value, x[i][s], sum[r][s]);
        }
        if (k < found) {
          const Entry e = entries[k];
#pragma unroll
          for (int s = 0; s < kSlots; ++s) sum[r][s] = fmaf(e.value, slots.read(e.offset, s), sum[r][s]);
        }
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int32_t to = target_of<kTaps>(w, t, at, s * kLanes + lane);
    if (to < 0) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = rows.first + r;
      if (row >= rows.end) continue;
      const int64_t place = to + row * w.target_plane;
      float v = sum[r][s] + (bias ? to_float(bias[row]) : 0.0f);
      if (residual) v += to_float(residual[place]);
      if (relu) v = v < 0.0f ? 0.0f : v;  // keeps NaN
      target[place] = from_float<T>(v);
    }
  }
}

// Sums eight numbers across the warp at once: lane l returns the sum of sum[l / 4 % 8].
__device__ inline float reduce_eight(float (&sum)[8], int lane) {
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float keep = upper ? sum[k + half] : sum[k], give = upper ? sum[k] : sum[k + half];
      sum[k] = keep + __shfl_xor_sync(kAll, give, 4 * half);
    }
  }
  float all = sum[0];
  all += __shfl_xor_sync(kAll, all, 2);
  all += __shfl_xor_sync(kAll, all, 1);
  return all;
}

template <class T, int kSlots, bool kTaps>
__global__ void __launch_bounds__(kThreads, 2)
    values_grad_kernel(const Walk w, const Tile t, const Weight weight, const T* __restrict__ grad_target,
                       const T* __restrict__ source, float* workspace, int32_t chunk, uint32_t magic, int64_t tiles,
                       int32_t splits, int32_t row_blocks, int32_t rows_of_warp) {
  __shared__ Entries shared[kWarps][kLanes / 2];
  __shared__ int32_t shared_next[kWarps][kMostRows];
  int32_t* const from = reinterpret_cast<int32_t*>(shared_floats());
  float* const staged = shared_floats() + t.elements;
  const int lane = threadIdx.x % kLanes;
  Entry* const entries = shared[threadIdx.x / kLanes]->v;
  int32_t* const next = shared_next[threadIdx.x / kLanes];
  const int64_t split = blockIdx.x / row_blocks;
  const Rows rows = rows_of(w, blockIdx.x % row_blocks, rows_of_warp);
  float* const partial = workspace + split * weight.nnz;
  for (int64_t tile = split; tile < tiles; tile += splits) {
    const Corner at = corner_of(t, tile, kSlots * kLanes);
    int32_t to[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) to[s] = target_of<kTaps>(w, t, at, s * kLanes + lane);
    const Slots<T, kSlots, kTaps> slots(w, t, at, source + static_cast<int64_t>(rows.channel) * w.source_h * w.source_w,
                                        staged, lane);
    __syncwarp();
    if (rows.first + lane < rows.end) next[lane] = weight.crow[rows.first + lane];
    __syncwarp();
    for (int32_t first = 0; first < w.group_channels; first += chunk) {
      const int32_t count = min(chunk, w.group_channels - first), base = first * w.taps;
      const int32_t limit = (first + count) * w.taps;
      if constexpr (kTaps) {
        __syncthreads();  // what is staged has been read
        if (first == 0) {
          find_sources(w, t, at, from);
          __syncthreads();
        }
        stage(t, from, source, w.source_h * w.source_w, rows.channel + first, count, kSlots * kLanes, staged);
        __syncthreads();
      }
      if (rows.first >= rows.end) continue;
      float grad[kSlots], grad_ahead[kSlots];
      const auto fetch_grad = [&](int32_t row) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
          grad_ahead[s] = to[s] < 0 ? 0.0f : to_float(grad_target[to[s] + row * w.target_plane]);
      };
      fetch_grad(rows.first);
      Fetched ahead = fetch<T, false>(weight, next[0], weight.crow[rows.first + 1]);
      for (int32_t row = rows.first; row < rows.end; ++row) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) grad[s] = grad_ahead[s];
        if (row + 1 < rows.end) fetch_grad(row + 1);
        int32_t j = next[row - rows.first];
        int read = kLanes;
        while (read == kLanes) {
          translate<kTaps>(w, t, magic, ahead, base, limit, entries, read);
          if (read == kLanes)
            ahead = fetch<T, false>(weight, j + read, weight.crow[row + 1]);
          else if (row + 1 < rows.end)
            ahead = fetch<T, false>(weight, next[row + 1 - rows.first], weight.crow[row + 2]);
          for (int k = 0; k < read; k += 8) {
            float part[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              part[i] = 0.0f;
              if (k + i < read) {
                const int32_t offset = entries[k + i].offset;
#pragma unroll
                for (int s = 0; s < kSlots; ++s) part[i] = fmaf(grad[s], slots.read(offset, s), part[i]);
              }
            }
            const float all = reduce_eight(part, lane);
            if (lane % 4 == 0 && k + lane / 4 < read) {
              float* const place = partial + j + k + lane / 4;
              *place = tile == split ? all : *place + all;
            }
          }
          j += read;
        }
        if (lane == 0) next[row - rows.first] = j;
      }
    }
  }
}

template <class T>
__global__ void add_partials_kernel(const float* __restrict__ workspace, int splits, int64_t nnz,
                                    T* __restrict__ grad) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= nnz) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += workspace[s * nnz + j];
  grad[j] = from_float<T>(sum);
}

template <class T, bool kCompress>
__global__ void compress_kernel(const Weight weight, const DenseWeight at, T* dense, T* values) {
  const int32_t row = blockIdx.x;
  for (int32_t j = weight.crow[row] + threadIdx.x; j < weight.crow[row + 1]; j += blockDim.x) {
    const int32_t c = weight.col[j], kx = c % at.kernel_w, ky = c / at.kernel_w % at.kernel_h;
    const int32_t channel = c / at.kernel_w / at.kernel_h;
    T* const entry = dense + row * at.row + channel * at.channel + ky * at.ky + kx * at.kx;
    if constexpr (kCompress)
      values[j] = *entry;
    else
      *entry = values[j];
  }
}

// --- the choice of a kernel ------------------------------------------------------------------------------------------

// A tile of 32 * slots slots, the rows of a warp, and the channels whose source fits shared memory beside that of
// the other blocks.
struct Plan {
  Tile tile;
  int slots, rows;
  int32_t chunk, bytes;
  uint32_t magic;
  int64_t row_blocks;
};

// Static shared memory, and what the device keeps of every block's.
constexpr int kOtherBytes = kWarps * (kLanes * static_cast<int>(sizeof(Entry)) + kMostRows * 4) + 1024;

Plan plan_of(const Walk& w, const Weight& weight, int slots, int rows, const Device& device) {
  Plan plan{tile_of(w, slots * kLanes), slots, rows, 0, 0, 0, 0};
  plan.chunk = w.group_channels;
  if (plan.tile.has_taps) {
    const int floats = (device.shared_bytes / kBlocks - kOtherBytes) / 4 - slots * kLanes;
    plan.chunk = std::min(floats / plan.tile.elements - 1, plan.chunk);
    if (plan.chunk <= 0) return plan;
    // Chunks of one size.
    plan.chunk = static_cast<int32_t>(div_up(w.group_channels, div_up(w.group_channels, plan.chunk)));
    plan.bytes = ((plan.chunk + 1) * plan.tile.elements + slots * kLanes) * 4;
  }
  plan.magic = static_cast<uint32_t>(((1ull << 32) + w.taps - 1) / w.taps);
  plan.row_blocks = weight.rows / w.group_rows * div_up(w.group_rows, rows * kWarps);
  return plan;
}

// Cycles that a plan takes, to compare plans by: a multiprocessor does a word a lane of shared memory or L1 a cycle,
// reads about 32 bytes a cycle of the source, takes a while for a visit of a warp to a row's part of a chunk, and
// reaches none of that with few warps.
double cycles(const Walk& w, const Weight& weight, const Plan& plan, const Device& device) {
  const double non_zeros = static_cast<double>(weight.nnz) / std::max(weight.rows, 1);
  const double visits = static_cast<double>(div_up(w.group_channels, plan.chunk)) + non_zeros / kLanes;
  const double row = non_zeros * (plan.slots + 1) + visits * 25;
  const double block = kWarps * plan.rows * row + 4.0 * w.group_channels * plan.tile.elements / 32 + 2000;
  const double blocks = static_cast<double>(plan.tile.tiles() * plan.row_blocks) / device.multiprocessors;
  const double reached = blocks > 2 ? 1 : blocks > 1 ? 0.85 : 0.6;
  return block * std::max(std::ceil(blocks), 1.0) / reached;
}

// The plan that should be the fastest of those that tiling allows; its chunk is 0 if there is none.
Plan best_plan(const Walk& w, const Weight& weight, const Tiling& tiling, const Device& device) {
  Plan best{};
  double least = 0;
  for (int slots : {8, 7, 4, 2})
    for (int rows : {16, 8, 4, 2, 1}) {
      if (!fits(slots, rows) || (tiling.slots && tiling.slots != slots) || (tiling.rows && tiling.rows != rows))
        continue;
      const Plan plan = plan_of(w, weight, slots, rows, device);
      if (plan.chunk <= 0) continue;
      const double taken = cycles(w, weight, plan, device);
      if (best.chunk == 0 || taken < least) best = plan, least = taken;
    }
  return best;
}

template <class T, int kSlots, int kRows, class F>
int with_taps(const Plan& plan, const F& f) {
  if constexpr (fits(kSlots, kRows))
    return plan.tile.has_taps ? f.template operator()<T, kSlots, kRows, true>()
                              : f.template operator()<T, kSlots, kRows, false>();
  else
    return kTooWide;  // best_plan makes none of these
}

template <class T, int kSlots, class F>
int with_rows(const Plan& plan, const F& f) {
  switch (plan.rows) {
    case 1:
      return with_taps<T, kSlots, 1>(plan, f);
    case 2:
      return with_taps<T, kSlots, 2>(plan, f);
    case 4:
      return with_taps<T, kSlots, 4>(plan, f);
    case 8:
      return with_taps<T, kSlots, 8>(plan, f);
    default:
      return with_taps<T, kSlots, 16>(plan, f);
  }
}

template <class T, class F>
int with_slots(const Plan& plan, const F& f) {
  switch (plan.slots) {
    case 2:
      return with_rows<T, 2>(plan, f);
    case 4:
      return with_rows<T, 4>(plan, f);
    case 7:
      return with_rows<T, 7>(plan, f);
    default:
      return with_rows<T, 8>(plan, f);
  }
}

// Calls f<type, slots, rows, whether there are taps>().
template <class F>
int with(Type type, const Plan& plan, const F& f) {
  switch (type) {
    case Type::kFloat:
      return with_slots<float>(plan, f);
    case Type::kHalf:
      return with_slots<Half>(plan, f);
    default:
      return with_slots<BFloat16>(plan, f);
  }
}

}  // namespace

int gather(Type type, const Walk& w, const Weight& weight, const void* source, const void* bias, const void* residual,
           bool relu, void* target, const Tiling& tiling, const Device& device, void* stream) {
  const Plan plan = best_plan(w, weight, tiling, device);
  if (plan.chunk == 0) return kTooWide;
  const int64_t blocks = plan.row_blocks;
  return with(type, plan, [&]<class T, int kSlots, int kRows, bool kTaps>() {
    return launch(gather_kernel<T, kSlots, kRows, kTaps>, plan.tile.tiles() * blocks, kThreads, plan.bytes, stream, w,
                  plan.tile, weight, static_cast<const T*>(source), static_cast<const T*>(bias),
                  static_cast<const T*>(residual), relu, static_cast<T*>(target), plan.chunk, plan.magic,
                  static_cast<int32_t>(blocks));
  });
}

int values_grad_splits(const Walk& w, const Weight& weight, const Tiling& tiling, const Device& device) {
  const Plan plan = best_plan(w, weight, tiling, device);
  if (plan.chunk == 0) return 1;
  const int64_t blocks = plan.row_blocks;
  return static_cast<int>(std::clamp<int64_t>(div_up(4 * device.multiprocessors, blocks), 1, plan.tile.tiles()));
}

int values_grad(Type type, const Walk& w, const Weight& weight, const void* grad_target, const void* source,
                float* workspace, int splits, void* grad, const Tiling& tiling, const Device& device, void* stream) {
  const Plan plan = best_plan(w, weight, tiling, device);
  if (plan.chunk == 0) return kTooWide;
  const int64_t blocks = plan.row_blocks;
  return with(type, plan, [&]<class T, int kSlots, int kRows, bool kTaps>() {
    const int error =
        launch(values_grad_kernel<T, kSlots, kTaps>, splits * blocks, kThreads, plan.bytes, stream, w, plan.tile,
               weight, static_cast<const T*>(grad_target), static_cast<const T*>(source), workspace, plan.chunk,
               plan.magic, plan.tile.tiles(), splits, static_cast<int32_t>(blocks), kRows);
    if (error) return error;
    return launch(add_partials_kernel<T>, div_up(weight.nnz, 256), 256, 0, stream, static_cast<const float*>(workspace),
                  splits, static_cast<int64_t>(weight.nnz), static_cast<T*>(grad));
  });
}

namespace {

template <bool kCompress>
int move_values(Type type, const Weight& weight, const DenseWeight& at, void* dense, void* values, void* stream) {
  switch (type) {
    case Type::kFloat:
      return launch(compress_kernel<float, kCompress>, weight.rows, 128, 0, stream, weight, at,
                    static_cast<float*>(dense), static_cast<float*>(values));
    case Type::kHalf:
      return launch(compress_kernel<Half, kCompress>, weight.rows, 128, 0, stream, weight, at,
                    static_cast<Half*>(dense), static_cast<Half*>(values));
    default:
      return launch(compress_kernel<BFloat16, kCompress>, weight.rows, 128, 0, stream, weight, at,
                    static_cast<BFloat16*>(dense), static_cast<BFloat16*>(values));
  }
}

}  // namespace

int compress(Type type, const Weight& weight, const DenseWeight& at, const void* dense, void* values, void* stream) {
  return move_values<true>(type, weight, at, const_cast<void*>(dense), values, stream);
}

int decompress(Type type, const Weight& weight, const DenseWeight& at, const void* values, void* dense, void* stream) {
  return move_values<false>(type, weight, at, dense, const_cast<void*>(values), stream);
}

Device device_of(int index) {
  Device device{1, 96 << 10};
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  return device;
}

const char* error_string(int error) {
  if (error == kTooWide) return "the convolution's dilation is too large for its images: use another backend";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace sparsekit::cuda
