// How patchify and flow_patchify share out a pack on the CPU.
#pragma once

#include "common.h"

namespace sorahpc {

// Tokens that are put together before they are written past the caches must fit the second cache, with what they are
// made of.
constexpr int64_t MAX_UNIT_BYTES = 512 << 10;

// Calls f(sample's number, t, h0, h1, scratch) for all tokens of the pack, on all threads. A unit is as many token rows
// of a frame as give the kernel a few hundred contiguous pixels. results: as many tensors the size of the latents are
// written. scratch: memory for a unit of each; null where all of them are no larger than the caches, or a unit is not
// much smaller. grain: elements a thread at least.
template <typename F>
void for_units(const Samples& samples, const Patchify& patch, int64_t item_bytes, int results, int64_t grain, F&& f) {
  const Sample* table = samples.host();
  const int64_t P = patch.token_size();
  const auto rows_a_unit = [&](const Sample& s) {
    return std::min<int64_t>(s.H, std::max<int64_t>(1, 512 / (patch.ph * s.W * patch.pw)));
  };
  int64_t unit_bytes = 0;
  std::vector<int64_t> first_unit{0};
  for (const Sample* s = table; s != table + samples.size(); ++s) {
    const int64_t rows = rows_a_unit(*s);
    unit_bytes = std::max(unit_bytes, results * rows * s->W * P * item_bytes);
    first_unit.push_back(first_unit.back() + s->T * ((s->H + rows - 1) / rows));
  }
  const int64_t num_units = first_unit.back(), numel = table[samples.size()].first_token * P;
  const bool stream = results * numel * item_bytes > STREAM_BYTES && unit_bytes <= MAX_UNIT_BYTES;
  torch::stable::parallel_for(0, num_units, std::max<int64_t>(1, grain * num_units / numel),
                              [&](int64_t begin, int64_t end) {
    std::vector<Line> scratch(stream ? unit_bytes / sizeof(Line) + 1 : 0);
    int64_t i = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - first_unit.begin() - 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit == first_unit[i + 1]) ++i;
      const int64_t H = table[i].H, rows = rows_a_unit(table[i]), a_frame = (H + rows - 1) / rows;
      const int64_t t = (unit - first_unit[i]) / a_frame, h = (unit - first_unit[i]) % a_frame * rows;
      f(i, t, h, std::min<int64_t>(h + rows, H), stream ? scratch[0].bytes : nullptr);
    }
    if (stream) cpu().stream_fence();
  });
}

}  // namespace sorahpc
