"""vLLM's model runner without a model: what it tells the plugin in every step, and CUDA graphs as recorded operations.

What is taken over from vLLM is held by test_contract.py. Queries, keys and values are random, the same for the same
request, position and layer.
"""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import torch
from recorded import Recorded
from transformers import LlamaConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from reasonalloc.cache import ragged
from reasonalloc.cache.attention import attend_rows, received_attention
from reasonalloc.engines.vllm import backend, runner
from reasonalloc.engines.vllm.running import running
from reasonalloc.kernels.chunks import ChunkTable

LAYERS, HEADS, GROUP, DIM, LONGEST = 3, 2, 2, 8, 512
BUCKETS = (1, 2, 4, 8)
CHUNK = 8  # slots


def attend(query, spans, scaling):
    """On the device alone: every span is gathered at full width; a token behind its span's chunks is not seen."""
    rows, heads = spans.lengths_device.shape
    at = torch.arange(2 * LONGEST, device=query.device)
    in_chunks = spans.chunks.first.diff().view(rows, heads) * spans.chunks.chunk
    seen = torch.minimum(spans.lengths_device, in_chunks)[..., None] > at
    slots = (spans.starts_device[..., None] + at).clamp(max=len(spans.keys) - 1)
    keys, values = spans.keys[slots].double(), spans.values[slots].double().masked_fill(~seen[..., None], 0.0)
    asked = query.reshape(rows, heads, -1, query.shape[-1]).double()
    logits = torch.einsum("rhgd,rhtd->rhgt", asked, keys) * scaling
    weights = logits.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    if spans.received is not None:
        places = (spans.received_starts_device[..., None] + at).clamp(max=len(spans.received) - 1)
        spans.received.index_add_(0, places.flatten(), weights.sum(2).float().flatten())
    return torch.einsum("rhgt,rhtd->rhgd", weights, values).to(query.dtype).reshape(query.shape)


def on_device(*_):
    """An attention backend that reads no number on the host, as those for GPUs."""

    def table(layers, rows, heads, slots, device):
        return ChunkTable(layers, rows * heads, CHUNK, slots, device)

    return SimpleNamespace(
        name="test", attend=attend, table=table, reads_host=False,
        attend_chunk=attend_rows, receive_chunk=received_attention,
    )  # fmt: skip


@dataclass
class Request:
    name: str
    prompt: int
    arena: int = 0
    computed: int = 0
    tokens: int = 0  # prompt and generated ones
    outputs: dict = field(default_factory=dict)  # by position: of all layers

    def states(self, layer, start, count):
        """Query, key, value ``[tokens, heads, dim]``."""
        each = []
        for position in range(start, start + count):
            generator = torch.Generator().manual_seed(crc32(repr((self.name, position, layer)).encode()))
            each.append([torch.randn(n, DIM, generator=generator) for n in (HEADS * GROUP, HEADS, HEADS)])
        return [torch.stack(x) for x in zip(*each, strict=True)]


def config(requests):
    """What the plugin looks at of vLLM's configuration."""
    model = LlamaConfig(
        num_hidden_layers=LAYERS, num_key_value_heads=HEADS, num_attention_heads=HEADS * GROUP, head_dim=DIM,
        hidden_size=HEADS * GROUP * DIM,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=model, max_model_len=LONGEST, dtype=torch.float32),
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=64),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, use_ubatching=False, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(enable_prefix_caching=False, cache_dtype="auto"),
        speculative_config=None, kv_transfer_config=None, use_v2_model_runner=False,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )  # fmt: skip


class Engine:
    """A runner with ``arenas`` arenas, the null block included, and graphs of up to ``requests`` requests or none."""

    def __init__(self, monkeypatch, arenas=6, requests=8, graphs=True):
        monkeypatch.setattr(ragged, "choose_backend", on_device)
        monkeypatch.setattr(ragged.RaggedCache, "_layers_at_once", lambda *_: LAYERS)  # as on a GPU
        self.config = config(requests)
        monkeypatch.setattr(backend, "get_current_vllm_config", lambda: self.config)
        self.graphs, self.requests, self.batch = graphs, {}, []
        self.compilation_config = self.config.compilation_config
        self.layers = self.compilation_config.static_forward_context
        with torch.device("meta"):  # vLLM sets the GPU here
            for layer in range(LAYERS):
                impl = backend.ArenaAttention(HEADS * GROUP, DIM, DIM**-0.5, HEADS)
                name = f"model.layers.{layer}.self_attn.attn"
                self.layers[name] = SimpleNamespace(impl=impl, layer_name=name, kv_cache=torch.empty(0))
        self.bind(arenas)
        self.blocks = np.zeros((requests, 1), np.int32)
        self.computed, self.prompts = np.zeros(requests, np.int32), torch.zeros(requests, dtype=torch.int32)
        table = SimpleNamespace(get_numpy_array=lambda: self.blocks)
        self.input_batch = SimpleNamespace(
            num_reqs=0, block_table=[table], num_computed_tokens_cpu=self.computed,
            num_prompt_tokens_cpu_tensor=self.prompts,
        )  # fmt: skip
        self.reads = None  # a mode, under which a step is prepared and run
        self.recorded, self.inputs, self.replays = {}, {}, 0
        if graphs:
            self.record()

    def bind(self, arenas):
        """Memory of all layers, one behind the other, and the builders: one for equal layers."""
        groups, sizes = {}, []
        for number, (name, layer) in enumerate(self.layers.items()):
            layout = layer.impl.served.layout(number, torch.float32)
            groups.setdefault(layout, []).append(name)
            sizes.append(arenas * layout.nbytes)
        whole = torch.full((sum(sizes),), 255, dtype=torch.uint8)  # NaN, if anybody read it
        for layer, part in zip(self.layers.values(), whole.split(sizes), strict=True):
            layer.kv_cache = part.view(torch.float32).view(arenas, -1)
        self.builders = [backend.StepBuilder(None, names, self.config, "cpu") for names in groups.values()]

    @property
    def running(self):
        return running(self.layers)

    # ---- what vLLM's own methods would do ----

    def stock_update_states(self, _):
        return None

    def stock_determine_batch_execution_and_padding(
        self, num_tokens, num_reqs, max_num_scheduled_tokens, force_eager=False
    ):
        if self.graphs and not force_eager and max_num_scheduled_tokens == 1 and num_tokens == num_reqs <= BUCKETS[-1]:
            return next(bucket for bucket in BUCKETS if bucket >= num_reqs)
        return None

    # ---- a step ----

    def describe(self, counts, requests):
        """vLLM's description of a batch with so many tokens of each request, padded to so many requests."""
        real, total = len(counts), int(np.sum(counts))
        bounds = np.full(requests + 1, total, np.int32)
        bounds[0], bounds[1 : real + 1] = 0, np.cumsum(counts)
        lengths = torch.zeros(requests, dtype=torch.int32)
        lengths[:real] = torch.from_numpy(self.computed[:real] + np.array(counts, np.int32))
        in_prompt = torch.from_numpy(self.computed) < self.prompts
        in_prompt[real:] = False
        blocks = torch.from_numpy(self.blocks[:requests].copy())
        blocks[real:] = 0
        poison = torch.full((requests + 1,), -1)  # nobody looks at these
        return CommonAttentionMetadata(
            query_start_loc=poison, query_start_loc_cpu=torch.from_numpy(bounds), seq_lens=poison,
            num_reqs=requests, num_actual_tokens=max(total, requests if requests > real else total),
            max_query_len=int(max(counts)), max_seq_len=LONGEST, block_table_tensor=blocks, slot_mapping=poison,
            is_prefilling=in_prompt[:requests], seq_lens_cpu_upper_bound=lengths,
        )  # fmt: skip

    @torch.inference_mode()
    def record(self):
        """One graph for each bucket, largest first, after a warm-up, as vLLM does."""
        for bucket in reversed([bucket for bucket in BUCKETS if bucket <= len(self.blocks)]):
            description = self.describe([1] * bucket, bucket)
            description.is_prefilling[:] = False
            shape = [(bucket, n, DIM) for n in (HEADS * GROUP, HEADS, HEADS, HEADS * GROUP)]
            self.inputs[bucket] = [[torch.ones(x) for x in shape] for _ in range(LAYERS)]
            for builder in self.builders:
                builder.build(0, description)
            self.forward(self.inputs[bucket], description)
            for builder in self.builders:
                builder.build_for_cudagraph_capture(description)
            with Recorded() as self.recorded[bucket]:
                self.forward(self.inputs[bucket], description)

    def forward(self, states, description):
        for (query, key, value, out), layer in zip(states, self.layers.values(), strict=True):
            layer.impl.forward(layer, query, key, value, layer.kv_cache, description, out)

    @torch.inference_mode()
    def step(self, scheduled, finished=(), preempted=()):
        """
        Args:
            scheduled: (request, tokens) in the order of the batch; a request with nothing computed comes anew.
            finished, preempted: names.
        """
        self.requests.update({r.name: SimpleNamespace(block_ids=([r.arena],)) for r, _ in scheduled})
        new = [r.name for r, _ in scheduled if not r.computed]
        runner._update_states(
            self,
            SimpleNamespace(
                finished_req_ids=set(finished), preempted_req_ids=set(preempted) or None,
                scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new[:1]],
                scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(new[1:])),
                total_num_scheduled_tokens=sum(count for _, count in scheduled),
            ),
        )  # fmt: skip
        if not scheduled:
            return
        self.input_batch.num_reqs = len(scheduled)
        for i, (request, _) in enumerate(scheduled):  # after _update_states: the order is final when a step is built
            self.blocks[i], self.computed[i], self.prompts[i] = request.arena, request.computed, request.prompt
        counts = [count for _, count in scheduled]
        bucket = runner._determine_batch_execution_and_padding(
            self, num_tokens=sum(counts), num_reqs=len(counts), max_num_scheduled_tokens=max(counts)
        )
        description = self.describe(counts, bucket or len(counts))
        if self.reads is not None:
            self.reads.on_host = {
                x.untyped_storage().data_ptr()
                for x in (
                    description.query_start_loc_cpu,
                    description.is_prefilling,
                    description.seq_lens_cpu_upper_bound,
                )
            }
        states = self.states(scheduled)
        if bucket:
            for mine, theirs in zip(self.inputs[bucket], states, strict=True):
                for x, y in zip(mine, theirs, strict=True):
                    x[: len(y)] = y
        with self.reads or torch.no_grad():
            for builder in self.builders:
                builder.build(0, description)
            if bucket:
                self.recorded[bucket].replay()
                self.replays += 1
            else:
                self.forward(states, description)
        outputs, start = torch.stack([x[3] for x in (self.inputs[bucket] if bucket else states)]), 0
        for request, count in scheduled:
            request.outputs[request.computed + count - 1] = outputs[:, start + count - 1].clone()
            start += count
            request.computed += count
            request.tokens = max(
                request.tokens, request.prompt, request.computed + (request.computed >= request.prompt)
            )

    def states(self, scheduled):
        layers = []
        for layer in range(LAYERS):
            each = [r.states(layer, r.computed, count) for r, count in scheduled]
            query, key, value = (torch.cat(x) for x in zip(*each, strict=True))
            layers.append([query, key, value, torch.zeros_like(query)])
        return layers

    def kept(self, request):
        """Positions in every layer and head, sorted, after the rounds that are due."""
        self.running.end()
        cache = self.running.cache
        layers = [cache.tokens(layer) for layer in range(LAYERS)]
        row = request.arena
        return [[sorted(x.positions[row, h, : int(n)].tolist()) for h, n in enumerate(x.lengths[row])] for x in layers]


def load(engine, steps, seed=0, preempting=True):
    """Requests that come, decode, pause in their prompts, are preempted, resume elsewhere, and end.

    Yields:
        What every step should find equal in another engine: the requests of the step, and those that were there.
    """
    choose, arenas = random.Random(seed), list(range(1, len(engine.running.cache.table.phases)))
    there, waiting, made, gone = [], [], 0, []
    for _ in range(steps):
        if waiting and arenas and choose.random() < 0.3:
            request = waiting.pop()
            request.arena, request.computed = arenas.pop(choose.randrange(len(arenas))), 0
            there.append(request)
        elif arenas and choose.random() < 0.25:
            made += 1
            prompt = choose.choice([1, 2, 17, 18, 33, 50])
            there.append(Request(f"r{made}", prompt, arenas.pop(choose.randrange(len(arenas))), tokens=prompt))
        choose.shuffle(there)  # vLLM condenses its batch
        scheduled = []
        for request in there:
            left = request.tokens - request.computed
            if left > 1:
                scheduled.append((request, min(left, choose.choice([16, 32]))))
            elif choose.random() < 0.9:
                scheduled.append((request, 1))
        if any(count > 1 for _, count in scheduled) and choose.random() < 0.3:
            scheduled = [(r, count) for r, count in scheduled if count == 1]  # prompts pause
        preempted = []
        if preempting and len(there) > 2 and choose.random() < 0.08:
            request = choose.choice(there)
            there.remove(request)
            arenas.append(request.arena)
            waiting.append(request)
            preempted.append(request.name)
        scheduled = [(r, count) for r, count in scheduled if r in there]
        engine.step(scheduled, gone, preempted)
        gone = []
        yield [r for r, _ in scheduled], list(there)
        for request in list(there):
            if request.tokens > request.prompt + 40 and choose.random() < 0.2:
                there.remove(request)
                arenas.append(request.arena)
                gone.append(request.name)
    engine.step([], gone)
