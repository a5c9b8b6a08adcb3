"""Evaluation: how much a compressed cache changes what a model says."""

from reasonalloc.evaluation.fidelity import Fidelity, Trace, read_traces, teacher_force

__all__ = ["Fidelity", "Trace", "read_traces", "teacher_force"]
