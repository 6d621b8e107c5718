// The device "cuda" with the host's memory and the CPU's operators, for a PyTorch without CUDA.
// A tensor of it and its alias on the CPU are the same bytes.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;

namespace {

DeviceIndex variable(const char *name, int missing) {
  const char *text = std::getenv(name);
  return static_cast<DeviceIndex>(text ? std::atoi(text) : missing);
}

// A process of torchrun sees as many devices as it has ranks, and has memory on its own.
const DeviceIndex DEVICES = variable("LOCAL_WORLD_SIZE", 1);
const Device OWN{DeviceType::CUDA, variable("LOCAL_RANK", 0)};

c10::DispatchKey key_of(Device device) {
  return device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
}

// The CPU's generator; the CPU's operators take it only while it has the name of their device.
struct Generator final : at::CPUGeneratorImpl {
  Generator() : CPUGeneratorImpl(c10::detail::getNonDeterministicRandom()) { rename(OWN); }
  void rename(Device device) {
    device_ = device;
    key_set_ = c10::DispatchKeySet(key_of(device));
  }
};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    auto deleter = memory.get_deleter();
    auto *data = memory.get();
    return {data, memory.release_context(), deleter, OWN};
  }
  void copy_data(void *to, const void *from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} allocator;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return OWN; }
  Device getDevice() const override { return OWN; }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Stream getStream(Device d) const noexcept override { return stream(d); }
  c10::Stream getNewStream(Device d, int) const override { return stream(d); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  void record(void **, const c10::Stream &, DeviceIndex, c10::EventFlag) const override {}
  void block(void *, const c10::Stream &) const override {}
  bool queryEvent(void *) const override { return true; }
  void destroyEvent(void *, DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream &) const override { return true; }
  void synchronizeStream(const c10::Stream &) const override {}
  void synchronizeEvent(void *) const override {}
  void synchronizeDevice(DeviceIndex) const override {}

private:
  static c10::Stream stream(Device d) { return c10::Stream(c10::Stream::DEFAULT, d); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

} // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface { // the name by which PyTorch looks for it
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void *) const override { return false; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return OWN.index(); }
  DeviceIndex current_device() const override { return OWN.index(); }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return OWN.index(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return OWN.index(); }
  void setCurrentDevice(DeviceIndex) const override {}
  at::Allocator *getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return make_generator<::Generator>();
  }
  const at::Generator &getDefaultGenerator(DeviceIndex) const override {
    static auto generator = make_generator<::Generator>();
    return generator;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
} // namespace at

namespace {

Tensor alias(const Tensor &x, Device device) {
  if (!x.defined() || x.device().type() == device.type())
    return x;
  auto *kept = new c10::Storage(x.storage());
  auto release = [](void *storage) { delete static_cast<c10::Storage *>(storage); };
  c10::DataPtr data{kept->mutable_data(), kept, release, device};
  auto *owner = device.is_cuda() ? &allocator : c10::GetCPUAllocator();
  c10::Storage storage({}, kept->nbytes(), std::move(data), owner, true);
  c10::DispatchKeySet keys(key_of(device));
  auto y = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  y._set_conj(x.is_conj());
  y._set_neg(x.is_neg());
  return y;
}

Tensor on_host(const Tensor &x) { return alias(x, c10::kCPU); }
Tensor on_device(const Tensor &x) { return alias(x, OWN); }

// All tensors of a list of arguments or results, in place.
void each_tensor(std::vector<IValue> &values, const std::function<Tensor(const Tensor &)> &change) {
  for (IValue &value : values) {
    if (value.isTensor()) {
      value = change(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor &x : value.toTensorVector())
        list.push_back(change(x));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> &x : value.toOptionalTensorList())
        list.push_back(x ? std::optional(change(*x)) : std::nullopt);
      value = list;
    }
  }
}

std::vector<Tensor> tensors_of(std::vector<IValue> values) {
  std::vector<Tensor> found;
  each_tensor(values, [&](const Tensor &x) { return found.emplace_back(x); });
  return found;
}

// A CUDA graph: what was called while it was captured, to be called again on the same memory.
struct Graph {
  struct Call {
    std::function<void()> work; // or empty, for a kernel of Triton
    int kernel;
  };
  std::vector<Call> calls;
  std::unordered_map<char *, std::vector<char>> before; // a capture changes nothing

  void keep(const c10::Storage &s) { keep(static_cast<char *>(s.mutable_data()), s.nbytes()); }
  void keep(char *memory, size_t bytes) {
    if (!before.count(memory))
      before.emplace(memory, std::vector<char>(memory, memory + bytes));
  }
} *capturing = nullptr;

void refuse_in_capture(const char *what) {
  TORCH_CHECK(!capturing, "operation not permitted when stream is capturing: ", what);
}

void by_the_cpu(const c10::OperatorHandle &, torch::jit::Stack *);

void keep_written(const c10::OperatorHandle &op, const std::vector<IValue> &given) {
  for (size_t i = 0; i < given.size(); i++) {
    auto *info = op.schema().arguments()[i].alias_info();
    if (info && info->isWrite())
      for (const Tensor &x : tensors_of({given[i]}))
        capturing->keep(x.storage());
  }
}

void record(const c10::OperatorHandle &op, std::vector<IValue> given,
            std::vector<IValue> returned) {
  auto again = [op, given = std::move(given), kept = tensors_of(std::move(returned))] {
    torch::jit::Stack stack(given.begin(), given.end());
    by_the_cpu(op, &stack);
    auto found = tensors_of(stack);
    for (size_t i = 0; i < kept.size(); i++)
      if (kept[i].defined() && !kept[i].is_alias_of(found[i]))
        on_host(kept[i]).copy_(on_host(found[i]));
  };
  capturing->calls.push_back({again, -1});
}

std::vector<IValue> popped(torch::jit::Stack *stack, size_t count) {
  auto values = torch::jit::last(*stack, count).vec();
  torch::jit::drop(*stack, count);
  return values;
}

// The CPU's operators would take what a GPU's refuse: only numbers and indices come from the host.
void check_devices(const c10::OperatorHandle &op, const std::vector<IValue> &given) {
  auto &name = op.schema().operator_name().name;
  bool indexes = name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
  for (size_t i = 0; i < (indexes ? 1 : given.size()); i++)
    for (const Tensor &x : tensors_of({given[i]}))
      TORCH_CHECK(!x.defined() || !x.device().is_cpu() || x.dim() == 0,
                  "Expected all tensors to be on the same device, but one of ", name,
                  " is on the host");
}

// Calls the CPU's operator on aliases; its results are aliases, or tensors that it was given.
void by_the_cpu(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  auto given = popped(stack, op.schema().arguments().size());
  check_devices(op, given);
  auto arguments = given;
  std::vector<std::pair<Tensor, Tensor>> pairs;
  each_tensor(arguments, [&](const Tensor &x) {
    return x.defined() && x.is_cuda() ? pairs.emplace_back(x, on_host(x)).second : x;
  });
  ::Generator *generator = nullptr;
  for (IValue &value : arguments) {
    if (value.isGenerator())
      generator = dynamic_cast<::Generator *>(value.toGenerator().unsafeGetGeneratorImpl());
    if (value.isDevice())
      value = Device(c10::kCPU);
  }
  if (capturing)
    keep_written(op, given);
  stack->insert(stack->end(), arguments.begin(), arguments.end());
  if (generator)
    generator->rename(c10::kCPU);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (generator)
    generator->rename(OWN);
  for (auto &[x, used] : pairs) // an output that was resized
    if (x.const_data_ptr() != used.const_data_ptr() || x.sizes() != used.sizes() ||
        x.strides() != used.strides()) {
      auto moved = on_device(used);
      auto *own = x.unsafeGetTensorImpl();
      own->set_storage_keep_dtype(moved.storage());
      own->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
    }
  auto returned = popped(stack, op.schema().returns().size());
  each_tensor(returned, [&](const Tensor &found) {
    for (auto &[x, used] : pairs)
      if (found.is_same(used))
        return x;
    return on_device(found);
  });
  if (capturing)
    record(op, given, returned);
  stack->insert(stack->end(), returned.begin(), returned.end());
}

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, type);
}

Tensor &run_or_record(Tensor &out, const std::function<void()> &work) {
  if (capturing) {
    capturing->keep(out.storage());
    capturing->calls.push_back({work, -1});
  }
  work();
  return out;
}

Tensor &copy_(Tensor &self, const Tensor &from, bool) {
  if (!self.is_cuda() || !from.is_cuda())
    refuse_in_capture("a copy between the host and the device");
  return run_or_record(self, [=] { on_host(self).copy_(on_host(from)); });
}

at::Scalar item(const Tensor &self) {
  refuse_in_capture("a number of the device");
  return on_host(self).item();
}

// Products of 16-bit numbers in float32, which only a GPU has.
Tensor &mm_out(const Tensor &a, const Tensor &b, at::ScalarType dtype, Tensor &out) {
  auto run = [=] { on_host(out).copy_(at::mm(on_host(a).to(dtype), on_host(b).to(dtype))); };
  return run_or_record(out, run);
}

Tensor &addmm_out(const Tensor &self, const Tensor &a, const Tensor &b, at::ScalarType dtype,
                  const at::Scalar &beta, const at::Scalar &alpha, Tensor &out) {
  auto run = [=] {
    auto product = at::mm(on_host(a).to(dtype), on_host(b).to(dtype));
    on_host(out).copy_(product.mul_(alpha).add_(on_host(self).to(dtype), beta));
  };
  return run_or_record(out, run);
}

int64_t math_attention(const Tensor &, const Tensor &, const Tensor &,
                       const std::optional<Tensor> &, double, bool, std::optional<double>, bool) {
  return 0; // SDPBackend.MATH
}

struct Silent final : c10::WarningHandler {
  void process(const c10::Warning &) override {}
};

// What NCCL does, by the backend of CPU tensors.
void register_collectives() {
  Silent silent; // PyTorch's own are overridden
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static torch::Library library(torch::Library::IMPL, "c10d", c10::DispatchKey::CUDA, __FILE__,
                                __LINE__);
  for (auto *name :
       {"allreduce_", "broadcast_", "barrier", "_allgather_base_", "_reduce_scatter_base_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

} // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("mm.dtype_out", &mm_out);
  m.impl("addmm.dtype_out", &addmm_out);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage", static_cast<Tensor &(*)(Tensor &, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
}

static const bool registered = [] {
  c10::SetAllocator(DeviceType::CUDA, &allocator);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&math_attention);
  register_collectives();
  return true;
}();

// For host_cuda.py.
extern "C" {
void storage_resize(c10::StorageImpl *storage, size_t bytes) {
  auto memory = allocator.allocate(bytes);
  if (auto both = std::min(bytes, storage->nbytes()))
    std::memcpy(memory.get(), storage->data(), both);
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(bytes);
}

Graph *graph_new() { return new Graph; }
void graph_delete(Graph *graph) { delete graph; }
void graph_resume(Graph *graph) { capturing = graph; }
void graph_pause() { capturing = nullptr; }
void graph_end(Graph *graph) {
  capturing = nullptr;
  for (auto &[memory, bytes] : graph->before)
    std::copy(bytes.begin(), bytes.end(), memory);
  graph->before.clear();
}

// Before a kernel of Triton, its number and each memory that it may change.
void graph_keep(Graph *graph, char *memory, size_t bytes) { graph->keep(memory, bytes); }
void graph_kernel(Graph *graph, int number) { graph->calls.push_back({nullptr, number}); }

// Makes the calls from a position on; returns the number of the next kernel, or -1 at the end.
int graph_replay(Graph *graph, int *position) {
  at::AutoDispatchBelowAutograd below;
  while (*position < static_cast<int>(graph->calls.size())) {
    auto &call = graph->calls[(*position)++];
    if (!call.work)
      return call.kernel;
    call.work();
  }
  return -1;
}
}
