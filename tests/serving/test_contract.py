"""What the plugin relies on in vLLM. Where one of these fails, a newer vLLM has changed the ground."""

import inspect

import torch
import vllm
from packaging.version import Version
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

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
    assert list(inspect.signature(GPUModelRunner._update_states).parameters) == ["self", "scheduler_output"]
    assert "finished_req_ids" in SchedulerOutput.__dataclass_fields__, "who says when a request has ended?"
    assert "block_ids" in CachedRequestState.__dataclass_fields__, "which arena did it have?"
    assert isinstance(ParallelConfig.use_ubatching, property), "may batches be split by another name?"
    assert "no_compile_layers" in inspect.signature(ForwardContext).parameters, "where are all layers?"
    assert "attention_backend" in EngineArgs.__dataclass_fields__, "how is the plugin's attention chosen on a GPU?"
    forward = list(inspect.signature(AttentionImpl.forward).parameters)
    assert forward[:8] == ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    assert hasattr(AttentionBackend, "supported_kv_cache_layouts")
