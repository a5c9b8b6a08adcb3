"""Full CUDA graphs in vLLM's own runner on the CPU: it chooses them and pads, and what it records is done again."""

from copy import deepcopy

import torch
from fake_engine import on_device
from recorded import Recorded
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import unified_attention_with_output

from reasonalloc.cache import ragged
from reasonalloc.engines.vllm import backend
from reasonalloc.engines.vllm.running import attentions

ATTENTION = torch.ops.vllm.unified_attention_with_output.default
SIZES = [1, 2, 4, 8]


class RecordedModel(Recorded):
    """Looks into vLLM's attention operation: what a GPU sees is what happens there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not ATTENTION:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return unified_attention_with_output(*args, **(kwargs or {}))


class Graphs:
    """In the place of ``CUDAGraphWrapper`` around the model."""

    def __init__(self, model):
        self.model, self.recorded, self.outputs, self.replays = model, {}, {}, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self.model(*args, **kwargs)
        which = context.batch_descriptor
        if which in self.recorded:
            self.recorded[which].replay()
            self.replays += 1
        else:
            with RecordedModel() as self.recorded[which]:
                self.outputs[which] = self.model(*args, **kwargs)
        return self.outputs[which]


def use_device_backend():
    """Before a model is loaded: attention that reads no number on the host, so that graphs may be had."""
    backend.choose_backend = ragged.choose_backend = on_device
    ragged.RaggedCache._layers_at_once = lambda *_: 8


def record(worker):
    """After it was loaded: graphs of 1, 2, 4 and 8 requests."""
    runner = worker.model_runner
    runner.model, config = Graphs(runner.model), runner.compilation_config
    config.cudagraph_mode, config.cudagraph_capture_sizes = CUDAGraphMode.FULL_DECODE_ONLY, SIZES
    config.max_cudagraph_capture_size = SIZES[-1]
    warm_up = {"cudagraph_runtime_mode": CUDAGraphMode.NONE, "force_attention": True, "uniform_decode": True}
    graph = {"cudagraph_runtime_mode": CUDAGraphMode.FULL, "is_graph_capturing": True, "uniform_decode": True}

    def record_all():
        for size in reversed(SIZES):
            runner._dummy_run(size, **warm_up)
            runner._dummy_run(size, **graph)
        assert len(runner.model.recorded) == len(SIZES)

    torch.accelerator.synchronize = torch.accelerator.empty_cache = lambda: None
    served, blocks = deepcopy(runner.kv_cache_config), runner.cache_config.num_gpu_blocks
    runner._cleanup_profiling_kv_cache()  # what vLLM does on a GPU before it knows how much memory there is
    with set_current_vllm_config(runner.vllm_config):
        runner._init_minimal_kv_cache_for_profiling()
    record_all()
    layers = attentions(config.static_forward_context)
    assert {len(layer.kv_cache) for layer in layers.values()} == {2}
    assert {layer.impl.running.requests for layer in layers.values()} == {1}
    runner.model.recorded.clear()
    runner._cleanup_profiling_kv_cache()
    assert all(layer.impl.running is None for layer in layers.values())
    runner.cache_config.num_gpu_blocks = blocks
    with set_current_vllm_config(runner.vllm_config):
        runner.initialize_kv_cache(served)
    assert config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
    record_all()


def replays(worker):
    """How many steps were replayed."""
    return worker.model_runner.model.replays
