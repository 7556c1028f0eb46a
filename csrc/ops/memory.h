// Memory of large CPU results, kept from call to call: mapping a fresh 50 MB result costs more in page faults than any
// kernel here spends on computing it.
#pragma once
#include <ATen/core/Tensor.h>

namespace zsq {

// Like at::empty_like for a dense CPU tensor, in `dtype`.
at::Tensor empty_result(const at::Tensor& like, at::ScalarType dtype);
inline at::Tensor empty_result(const at::Tensor& like) { return empty_result(like, like.scalar_type()); }

// Bytes that are kept for later results, and giving them back to the system.
int64_t kept_memory();
void release_memory();

}  // namespace zsq
