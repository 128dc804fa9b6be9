// Host only: which ids stand in which slices of a label volume, along any of its axes.
//
// Labels are mostly long runs of one id, so a row is cut into runs, eight bytes at a time, and a run is noted once for
// its slice, once for its row, and as a range of bits along the row. Notes are kept for a bounded number of ids and
// written out as pairs when there are more, so that labels which are nothing but different ids need no more memory than
// their pairs.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr int64_t kNoteWords = int64_t{1} << 23;  // 64 MiB of bits for the ids noted at one time

// Ids of one or two bytes are looked up in a table.
template <typename Id>
class IdTable {
 public:
  IdTable() : numbers_(size_t{1} << (8 * sizeof(Id)), -1) {}
  int32_t &operator[](Id id) { return numbers_[id]; }
  void clear() { std::fill(numbers_.begin(), numbers_.end(), -1); }

 private:
  std::vector<int32_t> numbers_;
};

// Ids of four bytes: open addressing, at most half full.
template <>
class IdTable<uint32_t> {
 public:
  IdTable() { clear(); }

  int32_t &operator[](uint32_t id) {
    if (2 * (used_ + 1) > slots_.size()) grow();
    Slot &slot = find(id);
    if (!slot.taken) {
      slot = {id, -1, true};
      ++used_;
    }
    return slot.number;
  }

  void clear() {
    slots_.assign(1024, Slot{});
    used_ = 0;
  }

 private:
  struct Slot {
    uint32_t id = 0;
    int32_t number = -1;
    bool taken = false;
  };

  Slot &find(uint32_t id) {
    const size_t mask = slots_.size() - 1;
    size_t place = (id * 0x9e3779b97f4a7c15ull >> 32) & mask;
    while (slots_[place].taken && slots_[place].id != id) place = (place + 1) & mask;
    return slots_[place];
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot &slot : old)
      if (slot.taken) find(slot.id) = slot;
  }

  std::vector<Slot> slots_;
  size_t used_ = 0;
};

// For each noted id a set of positions along one axis: bits, and the words of them that are not all 0.
class Positions {
 public:
  void start(int64_t num_positions) { words_ = (num_positions + 63) / 64; }
  int64_t words() const { return words_; }

  void add_id() {
    bits_.resize(bits_.size() + words_);
    first_.push_back(words_);
    last_.push_back(-1);
  }

  void set(int64_t number, int64_t begin, int64_t end) {
    const int64_t first = begin >> 6, last = (end - 1) >> 6;
    uint64_t *bits = bits_.data() + number * words_;
    const uint64_t head = ~uint64_t{0} << (begin & 63), tail = ~uint64_t{0} >> (63 - ((end - 1) & 63));
    if (first == last) {
      bits[first] |= head & tail;
    } else {
      bits[first] |= head;
      for (int64_t word = first + 1; word < last; ++word) bits[word] = ~uint64_t{0};
      bits[last] |= tail;
    }
    first_[number] = std::min(first_[number], first);
    last_[number] = std::max(last_[number], last);
  }

  // Appends position << 32 | id for all that is noted, and forgets it.
  void flush(const std::vector<uint32_t> &ids, std::vector<uint64_t> &pairs) {
    for (size_t number = 0; number < ids.size(); ++number) {
      const uint64_t *bits = bits_.data() + number * words_;
      for (int64_t word = first_[number]; word <= last_[number]; ++word)
        for (uint64_t rest = bits[word]; rest; rest &= rest - 1)
          pairs.push_back((uint64_t)(64 * word + __builtin_ctzll(rest)) << 32 | ids[number]);
    }
    bits_.clear();
    first_.clear();
    last_.clear();
  }

 private:
  int64_t words_ = 0;
  std::vector<uint64_t> bits_;
  std::vector<int64_t> first_, last_;
};

template <typename Id>
struct PairSearch {
  bool along[3];
  int64_t max_ids;
  IdTable<Id> numbers;
  std::vector<uint32_t> ids;  // by number
  std::vector<int64_t> last_slice;
  Positions rows, columns;
  std::vector<uint64_t> *pairs;

  int32_t number_of(Id id) {
    int32_t &found = numbers[id];
    if (found >= 0) return found;
    if ((int64_t)ids.size() == max_ids) {
      flush();
      return number_of(id);
    }
    const int32_t number = found = (int32_t)ids.size();
    ids.push_back(id);
    last_slice.push_back(-1);
    if (along[1]) rows.add_id();
    if (along[2]) columns.add_id();
    return number;
  }

  void flush() {
    if (along[1]) rows.flush(ids, pairs[1]);
    if (along[2]) columns.flush(ids, pairs[2]);
    ids.clear();
    last_slice.clear();
    numbers.clear();
  }

  void note(Id id, int64_t z, int64_t y, int64_t begin, int64_t end) {
    const int32_t number = number_of(id);
    if (along[0] && last_slice[number] != z) {
      last_slice[number] = z;
      pairs[0].push_back((uint64_t)z << 32 | id);
    }
    if (along[1]) rows.set(number, y, y + 1);
    if (along[2]) columns.set(number, begin, end);
  }
};

// Where the run of `row[begin]` ends.
template <typename Id>
int64_t run_end(const Id *row, int64_t begin, int64_t width) {
  constexpr int64_t kStep = 8 / sizeof(Id);
  const Id id = row[begin];
  uint64_t pattern = id;
  for (size_t bits = 8 * sizeof(Id); bits < 64; bits *= 2) pattern |= pattern << bits;
  int64_t x = begin + 1;
  for (; x + 4 * kStep <= width; x += 4 * kStep) {
    uint64_t words[4];
    memcpy(words, row + x, 32);
    if ((words[0] ^ pattern) | (words[1] ^ pattern) | (words[2] ^ pattern) | (words[3] ^ pattern)) break;
  }
  for (; x + kStep <= width; x += kStep) {
    uint64_t word;
    memcpy(&word, row + x, 8);
    if (word != pattern) return x + __builtin_ctzll(word ^ pattern) / (8 * sizeof(Id));  // little-endian
  }
  while (x < width && row[x] == id) ++x;
  return x;
}

template <typename Id>
void find_pairs(const Id *labels, const int64_t shape[3], const int32_t wanted[3], int64_t note_words,
                std::vector<uint64_t> pairs[3]) {
  PairSearch<Id> search;
  for (int axis = 0; axis < 3; ++axis) search.along[axis] = wanted[axis] != 0;
  search.rows.start(shape[1]);
  search.columns.start(shape[2]);
  search.pairs = pairs;
  const int64_t words_per_id = 1 + (search.along[1] ? search.rows.words() : 0) +
                               (search.along[2] ? search.columns.words() : 0);
  search.max_ids = std::min(std::max<int64_t>(note_words / words_per_id, 1), (int64_t)INT32_MAX);
  for (int64_t z = 0; z < shape[0]; ++z)
    for (int64_t y = 0; y < shape[1]; ++y) {
      const Id *row = labels + (z * shape[1] + y) * shape[2];
      for (int64_t begin = 0, end; begin < shape[2]; begin = end) {
        end = run_end(row, begin, shape[2]);
        if (row[begin]) search.note(row[begin], z, y, begin, end);
      }
    }
  search.flush();
  for (int axis = 0; axis < 3; ++axis) {
    std::sort(pairs[axis].begin(), pairs[axis].end());
    pairs[axis].erase(std::unique(pairs[axis].begin(), pairs[axis].end()), pairs[axis].end());
  }
}

}  // namespace

struct LabelPairs {
  std::vector<uint64_t> along[3];  // position << 32 | id, ascending
};

// Finds the pairs along the axes that are wanted. `note_words` bounds the bits kept at one time; 0 takes the default.
// Returns null where memory ran out. The caller asks for the counts, then for the pairs, then frees.
extern "C" LabelPairs *gpuparse_find_pairs(const void *labels, int32_t id_bytes, const int64_t *shape,
                                           const int32_t *wanted, int64_t note_words, int64_t *counts) {
  LabelPairs *found = nullptr;
  try {
    found = new LabelPairs;
    const int64_t words = note_words ? note_words : kNoteWords;
    if (id_bytes == 1) find_pairs((const uint8_t *)labels, shape, wanted, words, found->along);
    if (id_bytes == 2) find_pairs((const uint16_t *)labels, shape, wanted, words, found->along);
    if (id_bytes == 4) find_pairs((const uint32_t *)labels, shape, wanted, words, found->along);
    for (int axis = 0; axis < 3; ++axis) counts[axis] = (int64_t)found->along[axis].size();
    return found;
  } catch (const std::bad_alloc &) {
    delete found;
    return nullptr;
  }
}

// Writes (position, id) of each pair along an axis.
extern "C" void gpuparse_copy_pairs(const LabelPairs *found, int32_t axis, int64_t *out) {
  for (const uint64_t pair : found->along[axis]) {
    *out++ = (int64_t)(pair >> 32);
    *out++ = (int64_t)(pair & 0xffffffffu);
  }
}

extern "C" void gpuparse_free_pairs(LabelPairs *found) { delete found; }
