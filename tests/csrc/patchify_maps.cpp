// The element maps that the CUDA kernel walks, against the CPU kernel that moves the same bytes: checks the index math
// of the GPU where there is none. Arguments: C pt ph pw channels_last, then T H W of each sample. Exit 0: equal.
#include "patchify.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  const auto arg = [&](int i) { return std::strtoll(argv[i], nullptr, 10); };
  const sorahpc::Patchify op{arg(1), arg(2), arg(3), arg(4), arg(5) != 0};
  const int64_t P = op.token_size();
  std::vector<int64_t> first_token{0};
  for (int i = 6; i + 2 < argc; i += 3) first_token.push_back(first_token.back() + arg(i) * arg(i + 1) * arg(i + 2));
  const int num_samples = int(first_token.size()) - 1;

  std::vector<int32_t> latents(first_token.back() * P), tokens(latents.size(), -1);
  for (size_t i = 0; i < latents.size(); ++i) latents[i] = int32_t(i);
  for (int s = 0; s < num_samples; ++s) {
    const int64_t T = arg(6 + 3 * s), H = arg(7 + 3 * s), W = arg(8 + 3 * s), base = first_token[s] * P;
    for (int64_t row = 0; row < T * H; ++row)
      sorahpc_patchify_row_cpu(&op, 4, true, T, H, W, row, reinterpret_cast<char*>(&latents[base]),
                               reinterpret_cast<char*>(&tokens[base]));
  }
  for (int64_t i = 0; i < int64_t(tokens.size()); ++i) {
    const int s = sorahpc::find_sample(first_token.data(), num_samples, i / P);
    const int64_t T = arg(6 + 3 * s), H = arg(7 + 3 * s), W = arg(8 + 3 * s), base = first_token[s] * P;
    const int64_t from = base + op.token_to_latent(T, H, W, i - base);
    const int64_t back = base + op.latent_to_token(T, H, W, from - base);
    if (tokens[i] != latents[from] || back != i) {
      std::printf("element %lld of sample %d: CPU moved %d, map says %lld, and back %lld\n", (long long)i, s, tokens[i],
                  (long long)from, (long long)back);
      return 1;
    }
  }
  return 0;
}
