// How ema_scatter.cpp cuts rows and aligns its arrays. Prints what is wrong and returns 1.
#include <cstdio>

#include "cpu/ema_scatter.cpp"

using namespace momkd;

namespace {

int failures = 0;

void expect(bool fine, const char *what, int64_t n, int64_t c, int64_t k, int64_t s) {
  if (!fine && ++failures <= 20)
    std::printf("%s: n %lld, c %lld, k %lld, s %lld\n", what, static_cast<long long>(n),
                static_cast<long long>(c), static_cast<long long>(k), static_cast<long long>(s));
}

}  // namespace

int main() {
  for (int64_t count : {0, 1, 15, 16, 17, 1000}) {
    const Buffer<float> buffer(count);
    expect(reinterpret_cast<uintptr_t>(buffer.get()) % 64 == 0, "a buffer off its cache line", count, 0, 0,
           0);
    std::fill_n(buffer.get(), count, 1.0f);  // a sanitizer sees where it ends
  }
  for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{63}, int64_t{64}, int64_t{65}, int64_t{4095},
                    int64_t{4097}, int64_t{200'000}, int64_t{1} << 31, int64_t{1} << 40})
    for (int64_t c : {1, 2, 30})
      for (int64_t k : {1, 16, 17, 512})
        for (int64_t s : {1, 64, 100, 4096}) {
          const Chunks chunks(n, c, k, s);
          expect(chunks.rows >= 1, "no rows in a chunk", n, c, k, s);
          expect(chunks.count * chunks.rows >= n, "rows left out", n, c, k, s);
          expect(n == 0 ? chunks.count == 0 : (chunks.count - 1) * chunks.rows < n, "an empty chunk", n, c, k,
                 s);
          expect(chunks.count <= 1 || chunks.count * c * k * (padded(s) * 4 + 8) <= kWorkspace,
                 "too much memory", n, c, k, s);
          expect(chunks.count <= 1 || chunks.rows >= 8 * c * k, "chunks too small for their sums", n, c, k,
                 s);
        }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
