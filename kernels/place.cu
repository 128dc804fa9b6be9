// Placing: decoded blocks go from where a decoder left them, one slot each, to their places in a cache.
#include "compressed.h"
#include "portable.h"

// One element is 16 bytes of a slot. Slots and targets lie at multiples of 16.
GP_FN void place_blocks_element(int64_t element, const uint8_t *GP_RESTRICT inflated,
                                const CompressedBlock *GP_RESTRICT blocks, int64_t slot_bytes,
                                uint8_t *GP_RESTRICT arena) {
  const int64_t units = slot_bytes / 16;
  const int64_t i = element / units;
  const int32_t first = (int32_t)(element - i * units) * 16;
  const CompressedBlock block = blocks[i];
  if (first >= block.decoded_bytes) return;
  const uint8_t *source = inflated + i * slot_bytes + first;
  uint8_t *target = arena + block.target + first;
  if (first + 16 <= block.decoded_bytes) {
    *(Bytes16 *)target = *(const Bytes16 *)source;
    return;
  }
  for (int32_t k = 0; k < block.decoded_bytes - first; ++k) target[k] = source[k];
}

GP_KERNEL(place_blocks,
          (const uint8_t *GP_RESTRICT inflated, const CompressedBlock *GP_RESTRICT blocks, int64_t slot_bytes,
           uint8_t *GP_RESTRICT arena),
          (inflated, blocks, slot_bytes, arena))
