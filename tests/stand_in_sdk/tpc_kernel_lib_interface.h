// What the glue library needs of Habana's header of this name, declared anew with the same names and the same layout,
// so that the library compiles and runs on any machine. Sizes and offsets are asserted at the end. For tests only:
// where the SDK is, its own header is used.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tpc_lib_api {

constexpr uint32_t MAX_SCALAR_PARAMS = 32;
constexpr uint32_t MAX_NODE_NAME = 64;
constexpr uint32_t MAX_INDEX_SPACE_DIM_SIZE = 5;
constexpr uint32_t MAX_TENSOR_DIM = 25;

enum DeviceId { DEVICE_ID_GAUDI = 1, DEVICE_ID_GRECO, DEVICE_ID_GAUDI2, DEVICE_ID_GAUDI3, DEVICE_ID_MAX };

enum GlueCodeReturn {
    GLUE_SUCCESS = 0,
    GLUE_NODE_NOT_FOUND = 1,
    GLUE_INSUFFICIENT_ISA_BUFFER = 2,
    GLUE_INCOMPATIBLE_INPUT_COUNT = 3,
    GLUE_INCOMPATIBLE_INPUT_SIZE = 4,
    GLUE_INCOMPATIBLE_OUTPUT_COUNT = 5,
    GLUE_INCOMPATIBLE_OUTPUT_SIZE = 6,
    GLUE_INCOMPATIBLE_DATA_TYPE = 7,
    GLUE_UNSUPPORTED_LAYER_CONFIGURATION = 8,
    GLUE_INSUFFICIENT_AUX_BUFFER_SIZE = 9,
    GLUE_INSUFFICIENT_ELF_BUFFER = 18,
    GLUE_MISSING_PRIVATE_STRUCTURE = 19,
    GLUE_FAILED = 400,
};

enum TensorDataType {
    DATA_I8 = 1 << 2,
    DATA_U8 = 1 << 3,
    DATA_BF16 = 1 << 8,
    DATA_F16 = 1 << 9,
    DATA_I32 = 1 << 10,
    DATA_U32 = 1 << 11,
    DATA_F32 = 1 << 12,
    DATA_I64 = 1 << 13,
};

struct GuidInfo {
    char name[MAX_NODE_NAME];
    union {
        uint64_t Value;
    } nameHash;
    uint32_t kernelProperties;
};

struct UserParams {
    void* nodeParams;
    uint32_t nodeParamsSize;
};

struct TensorGeometry {
    uint32_t dims;
    uint64_t maxSizes[MAX_TENSOR_DIM];  // fastest dimension first
    uint64_t minSizes[MAX_TENSOR_DIM];
    TensorDataType dataType;
};

struct TensorQuantizationParam {
    int8_t zeroPoint;
    double scale;
};

struct TensorDataLayout {
    char layout[MAX_TENSOR_DIM];
};

struct Tensor {
    TensorGeometry geometry;
    TensorQuantizationParam quantizationParam;
    TensorDataLayout layout;
    uint32_t flags;
    const void* pData;
    uint32_t permutation[MAX_TENSOR_DIM];
    uint32_t reserved[6];
};

struct AuxTensor {
    TensorGeometry geometry;
    void* pData;
    uint64_t bufferSize;
    uint32_t flags;
    uint32_t reserved[6];
};

struct DimIndexSpaceMapping {
    uint32_t indexSpaceDim;
    float a, start_b, end_b;
    bool allRequired;
};

struct TensorAccessPattern {
    union {
        struct {
            uint32_t allRequired : 1, memsetBeforeExecution : 1, inputsReusability : 16, inputReusabilityBinding : 1;
            uint32_t sparseAccess : 1, noRmwAccess : 1, fullyAccessedOnce : 1, fullyWritten : 1, : 8;
        };
        uint32_t Value;
    };
    DimIndexSpaceMapping mapping[MAX_TENSOR_DIM];
    union {
        uint64_t u64Value;
    } memsetValue;
    uint32_t reserved[6];
};

struct HabanaKernelParams {
    int apiVersion;
    DeviceId deviceId;
    GuidInfo guid;
    UserParams nodeParams;
    Tensor* inputTensors;
    uint32_t inputTensorNr;
    Tensor* outputTensors;
    uint32_t outputTensorNr;
    uint32_t maxAvailableTpc;
    uint32_t useDeterministic;
    uint64_t uniqueNodeId;
    uint32_t debugFlags;
    uint16_t validInputTensors, validOutputTensors;
    uint32_t reserved[24];
};

struct DeviceKernel {
    void* kernelElf;
    uint32_t elfSize;
    uint32_t scalarParams[MAX_SCALAR_PARAMS];
    uint32_t paramsNr;
};

struct HabanaKernelInstantiation {
    uint32_t indexSpaceRank;
    uint64_t indexSpaceGeometry[MAX_INDEX_SPACE_DIM_SIZE];
    TensorAccessPattern* inputTensorAccessPattern;
    TensorAccessPattern* outputTensorAccessPattern;
    AuxTensor* auxiliaryTensors;
    uint32_t auxiliaryTensorNr;
    DeviceKernel kernel;
    uint32_t preferredSplitDim;
    uint32_t reserved[15];
};

struct NodeTensorPermutation {
    uint32_t permutation[MAX_TENSOR_DIM];
};

struct TensorShapeInfo {
    TensorGeometry geometry;
    uint32_t* hostAddress;
    uint32_t reserved[8];
};

struct ShapeInferenceParams {
    int apiVersion;
    uint64_t uniqueNodeId;
    GuidInfo guid;
    TensorShapeInfo** inputTensors;
    uint32_t inputTensorsNr;
    UserParams nodeParams;
    uint32_t outputTensorsNr;
    NodeTensorPermutation* inputPermutations;
    NodeTensorPermutation* outputPermutations;
    GuidInfo* pGuid;
    uint32_t maxAvailableTpc;
    uint32_t reserved[3];
};

struct ShapeInferenceOutput {
    TensorShapeInfo** outputTensors;
    uint32_t* invalidMask;
    uint32_t reserved[6];
};

static_assert(sizeof(GuidInfo) == 80 && offsetof(GuidInfo, nameHash) == 64);
static_assert(sizeof(TensorGeometry) == 416 && offsetof(TensorGeometry, dataType) == 408);
static_assert(sizeof(Tensor) == 600 && offsetof(Tensor, layout) == 432 && offsetof(Tensor, pData) == 464);
static_assert(sizeof(AuxTensor) == 464);
static_assert(sizeof(DimIndexSpaceMapping) == 20 && offsetof(DimIndexSpaceMapping, end_b) == 12);
static_assert(sizeof(TensorAccessPattern) == 536 && offsetof(TensorAccessPattern, memsetValue) == 504);
static_assert(sizeof(HabanaKernelParams) == 256 && offsetof(HabanaKernelParams, nodeParams) == 88);
static_assert(offsetof(HabanaKernelParams, outputTensors) == 120 && offsetof(HabanaKernelParams, reserved) == 160);
static_assert(sizeof(DeviceKernel) == 144 && offsetof(DeviceKernel, scalarParams) == 12);
static_assert(sizeof(HabanaKernelInstantiation) == 288 && offsetof(HabanaKernelInstantiation, kernel) == 80);
static_assert(sizeof(ShapeInferenceParams) == 176 && offsetof(ShapeInferenceParams, pGuid) == 152);
static_assert(sizeof(TensorShapeInfo) == 456 && sizeof(ShapeInferenceOutput) == 40);

}  // namespace tpc_lib_api
