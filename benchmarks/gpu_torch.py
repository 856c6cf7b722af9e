"""The calls of PyTorch that gpu.py measures: ours, the kernels of SDPA, and compiled FlexAttention."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import mha_spec_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy
    from gpu_settings import Setting

__all__ = ["calls", "name_of", "present", "wait"]

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_attention: Callable[..., Any] = mha_spec_torch.attention


def present(device: str) -> bool:
    """Return True if torch has such a device."""
    return device == "cpu" or torch.cuda.is_available()


def name_of(device: str) -> str:
    """Name the device and the versions."""
    name = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"


def wait(device: str, _: object) -> None:
    """Wait until the device has computed the result."""
    if device != "cpu":
        torch.cuda.synchronize()


def calls(setting: Setting, device: str, *, backward: bool) -> dict[str, Callable[[], object]]:
    """Make our call and those of the other kernels, some of which may raise."""
    torch.manual_seed(7)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    operands = [torch.randn(shape, device=device, dtype=dtype, requires_grad=backward) for shape in setting.shapes]

    def array(value: numpy.ndarray) -> torch.Tensor:
        return torch.from_numpy(value).to(device)

    functions: dict[str, Callable[..., torch.Tensor]] = {"ours": partial(_attention, **setting.options(array))}
    grouped = setting.kv[0] != setting.query[1]
    only_causal = setting.causal and setting.window is setting.lengths is setting.packed is None
    mask = None if setting.visible is None or only_causal else array(setting.visible)
    native = partial(scaled_dot_product_attention, attn_mask=mask, is_causal=only_causal, enable_gqa=grouped)
    functions |= {name: partial(_by, kernel, native) for name, kernel in KERNELS.items()}
    if setting.flex and setting.visible is not None:
        blocks = _blocks(setting, array(setting.visible), device)
        functions["flex"] = partial(_flex(device), block_mask=blocks, enable_gqa=grouped)
    return {name: partial(_pass, call, operands, backward=backward) for name, call in functions.items()}


def _flex(device: str) -> Callable[..., Any]:
    """Compile FlexAttention for this call only; on a CPU it is only traced, because compiling takes long."""
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, backend="eager" if device == "cpu" else "inductor")


def _by(kernel: SDPBackend, native: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return native(*operands)


def _pass(call: Callable[..., torch.Tensor], operands: list[torch.Tensor], *, backward: bool) -> object:
    """Call forward and, if requested, backward; the cotangent has the memory layout of the output, as in training."""
    if not backward:
        with torch.no_grad():
            return call(*operands)
    output = call(*operands)
    return torch.autograd.grad(output, operands, output.detach())


def _blocks(setting: Setting, visible: torch.Tensor, device: str) -> Any:
    """Make the block mask of FlexAttention."""
    batch, _, rows, _ = visible.shape

    def see(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return visible[b if batch > 1 else 0, 0 * h, i if rows > 1 else 0, j]

    return create_block_mask(see, batch if batch > 1 else None, None, setting.query[2], setting.kv[1], device=device)
