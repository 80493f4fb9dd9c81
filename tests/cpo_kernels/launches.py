"""The kernels that a call launches, specialised as the launch specialises them, and compiled for a card that is not there.

Triton makes a binary for a kernel's constants and for what it sees in the arguments: an integer or an address that is a
multiple of 16, or is not. A gate that is told these by hand may compile another binary than the one that ships. Here the
call itself runs, on tensors without data ("meta"), and its launches are kept instead of made. The process must not have
TRITON_INTERPRET set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cpo_kernels.aot import Compiled, read_binary


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by position and by name, and the grid."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]  # constants, num_warps, num_stages, maxnreg
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)

    def compiled(self, arch: int) -> Compiled:
        """The kernel for compute capability `arch` (80 or 90), as `JITFunction.run` compiles it at this launch."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        target = GPUTarget("cuda", arch, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs, debug=False)
        key = (self.name, arch, repr((specialization, options)), repr(_constants(self.kernel, bound)))
        if key not in _compiled:
            options, signature, constants, attributes = self.kernel._pack_args(
                backend, dict(options), bound, specialization, options
            )
            source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
            _compiled[key] = read_binary(triton.compile(source, target=target, options=options.__dict__), arch)
        return _compiled[key]


_compiled: dict[
    tuple[Any, ...], Compiled
] = {}  # as a process that launches keeps them: one for all that is specialised alike


def _constants(kernel: Any, bound: dict[str, Any]) -> list[Any]:
    return [bound[parameter.name] for parameter in kernel.params if parameter.is_constexpr]


def launches(call: Callable[[], Any]) -> list[Launch]:
    """What `call` launches, in order; nothing runs, so its results hold no numbers."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def keep(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        found.append(Launch(kernel, args, kwargs, grid))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", keep)
        call()
    return found
