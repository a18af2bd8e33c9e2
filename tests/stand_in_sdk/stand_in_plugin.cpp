// Habana's PyTorch plugin as far as the ops use it: keeps what is registered, and hands an op's guid, parameters and
// tensors to a function of the test, in the place of the graph compiler.

#include <ATen/Functions.h>

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

}  // namespace

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
