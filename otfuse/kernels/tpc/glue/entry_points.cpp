// What Habana's graph compiler calls, by these names, in the library that GC_KERNEL_PATH lists.
//
// Every answer is read off the table of kernels. What does not fit is answered by a code, with the value that would
// have fitted written back. The graph compiler counts dimensions from the fastest, the table from the outermost.

#include <algorithm>
#include <cstring>

#include "elfs.hpp"
#include "kernels.hpp"

using namespace tpc_lib_api;
using otfuse::Elf, otfuse::Kernel, otfuse::TensorRow, otfuse::Type;

namespace {

using Sizes = otfuse::Sizes<uint64_t>;

const Kernel* find_kernel(const GuidInfo& guid) {
    const std::string name(guid.name, strnlen(guid.name, MAX_NODE_NAME));
    for (const Kernel& kernel : otfuse::kernels())
        if (kernel.guid() == name) return &kernel;
    return nullptr;
}

const Elf* find_elf(DeviceId device, const Kernel& kernel, TensorDataType values) {
    const std::string name = std::string(kernel.name) + (values == DATA_BF16 ? "_bf16" : "_f32");
    const Elf* end = otfuse::ELFS + otfuse::NUM_ELFS;
    const Elf* elf = std::find_if(otfuse::ELFS, end, [&](const Elf& e) { return e.device == device && e.name == name; });
    return elf == end ? nullptr : elf;
}

// float32 or bfloat16, as the first tensor that may be either says.
TensorDataType value_type(const Kernel& kernel, const Tensor* inputs) {
    for (size_t i = 0; i < kernel.inputs.size(); ++i)
        if (kernel.inputs[i].type == Type::VALUES)
            return inputs[i].geometry.dataType == DATA_BF16 ? DATA_BF16 : DATA_F32;
    return DATA_F32;
}

TensorDataType data_type(Type type, TensorDataType values) { return type == Type::VALUES ? values : DATA_F32; }

GlueCodeReturn check_type(TensorGeometry& tensor, TensorDataType expected) {
    if (tensor.dataType == expected) return GLUE_SUCCESS;
    tensor.dataType = expected;
    return GLUE_INCOMPATIBLE_DATA_TYPE;
}

// A letter that is met for the first time is learned. `wrong` is the code where a size differs.
GlueCodeReturn check_sizes(TensorGeometry& tensor, const TensorRow& row, Sizes& known, GlueCodeReturn wrong) {
    const auto rank = static_cast<uint32_t>(std::strlen(row.sizes));
    if (tensor.dims != rank) {
        tensor.dims = rank;
        return wrong;
    }
    for (uint32_t i = 0; i < rank; ++i) {
        uint64_t& size = tensor.maxSizes[rank - 1 - i];
        const uint64_t expected = otfuse::expected(row.sizes[i], known, size);
        if (size == expected) continue;
        size = expected;
        return wrong;
    }
    return GLUE_SUCCESS;
}

GlueCodeReturn check_counts(const Kernel& kernel, HabanaKernelParams& params) {
    const auto inputs = static_cast<uint32_t>(kernel.inputs.size());
    const auto outputs = static_cast<uint32_t>(kernel.outputs.size());
    if (params.inputTensorNr != inputs) {
        params.inputTensorNr = inputs;
        return GLUE_INCOMPATIBLE_INPUT_COUNT;
    }
    if (params.outputTensorNr != outputs) {
        params.outputTensorNr = outputs;
        return GLUE_INCOMPATIBLE_OUTPUT_COUNT;
    }
    return GLUE_SUCCESS;
}

GlueCodeReturn check_tensors(const Kernel& kernel, HabanaKernelParams& params, TensorDataType values, Sizes& known) {
    for (size_t i = 0; i < kernel.inputs.size(); ++i) {
        TensorGeometry& tensor = params.inputTensors[i].geometry;
        if (auto code = check_type(tensor, data_type(kernel.inputs[i].type, values))) return code;
        if (auto code = check_sizes(tensor, kernel.inputs[i], known, GLUE_INCOMPATIBLE_INPUT_SIZE)) return code;
    }
    for (size_t i = 0; i < kernel.outputs.size(); ++i) {
        TensorGeometry& tensor = params.outputTensors[i].geometry;
        if (auto code = check_type(tensor, data_type(kernel.outputs[i].type, values))) return code;
        if (auto code = check_sizes(tensor, kernel.outputs[i], known, GLUE_INCOMPATIBLE_OUTPUT_SIZE)) return code;
    }
    return GLUE_SUCCESS;
}

// There is something to do, and room for it.
bool supported(const Kernel& kernel, const Sizes& known) {
    const bool empty = std::any_of(known.begin(), known.end(), [](const auto& size) { return size.second == 0; });
    return !empty && kernel.fits(known);
}

// The ops pass one word for each scalar, in the order of the table.
GlueCodeReturn read_scalars(const Kernel& kernel, const UserParams& given, uint32_t* words, Sizes& known) {
    const size_t bytes = kernel.scalars.size() * sizeof(uint32_t);
    if (given.nodeParamsSize != bytes || (bytes && !given.nodeParams)) return GLUE_MISSING_PRIVATE_STRUCTURE;
    if (bytes) std::memcpy(words, given.nodeParams, bytes);
    for (size_t i = 0; i < kernel.scalars.size(); ++i)
        if (kernel.scalars[i].letter) known[kernel.scalars[i].letter] = words[i];
    return GLUE_SUCCESS;
}

void set_index_space(const Kernel& kernel, const Sizes& known, HabanaKernelInstantiation& instance) {
    instance.indexSpaceRank = static_cast<uint32_t>(kernel.index_space.size());
    for (size_t d = 0; d < kernel.index_space.size(); ++d) {
        const otfuse::Walk& walk = kernel.index_space[d];
        const uint64_t step = walk.step * (walk.tiles ? known.at(walk.tiles) : 1);
        instance.indexSpaceGeometry[d] = (known.at(walk.letter) + step - 1) / step;
    }
}

// Of one dimension of a tensor, by a member.
DimIndexSpaceMapping touched(const Kernel& kernel, char size, const Sizes& known) {
    for (size_t d = 0; d < kernel.index_space.size(); ++d) {
        const otfuse::Walk& walk = kernel.index_space[d];
        const auto step = static_cast<float>(walk.step);
        if (walk.letter == size && !walk.tiles) return {static_cast<uint32_t>(d), step, 0.0f, step - 1.0f, false};
    }
    return {0, 0.0f, 0.0f, static_cast<float>(otfuse::size_of(size, known)) - 1.0f, false};
}

void set_access(const Kernel& kernel, const std::vector<TensorRow>& rows, const Sizes& known,
                TensorAccessPattern* patterns) {
    for (size_t t = 0; t < rows.size(); ++t) {
        const size_t rank = std::strlen(rows[t].sizes);
        patterns[t].Value = 0;
        for (size_t i = 0; i < rank; ++i) patterns[t].mapping[rank - 1 - i] = touched(kernel, rows[t].sizes[i], known);
    }
}

GlueCodeReturn copy_elf(const Elf& elf, DeviceKernel& kernel) {
    const uint32_t room = kernel.elfSize;
    kernel.elfSize = elf.size;
    if (room < elf.size || !kernel.kernelElf) return GLUE_INSUFFICIENT_ELF_BUFFER;
    std::memcpy(kernel.kernelElf, elf.code, elf.size);
    return GLUE_SUCCESS;
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default")))

// `guids` null, or `count` less than there are: the count comes back, and as many names as there is room for.
ENTRY GlueCodeReturn GetKernelGuids(DeviceId device, uint32_t* count, GuidInfo* guids) {
    if (!count) return GLUE_FAILED;
    uint32_t found = 0;
    for (const Kernel& kernel : otfuse::kernels()) {
        if (!find_elf(device, kernel, DATA_F32) || !find_elf(device, kernel, DATA_BF16)) continue;
        if (guids && found < *count) {
            guids[found] = GuidInfo{};
            std::strncpy(guids[found].name, kernel.guid().c_str(), MAX_NODE_NAME - 1);
        }
        ++found;
    }
    *count = found;
    return GLUE_SUCCESS;
}

ENTRY GlueCodeReturn InstantiateTpcKernel(const HabanaKernelParams* given, HabanaKernelInstantiation* instance) {
    if (!given || !instance) return GLUE_FAILED;
    HabanaKernelParams& params = const_cast<HabanaKernelParams&>(*given);  // to write back what would have fitted
    const Kernel* kernel = find_kernel(params.guid);
    if (!kernel) return GLUE_NODE_NOT_FOUND;
    if (auto code = check_counts(*kernel, params)) return code;
    const TensorDataType values = value_type(*kernel, params.inputTensors);
    const Elf* elf = find_elf(params.deviceId, *kernel, values);
    if (!elf) return GLUE_NODE_NOT_FOUND;
    Sizes known;
    if (auto code = read_scalars(*kernel, params.nodeParams, instance->kernel.scalarParams, known)) return code;
    if (auto code = check_tensors(*kernel, params, values, known)) return code;
    if (!supported(*kernel, known)) return GLUE_UNSUPPORTED_LAYER_CONFIGURATION;
    set_index_space(*kernel, known, *instance);
    set_access(*kernel, kernel->inputs, known, instance->inputTensorAccessPattern);
    set_access(*kernel, kernel->outputs, known, instance->outputTensorAccessPattern);
    instance->kernel.paramsNr = static_cast<uint32_t>(kernel->scalars.size());
    instance->auxiliaryTensorNr = 0;
    instance->preferredSplitDim = 0;
    return copy_elf(*elf, instance->kernel);
}

ENTRY GlueCodeReturn GetShapeInference(DeviceId, const ShapeInferenceParams* params, ShapeInferenceOutput* output) {
    if (!params || !output) return GLUE_FAILED;
    const Kernel* kernel = find_kernel(params->pGuid ? *params->pGuid : params->guid);
    if (!kernel) return GLUE_NODE_NOT_FOUND;
    if (params->inputTensorsNr != kernel->inputs.size()) return GLUE_INCOMPATIBLE_INPUT_COUNT;
    if (params->outputTensorsNr != kernel->outputs.size()) return GLUE_INCOMPATIBLE_OUTPUT_COUNT;
    Sizes known;
    uint32_t words[MAX_SCALAR_PARAMS];
    if (auto code = read_scalars(*kernel, params->nodeParams, words, known)) return code;
    for (size_t i = 0; i < kernel->inputs.size(); ++i) {
        TensorGeometry& tensor = params->inputTensors[i]->geometry;
        if (auto code = check_sizes(tensor, kernel->inputs[i], known, GLUE_INCOMPATIBLE_INPUT_SIZE)) return code;
    }
    for (size_t i = 0; i < kernel->outputs.size(); ++i) {
        TensorGeometry& tensor = output->outputTensors[i]->geometry;
        const std::string sizes = kernel->outputs[i].sizes;
        tensor.dims = static_cast<uint32_t>(sizes.size());
        for (size_t d = 0; d < sizes.size(); ++d) {
            const size_t place = sizes.size() - 1 - d;
            tensor.maxSizes[place] = tensor.minSizes[place] = otfuse::size_of(sizes[d], known);
        }
    }
    return GLUE_SUCCESS;
}

ENTRY uint64_t GetLibVersion() { return 1; }
