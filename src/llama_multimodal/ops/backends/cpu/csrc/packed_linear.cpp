// packed_linear of few rows, or of any number on a matrix unit, and a packed weight's tiles back to values: the work is
// shared out over the outputs, and an output's weights are read from memory once, however many rows x has. Threads take
// long runs of outputs first, which memory likes, and short ones last, so that none waits long for another.
//
// Shapes: N outputs · K inputs · T rows of x
#include "bias.h"
#include "drivers.h"
#include "kernels.h"
#include "linear.h"
#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

constexpr int64_t kWidened = 1024;  // inputs of x that are widened to fp32 together; whole blocks

struct Output {
  void* out;  // [T, N], contiguous, in x's dtype
  DType dtype;
  const void* bias;  // [N], or null
  DType bias_dtype;
  int64_t outputs;

  // sums [rows, count] of the rows from `row` on and the outputs from `output` on, those past the last dropped.
  void put(float* sums, int row, int rows, int64_t output, int64_t count) const {
    const int64_t real = least(count, outputs - output);
    for (int t = 0; t < rows; t++, sums += count) {
      if (bias)
        for (int64_t n = 0; n < real; n++) sums[n] += get(bias, bias_dtype, output + n);
      put_row(out, dtype, (row + t) * outputs + output, sums, real);
    }
  }
};

// The rows of x in panels, those that go over a tile together: of `most` rows, then of kMaxRows, the last of fewer.
struct Panels {
  RoundedX memory;
  int rows, most;
  int64_t blocks;
  int digit_bytes;

  int first(int row) const {
    const int rest = rows - rows % most;  // where the panels of kMaxRows begin
    return row < rest ? row - row % most : row - (row - rest) % kMaxRows;
  }
  int count(int row) const { return least(rows - first(row), row < rows - rows % most ? most : kMaxRows); }
  // The panel of a row, from that row and block `block` on.
  RoundedX at(int row, int64_t block) const {
    const int64_t i = first(row) * blocks + block * count(row) + row - first(row);
    return {memory.blocks + i, static_cast<char*>(memory.digits) + i * kBlock * digit_bytes};
  }
};

}  // namespace

extern "C" {

// 0, or 1 where there is no memory. x: [T, K], rounded to 8 bits (unless a matrix unit is faster without) or as its dtype
// wants; out: [T, N]; see PackedWeight for the weight.
int llama_mm_cpu_packed_linear(const void* x, int dtype, int to_8_bits, int rows, int64_t inputs,
                               const uint8_t* values, const uint16_t* scales, const uint8_t* zeros, int int4,
                               int64_t group, const void* bias, int bias_dtype, int64_t outputs, void* out,
                               int threads) {
  const Kernels& use = *kernels();
  const DType type = static_cast<DType>(dtype);
  const int64_t blocks = inputs / kBlock, tiles = (outputs + kTileRows - 1) / kTileRows;
  const PackedWeight weight = {values, scales, zeros, blocks, group / kBlock, int4 != 0};
  if (rows == 0 || outputs == 0) return 0;
  const TileLinear* const unit = tile_linear(type, inputs);
  if (unit && rows >= (to_8_bits ? unit->least_rounded : unit->least_packed)) {
    const Bias added(bias, bias_dtype, outputs, rounded_up(outputs, 32));
    const int64_t bytes = outputs * inputs * (1 + rows / 32);  // or as much work
    return !added.values || unit->packed(static_cast<const uint16_t*>(x), rows, inputs, weight, added.values, outputs,
                                         static_cast<uint16_t*>(out), useful_threads(threads, bytes));
  }
  const Output output = {out, type, bias, static_cast<DType>(bias_dtype), outputs};
  const Rounding rounding = to_8_bits ? kTo8Bits : static_cast<Rounding>(type);
  const int middle = zeros ? 0 : int4 ? 8 : 128;

  const int64_t heads_bytes = rows * blocks * static_cast<int64_t>(sizeof(BlockOfX));
  const int64_t row_bytes = inputs * use.digit_bytes[rounding];
  Scratch scratch(heads_bytes + rows * row_bytes);
  if (!scratch.memory) return 1;
  const RoundedX rounded = {reinterpret_cast<BlockOfX*>(scratch.memory), scratch.memory + heads_bytes};
  const bool pairs = to_8_bits && use.dot_pair;  // of tiles
  const Panels panels = {rounded, rows, pairs ? use.pair_rows : use.most_rows, blocks, use.digit_bytes[rounding]};
  const int team = useful_threads(threads, outputs * inputs / (int4 ? 2 : 1));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1 && rows > kMaxRows)
  for (int t = 0; t < rows; t++) {
    float wide[kWidened];
    for (int64_t first = 0; first < inputs; first += kWidened) {
      const int64_t count = least(kWidened, inputs - first);
      for (int64_t k = 0; k < count; k++) wide[k] = get(x, type, t * inputs + first + k);
      use.round_row(wide, count / kBlock, rounding, middle, panels.count(t), panels.at(t, first / kBlock));
    }
  }

  const int64_t step = pairs ? 2 : 1;
#pragma omp parallel for schedule(guided) num_threads(team) if (team > 1)
  for (int64_t first = 0; first < tiles; first += step) {
    float sums[kMaxTileRows * kTileRows];
    const int64_t end = least(first + step, tiles);
    for (int row = 0; row < rows; row += panels.count(row)) {
      const int count = panels.count(row);
      const bool both = end - first == 2 && count == use.pair_rows;
      if (both) use.dot_pair(weight, first, panels.at(row, 0), sums);
      for (int64_t tile = first; tile < end; tile++) {
        if (!both) use.dot_tile(weight, tile, panels.at(row, 0), count, rounding, sums);
        output.put(sums + (both ? (tile - first) * count * kTileRows : 0), row, count, tile * kTileRows, kTileRows);
      }
    }
  }
  return 0;
}

// The same with a bf16 weight [N, K] as it lies.
int llama_mm_cpu_bf16_linear(const void* x, int dtype, int rows, int64_t inputs,
                             const uint16_t* weight, const void* bias, int bias_dtype, int64_t outputs, void* out,
                             int threads) {
  const Kernels& use = *kernels();
  const DType type = static_cast<DType>(dtype);
  const TileLinear* const unit = tile_linear(type, inputs);
  if (rows == 0 || outputs == 0) return 0;
  if (unit && rows >= unit->least_plain)
    return llama_mm_cpu_wide_linear(static_cast<const uint16_t*>(x), rows, inputs, weight, bias, bias_dtype, outputs,
                                    static_cast<uint16_t*>(out), threads);
  const Output output = {out, type, bias, static_cast<DType>(bias_dtype), outputs};
  // 64 bytes more: rows a power of two apart would share few places of the first cache.
  const int64_t stride = rounded_up(inputs, 16) + 16;
  Scratch scratch((rows + 1) * stride * 4);
  if (!scratch.memory) return 1;
  float *ordered = reinterpret_cast<float*>(scratch.memory), *wide = ordered + rows * stride;
  for (int t = 0; t < rows; t++) {
    for (int64_t k = 0; k < inputs; k++) wide[k] = get(x, type, t * inputs + k);
    use.order_row(wide, inputs, ordered + t * stride);
  }
  const int team = useful_threads(threads, outputs * inputs * 2);
  const int passes = (rows + use.dot_rows - 1) / use.dot_rows;  // of about as many rows each
#pragma omp parallel for schedule(guided) num_threads(team) if (team > 1)
  for (int64_t first = 0; first < outputs; first += kOutputs) {
    float sums[kOutputs * kMaxDotRows];
    const int64_t count = least(outputs - first, int64_t{kOutputs});
    for (int pass = 0; pass < passes; pass++) {
      const int row = rows * pass / passes, some = rows * (pass + 1) / passes - row;
      use.dot_bf16(weight + first * inputs, inputs, static_cast<int>(count), ordered + row * stride, stride, some,
                   pass, passes, sums);
      output.put(sums, row, some, first, kOutputs);
    }
  }
  return 0;
}

// Tiles [first, end) of a packed weight → out [16 · (end - first), K], fp32 or bf16.
void llama_mm_cpu_unpack_tiles(const uint8_t* values, const uint16_t* scales, const uint8_t* zeros, int int4,
                               int64_t group, int64_t inputs, int64_t first, int64_t end, int dtype, void* out,
                               int threads) {
  const Kernels& use = *kernels();
  const DType type = static_cast<DType>(dtype);
  const PackedWeight weight = {values, scales, zeros, inputs / kBlock, group / kBlock, int4 != 0};
  const int64_t bytes = kTileRows * inputs * (type == kFloat32 ? 4 : 2);
  const int team = useful_threads(threads, (end - first) * bytes);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t tile = first; tile < end; tile++)
    use.unpack_tile(weight, tile, type, static_cast<char*>(out) + (tile - first) * bytes);
}

}  // extern "C"
