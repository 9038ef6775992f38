// The slots and pixels that the CUDA kernel of flow_patchify walks, against Patchify's own map: checks the index math
// of the GPU where there is none. Arguments: C pt ph pw channels_last, then T H W of each sample. Exit 0: every element
// is taken once, and to its place; of samples of many elements some are looked at, here and there.
#include "flow_patchify.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  const auto arg = [&](int i) { return std::strtoll(argv[i], nullptr, 10); };
  const sorahpc::Patchify op{arg(1), arg(2), arg(3), arg(4), arg(5) != 0};
  const int64_t P = op.token_size();
  std::vector<sorahpc::Sample> samples;
  int64_t total = 0;
  for (int i = 6; i + 2 < argc; i += 3) {
    samples.push_back({total, int32_t(arg(i)), int32_t(arg(i + 1)), int32_t(arg(i + 2))});
    total += arg(i) * arg(i + 1) * arg(i + 2);
  }
  const int64_t num_samples = int64_t(samples.size());
  samples.push_back({total, 0, 0, 0});

  const int64_t slots = sorahpc::first_slot(samples.data(), num_samples, P);
  const int64_t step = std::max<int64_t>(1, slots / 100000);
  int64_t taken = 0, before = -1;
  for (int64_t slot = 0; slot < slots; slot = slot + 1 == slots ? slots : std::min(slot + step, slots - 1)) {
    const int64_t i = sorahpc::sample_of_slot(samples.data(), num_samples, P, slot);
    const auto& s = samples[i];
    const int64_t block = slot - sorahpc::first_slot(samples.data(), i, P), base = s.first_token * P;
    const int64_t n = (samples[i + 1].first_token - s.first_token) * P;
    sorahpc::PixelWalk pixel(op, s, 4 * block);
    for (int64_t e = 4 * block; e < std::min(4 * block + 4, n); ++e, pixel.next(), ++taken) {
      const int64_t walked = pixel.in_tokens(op), mapped = op.latent_to_token(s.T, s.H, s.W, e);
      if (block < 0 || base + e <= before || walked != mapped) {
        std::printf("slot %lld, element %lld of sample %lld: walked to %lld, map says %lld\n", (long long)slot,
                    (long long)e, (long long)i, (long long)walked, (long long)mapped);
        return 1;
      }
      before = base + e;
    }
  }
  if (step == 1 && taken != total * P) {
    std::printf("%lld elements taken, expected %lld\n", (long long)taken, (long long)(total * P));
    return 1;
  }
  return 0;
}
