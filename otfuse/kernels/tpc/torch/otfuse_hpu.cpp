// The kernels as ops of PyTorch: one for each row of the table, otfuse_tpc::NAME, with its implementation for HPU and
// for Meta (which torch.compile asks for shapes). Schemas, shapes and parameters all follow from the table, so one boxed
// function serves every op.
//
// An op takes contiguous tensors and numbers and gives new tensors. Derivatives, masks and the matrix products around
// it are Python's part (otfuse/_backends/tpc/backend.py).

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <hpu_custom_op_pt2.h>
#include <torch/library.h>

#include <cstring>

#include "kernels.hpp"

using otfuse::Kernel, otfuse::TensorRow, otfuse::Type;

namespace {

std::string schema(const Kernel& kernel) {
    std::string arguments, results;
    for (const auto& row : kernel.inputs) arguments += std::string(", Tensor ") + row.name;
    for (const auto& row : kernel.scalars) arguments += std::string(row.real ? ", float " : ", int ") + row.name;
    for (const auto& row : kernel.outputs) results += std::string(", Tensor ") + row.name;
    return std::string(kernel.name) + "(" + arguments.substr(2) + ") -> (" + results.substr(2) + ")";
}

at::ScalarType scalar_type(Type type, at::ScalarType values) { return type == Type::VALUES ? values : at::kFloat; }

// float32 or bfloat16, as the first tensor that may be either says.
at::ScalarType value_type(const Kernel& kernel, const at::Stack& arguments) {
    for (size_t i = 0; i < kernel.inputs.size(); ++i)
        if (kernel.inputs[i].type == Type::VALUES) return arguments[i].toTensor().scalar_type();
    return at::kFloat;
}

std::vector<int64_t> sizes_of(const at::Tensor& tensor, int64_t) { return tensor.sizes().vec(); }
std::vector<c10::SymInt> sizes_of(const at::Tensor& tensor, c10::SymInt) { return tensor.sym_sizes().vec(); }

// Every argument checked against the row, and what each letter stands for.
template <class Int>
otfuse::Sizes<Int> sizes(const Kernel& kernel, const at::Stack& arguments) {
    otfuse::Sizes<Int> known;
    const at::ScalarType values = value_type(kernel, arguments);
    TORCH_CHECK(values == at::kFloat || values == at::kBFloat16, kernel.op(), " takes float32 or bfloat16; got ", values);
    for (size_t i = 0; i < kernel.scalars.size(); ++i) {
        const char letter = kernel.scalars[i].letter;
        if (letter) known[letter] = arguments[kernel.inputs.size() + i].toInt();
    }
    for (size_t i = 0; i < kernel.inputs.size(); ++i) {
        const TensorRow& row = kernel.inputs[i];
        const at::Tensor& tensor = arguments[i].toTensor();
        TORCH_CHECK(tensor.scalar_type() == scalar_type(row.type, values), kernel.op(), ": ", row.name, " must be ",
                    scalar_type(row.type, values), "; got ", tensor.scalar_type());
        const auto given = sizes_of(tensor, Int(0));
        const std::string letters = row.sizes;
        TORCH_CHECK(given.size() == letters.size(), kernel.op(), ": ", row.name, " must have ", letters.size(),
                    " dimensions; got ", given.size());
        for (size_t d = 0; d < given.size(); ++d) {
            const Int expected = otfuse::expected(letters[d], known, given[d]);
            TORCH_CHECK(given[d] == expected, kernel.op(), ": dimension ", d, " of ", row.name, " must be ", letters[d],
                        " = ", expected, "; got ", given[d]);
        }
    }
    return known;
}

habana::PartialOutputMetaDataVector output_meta(const Kernel& kernel, const at::Stack& arguments) {
    const auto known = sizes<int64_t>(kernel, arguments);
    const at::ScalarType values = value_type(kernel, arguments);
    habana::PartialOutputMetaDataVector outputs;
    for (const TensorRow& row : kernel.outputs) {
        habana::PartialOutputMetaData output{scalar_type(row.type, values), {}};
        for (const char* size = row.sizes; *size; ++size) output.shape.push_back(otfuse::size_of(*size, known));
        outputs.push_back(std::move(output));
    }
    return outputs;
}

// One word for each scalar, in the order of the table: what the glue hands to the kernel.
std::shared_ptr<void> fill_params(const Kernel& kernel, const at::Stack& arguments, size_t& bytes) {
    const size_t count = kernel.scalars.size();
    std::shared_ptr<uint32_t> words(new uint32_t[count ? count : 1], std::default_delete<uint32_t[]>());
    for (size_t i = 0; i < count; ++i) {
        const c10::IValue& argument = arguments[kernel.inputs.size() + i];
        const auto real = static_cast<float>(kernel.scalars[i].real ? argument.toDouble() : 0.0);
        const auto integer = static_cast<int32_t>(kernel.scalars[i].real ? 0 : argument.toInt());
        std::memcpy(words.get() + i, kernel.scalars[i].real ? static_cast<const void*>(&real) : &integer, 4);
    }
    bytes = count * sizeof(uint32_t);
    return words;
}

const Kernel& kernel_of(const c10::OperatorHandle& op) {
    const std::string& name = op.schema().name();
    for (const Kernel& kernel : otfuse::kernels())
        if (kernel.op() == name) return kernel;
    TORCH_CHECK(false, name, " is not in the table of kernels");
}

at::Stack take_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    return torch::jit::pop(*stack, op.schema().arguments().size());
}

void run_on_hpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const Kernel& kernel = kernel_of(op);
    const at::Stack arguments = take_arguments(op, stack);
    for (size_t i = 0; i < kernel.inputs.size(); ++i)
        TORCH_CHECK(arguments[i].toTensor().is_contiguous(), kernel.op(), ": ", kernel.inputs[i].name,
                    " must be contiguous; pass it by .contiguous()");
    auto descriptor = habana::custom_op::UserCustomOpDescriptor::getUserCustomOpDescriptor(kernel.op());
    for (at::Tensor& output : descriptor.execute(arguments)) stack->emplace_back(std::move(output));
}

void shapes_on_meta(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const Kernel& kernel = kernel_of(op);
    const at::Stack arguments = take_arguments(op, stack);
    const auto known = sizes<c10::SymInt>(kernel, arguments);
    const at::ScalarType values = value_type(kernel, arguments);
    const auto options = arguments[0].toTensor().options();
    for (const TensorRow& row : kernel.outputs) {
        std::vector<c10::SymInt> shape;
        for (const char* size = row.sizes; *size; ++size) shape.push_back(otfuse::size_of(*size, known));
        stack->emplace_back(at::empty_symint(shape, options.dtype(scalar_type(row.type, values))));
    }
}

}  // namespace

// otfuse's Python defines the same ops, with shapes of its own, where it was imported first.
TORCH_LIBRARY_FRAGMENT(otfuse_tpc, library) {
    for (const Kernel& kernel : otfuse::kernels()) {
        if (c10::Dispatcher::singleton().findSchema({kernel.op(), ""})) continue;
        library.def(torch::schema(schema(kernel).c_str()));
        auto shapes = torch::CppFunction::makeFromBoxedFunction<&shapes_on_meta>();
        library.impl(kernel.name, torch::dispatch(c10::DispatchKey::Meta, std::move(shapes)));
    }
}

TORCH_LIBRARY_IMPL(otfuse_tpc, HPU, library) {
    for (const Kernel& kernel : otfuse::kernels()) {
        library.impl(kernel.name, torch::CppFunction::makeFromBoxedFunction<&run_on_hpu>());
        habana::custom_op::registerUserCustomOp(
            kernel.op(), kernel.guid(), [&kernel](const at::Stack& stack) { return output_meta(kernel, stack); },
            [&kernel](const at::Stack& stack, size_t& bytes) { return fill_params(kernel, stack, bytes); });
    }
}
