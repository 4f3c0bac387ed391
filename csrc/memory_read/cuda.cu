// SPDX-License-Identifier: Apache-2.0
// The top-k match on CUDA: checks, the cut of the work into blocks, launches; registration of all operators.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "cuda_launch.h"
#include "cuda_operators.h"

namespace vosops::gpu {
namespace {

// When a sample of an eighth of the tiles pays for itself: every share must find its own threshold otherwise.
constexpr int kSampledSplits = 3, kSampledTopK = 48, kSampledTiles = 64;

// Serves what the Python side lets through, and refuses the rest rather than reading foreign bytes.
Match match_of(const Tensor& query_key, const Tensor& memory_key, const std::optional<Tensor>& shrinkage,
               const std::optional<Tensor>& selection, const std::optional<Tensor>& memory_mask,
               const std::optional<Tensor>& centers, const std::optional<Tensor>& precision, bool l2,
               double scale, int64_t top_k) {
  const ScalarType type = query_key.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Half || type == ScalarType::BFloat16) && memory_key.scalar_type() == type &&
          (!selection || selection->scalar_type() == type),
      "the cuda backend serves float16 and bfloat16 keys; query_key, memory_key and selection must "
      "have one dtype");
  const int64_t batch = query_key.size(0), channels = query_key.size(1);
  const int64_t queries = count_of(query_key, 2), memory = count_of(memory_key, 2);
  STD_TORCH_CHECK(memory_key.size(0) == batch && memory_key.size(1) == channels,
                  "memory_key must have the batch and channels of query_key");
  STD_TORCH_CHECK(channels % 8 == 0 && channels >= 8 && channels <= kMaxChannels,
                  "the cuda backend serves Ck a multiple of 8 up to ", int(kMaxChannels), ", got ", channels);
  STD_TORCH_CHECK(top_k >= 1 && std::min(top_k, memory) <= kMaxTopK,
                  "the cuda backend serves top_k from 1 to ", int(kMaxTopK), ", got ", top_k);
  STD_TORCH_CHECK(memory > 0 && memory < INT32_MAX - 1024 && queries < INT32_MAX - 1024 && batch <= 65535,
                  "between 1 and 2^31 memory positions and queries and at most 65535 batch entries, got ",
                  memory, ", ", queries, " and ", batch);
  STD_TORCH_CHECK(!selection || (l2 && selection->size(0) == batch && selection->size(1) == channels &&
                                 count_of(*selection, 2) == queries),
                  "selection needs l2 and the shape of query_key");
  STD_TORCH_CHECK(!shrinkage || (l2 && shrinkage->size(0) == batch && count_of(*shrinkage, 2) == memory),
                  "shrinkage needs l2 and one entry per memory position");
  STD_TORCH_CHECK(!memory_mask || (memory_mask->scalar_type() == ScalarType::Bool &&
                                   memory_mask->size(0) == batch && count_of(*memory_mask, 1) == memory),
                  "memory_mask must be bool, one per memory position");
  const std::pair<const std::optional<Tensor>*, const char*> optional[] = {{&shrinkage, "shrinkage"},
                                                                           {&selection, "selection"},
                                                                           {&memory_mask, "memory_mask"},
                                                                           {&centers, "centers"},
                                                                           {&precision, "precision"}};
  check_device(memory_key, query_key, "memory_key");
  for (const auto& [tensor, name] : optional)
    if (*tensor) check_device(**tensor, query_key, name);

  Match p;
  p.query = operand_of(query_key, "query_key");
  p.key = operand_of(memory_key, "memory_key");
  p.shrinkage = operand_of(shrinkage, "shrinkage");
  p.selection = operand_of(selection, "selection");
  if (memory_mask) {
    p.mask.data = memory_mask->const_data_ptr();
    p.mask.batch_stride = memory_mask->stride(0);
    p.mask.positions = positions_of(*memory_mask, 1);
  }
  p.centers = floats_of(centers, "centers");
  p.precision = floats_of(precision, "precision");
  STD_TORCH_CHECK(bool(centers) == bool(precision) && (!centers || (centers->numel() == batch * memory * 2 &&
                                                                    precision->numel() == batch * memory)),
                  "centers and precision must hold one entry per memory position");
  if (batch == 1) p.key.batch_stride = 0;  // torch lets it be anything
  p.key_run = run_of(p.key);
  p.channels = int(channels);
  p.queries = int(queries);
  p.memory = int(memory);
  p.batch = int(batch);
  p.grid_width = int(std::max<int64_t>(1, query_key.size(query_key.dim() - 1)));
  p.l2 = l2;
  p.scale = float(scale);
  p.k = int(std::min(top_k, memory));
  return p;
}

// Entries of a row: room for half a tile above k, and for more where shared memory allows two blocks, as a
// row is then cut less often.
int capacity_of(const Match& p, int64_t shared_memory) {
  const bool selection = p.selection.data != nullptr;
  int capacity = std::clamp(p.k + 2 * kSpare, 112, kMaxCapacity);
  while (capacity > p.k + kSpare && shared_bytes(selection, p.channels, capacity) > shared_memory) --capacity;
  STD_TORCH_CHECK(shared_bytes(selection, p.channels, capacity) <= shared_memory, "top_k = ", p.k,
                  " with Ck = ", p.channels, " needs ", shared_bytes(selection, p.channels, capacity),
                  " bytes of shared memory, this GPU has ", shared_memory);
  return capacity;
}

// wgmma exists on compute capability 9.x only, where this build has sm_90a code for it.
bool use_group(const Device& device) {
#ifdef VOSOPS_CUDA_SM90A
  const char* choice = std::getenv("VOSOPS_CUDA_MMA");
  return device.generation() == 9 && !(choice && std::string_view(choice) == "sync");
#else
  return false;
#endif
}

}  // namespace

std::tuple<Tensor, Tensor> memory_match(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                                        std::optional<Tensor> selection, std::optional<Tensor> memory_mask,
                                        std::optional<Tensor> centers, std::optional<Tensor> precision,
                                        bool l2, double scale, int64_t top_k) {
  Match p = match_of(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale,
                     top_k);
  const Device device(query_key);
  const Tensor indices = make(query_key, {p.batch, p.queries, p.k}, ScalarType::Long);
  const Tensor weights = make(query_key, {p.batch, p.queries, p.k}, ScalarType::Float);
  if (indices.numel() == 0) return {indices, weights};
  p.indices = data_of<int64_t>(indices);
  p.weights = data_of<float>(weights);
  p.capacity = capacity_of(p, device.shared_memory());
  const int shared = int(shared_bytes(bool(selection), p.channels, p.capacity));
  const bool half = query_key.scalar_type() == ScalarType::Half, group = use_group(device);
  const MatchKernel kernel =
      half ? match_kernel_half(bool(selection), group) : match_kernel_bfloat16(bool(selection), group);
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "memory_match");
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel.function, kThreads, shared),
        "memory_match");

  // With too few queries for all multiprocessors the memory is split too, four tiles or more to each block.
  p.tiles = int(ceil_div(p.memory, kCols));
  const int64_t blocks = ceil_div(p.queries, kRows);
  const int64_t fitting = int64_t(std::max(1, resident)) * device.multiprocessors() / (blocks * p.batch);
  const int64_t most = std::clamp<int64_t>(fitting, 1, 65535);
  cut_tiles(p, std::min<int64_t>(most, ceil_div(p.tiles, 4)));
  const auto launch = [&](const Match& part) {
    const dim3 grid(unsigned(blocks), unsigned(part.splits), unsigned(p.batch));
    check(kernel.launch(part, grid, shared, device.stream()), "memory_match");
  };
  const Tensor kept = make(query_key, {p.batch, p.queries, p.splits, p.k}, ScalarType::Long);
  p.kept = data_of<uint64_t>(kept);
  std::optional<Tensor> groups;
  if (p.splits >= kSampledSplits && p.k <= kSampledTopK && p.tiles >= kSampledTiles) {
    groups = make(query_key, {p.batch, p.queries, kCols}, ScalarType::Int);
    p.groups = reinterpret_cast<uint32_t*>(data_of<int32_t>(*groups));
    check(cudaMemsetAsync(p.groups, 0, groups->numel() * sizeof(uint32_t), device.stream()), "memory_match");
    launch(sample_of(p, p.tiles / 8, most));
  }
  launch(p);
  check(launch_merge(p, device.stream()), "memory_match, merge");
  return {indices, weights};
}

}  // namespace vosops::gpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CUDA, m) {
  m.impl("memory_match", TORCH_BOX(&vosops::gpu::memory_match));
  m.impl("memory_gather", TORCH_BOX(&vosops::gpu::memory_gather));
  m.impl("memory_gather_backward", TORCH_BOX(&vosops::gpu::memory_gather_backward));
}
