"""A simulated CUDA device. Tensors on it are fake: they have shapes and dtypes, and no values."""

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch.optim.optimizer
import torch.utils._foreach_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lcm.simulation import guard
from lcm.simulation.ledger import Ledger, aten

real_attention = F.scaled_dot_product_attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the kernel that torch chooses on an A100 or H100.

    That is flash attention for 16 bits without a mask, else the memory-efficient one. Fake tensors alone would choose
    the plain formula, whose attention weights take far more memory.
    """
    if query.device.type != "cuda":
        return real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention: query, key and value are {query.dtype}, {key.dtype}, {value.dtype}")
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    with torch.amp.autocast("cuda", enabled=False):
        if is_half and attn_mask is None and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        has_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, has_gradient, dropout_p, is_causal, scale=scale
        )[0]


class SimulatedCuda(contextlib.ExitStack):
    """While it is entered, torch has one CUDA device, and all tensors are fake. `ledger` says what happened on it.

    Raises UserError if this build of torch cannot simulate CUDA.
    """

    def __init__(self, name: str = "a simulated GPU", memory: int = 80 * 10**9, capability: tuple[int, int] = (9, 0)):
        super().__init__()
        guard.install()
        self.name, self.memory, self.capability = name, memory, capability
        self.mode, self.ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger()

    def patch(self, owner: Any, name: str, value: Any) -> Any:
        """Replace an attribute until the device is left; returns the original."""
        original = getattr(owner, name)
        setattr(owner, name, value)
        self.callback(setattr, owner, name, original)
        return original

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Count what a function or method does as a phase."""
        original, ledger = getattr(owner, name), self.ledger

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with ledger.within(phase):
                return original(*args, **kwargs)

        self.patch(owner, name, wrapped)

    def __enter__(self) -> "SimulatedCuda":
        super().__enter__()
        for name, answer in self.answers().items():
            self.patch(torch.cuda, name, answer)
        self.patch(torch, "Generator", self.generator_class())
        self.patch(F, "scaled_dot_product_attention", attention)
        self.patch(FakeTensorMode, "avoid_device_init", property(lambda mode: True))
        self.patch(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)
        real_resize = torch.UntypedStorage.resize_
        self.patch(torch.UntypedStorage, "resize_", lambda *args: self.resize(real_resize, *args))
        # On CUDA, optimizers and clipping use foreach kernels, for types that they know.
        for module in (sys.modules["torch.optim.optimizer"], sys.modules["torch.utils._foreach_utils"]):
            known = module._foreach_supported_types  # type: ignore[attr-defined]
            self.patch(module, "_foreach_supported_types", [*known, FakeTensor, torch.nn.Parameter])
        # `Module.to` swaps fake parameters, unless there are weak references to them, as FakeTensorMode has.
        self.patch(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda tensor: []))
        self.enter_context(self.mode)
        self.enter_context(self.ledger)
        return self

    def resize(self, real_resize: Any, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """`UntypedStorage.resize_`, counted."""
        real_resize(storage, size)
        self.ledger.resized(storage)
        return storage

    def answers(self) -> dict[str, Any]:
        """The functions of torch.cuda that ask about the device."""
        ledger, random_state = self.ledger, torch.zeros(16, dtype=torch.uint8)
        major, minor = self.capability
        properties = SimpleNamespace(
            name=self.name, major=major, minor=minor, total_memory=self.memory, multi_processor_count=132, warp_size=32
        )
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": lambda: None,
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: self.name,
            "get_device_capability": lambda device=None: self.capability,
            "is_bf16_supported": lambda including_emulation=True: True,
            "is_current_stream_capturing": lambda: False,
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
            "get_rng_state": lambda device="cuda": random_state,
            "set_rng_state": lambda state, device="cuda": None,
            "get_rng_state_all": lambda: [random_state],
            "set_rng_state_all": lambda states: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: ledger.current,
            "max_memory_allocated": lambda device=None: ledger.peak,
            "reset_peak_memory_stats": lambda device=None: None,
            "synchronize": lambda device=None: ledger.wait("synchronize"),
        }

    def generator_class(self) -> type[torch.Generator]:
        """torch.Generator, which a build without CUDA cannot make for "cuda"; the ledger keeps its device."""
        ledger = self.ledger
        base: Any = torch._C.Generator

        class Generator(base):
            def __new__(cls, device: Any = "cpu") -> "Generator":
                self = super().__new__(cls, "cpu")  # type: ignore[call-arg]
                device = torch.device(device)
                ledger.generators[self._cdata] = torch.device("cuda", 0) if device.type == "cuda" else device
                return self

            def __init__(self, device: Any = "cpu"):
                pass

            @property
            def device(self) -> torch.device:
                return ledger.generators[self._cdata]

        return Generator
