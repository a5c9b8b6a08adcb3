"""What the plugin relies on in vLLM. Where one of these fails, a newer vLLM has changed the ground."""

import inspect

import torch
import vllm
from packaging.version import Version
from vllm import envs
from vllm.config import ParallelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.engines.vllm.spec import ArenaSpec

LONGEST = 4096


def spec(slots):
    layout = ArenaLayout(slots, 4, 8, 32, torch.float32, queries=8, tracks_received=False)
    found = ArenaSpec(
        block_size=LONGEST, num_kv_heads=4, head_size=32, dtype=torch.float32, pairs=layout.rows // 2
    )  # fmt: skip
    return layout, found


def test_the_version_is_one_that_was_tried():
    assert Version("0.32") <= Version(vllm.__version__.split("+")[0]) < Version("0.34"), vllm.__version__


def test_a_page_is_an_arena():
    layout, found = spec(640)
    assert found.page_size_bytes == layout.nbytes
    assert found.max_memory_usage_bytes(None) == layout.nbytes
    for name in ("num_heads", "num_states", "get_num_kernel_states"):
        assert hasattr(AttentionSpec, name) or hasattr(KVCacheSpec, name), f"nothing asks for {name} any more"
    assert isinstance(KVCacheSpec.prefix_cacheable, property)


def test_a_request_takes_one_block():
    class Config:
        class parallel_config:
            decode_context_parallel_size = 1

    assert spec(640)[1].max_num_blocks_per_req(Config, LONGEST) == 1


def test_layers_of_different_arenas_are_one_group():
    specs = {f"layer.{i}": spec(slots)[1] for i, slots in enumerate((640, 512, 768))}
    assert UniformTypeKVCacheSpecs.is_uniform_type(specs)
    group = UniformTypeKVCacheSpecs.from_specs(specs)
    assert group.page_size_bytes == sum(found.page_size_bytes for found in specs.values())


def test_the_seams_are_where_they_were():
    assert issubclass(ArenaSpec, FullAttentionSpec)
    assert list(inspect.signature(Attention.get_kv_cache_spec).parameters) == ["self", "vllm_config"]
    assert {"CPU_ATTN", "CUSTOM"} <= {member.name for member in AttentionBackendEnum}
    build = inspect.signature(AttentionMetadataBuilder.build).parameters
    assert list(build) == ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]
    batch = inspect.signature(CommonAttentionMetadata).parameters
    assert "is_prefilling" in batch, "who says when a prompt ends?"
    assert "seq_lens_cpu_upper_bound" in batch, "how long are prompts, without waiting for the device?"
    assert {"finished_req_ids", "preempted_req_ids", "total_num_scheduled_tokens"} <= {
        *SchedulerOutput.__dataclass_fields__
    }, "who says when a request has ended?"
    assert "query_start_loc_cpu" in batch, "where do requests begin, without waiting for the device?"
    assert {"num_reqs", "max_query_len"} <= {*batch}
    assert "block_ids" in CachedRequestState.__dataclass_fields__, "which arena did it have?"
    assert isinstance(ParallelConfig.use_ubatching, property), "may batches be split by another name?"
    assert "no_compile_layers" in inspect.signature(ForwardContext).parameters, "where are all layers?"
    assert "attention_backend" in EngineArgs.__dataclass_fields__, "how is the plugin's attention chosen on a GPU?"
    forward = list(inspect.signature(AttentionImpl.forward).parameters)
    assert forward[:8] == ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    assert hasattr(AttentionBackend, "supported_kv_cache_layouts")


def test_the_runner_is_where_it_was():
    """All of these are replaced, each by one that calls it."""

    def arguments(method):
        return list(inspect.signature(getattr(GPUModelRunner, method)).parameters)

    assert arguments("_update_states") == ["self", "scheduler_output"]
    assert {"max_num_scheduled_tokens", "force_eager"} <= {*arguments("_determine_batch_execution_and_padding")}
    assert arguments("initialize_kv_cache")[:3] == ["self", "kv_cache_config", "is_profiling"]
    assert arguments("_cleanup_profiling_kv_cache") == ["self"]
    profiling = inspect.getsource(GPUModelRunner._init_minimal_kv_cache_for_profiling)
    assert "self.initialize_kv_cache(minimal_config, is_profiling=True)" in profiling
    assert "num_gpu_blocks_override" in inspect.getsource(kv_cache_utils)
    made = inspect.getsource(InputBatch.__init__)
    for name in ("num_computed_tokens_cpu", "num_prompt_tokens_cpu_tensor", "block_table"):
        assert f"self.{name} =" in made, f"who says it on the host, if not {name}?"
    assert callable(BlockTable.get_numpy_array)
    assert "_may_reorder_batch" in inspect.getsource(GPUModelRunner._update_states), "when is the order final?"
    executed = inspect.getsource(GPUModelRunner.execute_model)
    order = ("self._update_states(", "self._determine_batch_execution_and_padding(", "self._build_attention_metadata(")
    assert [executed.index(name) for name in order] == sorted(executed.index(name) for name in order)


def test_the_older_runner_can_be_chosen():
    assert isinstance(VllmConfig.use_v2_model_runner, property)
    assert "VLLM_USE_V2_MODEL_RUNNER" in envs.environment_variables
    worker = inspect.getsource(gpu_worker.Worker._make_model_runner)
    assert "from vllm.v1.worker.gpu_model_runner import GPUModelRunner" in worker


def test_graphs_are_asked_for_as_they_were():
    asked = inspect.signature(AttentionMetadataBuilder.get_cudagraph_support).parameters
    assert list(asked) == ["vllm_config", "kv_cache_spec"]
    assert AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value > AttentionCGSupport.NEVER.value
    capture = inspect.getsource(AttentionMetadataBuilder.build_for_cudagraph_capture)
    assert "self.build(" in capture
    assert issubclass(gpu_worker.Worker, WorkerBase), "who is asked for counters by name?"
