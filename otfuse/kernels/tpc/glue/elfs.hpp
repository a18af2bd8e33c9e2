// The compiled kernels; defined by a file that build.py writes.
#pragma once

#include <tpc_kernel_lib_interface.h>

namespace otfuse {

struct Elf {
    tpc_lib_api::DeviceId device;
    const char* name;  // of the source file, without its ending
    const unsigned char* code;
    unsigned size;
};

extern const Elf ELFS[];
extern const unsigned NUM_ELFS;

}  // namespace otfuse
