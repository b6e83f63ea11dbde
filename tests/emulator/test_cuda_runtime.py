"""The fake CUDA runtime does what the real one does: memory, streams, events, graphs, errors; and tells of what is wrong with their use."""

import ctypes
import re
import signal
import subprocess
import sys
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import pytest
import torch
from emulator import cuda

pytestmark = pytest.mark.skipif(
    cuda.unavailable_reason is not None, reason=str(cuda.unavailable_reason)
)
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
INVALID_VALUE, OUT_OF_MEMORY, NO_DRIVER, NOT_READY, LAUNCH_FAILURE = 1, 2, 35, 600, 719
NON_BLOCKING = 1
GLOBAL_MODE, RELAXED_MODE = 0, 2
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_UNJOINED, CAPTURE_IMPLICIT = 900, 901, 904, 906


@pytest.fixture(autouse=True)
def _empty_device():
    cuda.reset()
    yield
    cuda.reset()


@pytest.fixture
def library():
    return cuda.library("runtime_kernels", [Path(__file__).with_name("runtime_kernels.cu")])


@pytest.fixture
def api():
    return cuda.runtime()


@pytest.fixture
def x():
    return cuda.to_device(torch.arange(100.0), "x")


@pytest.fixture
def y():
    return cuda.to_device(torch.zeros(100), "y")


def reason():
    return cuda.runtime().cudaGetErrorString(cuda.runtime().cudaGetLastError()).decode()


def new(create, *args):
    handle = c_void_p()
    assert create(byref(handle), *args) == 0, reason()
    return handle


def scale(library, x, y, factor, stream=None, n=100):
    return library.launch_scale(x, y, c_float(factor), c_int64(0), n, stream)


class Pinned:
    """Pinned memory, seen as a tensor."""

    def __init__(self, values):
        self.address = new(cuda.runtime().cudaMallocHost, c_size_t(values.nbytes))
        memory = (c_float * values.numel()).from_address(self.address.value)
        self.tensor = torch.frombuffer(memory, dtype=torch.float32)
        self.tensor.copy_(values)


# ---- memory


def test_copies(api, x, y):
    assert torch.equal(x.cpu(), torch.arange(100.0))
    rows = c_size_t(40), c_size_t(12), c_size_t(3)  # 3 rows of 12 bytes, 40 apart
    assert api.cudaMemcpy2D(y, *rows[:1], x, *rows, ON_DEVICE) == 0
    expected = torch.zeros(100)
    for row in (0, 10, 20):
        expected[row : row + 3] = torch.arange(row, row + 3)
    assert torch.equal(y.cpu(), expected)
    assert api.cudaMemset(y, 0, c_size_t(48)) == 0
    assert (y.cpu()[:12] == 0).all() and y.cpu()[20] == 20


def test_a_copy_on_the_device_does_not_write_what_was_not_written(api, library, x):
    fresh, copy = (cuda.empty(100, torch.float32, name) for name in ("fresh", "copy"))
    api.cudaMemset(fresh, 0, c_size_t(200))
    assert api.cudaMemcpy(copy, fresh, c_size_t(400), ON_DEVICE) == 0
    scale(library, copy, x, 1, n=50)
    with pytest.raises(cuda.Fault, match="nobody wrote: read of 4 bytes in 'copy' at byte 200"):
        scale(library, copy, x, 1, n=51)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda api, x, host: api.cudaMemcpy(x, host, c_size_t(404), TO_DEVICE), "404 bytes from byte 0 of 'x' on, which has 400"),
        (lambda api, x, host: api.cudaMemcpy(host, x, c_size_t(4), TO_DEVICE), "the destination is no device memory"),
        (lambda api, x, host: api.cudaMemcpy(x, x, c_size_t(4), TO_DEVICE), "the source is device memory, the kind says host"),
        (lambda api, x, host: api.cudaMemset(c_void_p(x.address + 396), 0, c_size_t(8)), "8 bytes from byte 396"),
        (lambda api, x, host: api.cudaFree(c_void_p(x.address + 4)), "no allocation starts at this address"),
        (lambda api, x, host: api.cudaFree(x) or api.cudaFree(x), "'x' was freed already"),
        (lambda api, x, host: api.cudaFree(x) or api.cudaMemset(x, 0, c_size_t(4)), "use of 'x' after it was freed"),
        (lambda api, x, host: api.cudaFreeHost(host), "no pinned memory starts at this address"),
    ],
    ids=range(8),
)  # fmt: skip
def test_misuse_of_memory_is_refused(api, x, call, message):
    host = (c_float * 200)()
    assert call(api, x, host) == INVALID_VALUE
    assert message in reason()


def test_memory_ends(api):
    with cuda.settings(memory_bytes=1000):
        free, total = c_size_t(), c_size_t()
        memory = new(api.cudaMalloc, c_size_t(600))
        api.cudaMemGetInfo(byref(free), byref(total))
        assert (free.value, total.value) == (400, 1000)
        other = c_void_p()
        assert api.cudaMalloc(byref(other), c_size_t(500)) == OUT_OF_MEMORY
        assert "500 bytes asked for, 400 left" in reason()
        with cuda.settings(memory_bytes=100):  # less than is in use
            api.cudaMemGetInfo(byref(free), byref(total))
            assert (free.value, total.value) == (0, 100)
            assert api.cudaMalloc(byref(other), c_size_t(1)) == OUT_OF_MEMORY
        api.cudaFree(memory)
        api.cudaFree(new(api.cudaMalloc, c_size_t(500)))
    assert cuda.leaks() == []


def test_leaks_are_listed(api):
    new(api.cudaMalloc, c_size_t(600))
    new(api.cudaMallocHost, c_size_t(8))
    new(api.cudaStreamCreate)
    new(api.cudaEventCreate)
    assert sorted(cuda.leaks()) == ["1 events", "1 streams", "allocation 0, 600 bytes", "pinned memory, 8 bytes"]  # fmt: skip
    cuda.reset()
    assert cuda.leaks() == []


def test_the_host_cannot_touch_device_memory():
    script = (
        "import ctypes, torch; from emulator import cuda; x = cuda.to_device(torch.zeros(4), 'x'); "
        "print(ctypes.c_float.from_address(x.address))"
    )
    tests = str(Path(__file__).parents[1])
    process = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": tests}, check=False)
    assert process.returncode == -signal.SIGSEGV


# ---- kernels


def test_parameters_variables_and_kinds_of_launches(library, y):
    look_up = cuda.empty(32, torch.float32, "look_up")
    assert library.launch_look_up(look_up) == 0
    assert torch.equal(look_up.cpu(), torch.tensor([0.5, 1.5, -2, 8]).repeat(8))
    out = cuda.empty(1, torch.int32, "out")
    for num_blocks in (1, 3):  # kernels of a module share its variables
        assert library.launch_counts(num_blocks, out) == 0
        assert out.cpu().item() == 32 * num_blocks
    extended = cuda.empty(96, torch.int32, "extended")
    assert library.launch_extended(extended) == 0
    assert (extended.cpu() == 95).all()


def test_libraries_have_their_own_kernels(x):
    source = Path(__file__).with_name("same_names.cu")
    for factor in (2, 3, 2):
        library = cuda.library("same_names", [source], [f"-DFACTOR={factor}"])
        x.copy_(torch.ones(100))
        assert library.launch_multiply(x) == 0
        assert x.cpu()[0] == factor


def test_blocks_of_a_cooperative_launch_run_at_the_same_time(library):
    out = cuda.to_device(torch.zeros(10, dtype=torch.int32), "out")
    with cuda.settings(resident=1, preempt=20):
        assert library.launch_meet(5, out) == 0
    assert out.cpu().tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 0]
    with cuda.settings(num_multiprocessors=1):
        assert library.launch_meet(33, out) != 0
    assert "more blocks than can run at the same time" in reason()


def test_attributes_and_occupancy(library):
    attributes, num_blocks = (ctypes.c_byte * 1024)(), c_int()
    assert library.describe(attributes, byref(num_blocks)) == 0
    assert ctypes.c_size_t.from_buffer(attributes).value == 96 * 4
    assert num_blocks.value == 3  # each with 40.4 KB of 164, and 1 reserved


# ---- streams and events


def test_streams_may_be_late(api, library, x, y):
    with cuda.settings(is_deferred=True):
        stream = new(api.cudaStreamCreateWithFlags, NON_BLOCKING)
        result = Pinned(torch.zeros(100))
        scale(library, x, y, 2, stream)
        api.cudaMemcpyAsync(result.address, y, c_size_t(400), TO_HOST, stream)
        assert (y.cpu() == 0).all() and (
            result.tensor == 0
        ).all()  # the default stream does not wait
        assert api.cudaStreamSynchronize(stream) == 0
        assert torch.equal(result.tensor, 2 * torch.arange(100.0))


@pytest.mark.parametrize("is_deferred", [False, True])
def test_blocking_streams_and_the_default_stream_wait_for_each_other(api, library, x, y, is_deferred):  # fmt: skip
    with cuda.settings(is_deferred=is_deferred):
        stream = new(api.cudaStreamCreate)
        scale(library, x, y, 2, stream)
        scale(library, y, y, 2)
        scale(library, y, y, 2, stream)
        assert torch.equal(y.cpu(), 8 * torch.arange(100.0))


def test_pinned_memory_must_stay_until_it_was_copied(api, x):
    """What is reused too early shows in late streams; memory that may be paged out is copied at once."""
    host = Pinned(torch.ones(100))
    results = []
    for is_deferred in (False, True):
        with cuda.settings(is_deferred=is_deferred):
            stream = new(api.cudaStreamCreate)
            host.tensor.fill_(1)
            api.cudaMemcpyAsync(x, host.address, c_size_t(400), TO_DEVICE, stream)
            host.tensor.fill_(5)
            api.cudaStreamSynchronize(stream)
            results.append(x.cpu()[0].item())
            pageable = torch.ones(100)
            api.cudaMemcpyAsync(x, c_void_p(pageable.data_ptr()), c_size_t(400), TO_DEVICE, stream)
            pageable.fill_(5)
            api.cudaStreamSynchronize(stream)
            assert x.cpu()[0] == 1
    assert results == [1, 5]


def test_events_order_streams(api, library, x, y):
    for waits in (True, False):
        y.copy_(torch.zeros(100))
        with cuda.settings(is_deferred=True):
            a, b = (new(api.cudaStreamCreateWithFlags, NON_BLOCKING) for _ in range(2))
            event, end = new(api.cudaEventCreate), new(api.cudaEventCreate)
            scale(library, x, y, 2, a)
            api.cudaEventRecord(event, a)
            if waits:
                api.cudaStreamWaitEvent(b, event, 0)
            scale(library, y, y, 3, b)
            api.cudaEventRecord(end, b)
            assert api.cudaEventQuery(end) == NOT_READY
            assert api.cudaEventSynchronize(end) == 0
            assert api.cudaEventQuery(end) == 0
            if waits:
                assert api.cudaEventElapsedTime(byref(c_float()), event, end) == 0
        assert torch.equal(y.cpu(), (6.0 if waits else 0.0) * torch.arange(100.0))
    api.cudaStreamDestroy(a)
    assert api.cudaStreamSynchronize(a) != 0
    assert "the handle is not valid, or was destroyed" in reason()


def test_an_event_is_waited_for_and_nothing_behind_it(api, library, x, y):
    """What a copy brings to pinned memory is not there before its event, and work after it does not hold the host up."""
    with cuda.settings(is_deferred=True):
        stream, event = new(api.cudaStreamCreateWithFlags, NON_BLOCKING), new(api.cudaEventCreate)
        results = [Pinned(torch.zeros(100)), Pinned(torch.zeros(100))]
        for i, result in enumerate(results):
            scale(library, x, y, 2 + i, stream)
            api.cudaMemcpyAsync(result.address, y, c_size_t(400), TO_HOST, stream)
            if i == 0:
                api.cudaEventRecord(event, stream)
        assert (results[0].tensor == 0).all()  # read too early
        assert api.cudaEventSynchronize(event) == 0
        assert torch.equal(results[0].tensor, 2 * torch.arange(100.0))
        assert (results[1].tensor == 0).all()
        assert api.cudaStreamSynchronize(stream) == 0
        assert torch.equal(results[1].tensor, 3 * torch.arange(100.0))


def test_memory_freed_in_a_stream_lasts_until_its_turn(api, library, y):
    with cuda.settings(is_deferred=True):
        stream = new(api.cudaStreamCreateWithFlags, NON_BLOCKING)
        memory = new(api.cudaMallocAsync, c_size_t(400), stream)
        api.cudaMemsetAsync(memory, 0, c_size_t(400), stream)
        scale(library, memory, y, 1, stream)
        api.cudaFreeAsync(memory, stream)
        assert api.cudaStreamSynchronize(stream) == 0
        scale(library, memory, y, 1, stream)
        with pytest.raises(cuda.Fault, match="use after free: global read of 4 bytes in 'allocation"):  # fmt: skip
            cuda.synchronize()


# ---- graphs


def capture(api, work, mode=GLOBAL_MODE, stream=None):
    """The executable graph of what `work` does in a stream, and the stream."""
    stream = stream or new(api.cudaStreamCreateWithFlags, NON_BLOCKING)
    assert api.cudaStreamBeginCapture(stream, mode) == 0, reason()
    work(stream)
    graph = new_graph(api, stream)
    executable = new(api.cudaGraphInstantiate, graph, ctypes.c_ulonglong(0))
    assert api.cudaGraphDestroy(graph) == 0
    return executable, stream


def new_graph(api, stream):
    graph = c_void_p()
    assert api.cudaStreamEndCapture(stream, byref(graph)) == 0, reason()
    return graph


@pytest.mark.parametrize("is_deferred", [False, True])
def test_a_graph_repeats_what_was_captured(api, library, x, y, is_deferred):
    with cuda.settings(is_deferred=is_deferred):

        def work(stream):
            scale(library, y, y, 2, stream)
            api.cudaMemsetAsync(y, 0, c_size_t(4), stream)

        y.copy_(torch.ones(100))
        executable, stream = capture(api, work)
        assert (y.cpu() == 1).all()  # nothing was done
        for _ in range(3):
            assert api.cudaGraphLaunch(executable, stream) == 0
        api.cudaStreamSynchronize(stream)
        assert torch.equal(y.cpu(), torch.tensor([0.0] + [8.0] * 99))
    api.cudaStreamDestroy(stream)
    assert api.cudaGraphExecDestroy(executable) == 0
    assert cuda.leaks() == []


def test_a_graph_does_not_keep_memory_alive(api, library, x, y):
    executable, stream = capture(api, lambda stream: scale(library, x, y, 2, stream))
    api.cudaFree(x)
    api.cudaGraphLaunch(executable, stream)
    with pytest.raises(cuda.Fault, match="use after free: global read of 4 bytes in 'x'"):
        cuda.synchronize()


def test_a_graph_is_updated(api, library, x, y):
    executable, stream = capture(api, lambda stream: scale(library, x, y, 2, stream))
    api.cudaStreamBeginCapture(stream, GLOBAL_MODE)
    scale(library, x, y, 5, stream)
    info = (ctypes.c_byte * 256)()
    assert api.cudaGraphExecUpdate(executable, new_graph(api, stream), info) == 0
    api.cudaGraphLaunch(executable, stream)
    assert torch.equal(y.cpu(), 5 * torch.arange(100.0))
    api.cudaStreamBeginCapture(stream, GLOBAL_MODE)
    api.cudaMemsetAsync(y, 0, c_size_t(4), stream)
    assert api.cudaGraphExecUpdate(executable, new_graph(api, stream), info) != 0
    assert "other nodes than before" in reason()


def test_a_capture_spreads_to_other_streams_and_must_end_in_the_first(api, library, x, y):
    other = new(api.cudaStreamCreateWithFlags, NON_BLOCKING)
    fork, join = new(api.cudaEventCreate), new(api.cudaEventCreate)
    z = cuda.empty(100, torch.float32, "z")

    def work(stream, joins=True):
        scale(library, x, y, 2, stream)
        api.cudaEventRecord(fork, stream)
        api.cudaStreamWaitEvent(other, fork, 0)
        scale(library, y, z, 2, other)
        api.cudaEventRecord(join, other)
        if joins:
            api.cudaStreamWaitEvent(stream, join, 0)
            scale(library, z, y, 2, stream)

    executable, stream = capture(api, work)
    assert api.cudaGraphLaunch(executable, stream) == 0
    assert torch.equal(y.cpu(), 8 * torch.arange(100.0))
    api.cudaStreamBeginCapture(stream, GLOBAL_MODE)
    work(stream, joins=False)
    assert api.cudaStreamEndCapture(stream, byref(c_void_p())) == CAPTURE_UNJOINED


@pytest.mark.parametrize(
    ("name", "call", "code"),
    [
        ("cudaMalloc", lambda api, s: api.cudaMalloc(byref(c_void_p()), c_size_t(4)), CAPTURE_UNSUPPORTED),
        ("cudaStreamSynchronize", lambda api, s: api.cudaStreamSynchronize(s), CAPTURE_UNSUPPORTED),
        ("cudaDeviceSynchronize", lambda api, s: api.cudaDeviceSynchronize(), CAPTURE_UNSUPPORTED),
        ("default stream", lambda api, s: api.cudaMemsetAsync(c_void_p(), 0, c_size_t(0), None) or use_default_stream(api), CAPTURE_IMPLICIT),
    ],
)  # fmt: skip
def test_what_ends_a_capture(api, library, x, y, name, call, code):
    stream = new(api.cudaStreamCreate)
    api.cudaStreamBeginCapture(stream, GLOBAL_MODE)
    assert call(api, stream) == code
    assert name in reason()
    assert api.cudaStreamEndCapture(stream, byref(c_void_p())) == CAPTURE_INVALIDATED
    assert call(api, stream) == 0


def use_default_stream(api):
    event = new(api.cudaEventCreate)
    return api.cudaEventRecord(event, None)


def test_a_relaxed_capture_allows_allocations(api, library, x, y):
    executable, stream = capture(
        api, lambda stream: new(api.cudaMalloc, c_size_t(4)), mode=RELAXED_MODE
    )
    assert api.cudaGraphLaunch(executable, stream) == 0


# ---- errors


def test_a_fault_stays(api, library, x, y):
    with pytest.raises(cuda.Fault, match=re.compile("scale.*out of bounds.*'x'.*runtime_kernels.cu:", re.S)):  # fmt: skip
        scale(library, x, y, 1, n=101)
    assert api.cudaGetLastError() == api.cudaGetLastError() == LAUNCH_FAILURE
    assert api.cudaMemset(y, 0, c_size_t(4)) == LAUNCH_FAILURE
    cuda.reset()
    assert api.cudaGetLastError() == 0


def test_a_refused_call_is_forgotten_once_it_was_asked_for(api, x):
    assert api.cudaFree(c_void_p(12)) == INVALID_VALUE
    assert api.cudaPeekAtLastError() == api.cudaGetLastError() == INVALID_VALUE
    assert api.cudaGetLastError() == 0
    assert api.cudaMemset(x, 0, c_size_t(4)) == 0


def test_a_machine_without_a_driver(api):
    count = c_int(7)
    with cuda.settings(capability=(0, 0)):
        assert api.cudaGetDeviceCount(byref(count)) == NO_DRIVER
        assert count.value == 0
        assert api.cudaSetDevice(0) == NO_DRIVER
    assert api.cudaGetDeviceCount(byref(count)) == 0 and count.value == 1


def test_attributes_of_the_device(api):
    major, multiprocessors = c_int(), c_int()
    with cuda.settings(capability=(9, 0), num_multiprocessors=132):
        assert api.cudaDeviceGetAttribute(byref(major), 75, 0) == 0
        assert api.cudaDeviceGetAttribute(byref(multiprocessors), 16, 0) == 0
    assert (major.value, multiprocessors.value) == (9, 132)
    assert api.cudaDeviceGetAttribute(byref(major), 75, 1) != 0
