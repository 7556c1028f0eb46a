// Memory of large CPU results, kept from call to call: mapping a fresh 50 MB result costs more in page faults than any
// kernel here spends on computing it.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

namespace zsq {

// Like at::empty_like for a dense CPU tensor, in `dtype`.
at::Tensor empty_result(const at::Tensor& like, at::ScalarType dtype);
inline at::Tensor empty_result(const at::Tensor& like) { return empty_result(like, like.scalar_type()); }

// Results of one call that are freed together, each a tensor with a storage of its own to everybody else: making many
// small ones costs more than filling them.
class ResultBlock {
 public:
  explicit ResultBlock(at::TensorList like);  // room for a result like each of these
  at::Tensor empty_like(const at::Tensor& dense);

 private:
  c10::Storage memory_;
  char* next_;
};

// Bytes that are kept for later results, and giving them back to the system.
int64_t kept_memory();
void release_memory();

}  // namespace zsq
