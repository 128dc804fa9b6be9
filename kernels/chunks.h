// The list of chunks that locating makes and reading follows.
#ifndef GPUPARSE_CHUNKS_H
#define GPUPARSE_CHUNKS_H

#include "portable.h"

// Mirrored by CHUNK_DTYPE in gpuparse/locate.py, 64 bytes.
struct ChunkRequest {
  int64_t file_offset;
  int64_t num_bytes;  // of the frame and the checksum behind it
  int64_t decoded_bytes;
  int64_t target;       // where the decoded chunk goes in the arena
  int64_t data_offset;  // where its blocks go in the buffer
  int64_t capacity;     // bytes kept free for them there
  int64_t first_block;  // its first entry in the list of blocks
  int32_t file;
  int32_t in_memory;  // 1: nothing is read; file_offset is the address of its bytes
};

#endif  // GPUPARSE_CHUNKS_H
