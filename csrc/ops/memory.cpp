#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <deque>
#include <mutex>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace zsq {
namespace {
constexpr size_t kLarge = size_t(1) << 20;     // below, malloc keeps freed memory by itself
constexpr size_t kPage = size_t(2) << 20;      // a huge page: one fault instead of 512
constexpr size_t kMostKept = size_t(1) << 30;  // of memory that no tensor uses

struct Block {
  void* data;
  size_t bytes;
};

class ResultMemory : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const size_t bytes = (n + kPage - 1) / kPage * kPage;
    Block* block = take(bytes);
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

  size_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }
  void shrink_to(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(bytes);
  }

 private:
  Block* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = free_.rbegin(); it != free_.rend(); ++it)  // the last one freed may still be in a cache
        if ((*it)->bytes == bytes) {
          Block* block = *it;
          free_.erase(std::next(it).base());
          kept_ -= bytes;
          return block;
        }
    }
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, kPage, bytes) == 0, "DefaultCPUAllocator: not enough memory for a result of ",
                bytes, " bytes");
#ifdef __linux__
    madvise(data, bytes, MADV_HUGEPAGE);  // a wish: without huge pages everything works, more slowly at first
#endif
    return new Block{data, bytes};
  }
  static void give_back(void* context);
  void keep(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    kept_ += block->bytes;
    shrink(kMostKept);
  }
  void shrink(size_t most) {
    while (kept_ > most) {
      Block* oldest = free_.front();
      free_.pop_front();
      kept_ -= oldest->bytes;
      std::free(oldest->data);
      delete oldest;
    }
  }

  std::mutex mutex_;
  std::deque<Block*> free_;  // the oldest first
  size_t kept_ = 0;
};

// Never destroyed: tensors may outlive the module's static objects.
ResultMemory& memory() {
  static ResultMemory& only = *new ResultMemory;
  return only;
}
void ResultMemory::give_back(void* context) { memory().keep(static_cast<Block*>(context)); }
}  // namespace

at::Tensor empty_result(const at::Tensor& like, at::ScalarType dtype) {
  if (!like.is_non_overlapping_and_dense()) return at::empty_like(like, like.options().dtype(dtype));
  if (size_t(like.numel()) * c10::elementSize(dtype) < kLarge)  // past the dispatcher, which costs more than the rest
    return at::detail::empty_strided_cpu(like.sizes(), like.strides(), dtype);
  return at::detail::empty_strided_generic(like.sizes(), like.strides(), &memory(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
}

namespace {
constexpr size_t kLine = 64;
size_t padded(const at::Tensor& t) { return (t.nbytes() + kLine - 1) / kLine * kLine; }
void let_go(void* block) { c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(block)); }
}  // namespace

ResultBlock::ResultBlock(at::TensorList like) {
  size_t bytes = 0;
  for (const at::Tensor& t : like) bytes += padded(t);
  c10::Allocator* allocator = bytes < kLarge ? c10::GetCPUAllocator() : &memory();
  memory_ = c10::Storage(c10::Storage::use_byte_size_t(), bytes, allocator);
  next_ = static_cast<char*>(memory_.mutable_data());
}
at::Tensor ResultBlock::empty_like(const at::Tensor& dense) {
  c10::StorageImpl* block = memory_.unsafeGetStorageImpl();
  c10::raw::intrusive_ptr::incref(block);
  c10::Storage own(c10::Storage::use_byte_size_t(), dense.nbytes(),
                   c10::DataPtr(next_, block, let_go, c10::Device(c10::DeviceType::CPU)), c10::GetCPUAllocator(),
                   /*resizable=*/true);
  next_ += padded(dense);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(own), c10::DispatchKeySet(c10::DispatchKey::CPU), dense.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(dense.sizes(), dense.strides());
  return result;
}

int64_t kept_memory() { return int64_t(memory().kept()); }
void release_memory() { memory().shrink_to(0); }
}  // namespace zsq
