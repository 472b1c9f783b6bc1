"""A frozen model: gradients pass through it, and neither its weights nor its blocks' insides are kept for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SolveError
from .overwriting import Overwriting
from .structure import Structure

Forward = Callable[..., Any]


@contextmanager
def frozen(model: nn.Module, checkpointing: bool = True) -> Iterator[None]:
    """Inside, gradients pass through `model`, and its weights get none. Afterwards it is as before.

    Weights that were loaded under inference mode are looked at through tensors of the same memory, as autograd does not
    take them. Weights that are converted for every call (quantized, offloaded) are converted again when gradients pass,
    instead of being kept until then.

    Args:
        checkpointing: of the model's repeated blocks only the inputs are kept, and their insides computed again
            (Chen et al. 2016, arXiv 1604.06174).
    """
    with ExitStack() as stack:
        names = {module: name for name, module in model.named_modules()}
        for module, name in names.items():
            stack.enter_context(_usable_weights(module))
            if module._parameters and not module._modules:
                stack.enter_context(_replaced(module, _converting(module, _said(module, name))))
        for block in blocks_of(model) if checkpointing else ():
            stack.enter_context(_replaced(block, _checkpointed(block, _said(block, names[block]))))
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what its outermost ModuleLists hold, inside further lists if need be."""
    found: list[nn.Module] = []
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            found += blocks_of(child)
            continue
        for one in child:
            # a Sequential in a list may be taken apart by its model, as UNets do
            held = list(one) if isinstance(one, nn.ModuleList | nn.Sequential) else [one]
            for block in held:
                found += blocks_of(nn.ModuleList([block])) if isinstance(block, nn.ModuleList) else [block]
    return [block for block in found if any(True for _ in block.parameters())]


@contextmanager
def _usable_weights(module: nn.Module) -> Iterator[None]:
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    wanting = {name: one for name, one in parameters.items() if one is not None and one.requires_grad}
    for name, parameter in parameters.items():
        if parameter is not None and parameter.is_inference():
            module._parameters[name] = _same_parameter(parameter)
        elif name in wanting and parameter is not None:
            parameter.requires_grad_(False)
    for name, buffer in buffers.items():
        if type(buffer) is Tensor and buffer.is_inference():
            module._buffers[name] = _same_memory(buffer)
    try:
        yield
    finally:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
        for parameter in wanting.values():
            if not parameter.is_inference():
                parameter.requires_grad_(True)


def _same_parameter(parameter: nn.Parameter) -> nn.Parameter:
    if hasattr(parameter, "__tensor_flatten__"):  # it wraps tensors, as ComfyUI's QuantizedTensor does
        return nn.Parameter(_same_wrapper(parameter), requires_grad=False)
    with torch._C.DisableTorchFunctionSubclass():
        fresh = _same_memory(parameter.as_subclass(Tensor))
        if type(parameter) is nn.Parameter:
            return nn.Parameter(fresh, requires_grad=False)
        same: nn.Parameter = fresh.as_subclass(type(parameter))
        vars(same).update(vars(parameter))  # what its class keeps beside its values, as that of ComfyUI-GGUF does
    return same


def _same_wrapper(wrapper: Any) -> Tensor:
    own = set(vars(wrapper))
    names, how = wrapper.__tensor_flatten__()
    inner = {name: getattr(wrapper, name) for name in names}
    for name in set(vars(wrapper)) - own:  # put there for the lines above
        delattr(wrapper, name)
    fresh = {name: _same_memory(one) if one.is_inference() else one for name, one in inner.items()}
    same: Tensor = type(wrapper).__tensor_unflatten__(fresh, how, wrapper.shape, wrapper.stride())
    return same


def _same_memory(tensor: Tensor) -> Tensor:
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


@contextmanager
def _replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    own = module.__dict__.get("forward")  # of another node, if it put one on this very module
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own


def _said(module: nn.Module, name: str) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _without_gradient(said: str) -> SolveError:
    return SolveError(
        f"No gradient passes through {said}, so nothing can be distilled on this model. Its kernels may be made for "
        "inference only: use the same model in bf16, fp8 or GGUF."
    )


@contextmanager
def _naming(said: str) -> Iterator[None]:
    """Tells in what a kernel without gradient is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _without_gradient(said) from error


def _converting(module: nn.Module, said: str) -> Forward:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        simple = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].requires_grad
        if simple and not _is_used_as_it_is(module, args[0]):
            return _Again.apply(args[0], original, said)
        output = original(*args, **kwargs)
        if simple and torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad:
            raise _without_gradient(said)
        return output

    return forward


def _is_used_as_it_is(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer computes with the very weight that it holds."""
    # ComfyUI's marks of weights that are patched at every call, or held by its dynamic memory
    moving = bool(getattr(module, "weight_function", ())) or hasattr(module, "_v")
    held = (one for one in module._parameters.values() if one is not None)
    return not moving and all(one.dtype == x.dtype and one.device == x.device for one in held)


class _Again(torch.autograd.Function):
    """A layer that is run again when its gradient is asked for, rather than keep the weight that it converted."""

    @staticmethod
    def forward(context: Any, x: Tensor, original: Forward, said: str) -> Tensor:
        context.save_for_backward(x)
        context.original, context.said = original, said
        output: Tensor = original(x)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = context.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output = context.original(x)
            if not output.requires_grad:
                raise _without_gradient(context.said)
            with _naming(context.said):
                return torch.autograd.grad(output, x, gradients)[0], None, None


def _checkpointed(block: nn.Module, said: str) -> Forward:
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        # models write into the options they hand on (the number of the block): when it is computed again, it has to
        # find what it found
        kwargs = {name: dict(one) if type(one) is dict else one for name, one in kwargs.items()}
        given, inputs = Structure.of((args, kwargs))
        answered = Structure(None)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal answered
            args, kwargs = given.filled(tensors)
            answered, answers = Structure.of(original(*args, **kwargs))
            return answers

        always = torch.empty(0, requires_grad=True)  # the first block's inputs want no gradient, its factors do
        answers = _Checkpoint.apply(run, said, always, *inputs)
        return answered.filled(answers)

    return forward


class _Checkpoint(torch.autograd.Function):
    """torch.utils.checkpoint keeps no check that what it computed again was not overwritten afterwards."""

    @staticmethod
    def forward(
        context: Any, run: Callable[..., tuple[Tensor, ...]], said: str, always: Tensor, *tensors: Tensor
    ) -> Any:
        context.run, context.said = run, said
        context.save_for_backward(*tensors)
        return run(*map(torch.clone, tensors))

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [one.detach().requires_grad_(one.requires_grad) for one in context.saved_tensors]
        # modes and hooks of the forward pass do not reach into the backward pass
        with torch.enable_grad(), Overwriting():
            answers = context.run(*map(torch.clone, given))
            pairs = [(a, g) for a, g in zip(answers, gradients, strict=True) if a.requires_grad and g is not None]
            if not pairs and any(one.requires_grad for one in given):
                raise _without_gradient(context.said)
            with _naming(context.said):
                torch.autograd.backward([a for a, _ in pairs], [g for _, g in pairs])
        return (None, None, None, *(one.grad for one in given))
