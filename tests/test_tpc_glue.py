"""The glue library for Gaudi, called as the graph compiler calls it, on the CPU: every kernel, dtype, device, code."""

from __future__ import annotations

import shutil
import sys

import gaudi_glue as glue
import pytest
import torch
from gaudi_glue import GAUDI2, KERNELS, Call, Glue, Spec, call, signature, words

from otfuse._backends.tpc import emulator

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="the glue is compiled by c++, for Linux"
)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# More items than one, and sides that no tile divides; "small" has a batch beyond its lanes.
SIZES = {"B": 3, "N": 21, "M": 10}
SMALL = {"B": 70, "N": 3, "M": 5}


def sizes_for(kernel):
    return SMALL if kernel == "small" else SIZES


@pytest.fixture(scope="module")
def library():
    from gaudi_libraries import libraries

    return Glue(libraries()[0])


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def wanted(request, kernel):
    """A call that fits, for either dtype."""
    return signature(kernel, request.param, **sizes_for(kernel))


def element_type(wanted):
    return wanted.inputs["values"].dtype


class TestGuids:
    @pytest.mark.parametrize("device", glue.DEVICES.values(), ids=glue.DEVICES)
    def test_every_kernel_is_named_on_every_device(self, library, device):
        count, names = library.guids(device, 0)
        assert (count, names) == (len(KERNELS), [])
        assert library.guids(device, count) == (count, [f"otfuse_{kernel}" for kernel in KERNELS])

    def test_too_little_room_is_filled_and_the_count_told(self, library):
        assert library.guids(GAUDI2, 2) == (len(KERNELS), [f"otfuse_{kernel}" for kernel in KERNELS[:2]])

    @pytest.mark.parametrize("device", [glue.GAUDI, glue.GRECO])
    def test_other_devices_have_none(self, library, device):
        assert library.guids(device, 0) == (0, [])

    def test_version(self, library):
        assert library.version == 1


class TestInstantiation:
    @pytest.mark.parametrize("device", glue.DEVICES.values(), ids=glue.DEVICES)
    def test_what_a_kernel_gets(self, library, kernel, wanted, device):
        node = call(kernel, wanted, device=device)
        assert library.instantiate(node) == glue.SUCCESS
        assert node.index_space == wanted.index_space
        assert node.scalars == words(wanted.scalars)
        assert (node.instance.num_aux, node.instance.preferred_split) == (0, 0)
        size, code = node.instance.kernel.elf_size, node.elf.raw
        arguments = code[:size].decode().split("\n")
        suffix = "bf16" if element_type(wanted) == torch.bfloat16 else "f32"
        march = next(name for name, number in glue.DEVICES.items() if number == device)
        assert f"-march={march}" in arguments
        assert arguments[arguments.index("-c") + 1].endswith(f"kernels/tpc/{march}/{kernel}_{suffix}.c")
        assert code[size : size + 64] == b"\x5a" * 64

    @pytest.mark.parametrize("N, M, tiles", [(64, 20, 5), (64, 20, 2), (64, 20, 1), (65, 33, 4), (1, 1, 1)])
    def test_unroll_has_a_member_for_each_slice(self, library, N, M, tiles):
        wanted = signature("unroll", torch.float32, 2, N, M, tiles=tiles)
        node = call("unroll", wanted)
        assert library.instantiate(node) == glue.SUCCESS
        assert node.index_space == wanted.index_space == (-(-M // (4 * tiles)), 2)

    def test_a_million_small_items(self, library):
        wanted = signature("small", torch.bfloat16, 1 << 20, 4, 4)
        node = call("small", wanted)
        assert library.instantiate(node) == glue.SUCCESS
        assert node.index_space == (1 << 14,)
        assert node.box(False, 0, ((1 << 14) - 1,))[0] == ((1 << 20) - 64, (1 << 20) - 1)


class TestRefusals:
    def test_an_unknown_kernel(self, library, wanted):
        assert library.instantiate(Call("sinkhorn", [], [], b"")) == glue.NODE_NOT_FOUND
        assert library.instantiate(Call("x" * 63, [], [], b"")) == glue.NODE_NOT_FOUND

    @pytest.mark.parametrize("device", [glue.GAUDI, glue.GRECO, 5])
    def test_a_device_without_it(self, library, kernel, wanted, device):
        assert library.instantiate(call(kernel, wanted, device=device)) == glue.NODE_NOT_FOUND

    def test_counts(self, library, kernel, wanted):
        for field, code, right in (
            ("num_inputs", glue.INPUT_COUNT, len(wanted.inputs)),
            ("num_outputs", glue.OUTPUT_COUNT, len(wanted.outputs)),
        ):
            for wrong in (right - 1, right + 1):
                node = call(kernel, wanted)
                setattr(node.params, field, wrong)
                assert library.instantiate(node) == code
                assert getattr(node.params, field) == right

    def test_a_wrong_size_anywhere_is_answered_until_it_fits(self, library, kernel, wanted):
        free = {("history", 1)} if kernel in ("unroll", "implicit") else set()  # as many rounds as were kept
        for tensor, (name, spec) in enumerate([*wanted.inputs.items(), *wanted.outputs.items()]):
            for dim in range(len(spec.shape)):
                node = call(kernel, wanted)
                geometry_of(node, tensor).max_sizes[len(spec.shape) - 1 - dim] += 1
                answers = []
                # Each answer mends one size, and none undoes another.
                while (code := library.instantiate(node)) in (glue.INPUT_SIZE, glue.OUTPUT_SIZE):
                    answers.append(code)
                    assert len(answers) < 40
                assert bool(answers) == ((name, dim) not in free), (name, dim)
                assert code == glue.SUCCESS

    def test_what_is_written_back(self, library):
        node = call("sinkhorn", signature("sinkhorn", torch.float32, 3, 64, 20))
        node.inputs[1].geometry.max_sizes[0] = 63  # a [3, 64]
        assert library.instantiate(node) == glue.INPUT_SIZE
        assert node.inputs[1].geometry.shape == (3, 64)
        node.inputs[3].geometry.dims = 3  # form [3, 1]
        assert library.instantiate(node) == glue.INPUT_SIZE
        assert node.inputs[3].geometry.dims == 2
        node.outputs[3].geometry.max_sizes[0] = 4  # report [3, 2]
        assert library.instantiate(node) == glue.OUTPUT_SIZE
        assert node.outputs[3].geometry.shape == (3, 2)
        node.outputs[0].geometry.dims = 2
        assert library.instantiate(node) == glue.OUTPUT_SIZE
        assert node.outputs[0].geometry.shape == (3, 20, 64)
        assert library.instantiate(node) == glue.SUCCESS

    def test_the_history_has_as_many_rounds_as_are_kept(self, library):
        wanted = signature("sinkhorn_history", torch.float32, 2, 65, 20, T=7)
        node = call("sinkhorn_history", wanted)
        node.outputs[4].geometry.max_sizes[1] = 6
        assert library.instantiate(node) == glue.OUTPUT_SIZE
        assert node.outputs[4].geometry.shape == (2, 7, 128 * 3)

    def test_dtypes(self, library, kernel, wanted):
        for tensor, spec in enumerate([*wanted.inputs.values(), *wanted.outputs.values()]):
            node = call(kernel, wanted)
            geometry_of(node, tensor).dtype = glue.I32
            assert library.instantiate(node) == glue.DATA_TYPE
            if tensor:  # the first decides; it is answered float32
                assert geometry_of(node, tensor).dtype == glue.DTYPES[spec.dtype]
                assert library.instantiate(node) == glue.SUCCESS
            else:
                assert geometry_of(node, 0).dtype == glue.F32

    def test_tensors_of_two_dtypes(self, library):
        node = call("sinkhorn", signature("sinkhorn", torch.bfloat16, 2, 4, 4))
        node.outputs[0].geometry.dtype = glue.F32
        assert library.instantiate(node) == glue.DATA_TYPE
        assert node.outputs[0].geometry.dtype == glue.BF16

    def test_parameters_that_are_missing(self, library, kernel, wanted):
        inputs, outputs, data = [*wanted.inputs.values()], [*wanted.outputs.values()], words(wanted.scalars)
        for wrong in (b"", data[:-4], data + b"\0\0\0\0"):
            assert library.instantiate(Call(f"otfuse_{kernel}", inputs, outputs, wrong)) == glue.MISSING_STRUCTURE
        node = call(kernel, wanted)
        node.params.node_params.data = None
        assert library.instantiate(node) == glue.MISSING_STRUCTURE

    @pytest.mark.parametrize("room", [0, 10])
    def test_too_little_room_for_the_kernel(self, library, kernel, wanted, room):
        node = call(kernel, wanted, elf_room=room)
        assert library.instantiate(node) == glue.ELF_BUFFER
        needed = node.instance.kernel.elf_size
        assert needed > 10 and set(node.elf.raw[:room]) <= {0x5A}
        again = call(kernel, wanted, elf_room=needed)
        assert library.instantiate(again) == glue.SUCCESS
        assert again.elf.raw[:6] == b"ELF of"

    def test_nothing_at_all(self, library):
        assert library.with_nothing() == [glue.FAILED, glue.SUCCESS, glue.FAILED, glue.FAILED]

    def test_no_items(self, library, kernel):
        empty = signature(kernel, torch.float32, **{**sizes_for(kernel), "B": 0})
        assert library.instantiate(call(kernel, empty)) == glue.UNSUPPORTED

    # Vectors of local memory: matrix tiles of 16 x 4, and per 64 of either side what the kernel has beside them.
    @pytest.mark.parametrize(
        "kernel, beside, slice_rows",
        [("sinkhorn", 4, 0), ("sinkhorn_history", 4, 0), ("implicit", 8, 0), ("unroll", 8, 1)],
    )
    def test_what_does_not_fit_in_local_memory(self, library, kernel, beside, slice_rows):
        seen = set()
        for N in (1, 16, 17, 64, 128, 129, 256, 272, 600):
            for M in (1, 4, 20, 64, 127, 128, 129, 130, 256):
                rows, columns = -(-N // 16), -(-M // 4)
                fits = rows * columns + beside * (-(-N // 64) + -(-M // 64)) + slice_rows * rows <= 300
                code = library.instantiate(call(kernel, signature(kernel, torch.float32, 1, N, M)))
                assert code == (glue.SUCCESS if fits else glue.UNSUPPORTED), (N, M)
                seen.add(fits)
        assert seen == {True, False}

    @pytest.mark.parametrize("N, M", [(9, 8), (8, 9)])
    def test_what_does_not_fit_a_lane(self, library, N, M):
        assert library.instantiate(call("small", signature("small", torch.float32, 64, 8, 8))) == glue.SUCCESS
        assert library.instantiate(call("small", signature("small", torch.float32, 64, N, M))) == glue.UNSUPPORTED


class TestShapes:
    @pytest.mark.parametrize("pointed", [False, True])
    def test_of_the_outputs(self, library, kernel, wanted, pointed):
        inputs, data = [*wanted.inputs.values()], words(wanted.scalars)
        code, shapes = library.infer_shapes(f"otfuse_{kernel}", inputs, data, len(wanted.outputs), pointed)
        assert (code, shapes) == (glue.SUCCESS, [spec.shape for spec in wanted.outputs.values()])

    def test_refusals(self, library):
        wanted = signature("sinkhorn", torch.float32, 3, 64, 20)
        inputs, data = [*wanted.inputs.values()], words(wanted.scalars)
        wrong = [inputs[0], Spec((3, 63), torch.float32), *inputs[2:]]
        assert library.infer_shapes("otfuse_other", inputs, data, 4)[0] == glue.NODE_NOT_FOUND
        assert library.infer_shapes("otfuse_sinkhorn", inputs[:3], data, 4)[0] == glue.INPUT_COUNT
        assert library.infer_shapes("otfuse_sinkhorn", inputs, data, 5)[0] == glue.OUTPUT_COUNT
        assert library.infer_shapes("otfuse_sinkhorn", wrong, data, 4)[0] == glue.INPUT_SIZE
        assert library.infer_shapes("otfuse_sinkhorn", inputs, data[4:], 4)[0] == glue.MISSING_STRUCTURE


class TestAccess:
    """The boxes that the glue declares, against those that the emulator saw each member touch."""

    def test_members_stay_in_their_boxes(self, library, kernel, wanted):
        node, record = run_both(library, kernel, wanted)
        for member in record:
            for output, names, boxes in (
                (False, wanted.inputs, member.loaded),
                (True, wanted.outputs, member.loaded),
                (True, wanted.outputs, member.stored),
            ):
                for name in set(names) & set(boxes):
                    declared = node.box(output, list(names).index(name), member.member)
                    assert inside(boxes[name], declared), (member.member, name, boxes[name], declared)

    def test_the_boxes_are_no_larger_than_they_need_be(self, library, kernel, wanted):
        """Every member stores to all of its boxes (slices of unroll share theirs), and every item is stored."""
        node, record = run_both(library, kernel, wanted)
        for place, name in enumerate(wanted.outputs):
            stored = {member.member: member.stored[name] for member in record if name in member.stored}
            assert stored, name
            for member, box in stored.items():
                if kernel != "unroll" and name != "history":  # which has room that not every form needs
                    assert box == node.box(True, place, member), name
            items = {box[-1] if kernel != "small" else box[0] for box in stored.values()}
            assert len(items) == wanted.index_space[-1]

    def test_that_a_wrong_box_is_seen(self, library):
        wanted = signature("sinkhorn", torch.float32, **SIZES)
        node, record = run_both(library, "sinkhorn", wanted)
        node.output_access[0].mapping[2].a = 0  # every member said to store item 0
        declared = [node.box(True, 0, member.member) for member in record]
        assert [inside(m.stored["plan"], box) for m, box in zip(record, declared)] == [True, False, False]


def run_both(library, kernel, wanted):
    """The glue's answer, and the record of an emulated run of the same call."""
    node = call(kernel, wanted)
    assert library.instantiate(node) == glue.SUCCESS
    suffix = "bf16" if element_type(wanted) == torch.bfloat16 else "f32"
    run = emulator.kernel(f"gaudi2/{kernel}_{suffix}.c", ("__gaudi2__",))
    tensors = {name: glue.new(spec) for name, spec in {**wanted.inputs, **wanted.outputs}.items()}
    for name in ("a", "b"):
        tensors[name].fill_(1 / 16)
    assert (len(run.tensors), run.scalars) == (len(tensors), tuple(wanted.scalars))
    record = run.touched([*tensors.values()], [*wanted.scalars.values()], node.index_space, len(wanted.outputs))
    named = dict(zip(run.tensors, tensors))  # the kernel's own names may differ; the order may not
    record = [
        member._replace(
            loaded={named[name]: box for name, box in member.loaded.items()},
            stored={named[name]: box for name, box in member.stored.items()},
        )
        for member in record
    ]
    assert len(record) == torch.tensor(wanted.index_space).prod()
    return node, record


def inside(box, declared):
    return len(box) == len(declared) and all(low >= a and high <= b for (low, high), (a, b) in zip(box, declared))


def geometry_of(node, tensor):
    inputs = node.params.num_inputs
    return (node.inputs[tensor] if tensor < inputs else node.outputs[tensor - inputs]).geometry
