"""Routing over heads that several ranks hold; the ranks are threads that meet at every gathering."""

import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonalloc.policies.allocation import HEAD_ALLOCATORS, ThresholdHeads, UniformHeads
from reasonalloc.policies.allocation.ranks import GatheredHeads

WINDOW = 2


class Meeting:
    """Gathers from threads as a process group does from processes."""

    def __init__(self, ranks):
        self.brought, self.barrier = [None] * ranks, threading.Barrier(ranks, timeout=30)

    def of(self, rank):
        def gather(tensor):
            assert tensor.is_floating_point(), "vLLM gathers no integers on CPUs with AVX-512"
            self.brought[rank] = tensor
            self.barrier.wait()
            everyone = torch.cat(self.brought)
            self.barrier.wait()
            return everyone

        return gather


def on_ranks(inner, scores, lengths, totals):
    """One ``allocate`` on every rank; scores and lengths are lists, one entry a rank."""
    meeting, out = Meeting(len(scores)), [None] * len(scores)

    def work(rank):
        allocator = GatheredHeads(inner, meeting.of(rank), rank)
        out[rank] = allocator.allocate(scores[rank], lengths[rank], totals[rank], WINDOW)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(scores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def drawn(seed, heads, tokens):
    scores = torch.rand(3, heads, tokens, generator=torch.Generator().manual_seed(seed))
    return scores, torch.full((3, heads), tokens)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 20), ranks=st.integers(1, 4), name=st.sampled_from(["uniform", "threshold", "adakv"]))
def test_every_rank_fills_its_memory_exactly(seed, ranks, name):
    inner = HEAD_ALLOCATORS.create(name)
    parts = [drawn(seed + rank, 2, 20 + rank) for rank in range(ranks)]  # ranks hold heads of different lengths
    scores, lengths = zip(*parts, strict=True)
    splits = on_ranks(inner, scores, lengths, [torch.full((3,), 22)] * ranks)
    for split, held in zip(splits, lengths, strict=True):
        assert (split.budgets.sum(-1) == 22).all()
        assert (split.budgets >= WINDOW).all()
        assert (split.budgets <= held).all()


def test_one_rank_is_the_split_itself():
    scores, lengths = drawn(0, 4, 30)
    total = torch.full((3,), 50)
    [split] = on_ranks(ThresholdHeads(), [scores], [lengths], [total])
    assert torch.equal(split.budgets, ThresholdHeads().allocate(scores, lengths, total, WINDOW).budgets)


def test_demand_is_told_by_one_threshold_over_all_ranks():
    """On the second rank nothing is worth keeping: its heads are equal then, by themselves they would not be."""
    good, lengths = drawn(0, 2, 40)
    poor = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 0.01])[:, None] - 1
    total = torch.full((3,), 40)
    _, second = on_ranks(ThresholdHeads(), [good + 1, poor], [lengths, lengths], [total, total])
    alone = ThresholdHeads().allocate(poor, lengths, total, WINDOW).budgets
    assert torch.equal(second.budgets, torch.full((3, 2), 20))
    assert not torch.equal(alone, second.budgets)


def test_equal_heads_stay_equal():
    parts = [drawn(rank, 2, 40) for rank in range(2)]
    scores, lengths = zip(*parts, strict=True)
    for split in on_ranks(UniformHeads(), scores, lengths, [torch.full((3,), 40)] * 2):
        assert torch.equal(split.budgets, torch.full((3, 2), 20))
