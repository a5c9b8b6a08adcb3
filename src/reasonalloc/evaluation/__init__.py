"""Evaluation: how much a compressed cache changes what a model says."""

from reasonalloc.evaluation.fidelity import Fidelity, Trace, make_trace, teacher_force

__all__ = ["Fidelity", "Trace", "make_trace", "teacher_force"]
