// Memory that the system hands out a large page at a time.
#pragma once

#include <cstdint>

namespace momkd {

// Ask for large pages behind `bytes` of memory that nothing has touched yet: each first touch of a page
// interrupts the program, and with pages of 4 KB those interruptions take longer than the writing. Does
// nothing where the system knows no such request.
void use_large_pages(void *data, int64_t bytes);

}  // namespace momkd
