// The list of compressed blocks that reading makes, decoding takes, and placing follows.
#ifndef GPUPARSE_COMPRESSED_H
#define GPUPARSE_COMPRESSED_H

#include "portable.h"

// Mirrored by COMPRESSED_BLOCK_DTYPE in gpuparse/read.py, 24 bytes.
struct CompressedBlock {
  int64_t data_offset;  // in the buffer that was read into
  int64_t target;       // in the arena
  int32_t num_bytes;
  int32_t decoded_bytes;
};

#endif  // GPUPARSE_COMPRESSED_H
