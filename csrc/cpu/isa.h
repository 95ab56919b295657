// Which instruction set the kernels use: files named *_rows.cpp are compiled once for each, and one is chosen
// at run time, the best that this processor has.
#pragma once

namespace momkd {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use. Chosen at the first call, the same for the whole process.
Isa current_isa();

// Use `isa` from now on: for tests and measurements. False (and no change) where it isn't compiled in or the
// processor lacks it. Not to be called while a kernel runs.
bool use_isa(Isa isa);

const char *isa_name(Isa isa);

// The kernels for the instruction set in use, of a table NAME that *_rows.cpp defines as NAME_baseline,
// NAME_avx2 and NAME_avx512.
#ifdef MOMKD_HAVE_AVX2
#define MOMKD_AVX2_OR_BASELINE(name) name##_avx2
#else
#define MOMKD_AVX2_OR_BASELINE(name) name##_baseline
#endif
#ifdef MOMKD_HAVE_AVX512
#define MOMKD_AVX512_OR_BASELINE(name) name##_avx512
#else
#define MOMKD_AVX512_OR_BASELINE(name) name##_baseline
#endif
#define MOMKD_KERNELS(name)                                      \
  (current_isa() == Isa::avx512 ? MOMKD_AVX512_OR_BASELINE(name) \
   : current_isa() == Isa::avx2 ? MOMKD_AVX2_OR_BASELINE(name)   \
                                : name##_baseline)

}  // namespace momkd
