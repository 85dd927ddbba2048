"""The recorder's place in the training loop: where each phase begins and ends. Follows l2v/training/loop.py and steps.py."""

from __future__ import annotations

from types import ModuleType

from .inside import after, at_exit, record_path, replaced
from .place import Plan
from .recorder import Recorder


def register(plan: Plan) -> None:
    """Record this process's training, from the import of the loop to the end."""
    recorder = Recorder(lines=plan.lines)

    @after("triton.runtime.jit")
    def _specialisations(jit: ModuleType) -> None:
        def make(real):
            def _do_compile(function, key, signature, device, constexprs, options, attrs, warmup):
                kernel = real(function, key, signature, device, constexprs, options, attrs, warmup)
                recorder.compiled(function, key, signature, constexprs, options, attrs, kernel)
                return kernel

            return _do_compile

        replaced(jit.JITFunction, "_do_compile", make)

    @after("l2v.training.steps")
    def _backward(steps: ModuleType) -> None:
        def make(real):
            def _backward(*arguments, **named):
                stage, step, _ = recorder.at
                with recorder.phase(stage, step, "backward"):
                    return real(*arguments, **named)

            return _backward

        replaced(steps, "_backward", make)

    @after("l2v.training.loop")
    def _loop(loop: ModuleType) -> None:
        def phase(name: str):
            def make(real):
                def method(training, step, *arguments, **named):
                    with recorder.phase(training.job.name, step + 1, name):
                        return real(training, step, *arguments, **named)

                return method

            return make

        def gradients(real):  # what comes after them, until the update, is the ranks' agreement
            def _gradients(training, *arguments, **named):
                try:
                    return real(training, *arguments, **named)
                finally:
                    stage, step, _ = recorder.at
                    recorder.enter(stage, step, "agreement")

            return _gradients

        def log_step(real):
            def log_step(training, step, *arguments, **named):
                with recorder.phase(training.job.name, step + 1, "log"):
                    recorder.note_memory()
                    return real(training, step, *arguments, **named)

            return log_step

        replaced(loop.Training, "forward_and_backward", phase("forward"))
        replaced(loop.Training, "_gradients", gradients)
        replaced(loop.Training, "update_or_skip", phase("update"))
        replaced(loop.Training, "log_step", log_step)
        replaced(loop.Training, "save_if_due", phase("save"))
        recorder.start()

        def write() -> None:
            recorder.stop()
            recorder.write(record_path(plan))

        at_exit(write)
