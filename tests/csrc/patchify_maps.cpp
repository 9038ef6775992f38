// The element maps that the CUDA kernel walks, against the CPU kernel that moves the same bytes: checks the index math
// of the GPU where there is none. Arguments: C pt ph pw channels_last, then T H W of each sample. Exit 0: equal.
#include "cpu/patchify.h"

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

  std::vector<int32_t> latents(total * P), tokens(latents.size(), -1);
  for (size_t i = 0; i < latents.size(); ++i) latents[i] = int32_t(i);
  for (const auto& s : samples) {
    const int64_t base = s.first_token * P;
    for (int64_t t = 0; t < s.T; ++t)
      patchify(&op, 4, true, &s, t, 0, s.H, reinterpret_cast<char*>(&latents[base]),
               reinterpret_cast<char*>(&tokens[base]), nullptr);
  }
  for (int64_t i = 0; i < int64_t(tokens.size()); ++i) {
    const int64_t number = sorahpc::find_sample(samples.data(), num_samples, i / P);
    const auto& s = samples[number];
    const int64_t base = s.first_token * P;
    const int64_t from = base + op.token_to_latent(s.T, s.H, s.W, i - base);
    const int64_t back = base + op.latent_to_token(s.T, s.H, s.W, from - base);
    if (tokens[i] != latents[from] || back != i) {
      std::printf("element %lld of sample %lld: CPU moved %d, map says %lld, and back %lld\n", (long long)i, (long long)number, tokens[i],
                  (long long)from, (long long)back);
      return 1;
    }
  }
  return 0;
}
