/* Streams, events, launches and graphs of the emulated runtime. Outside a capture everything runs at the
 * call, so a stream only has to know whether it is being captured, and into what.
 */
#include "stream.h"
#include "block.h"
#include "device.h"

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include <time.h>

namespace
{
enum node_kind { KERNEL, COPY, SET, HOST };

struct node {
    node_kind kind;
    cudaMemcpyKind direction; /* COPY */
    std::function<void()> run;
};

struct capture {
    emu_stream *origin;
    cudaStreamCaptureMode mode;
    std::vector<node> nodes;
    std::set<emu_stream *> members;
    bool invalid;
};

std::recursive_mutex lock; /* over all below, and held while a kernel runs */
typedef std::lock_guard<std::recursive_mutex> locked;
std::set<capture *> captures;
std::map<const void *, size_t> allowed_shared; /* by kernel, after cudaFuncSetAttribute */
} // namespace

struct emu_stream {
    CUstream_st handle;
    unsigned flags;
    std::shared_ptr<capture> into; /* while it is captured */
    bool unjoined;                 /* work that no other stream of the capture has waited for */
    size_t last;                   /* nodes of the capture up to its last work */
};

struct CUevent_st {
    unsigned flags;
    bool recorded;
    double time; /* seconds */
    std::shared_ptr<capture> into;
    emu_stream *from; /* captured stream it was recorded on */
    size_t position;  /* nodes recorded by then */
};

struct CUgraph_st {
    std::vector<node> nodes;
};

struct CUgraphExec_st {
    std::vector<node> nodes;
};

static cudaError_t queue_work(cudaStream_t stream, emu_work work, const void *data, size_t bytes);

static emu_stream legacy = {{queue_work, &legacy}, 0, nullptr, false, 0};

static emu_stream *resolve(cudaStream_t stream)
{
    return !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread ? &legacy : stream->own;
}

/* A blocking stream that is captured may not meet the legacy stream. */
static bool blocking_capture(void)
{
    for (capture *c : captures)
        if (!(c->origin->flags & cudaStreamNonBlocking)) return true;
    return false;
}

static cudaError_t enqueue(cudaStream_t stream, node n)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    locked hold(lock);
    emu_stream *s = resolve(stream);
    if (!s->into) {
        if (s == &legacy && blocking_capture()) return emu_return(cudaErrorStreamCaptureImplicit);
        n.run();
        return cudaSuccess;
    }
    if (s->into->invalid) return emu_return(cudaErrorStreamCaptureInvalidated);
    s->into->nodes.push_back(std::move(n));
    s->unjoined = true;
    s->last = s->into->nodes.size();
    return cudaSuccess;
}

static cudaError_t queue_work(cudaStream_t stream, emu_work work, const void *data, size_t bytes)
{
    std::vector<char> copy((const char *)data, (const char *)data + bytes);
    node n = {KERNEL, cudaMemcpyDefault, [work, copy]() mutable {
                  if (emu_count_run()) work(copy.data());
              }};
    cudaError_t error = emu_count_launch();
    return error ? emu_return(error) : enqueue(stream, std::move(n));
}

cudaError_t emu_forbid_in_capture(void)
{
    locked hold(lock);
    bool forbidden = false;
    for (capture *c : captures)
        if (c->mode != cudaStreamCaptureModeRelaxed) forbidden = c->invalid = true;
    return forbidden ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

/* Waiting for `stream`, or for all with NULL. */
static cudaError_t wait_for(const emu_stream *s)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    locked hold(lock);
    for (capture *c : captures)
        if (!s || s->into.get() == c) {
            c->invalid = true;
            error = cudaErrorStreamCaptureUnsupported;
        }
    return emu_return(error);
}

cudaError_t cudaDeviceSynchronize(void)
{
    return wait_for(nullptr);
}

/* ---- launches ---- */

static cudaError_t check_launch(const cudaLaunchConfig_t *c, const void *kernel)
{
    dim3 g = c->gridDim, b = c->blockDim;
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z) return cudaErrorInvalidConfiguration;
    if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
    if (b.x > 1024 || b.y > 1024 || b.z > 64 || (size_t)b.x * b.y * b.z > 1024)
        return cudaErrorInvalidConfiguration;
    auto found = allowed_shared.find(kernel);
    size_t limit = found == allowed_shared.end() ? 48 * 1024 : found->second;
    if (c->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
            emu_read_settings().sm < 90)
            return cudaErrorNotSupported;
    return cudaSuccess;
}

cudaError_t emu_launch(const cudaLaunchConfig_t *config, const void *kernel, std::function<void()> thread)
{
    locked hold(lock);
    cudaError_t error = emu_ready();
    if (!error) error = check_launch(config, kernel);
    if (!error) error = emu_count_launch();
    if (error) return emu_return(error);
    dim3 grid = config->gridDim, block = config->blockDim;
    size_t shared = config->dynamicSmemBytes;
    return enqueue(config->stream, {KERNEL, cudaMemcpyDefault, [=]() {
                                        if (emu_count_run()) emu_run_grid(grid, block, shared, thread);
                                    }});
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    locked hold(lock);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        (size_t)value > emu_shared_limit())
        return emu_return(cudaErrorInvalidValue);
    size_t &allowed = allowed_shared[kernel];
    allowed = (size_t)value > 48 * 1024 ? (size_t)value : 48 * 1024;
    return cudaSuccess;
}

/* As if compiled for the device at hand. */
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    out->ptxVersion = out->binaryVersion = emu_read_settings().sm;
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data)
{
    return enqueue(stream, {HOST, cudaMemcpyDefault, [=]() { function(data); }});
}

/* ---- copies ---- */

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    cudaError_t error = emu_ready();
    if (!error) error = emu_check_copy(dst, src, bytes, kind);
    if (error) return emu_return(error);
    return enqueue(stream, {COPY, kind, [=]() {
                                if (bytes) memmove(dst, src, bytes);
                            }});
}

cudaError_t cudaMemcpy2DAsync(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream)
{
    cudaError_t error = emu_ready();
    if (!error && (width > dst_pitch || width > src_pitch)) error = cudaErrorInvalidPitchValue;
    for (size_t i = 0; i < height && !error; i++)
        error = emu_check_copy((char *)dst + i * dst_pitch, (const char *)src + i * src_pitch, width, kind);
    if (error) return emu_return(error);
    return enqueue(stream, {COPY, kind, [=]() {
                                for (size_t i = 0; i < height; i++)
                                    memmove((char *)dst + i * dst_pitch, (const char *)src + i * src_pitch,
                                            width);
                            }});
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream)
{
    cudaError_t error = emu_ready();
    if (!error) error = emu_check_device(p, bytes);
    if (error) return emu_return(error);
    return enqueue(stream, {SET, cudaMemcpyDefault, [=]() {
                                if (bytes) memset(p, value, bytes);
                            }});
}

/* The calls that wait go by the legacy stream. */
static cudaError_t may_wait(void)
{
    locked hold(lock);
    if (blocking_capture()) return emu_return(cudaErrorStreamCaptureImplicit);
    return emu_return(emu_forbid_in_capture());
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind)
{
    cudaError_t error = may_wait();
    return error ? error : cudaMemcpyAsync(dst, src, bytes, kind, nullptr);
}

cudaError_t cudaMemcpy2D(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width,
                         size_t height, cudaMemcpyKind kind)
{
    cudaError_t error = may_wait();
    return error ? error : cudaMemcpy2DAsync(dst, dst_pitch, src, src_pitch, width, height, kind, nullptr);
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    cudaError_t error = may_wait();
    return error ? error : cudaMemsetAsync(p, value, bytes, nullptr);
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int)
{
    cudaError_t error = emu_ready();
    if (!error && flags & ~(unsigned)cudaStreamNonBlocking) error = cudaErrorInvalidValue;
    if (error) return emu_return(error);
    emu_stream *s = new emu_stream();
    s->handle.queue = queue_work;
    s->handle.own = s;
    s->flags = flags;
    *stream = &s->handle;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    emu_stream *s = resolve(stream);
    if (s == &legacy) return emu_return(cudaErrorInvalidResourceHandle);
    locked hold(lock);
    if (s->into && s->into->origin == s) captures.erase(s->into.get());
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    return wait_for(resolve(stream));
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return wait_for(resolve(stream));
}

/* ---- events ---- */

static double seconds(void)
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    *event = new CUevent_st();
    (*event)->flags = flags;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    if (!event) return emu_return(cudaErrorInvalidResourceHandle);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    locked hold(lock);
    emu_stream *s = resolve(stream);
    event->recorded = true;
    event->time = seconds();
    event->into = s->into;
    event->from = s;
    event->position = s->into ? s->into->nodes.size() : 0;
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    cudaError_t error = emu_ready();
    if (!error && event->into) error = cudaErrorCapturedEvent;
    return emu_return(error);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    return cudaEventQuery(event);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    cudaError_t error = emu_ready();
    if (!error &&
        (!start->recorded || !end->recorded || (start->flags | end->flags) & cudaEventDisableTiming))
        error = cudaErrorInvalidResourceHandle;
    if (!error && (start->into || end->into)) error = cudaErrorCapturedEvent;
    if (error) return emu_return(error);
    *milliseconds = (float)((end->time - start->time) * 1e3);
    return cudaSuccess;
}

/* An event recorded in a capture draws the stream that waits for it into the same capture. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    locked hold(lock);
    emu_stream *s = resolve(stream);
    if (!event->into) return emu_return(s->into ? cudaErrorStreamCaptureIsolation : cudaSuccess);
    if (!captures.count(event->into.get())) return emu_return(cudaErrorCapturedEvent);
    if (s == &legacy) return emu_return(cudaErrorStreamCaptureImplicit);
    if (s->into && s->into != event->into) return emu_return(cudaErrorStreamCaptureMerge);
    s->into = event->into;
    s->into->members.insert(s);
    s->unjoined = true;
    s->last = s->into->nodes.size();
    if (event->from != s && s->into->members.count(event->from) && event->position >= event->from->last)
        event->from->unjoined = false;
    return cudaSuccess;
}

/* ---- capture and graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    cudaError_t error = emu_ready();
    emu_stream *s = resolve(stream);
    if (!error && (s == &legacy || s->into)) error = cudaErrorStreamCaptureUnsupported;
    if (error) return emu_return(error);
    locked hold(lock);
    s->into = std::make_shared<capture>();
    s->into->origin = s;
    s->into->mode = mode;
    s->into->members.insert(s);
    s->last = 0;
    captures.insert(s->into.get());
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    locked hold(lock);
    emu_stream *s = resolve(stream);
    *graph = nullptr;
    std::shared_ptr<capture> c = s->into;
    if (!c) return emu_return(cudaErrorIllegalState);
    if (c->origin != s) return emu_return(cudaErrorStreamCaptureUnmatched);
    cudaError_t error = c->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    for (emu_stream *member : c->members) {
        if (member != s && member->unjoined && !error) error = cudaErrorStreamCaptureUnjoined;
        member->into = nullptr;
    }
    captures.erase(c.get());
    if (error) return emu_return(error);
    *graph = new CUgraph_st{std::move(c->nodes)};
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    locked hold(lock);
    emu_stream *s = resolve(stream);
    if (s == &legacy && blocking_capture()) return emu_return(cudaErrorStreamCaptureImplicit);
    *status = !s->into           ? cudaStreamCaptureStatusNone
              : s->into->invalid ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    if (nodes) return emu_return(cudaErrorNotSupported); /* a node has no handle here */
    *count = graph->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    *exec = new CUgraphExec_st{graph->nodes};
    return cudaSuccess;
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *info)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    *info = {cudaGraphExecUpdateSuccess, nullptr, nullptr};
    if (exec->nodes.size() != graph->nodes.size()) info->result = cudaGraphExecUpdateErrorTopologyChanged;
    for (size_t i = 0; i < graph->nodes.size() && !info->result; i++) {
        const node &old = exec->nodes[i], &fresh = graph->nodes[i];
        if (old.kind != fresh.kind)
            info->result = cudaGraphExecUpdateErrorNodeTypeChanged;
        else if (old.direction != fresh.direction)
            info->result = cudaGraphExecUpdateErrorParametersChanged;
    }
    if (info->result) return emu_return(cudaErrorGraphExecUpdateFailure);
    exec->nodes = graph->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
    return emu_return(emu_ready());
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    cudaError_t error = emu_ready();
    if (!exec) error = cudaErrorInvalidValue;
    if (error) return emu_return(error);
    locked hold(lock);
    emu_stream *s = resolve(stream);
    if (s->into) {
        s->into->invalid = true;
        return emu_return(cudaErrorStreamCaptureUnsupported);
    }
    for (node &n : exec->nodes) n.run();
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}
