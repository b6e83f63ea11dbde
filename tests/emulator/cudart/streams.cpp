// Streams, events, and graphs that streams were captured into.
//
// A stream is a queue of operations. They are done at once; or, if the settings say so, only when
// the host waits for them: both are legal, and what is right must not depend on it. Reading a
// result before the copy of it was waited for shows in the latter.
#include <chrono>
#include <deque>
#include <memory>
#include <set>

#include "runtime.h"

namespace cudart {

namespace {

struct Graph {
  std::vector<std::pair<const char*, Operation>> nodes;  // in the order of the capture
};

struct Capture {
  std::unique_ptr<Graph> graph = std::make_unique<Graph>();
  cudaStreamCaptureMode mode;
  std::string invalid;  // why, if it is
};

struct Stream {
  bool is_blocking = true;  // it waits for the default stream, and that one for it
  std::deque<Operation> pending;
  std::shared_ptr<Capture> capture;
  bool is_origin = false;  // of the capture
  uint64_t num_captured = 0, num_joined = 0;
};

struct Event {
  Stream* stream = nullptr;  // where it was recorded
  std::shared_ptr<bool> done;
  std::shared_ptr<std::chrono::steady_clock::time_point> time;
  std::shared_ptr<Capture> capture;
  uint64_t num_captured = 0;
};

Stream default_stream, thread_stream;
std::set<Stream*> streams;  // those that were created
std::set<Event*> events;
std::set<Graph*> graphs, executables;

template <class T, class Handle>
T* find(const std::set<T*>& all, Handle handle, const char* caller) {
  T* const object = reinterpret_cast<T*>(handle);
  if (!all.count(object))
    throw Refused(cudaErrorInvalidResourceHandle,
                  std::string(caller) + ": the handle is not valid, or was destroyed");
  return object;
}

Stream& find(cudaStream_t handle, const char* caller) {
  if (handle == nullptr || handle == cudaStreamLegacy) return default_stream;
  if (handle == cudaStreamPerThread) return thread_stream;
  return *find(streams, handle, caller);
}

void run_next(Stream& stream) {
  const Operation operation = std::move(stream.pending.front());
  stream.pending.pop_front();
  operation();
}

void drain(Stream& stream) {
  while (!stream.pending.empty()) run_next(stream);
}

template <class F>
void for_all_streams(const F& f) {
  f(default_stream), f(thread_stream);
  for (Stream* stream : streams) f(*stream);
}

// Let the stream run until the event is done.
void wait(Stream& stream, const std::shared_ptr<bool>& done) {
  while (!*done && !stream.pending.empty()) run_next(stream);
}

[[noreturn]] void invalidate(Capture& capture, cudaError_t code, const std::string& reason) {
  capture.invalid = reason;
  throw Refused(code, reason);
}

void add(Stream& stream, const char* caller, Operation operation) {
  if (stream.capture) {
    if (!stream.capture->invalid.empty())
      throw Refused(cudaErrorStreamCaptureInvalidated,
                    std::string(caller) + ": the capture is invalid: " + stream.capture->invalid);
    stream.capture->graph->nodes.emplace_back(caller, std::move(operation));
    ++stream.num_captured;
    return;
  }
  // the default stream and the blocking ones wait for each other
  if (&stream == &default_stream)
    for_all_streams([&](Stream& other) {
      if (!other.is_blocking || &other == &stream) return;
      if (other.capture)
        invalidate(*other.capture, cudaErrorStreamCaptureImplicit,
                   std::string(caller) +
                       ": use of the default stream while a stream is captured that waits for it");
      drain(other);
    });
  else if (stream.is_blocking)
    drain(default_stream);
  stream.pending.push_back(std::move(operation));
  if (!settings.is_deferred) drain(stream);
}

cudaStream_t new_stream(bool is_blocking) {
  Stream* const stream = new Stream;
  stream->is_blocking = is_blocking;
  streams.insert(stream);
  return reinterpret_cast<cudaStream_t>(stream);
}

cudaEvent_t new_event() {
  Event* const event = new Event;
  events.insert(event);
  return reinterpret_cast<cudaEvent_t>(event);
}

void record(Event& event, Stream& stream, const char* caller) {
  event.stream = &stream;
  event.capture = stream.capture;
  event.num_captured = stream.num_captured;
  event.done = std::make_shared<bool>(false);
  event.time = std::make_shared<std::chrono::steady_clock::time_point>();
  if (stream.capture) return;  // an edge of the graph, no node
  add(stream, caller, [done = event.done, time = event.time] {
    *done = true;
    *time = std::chrono::steady_clock::now();
  });
}

void wait_for(Stream& stream, Event& event, const char* caller) {
  if (!event.done) return;  // never recorded: nothing to wait for
  if (event.capture) {
    if (stream.capture && stream.capture != event.capture)
      throw Refused(cudaErrorStreamCaptureMerge,
                    std::string(caller) + ": two captures would become one");
    if (!stream.capture) {  // it takes part in the capture from now on
      stream.capture = event.capture;
      stream.num_captured = stream.num_joined = 0;
    }
    if (event.num_captured == event.stream->num_captured)
      event.stream->num_joined = event.num_captured;
    ++stream.num_captured;
    return;
  }
  if (stream.capture)
    invalidate(
        *stream.capture, cudaErrorStreamCaptureIsolation,
        std::string(caller) + ": a captured stream waits for an event outside of the capture");
  add(stream, caller, [other = event.stream, done = event.done] {
    if (streams.count(other) || other == &default_stream || other == &thread_stream)
      wait(*other, done);
  });
}

void end_capture(Stream& origin, cudaGraph_t* out) {
  *out = nullptr;
  if (!origin.capture)
    throw Refused(cudaErrorIllegalState, "cudaStreamEndCapture: the stream is not captured");
  if (!origin.is_origin)
    throw Refused(cudaErrorStreamCaptureUnmatched,
                  "cudaStreamEndCapture: the capture began in another stream");
  const std::shared_ptr<Capture> capture = origin.capture;
  bool is_joined = true;
  for_all_streams([&](Stream& stream) {
    if (stream.capture != capture) return;
    is_joined &= &stream == &origin || stream.num_joined == stream.num_captured;
    stream.capture = nullptr;
    stream.is_origin = false;
  });
  if (!capture->invalid.empty())
    throw Refused(cudaErrorStreamCaptureInvalidated,
                  "cudaStreamEndCapture: the capture is invalid: " + capture->invalid);
  if (!is_joined)
    throw Refused(cudaErrorStreamCaptureUnjoined,
                  "cudaStreamEndCapture: a stream that joined was not waited for");
  Graph* const graph = capture->graph.release();
  graphs.insert(graph);
  *out = reinterpret_cast<cudaGraph_t>(graph);
}

cudaGraphExec_t instantiate(cudaGraph_t graph, const char* caller) {
  Graph* const executable = new Graph(*find(graphs, graph, caller));
  executables.insert(executable);
  return reinterpret_cast<cudaGraphExec_t>(executable);
}

template <class T>
void destroy(std::set<T*>& all, T* object) {
  all.erase(object);
  delete object;
}

}  // namespace

void enqueue(cudaStream_t stream, const char* caller, Operation operation) {
  add(find(stream, caller), caller, std::move(operation));
}

void synchronize(cudaStream_t handle) {
  Stream& stream = find(handle, "synchronize");
  if (&stream == &default_stream) {
    for_all_streams([](Stream& other) {
      if (other.is_blocking) drain(other);
    });
  } else {
    drain(stream);
  }
}

void synchronize_all() { for_all_streams(drain); }

void refuse_in_capture(const char* caller) {
  for_all_streams([&](Stream& stream) {
    if (stream.capture && stream.capture->mode != cudaStreamCaptureModeRelaxed)
      invalidate(*stream.capture, cudaErrorStreamCaptureUnsupported,
                 std::string(caller) + ": not allowed while a stream is captured");
  });
}

bool is_capturing(cudaStream_t stream) { return find(stream, "capture").capture != nullptr; }

std::string live_handles() {
  std::string text;
  const auto count = [&](size_t number, const char* what) {
    if (number) text += std::to_string(number) + " " + what + "\n";
  };
  count(streams.size(), "streams"), count(events.size(), "events");
  count(graphs.size(), "graphs"), count(executables.size(), "executable graphs");
  return text;
}

void forget_streams() {
  for_all_streams([](Stream& stream) {
    stream.pending.clear();
    stream.capture = nullptr;
  });
  while (!streams.empty()) destroy(streams, *streams.begin());
  while (!events.empty()) destroy(events, *events.begin());
  while (!graphs.empty()) destroy(graphs, *graphs.begin());
  while (!executables.empty()) destroy(executables, *executables.begin());
}

}  // namespace cudart

using namespace cudart;

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return api([&] { *stream = new_stream(true); });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return api([&] { *stream = new_stream(!(flags & cudaStreamNonBlocking)); });
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return api([&] {
    Stream* const stream = find(streams, handle, "cudaStreamDestroy");
    if (stream->capture)
      invalidate(*stream->capture, cudaErrorStreamCaptureUnsupported,
                 "cudaStreamDestroy: the stream is being captured");
    drain(*stream);
    destroy(streams, stream);
  });
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return api([&] {
    if (is_capturing(handle))
      invalidate(*find(handle, "").capture, cudaErrorStreamCaptureUnsupported,
                 "cudaStreamSynchronize: the stream is being captured");
    synchronize(handle);
  });
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  cudaError_t result = cudaSuccess;
  const cudaError_t error = api([&] {
    Stream& stream = find(handle, "cudaStreamQuery");
    if (stream.pending.empty()) return;
    run_next(stream);  // who asks again and again must be told in the end
    result = cudaErrorNotReady;
  });
  return error ? error : result;
}
cudaError_t cudaDeviceSynchronize() {
  return api([&] {
    refuse_in_capture("cudaDeviceSynchronize");
    synchronize_all();
  });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return api([&] {
    wait_for(find(stream, "cudaStreamWaitEvent"), *find(events, event, "cudaStreamWaitEvent"),
             "cudaStreamWaitEvent");
  });
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  return api([&] { *priority = 0; });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return api([&] { enqueue(stream, "cudaLaunchHostFunc", [=] { function(data); }); });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return api([&] { *event = new_event(); });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return api([&] { destroy(events, find(events, event, "cudaEventDestroy")); });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return api([&] {
    record(*find(events, event, "cudaEventRecord"), find(stream, "cudaEventRecord"),
           "cudaEventRecord");
  });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return api([&] {
    Event& event = *find(events, handle, "cudaEventSynchronize");
    if (event.capture)
      throw Refused(cudaErrorCapturedEvent, "cudaEventSynchronize: the event is part of a capture");
    if (event.done) wait(*event.stream, event.done);
  });
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  cudaError_t result = cudaSuccess;
  const cudaError_t error = api([&] {
    Event& event = *find(events, handle, "cudaEventQuery");
    if (event.capture)
      throw Refused(cudaErrorCapturedEvent, "cudaEventQuery: the event is part of a capture");
    if (!event.done || *event.done) return;
    run_next(*event.stream);
    result = cudaErrorNotReady;
  });
  return error ? error : result;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  return api([&] {
    const Event &a = *find(events, start, "cudaEventElapsedTime"),
                &b = *find(events, end, "cudaEventElapsedTime");
    if (!a.done || !b.done)
      throw Refused(cudaErrorInvalidResourceHandle,
                    "cudaEventElapsedTime: an event was not recorded");
    if (!*a.done || !*b.done)
      throw Refused(cudaErrorNotReady, "cudaEventElapsedTime: not yet done");
    *ms = std::chrono::duration<float, std::milli>(*b.time - *a.time).count();
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return api([&] {
    Stream& stream = find(handle, "cudaStreamBeginCapture");
    if (&stream == &default_stream)
      throw Refused(cudaErrorStreamCaptureUnsupported,
                    "cudaStreamBeginCapture: the default stream cannot be captured");
    if (stream.capture)
      throw Refused(cudaErrorIllegalState,
                    "cudaStreamBeginCapture: the stream is captured already");
    stream.capture = std::make_shared<Capture>();
    stream.capture->mode = mode;
    stream.is_origin = true;
    stream.num_captured = stream.num_joined = 0;
  });
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return api([&] { end_capture(find(stream, "cudaStreamEndCapture"), graph); });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return api([&] {
    const Stream& s = find(stream, "cudaStreamIsCapturing");
    *status = !s.capture                   ? cudaStreamCaptureStatusNone
              : s.capture->invalid.empty() ? cudaStreamCaptureStatusActive
                                           : cudaStreamCaptureStatusInvalidated;
  });
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  return api([&] { std::swap(current, *mode); });
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  return api([&] { *executable = instantiate(graph, "cudaGraphInstantiate"); });
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
  return api([&] { *executable = instantiate(graph, "cudaGraphInstantiateWithFlags"); });
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return api([&] {
    const Graph& graph = *find(executables, executable, "cudaGraphLaunch");
    enqueue(stream, "cudaGraphLaunch", [nodes = graph.nodes] {
      for (const auto& [caller, operation] : nodes) operation();
    });
  });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
  return api([&] { find(executables, executable, "cudaGraphUpload"); });
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* info) {
  return api([&] {
    Graph &to = *find(executables, executable, "cudaGraphExecUpdate"),
          &from = *find(graphs, graph, "cudaGraphExecUpdate");
    *info = {};
    bool is_same = to.nodes.size() == from.nodes.size();
    for (size_t i = 0; is_same && i < to.nodes.size(); ++i)
      is_same = std::string(to.nodes[i].first) == from.nodes[i].first;
    info->result = is_same ? cudaGraphExecUpdateSuccess : cudaGraphExecUpdateErrorTopologyChanged;
    if (!is_same)
      throw Refused(cudaErrorGraphExecUpdateFailure,
                    "cudaGraphExecUpdate: other nodes than before");
    to.nodes = from.nodes;
  });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return api([&] {
    if (nodes) throw Refused(cudaErrorNotSupported, "cudaGraphGetNodes: the emulator only counts");
    *count = find(graphs, graph, "cudaGraphGetNodes")->nodes.size();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return api([&] { destroy(graphs, find(graphs, graph, "cudaGraphDestroy")); });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return api([&] { destroy(executables, find(executables, executable, "cudaGraphExecDestroy")); });
}

}  // extern "C"
