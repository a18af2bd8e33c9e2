// Habana's PyTorch plugin as far as the ops use it: keeps what is registered, and hands an op's guid, parameters and
// tensors to a function of the test, in the place of the graph compiler. To torch there is one device.

#include <ATen/Functions.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>

#include "hpu_custom_op_pt2.h"

namespace {

struct Argument {
    void* data;
    int64_t dims, sizes[5];
    int64_t bfloat16;
};

using Executor = void (*)(const char* guid, const void* params, uint64_t bytes, const Argument*, uint64_t inputs,
                          uint64_t outputs);
Executor executor = nullptr;

Argument argument(const at::Tensor& tensor) {
    Argument made{tensor.data_ptr(), tensor.dim(), {}, tensor.scalar_type() == at::kBFloat16};
    for (int64_t d = 0; d < tensor.dim(); ++d) made.sizes[d] = tensor.size(d);
    return made;
}

std::map<std::string, habana::custom_op::UserCustomOpDescriptor>& registered() {
    static std::map<std::string, habana::custom_op::UserCustomOpDescriptor> ops;
    return ops;
}

struct HPUHooks : at::HPUHooksInterface {
    explicit HPUHooks(at::HPUHooksArgs) {}
    bool hasHPU() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

// Everything is done when it is asked for: there is nothing to wait for.
struct StandInGuard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::HPU> {
    static c10::Device device() { return {c10::DeviceType::HPU, 0}; }
    static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
    c10::Device exchangeDevice(c10::Device) const override { return device(); }
    c10::Device getDevice() const override { return device(); }
    c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
    c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
    c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(HPU, StandInGuard)

}  // namespace

namespace at {
REGISTER_HPU_HOOKS(HPUHooks);
}

extern "C" void stand_in_execute_with(Executor function) { executor = function; }

namespace habana::custom_op {

UserCustomOpDescriptor::UserCustomOpDescriptor(const std::string& schema, const std::string& guid, OutputMetaFn meta,
                                               FillParamsFn params)
    : schema_(schema), guid_(guid), output_meta_(meta), fill_params_(params) {}

const UserCustomOpDescriptor& UserCustomOpDescriptor::getUserCustomOpDescriptor(const std::string& op) {
    return registered().at(op);
}

const std::string& UserCustomOpDescriptor::getSchemaName() const { return schema_; }
const std::string& UserCustomOpDescriptor::getGuid() const { return guid_; }
const OutputMetaFn& UserCustomOpDescriptor::getOutputMetaFn() const { return output_meta_; }
const FillParamsFn& UserCustomOpDescriptor::getFillParamsFn() const { return fill_params_; }

std::vector<at::Tensor> UserCustomOpDescriptor::execute(const std::vector<c10::IValue>& inputs) {
    std::vector<at::Tensor> outputs;
    std::vector<Argument> arguments;
    for (const c10::IValue& value : inputs)
        if (value.isTensor()) arguments.push_back(argument(value.toTensor()));
    const uint64_t count = arguments.size();
    for (const PartialOutputMetaData& meta : output_meta_(inputs)) {
        outputs.push_back(at::empty(meta.shape, inputs[0].toTensor().options().dtype(meta.dtype)));
        arguments.push_back(argument(outputs.back()));
    }
    size_t bytes = 0;
    const std::shared_ptr<void> params = fill_params_(inputs, bytes);
    TORCH_CHECK(executor, "the test has set no executor");
    executor(guid_.c_str(), params.get(), bytes, arguments.data(), count, outputs.size());
    return outputs;
}

void registerUserCustomOp(const std::string& schema, const std::string& guid, OutputMetaFn meta, FillParamsFn params) {
    registered().insert_or_assign(schema, UserCustomOpDescriptor(schema, guid, meta, params));
}

}  // namespace habana::custom_op
