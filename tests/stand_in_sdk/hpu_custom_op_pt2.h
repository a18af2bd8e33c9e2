// What the ops need of Habana's header of this name, declared anew; the functions are defined by the tests. Where
// Habana's PyTorch is installed, its own header is used.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace habana {

struct PartialOutputMetaData {
    at::ScalarType dtype = at::ScalarType::Undefined;
    std::vector<int64_t> shape;
};

using PartialOutputMetaDataVector = std::vector<PartialOutputMetaData>;

namespace custom_op {

using OutputMetaFn = std::function<PartialOutputMetaDataVector(const at::Stack&)>;
using FillParamsFn = std::function<std::shared_ptr<void>(const at::Stack&, size_t&)>;

class UserCustomOpDescriptor {
   public:
    UserCustomOpDescriptor() = default;
    UserCustomOpDescriptor(const std::string& schema, const std::string& guid, OutputMetaFn meta, FillParamsFn params);
    std::vector<at::Tensor> execute(const std::vector<c10::IValue>& inputs);
    static const UserCustomOpDescriptor& getUserCustomOpDescriptor(const std::string& op);
    const std::string& getSchemaName() const;
    const std::string& getGuid() const;
    const OutputMetaFn& getOutputMetaFn() const;
    const FillParamsFn& getFillParamsFn() const;

   private:
    std::string schema_, guid_;
    OutputMetaFn output_meta_;
    FillParamsFn fill_params_;
};

void registerUserCustomOp(const std::string& schema, const std::string& guid, OutputMetaFn meta, FillParamsFn params);

}  // namespace custom_op
}  // namespace habana
