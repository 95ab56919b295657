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

}  // namespace momkd
