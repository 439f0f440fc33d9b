// A device for torch that is none: its memory is the processor's, and so is its arithmetic, but torch takes its tensors for those
// of another device.  So what fails on a GPU fails here: tensors of both devices in one operation, numbers that are read without
// being brought over.  Whatever would make the processor wait for a GPU is counted, and refused on request.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = c10::IntArrayRef;
using SymbolicSizes = c10::SymIntArrayRef;

constexpr auto kSimulated = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kSimulated, 0);

// ---------------------------------------------------------------- waiting, and float64

std::atomic<long> waits{0};
std::atomic<bool> may_wait{true};
std::atomic<bool> has_float64{true};
thread_local int working = 0;

// What the device does for itself, on the processor, is no waiting.
struct Working {
  Working() { ++working; }
  ~Working() { --working; }
};

void wait() {
  if (working) return;
  ++waits;
  TORCH_CHECK(may_wait, "this waits for the device");
}

void refuse_float64(std::optional<at::ScalarType> type) {
  TORCH_CHECK_TYPE(has_float64 || !type || (*type != at::kDouble && *type != at::kComplexDouble), "this device has no float64");
}

// ---------------------------------------------------------------- what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSimulated; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  static void release(void* bytes) { c10::free_cpu(bytes); }
  c10::DataPtr allocate(size_t count) override {
    void* bytes = count ? c10::alloc_cpu(count) : nullptr;
    return {bytes, bytes, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
Memory memory;
REGISTER_ALLOCATOR(kSimulated, &memory);

struct Generator : at::CPUGeneratorImpl {
  Generator() {
    device_ = kDevice;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const { return true; }
  bool isBuilt() const { return true; }
  c10::DeviceIndex deviceCount() const { return 1; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t count) const override {
    auto* there = storage.unsafeGetStorageImpl();
    auto fresh = memory.allocate(count);
    if (there->nbytes() && count) std::memcpy(fresh.get(), there->data(), std::min(count, there->nbytes()));
    there->set_data_ptr_noswap(std::move(fresh));
    there->set_nbytes(count);
  }
};
Hooks hooks;
const bool hooked = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---------------------------------------------------------------- tensors

// The same memory as a tensor of the processor's.
Tensor seen(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kSimulated) return tensor;
  const auto options = tensor.options().device(at::kCPU).requires_grad(false);
  if (!tensor.numel()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  auto result = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) result = result.conj();
  return tensor.is_neg() ? at::_neg_view(result) : result;
}
Tensor seen(const MaybeTensor& tensor) { return tensor ? seen(*tensor) : Tensor(); }

// A result of the processor's on the device.
Tensor brought(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  Working now;
  auto result = at::empty(tensor.sizes(), tensor.options().device(kDevice));
  seen(result).copy_(tensor);
  return result;
}

void must_be_here(std::initializer_list<Tensor> tensors) {
  for (const auto& tensor : tensors) TORCH_CHECK(tensor.device() == kDevice, "a layer's tensors are not all on the device");
}

Tensor empty(Sizes sizes, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  refuse_float64(type);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(sizes, &memory, keys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(Sizes sizes, Sizes strides, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  refuse_float64(type);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(sizes, strides, &memory, keys, c10::dtype_or_default(type));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const bool from_processor = from.device() != kDevice, to_processor = to.device() != kDevice;
  if (to_processor || (from_processor && !non_blocking)) wait();
  Working now;
  seen(to).copy_(seen(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  seen(to).copy_(seen(from));
  return to;
}

at::Scalar number(const Tensor& tensor) {
  wait();
  Working now;
  return at::_local_scalar_dense(seen(tensor));
}

const Tensor& resize(const Tensor& tensor, SymbolicSizes sizes, std::optional<at::MemoryFormat>) {
  const auto wanted = C10_AS_INTARRAYREF_SLOW(sizes);
  auto* impl = tensor.unsafeGetTensorImpl();
  const auto bytes = (impl->storage_offset() + c10::multiply_integers(wanted)) * tensor.itemsize();
  if (impl->storage().nbytes() < bytes) hooks.resizePrivateUse1Bytes(impl->storage(), bytes);
  impl->set_sizes_contiguous(wanted);
  return tensor;
}

Tensor& set_storage_part(Tensor& tensor, at::Storage storage, int64_t offset, Sizes sizes, Sizes strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(sizes, strides);
  return tensor;
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return set_storage_part(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_storage_part(tensor, std::move(storage), 0, {count}, {1});
}

Tensor as_strided(const Tensor& tensor, SymbolicSizes sizes, SymbolicSizes strides, std::optional<c10::SymInt> offset) {
  const auto begin = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), begin);
}

Tensor view(const Tensor& tensor, SymbolicSizes sizes) { return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes)); }

Tensor reshape_alias(const Tensor& tensor, SymbolicSizes sizes, SymbolicSizes strides) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

Tensor unfold(const Tensor& tensor, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dimension, size, step);
}

// ---------------------------------------------------------------- layers for which torch has kernels of each device

Tensor convolution(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, Sizes stride, Sizes padding, Sizes dilation,
                   bool transposed, Sizes output_padding, int64_t groups) {
  must_be_here({x, weight});
  const auto added = bias && bias->defined() ? MaybeTensor(seen(bias)) : MaybeTensor();
  return brought(at::convolution(
      seen(x), seen(weight), added, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight, Sizes stride,
                                                        Sizes padding, Sizes dilation, bool transposed, Sizes output_padding,
                                                        int64_t groups, std::array<bool, 3> wanted) {
  must_be_here({gradient, x, weight});
  const std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [of_x, of_weight, of_bias] = at::convolution_backward(
      seen(gradient), seen(x), seen(weight), at::OptionalIntArrayRef(bias), stride, padding, dilation, transposed, output_padding,
      groups, wanted);
  return {brought(of_x), brought(of_weight), brought(of_bias)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& of_x, const Tensor& of_h, const Tensor& c, const MaybeTensor& bias_x,
                                             const MaybeTensor& bias_h) {
  must_be_here({of_x, of_h, c});
  auto gates = seen(of_x) + seen(of_h);
  if (seen(bias_x).defined()) gates = gates + seen(bias_x) + seen(bias_h);
  const auto parts = gates.chunk(4, 1);
  const auto i = parts[0].sigmoid(), f = parts[1].sigmoid(), g = parts[2].tanh(), o = parts[3].sigmoid();
  const auto next = f * seen(c) + i * g;
  return {brought(o * next.tanh()), brought(next), brought(at::cat({i, f, g, o}, 1))};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const MaybeTensor& at_h, const MaybeTensor& at_c, const Tensor& c,
                                                      const Tensor& next, const Tensor& kept, bool bias) {
  must_be_here({c, next, kept});
  const auto parts = seen(kept).chunk(4, 1);
  const auto &i = parts[0], &f = parts[1], &g = parts[2], &o = parts[3];
  const auto bounded = seen(next).tanh();
  const auto h = seen(at_h).defined() ? seen(at_h) : at::zeros_like(bounded);
  auto cell = h * o * (1 - bounded * bounded);
  if (seen(at_c).defined()) cell = cell + seen(at_c);
  const auto gates = at::cat(
      {cell * g * i * (1 - i), cell * seen(c) * f * (1 - f), cell * i * (1 - g * g), h * bounded * o * (1 - o)}, 1);
  return {brought(gates), brought(cell * f), bias ? brought(gates.sum(0)) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& of_x, const Tensor& of_h, const Tensor& h, const MaybeTensor& bias_x,
                                    const MaybeTensor& bias_h) {
  must_be_here({of_x, of_h, h});
  auto left = seen(of_x), right = seen(of_h);
  if (seen(bias_x).defined()) left = left + seen(bias_x), right = right + seen(bias_h);
  const auto x = left.chunk(3, 1), y = right.chunk(3, 1);
  const auto r = (x[0] + y[0]).sigmoid(), z = (x[1] + y[1]).sigmoid(), n = (x[2] + r * y[2]).tanh();
  return {brought(n + z * (seen(h) - n)), brought(at::cat({r, z, n, seen(h), y[2]}, 1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& at_h, const Tensor& kept, bool bias) {
  must_be_here({at_h, kept});
  const auto parts = seen(kept).chunk(5, 1);
  const auto &r = parts[0], &z = parts[1], &n = parts[2], &h = parts[3], &of_h = parts[4];
  const auto at_n = seen(at_h) * (1 - z) * (1 - n * n), at_r = at_n * of_h * r * (1 - r);
  const auto at_z = seen(at_h) * (h - n) * z * (1 - z);
  const auto left = at::cat({at_r, at_z, at_n}, 1), right = at::cat({at_r, at_z, at_n * r}, 1);
  return {brought(left), brought(right), brought(seen(at_h) * z), bias ? brought(left.sum(0)) : Tensor(),
          bias ? brought(right.sum(0)) : Tensor()};
}

// ---------------------------------------------------------------- everything else

// Operations whose result has a size that depends on numbers, or that look at numbers on a GPU themselves.
const std::array<std::string, 14> kWaiting{
    "aten::nonzero",       "aten::equal",       "aten::masked_select",      "aten::_unique",      "aten::_unique2",
    "aten::unique_dim",    "aten::bincount",    "aten::unique_consecutive", "aten::multinomial",  "aten::repeat_interleave",
    "aten::_linalg_eigh",  "aten::_linalg_svd", "aten::linalg_lstsq",       "aten::linalg_eigh"};

// Operations that take an index from the processor.
const std::array<std::string, 4> kIndexed{"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

void by_the_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto count = op.schema().arguments().size();
  bool here = false, elsewhere = false;
  const auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    here = here || tensor.device() == kDevice;
    elsewhere = elsewhere || (tensor.device() != kDevice && tensor.dim());
  };
  for (auto argument = stack->end() - count; argument != stack->end(); ++argument) {
    if (argument->isTensor()) look(argument->toTensor());
    if (argument->isTensorList())
      for (const Tensor& tensor : argument->toTensorVector()) look(tensor);
    // Random numbers are the processor's.
    if (argument->isGenerator() && argument->toGenerator().device() == kDevice) *argument = c10::IValue();
  }
  const auto among = [&](const auto& names) { return std::find(names.begin(), names.end(), name) != names.end(); };
  TORCH_CHECK(!(here && elsewhere) || among(kIndexed), "tensors of two devices in one operation: ", name);
  if ((here && elsewhere) || among(kWaiting)) wait();
  Working now;
  at::native::cpu_fallback(op, stack, false, c10::DispatchKey::CPU);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", number);
  library.impl("resize_", resize);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage_part);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("_thnn_fused_lstm_cell", lstm_cell);
  library.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  library.impl("_thnn_fused_gru_cell", gru_cell);
  library.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_processor>());
}

extern "C" {
long simulated_waits() { return waits; }
void simulated_may_wait(bool may) { may_wait = may; }
void simulated_has_float64(bool has) { has_float64 = has; }
}
