"""A causal LM opened without its weights, and walked block by block.

The skeleton is transformers' own modelling code on the meta device; weights are put into one
decoder block at a time. Blocks and linears are found by structure, so most decoder-only families
work without being named here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.errors import RunError, first_line
from compressor.models.attention import use_chunked_causal
from compressor.models.checkpoint import Checkpoint
from compressor.models.experts import UnfusedExperts, is_fused
from compressor.models.names import disk_keys
from compressor.models.read_ahead import ReadAhead
from compressor.numerics import vector_math
from compressor.numerics.memory import free_bytes, keep_freed_pages

# Before any model computes: all of them come through here.
vector_math.settle()
keep_freed_pages()

# Siblings that read the same tensor and so share one statistic. A family that names them otherwise
# only computes a statistic more often than needed.
_SHARED_INPUT = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
FUSED_EXPERTS = "fused experts that cannot be taken apart"
_AHEAD_SHARE = 0.25  # of the free memory that a block read ahead may take


@dataclass(frozen=True)
class LinearRef:
    """A linear of a block.

    Attributes:
        name: its key in the checkpoint, without ``.weight``.
        path: its module path in the model.
        module: the linear itself.
        input_group: shared by linears that read the same tensor.
    """

    name: str
    path: str
    module: nn.Linear
    input_group: str


def by_input(refs: Iterable[LinearRef]) -> dict[str, list[LinearRef]]:
    """Linears grouped by what they read, in model order."""
    groups: dict[str, list[LinearRef]] = {}
    for ref in refs:
        groups.setdefault(ref.input_group, []).append(ref)
    return groups


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks are called with.

    Attributes:
        hidden: [batch, length, hidden], input of the first block.
        calls: positional and keyword arguments of each block besides the hidden states.
    """

    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Stop(Exception):
    """Ends a forward pass when the last block has been reached."""


class _OtherForm(Exception):
    """This model wants its blocks' output in the other form (tuple or tensor)."""


class _Catcher(nn.Module):
    """Stands in for a block: notes its arguments and passes the hidden states on."""

    def __init__(self, block: nn.Module, seen: list[Any], count: int, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: its weights are not there
        self.seen = seen
        self.count = count
        self.as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, *args = args  # type: ignore[assignment]
        else:
            hidden = kwargs.pop("hidden_states")
        if not isinstance(hidden, torch.Tensor) or (
            self.seen and hidden.shape != self.seen[0][0].shape
        ):
            raise _OtherForm
        self.seen.append((hidden, tuple(args), kwargs))
        if len(self.seen) == self.count:
            raise _Stop
        return (hidden,) if self.as_tuple else hidden


class _Given(nn.Module):
    """Stands in for a block: gives the hidden states it was made with, or passes its input on."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor | None, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "hidden", hidden)
        self.as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.__dict__["hidden"]
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not isinstance(hidden, torch.Tensor):
                raise _OtherForm
        return (hidden,) if self.as_tuple else hidden


class CausalLM:
    """A model whose weights are still on disk. Make one with `CausalLM.open`.

    Attributes:
        config: transformers' config, without ``quantization_config``; its dtype is the one on
            disk.
        model: the module tree, parameters on the meta device until loaded.
        blocks: decoder blocks in order; ``block_names`` are their module paths.
        checkpoint: the tensors on disk.
        num_parameters: tied weights counted once.
    """

    def __init__(self, model: Any, config: Any, checkpoint: Checkpoint) -> None:
        self.model = model
        self.config = config
        self.checkpoint = checkpoint
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._disk = disk_keys(model, checkpoint.names)
        self._persistent = set(model.state_dict()) - set(dict(model.named_parameters()))
        self._arguments: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._ahead: ReadAhead | None = None
        for name, module in list(model.named_modules()):
            if is_fused(module) and f"{name}.0.gate_proj.weight" in self._disk:
                with torch.device("meta"):
                    _set_module(model, name, UnfusedExperts(module).eval())
        self._list_name, self.blocks = _find_blocks(model)
        self.block_names = [f"{self._list_name}.{i}" for i in range(len(self.blocks))]

    @classmethod
    def open(cls, directory: Path, trust_remote_code: bool = False) -> CausalLM:
        """Build the skeleton from config.json; no weight is read.

        Raises:
            RunError: transformers does not know the config, or no decoder blocks are found.
        """
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        checkpoint = Checkpoint(directory)
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config),  # the dtype given here is written into it
                    trust_remote_code=trust_remote_code,
                    dtype=torch.float32,
                )
        except Exception as error:  # whatever libraries make of such a config
            raise RunError(
                f"transformers cannot build this model ({first_line(error)})",
                where=str(directory / "config.json"),
                fix="check config.json, or update transformers if the architecture is new",
            ) from error
        model.tie_weights()  # placing parameters on meta has cut the ties
        config.dtype = _main_dtype(checkpoint) or config.dtype or torch.float32
        use_chunked_causal(model)
        return cls(model.eval(), config, checkpoint)

    def linears(self, index: int) -> list[LinearRef]:
        """The linears of a block that can be quantized: experts' too, routers' not."""
        return [ref for ref, reason in self._linears(index) if reason is None]

    def skipped(self, index: int) -> list[tuple[str, str]]:
        """(name in the checkpoint, reason) of a block's matrices that stay as they are."""
        found = [(ref.name, reason) for ref, reason in self._linears(index) if reason]
        for path, module in self.blocks[index].named_modules():
            if isinstance(module, nn.Linear):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    full = _join(self.block_names[index], path, name)
                    if is_router(path):
                        reason = "router"
                    else:
                        reason = FUSED_EXPERTS if "experts" in full else "not a linear"
                    found.append((self.disk_name(full).removesuffix(".weight"), reason))
        return found

    def outside_linears(self) -> list[tuple[str, str]]:
        """(name in the checkpoint, reason) of linears outside the blocks, such as lm_head."""
        return [
            (self.disk_name(f"{path}.weight").removesuffix(".weight"), "outside the decoder blocks")
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not self._in_blocks(path)
        ]

    def head(self) -> LinearRef | None:
        """The output layer (lm_head), where it is a linear; under its own name even where its
        weight is the embeddings'."""
        module = self.model.get_output_embeddings()
        path = next((path for path, m in self.model.named_modules() if m is module), None)
        if not isinstance(module, nn.Linear) or path is None or self._in_blocks(path):
            return None
        name = path
        if not self.head_is_tied:
            name = self.disk_name(f"{path}.weight").removesuffix(".weight")
        return LinearRef(name, path, module, path)

    @property
    def head_is_tied(self) -> bool:
        """Whether the output layer's weight is the embeddings'."""
        output, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return output is not None and getattr(output, "weight", None) is embeddings.weight

    def head_key(self) -> str:
        """Key in the checkpoint of the output layer's weight."""
        module = self.model.get_output_embeddings()
        if self.head_is_tied:
            module = self.model.get_input_embeddings()
        path = next(path for path, m in self.model.named_modules() if m is module)
        return self.disk_name(f"{path}.weight")

    def untie_head(self) -> None:
        """Let the output layer have a weight of its own from now on."""
        for config in (self.model.config, self.model.config.get_text_config()):
            config.tie_word_embeddings = False

    def _linears(self, index: int) -> Iterator[tuple[LinearRef, str | None]]:
        prefix = self.block_names[index]
        for path, module in self.blocks[index].named_modules():
            if not isinstance(module, nn.Linear):
                continue
            full = _join(prefix, path)
            parent, _, leaf = path.rpartition(".")
            group = _join(prefix, parent, _SHARED_INPUT.get(leaf, leaf))
            name = self.disk_name(f"{full}.weight").removesuffix(".weight")
            yield LinearRef(name, full, module, group), "router" if is_router(path) else None

    def disk_name(self, name: str) -> str:
        """Key in the checkpoint of a parameter of the model (the name itself if there is none)."""
        return self._disk.get(name, name)

    def disk_path(self, path: str) -> str:
        """What a module is called in the checkpoint: the path itself unless its parameters have
        another prefix there."""
        return self._disk_paths.get(path, path)

    @functools.cached_property
    def _disk_paths(self) -> dict[str, str]:
        """Prefixes of the parameters' names in the model, and what stands for them on disk."""
        found: dict[str, str] = {}
        for path, key in self._disk.items():
            while True:
                path, _, leaf = path.rpartition(".")
                key, _, theirs = key.rpartition(".")
                if leaf != theirs or not path or not key or path in found:
                    break
                found[path] = key
        return found

    @property
    def block_parameters(self) -> int:
        """Parameters of all matrices in the blocks: what could be quantized, routers included."""
        return sum(p.numel() for b in self.blocks for p in b.parameters() if p.ndim >= 2)

    def numel(self, name: str) -> int:
        """Elements of a matrix that `skipped` or `outside_linears` names; 0 if it has no tensor."""
        for key in (f"{name}.weight", name):
            if self.checkpoint.has(key):
                return self.checkpoint.numel(key)
        return 0

    def unread(self) -> list[str]:
        """Tensors of the checkpoint that the modelling code never reads, such as heads of
        multi-token prediction (transformers ignores those without a word)."""
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        used = {self.disk_name(name) for name in names | self._persistent}
        return [key for key in self.checkpoint.names if key not in used]

    def load_block(self, index: int, device: str | torch.device, dtype: torch.dtype) -> None:
        """Put a block's weights in place."""
        self._load(self.block_names[index], self.blocks[index], device, dtype)
        self._ahead = None

    def read_ahead(self, index: int, device: str | torch.device) -> bool:
        """Start to read a block's weights in the background, for `load_block` to find there.

        Returns:
            Whether it was begun: not where memory would be short of it.
        """
        names = (
            _join(self.block_names[index], n) for n, _ in self.blocks[index].named_parameters()
        )
        keys = [key for name in names if self.checkpoint.has(key := self.disk_name(name))]
        size = sum(self.checkpoint.numel(k) * self.checkpoint.dtype(k).itemsize for k in keys)
        # For a GPU it passes through pinned memory of this machine.
        if size > _AHEAD_SHARE * min(free_bytes("cpu"), free_bytes(device)):
            return False
        self._ahead = ReadAhead(self.checkpoint, keys, device)
        return True

    def unload_block(self, index: int) -> None:
        """Free a block's weights."""
        for module in self.blocks[index].modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def embed(self, ids: torch.Tensor) -> BlockInputs:
        """Run the model's own forward up to its blocks, in float32.

        Args:
            ids: int64 [batch, length]; every batch of that shape has equal block arguments.

        Raises:
            RunError: they are not equal, because the model hands blocks more than hidden states
                that depend on the text.
        """
        self._place_outside(ids.device)
        try:
            seen = self._catch(ids, as_tuple=False)
        except _OtherForm:
            seen = self._catch(ids, as_tuple=True)
        self._check_arguments(tuple(ids.shape), seen)
        return BlockInputs(seen[0][0], [(args, kwargs) for _, args, kwargs in seen])

    def _place_outside(self, device: torch.device) -> None:
        """Put weights and buffers outside the blocks in place, in float32, but not the head's."""
        head = self.model.get_output_embeddings()
        unused = {id(p) for p in head.parameters()} if head is not None else set()
        unused -= {id(p) for p in self.model.get_input_embeddings().parameters()}
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not self._in_blocks(name) and id(parameter) not in unused:
                self._place(name, device, torch.float32)
        for name, _ in list(self.model.named_buffers()):
            if not self._in_blocks(name):
                self._place_buffer(name, device)
        self.model.tie_weights()

    def unload_outside(self) -> None:
        """Free the weights outside the blocks, such as the embeddings."""
        for path, module in list(self.model.named_modules()):
            if self._in_blocks(path):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if self.checkpoint.has(self.disk_name(_join(path, name))):
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        self.model.tie_weights()

    def finish(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] of the last block's output, by the model's own code.

        Gradients flow to ``hidden`` [batch, length, hidden] where it asks for them.
        """
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not self._in_blocks(name):
                self._place(name, ids.device, torch.float32)
        self.model.tie_weights()
        return self._after_blocks(hidden, ids)

    def head_input(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What the output layer reads, float32 [batch, length, in], given the last block's output
        [batch, length, hidden]; its own weight is not needed for that."""
        seen: list[torch.Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].shape[:-1] != hidden.shape[:-1]:
                raise _OtherForm
            seen.append(args[0])
            raise _Stop

        self._place_outside(ids.device)
        handle = self.model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            with contextlib.suppress(_Stop):
                self._after_blocks(hidden.float(), ids)
        finally:
            handle.remove()
        return seen[0]

    def _after_blocks(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Run the model with ``hidden`` in the place of what its blocks would make."""
        holder: nn.ModuleList = self.model.get_submodule(self._list_name)
        originals = list(holder)
        last = len(originals) - 1
        for as_tuple in (False, True):
            for i, block in enumerate(originals):
                holder[i] = _Given(block, hidden if i == last else None, as_tuple)
            try:
                return self.model(ids, use_cache=False).logits
            except (_OtherForm, AttributeError, IndexError, TypeError):
                if as_tuple:
                    raise
            finally:
                for i, block in enumerate(originals):
                    holder[i] = block
        raise AssertionError("unreachable")

    def _catch(self, ids: torch.Tensor, *, as_tuple: bool) -> list[Any]:
        """(hidden, args, kwargs) that each block is called with."""
        seen: list[Any] = []
        holder: nn.ModuleList = self.model.get_submodule(self._list_name)
        originals = list(holder)
        for i, block in enumerate(originals):
            holder[i] = _Catcher(block, seen, len(originals), as_tuple)
        try:
            with torch.no_grad():
                self.model(ids, use_cache=False)
        except _Stop:
            pass
        finally:
            for i, block in enumerate(originals):
                holder[i] = block
        return seen

    def _check_arguments(self, shape: tuple[int, ...], seen: list[Any]) -> None:
        """Raise unless the blocks' tensors are those of the first batch of this shape, but for
        rounding."""
        tensors = _tensors([(args, kwargs) for _, args, kwargs in seen])
        first = self._arguments.setdefault(shape, tensors)
        same = len(first) == len(tensors) and all(
            _equal_but_for_rounding(a, b) for a, b in zip(first, tensors, strict=True)
        )
        if not same:
            raise RunError(
                "blocks of this architecture get further inputs that depend on the text",
                where=type(self.model).__name__,
                fix="this architecture cannot be walked block by block yet: choose another model",
            )

    def _in_blocks(self, name: str) -> bool:
        return name.startswith(f"{self._list_name}.")

    def run_block(self, index: int, hidden: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        """Output [batch, length, hidden] of a loaded block."""
        args, kwargs = inputs.calls[index]
        out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def replace_linear(self, ref: LinearRef, module: nn.Module) -> None:
        """Put another module in a linear's place."""
        _set_module(self.model, ref.path, module)

    def replace_linears(self, refs: Sequence[LinearRef], modules: Sequence[nn.Module]) -> None:
        """Put other modules in the places of as many linears."""
        for ref, module in zip(refs, modules, strict=True):
            self.replace_linear(ref, module)

    def load_full(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        replaced: Mapping[str, torch.Tensor] | None = None,
    ) -> Any:
        """The whole model with every weight that is not there yet; tied weights stay tied.

        ``replaced`` holds tensors to use instead of the checkpoint's, by their name there.
        """
        self._load("", self.model, device, dtype)
        for name, parameter in self.model.named_parameters():
            value = (replaced or {}).get(self.disk_name(name))
            if value is not None:
                parameter.data.copy_(value)
        self.model.tie_weights()
        missing = [name for name, p in self.model.named_parameters() if p.is_meta]
        if missing:
            raise RunError(
                f"{len(missing)} weights are missing, such as {missing[0]}",
                where=str(self.checkpoint.directory),
                fix="the checkpoint does not fit its config.json: download both again",
            )
        return self.model.to(device).eval()

    def check_weights(self) -> list[str]:
        """Notes on tensors that the model does not use.

        Raises:
            RunError: a weight is missing, has another shape than config.json says, or is not
                finite.
        """
        damaged = "the checkpoint does not fit its config.json: download both again"
        where = str(self.checkpoint.directory)
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        used = set()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            key = self.disk_name(name)
            if not self.checkpoint.has(key):
                if name in tied:
                    continue
                raise RunError(f"weight {name} is missing", where=where, fix=damaged)
            if self.checkpoint.shape(key) != tuple(parameter.shape):
                raise RunError(
                    f"weight {key} is {self.checkpoint.shape(key)}, config.json says "
                    f"{tuple(parameter.shape)}",
                    where=where,
                    fix=damaged,
                )
            used.add(key)
        used |= {self.disk_name(name) for name in self._persistent}
        used &= set(self.checkpoint.names)
        for key in sorted(used):
            value = self.checkpoint.tensor(key)
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise RunError(
                    f"weight {key} holds NaN or infinite values",
                    where=where,
                    fix="the checkpoint is damaged: download it again",
                )
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        surplus = [
            key
            for key in self.checkpoint.names
            if key not in used and not any(re.search(pattern, key) for pattern in ignored)
        ]
        if not surplus:
            return []
        shown = ", ".join(surplus[:3]) + (", ..." if len(surplus) > 3 else "")
        return [f"{len(surplus)} tensors of the source are not used by the model: {shown}"]

    def _load(
        self, prefix: str, root: nn.Module, device: str | torch.device, dtype: torch.dtype
    ) -> None:
        for name, parameter in list(root.named_parameters(remove_duplicate=False)):
            full = _join(prefix, name)
            if parameter.is_meta and self.checkpoint.has(self.disk_name(full)):
                self._place(full, device, dtype)
        for name, _ in list(root.named_buffers()):
            self._place_buffer(_join(prefix, name), device)

    def _place(self, name: str, device: str | torch.device, dtype: torch.dtype) -> None:
        key = self.disk_name(name)
        owner, leaf = self._owner(name)
        expected = tuple(owner._parameters[leaf].shape)
        if not self.checkpoint.has(key) or self.checkpoint.shape(key) != expected:
            found = self.checkpoint.shape(key) if self.checkpoint.has(key) else "missing"
            raise RunError(
                f"weight {key} is {found}, config.json says {expected}",
                where=str(self.checkpoint.directory),
                fix="the checkpoint does not fit its config.json: download both again",
            )
        value = None if self._ahead is None else self._ahead.take(key)
        if value is None:
            value = self.checkpoint.tensor(key)
        value = value.to(device).to(dtype)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _place_buffer(self, name: str, device: str | torch.device) -> None:
        owner, leaf = self._owner(name)
        buffer = owner._buffers[leaf]
        key = self.disk_name(name)
        if name in self._persistent and self.checkpoint.has(key):
            buffer = self.checkpoint.tensor(key, buffer.dtype)
        owner._buffers[leaf] = buffer.to(device)

    def _owner(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf


def _find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The list of same-class modules that holds the most parameters: the decoder blocks."""
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not isinstance(module, UnfusedExperts)
        ):
            children = list(module)
            size = sum(p.numel() for p in module.parameters())
            if len({type(child) for child in children}) == 1 and size > best[0]:
                best = (size, name, children)
    if not best[2]:
        raise RunError(
            "no decoder blocks were found",
            where=type(model).__name__,
            fix="only models with a list of equal decoder blocks can be compressed",
        )
    return best[1], best[2]


def is_router(path: str) -> bool:
    """Whether a module of a block decides which experts run (or how much one counts)."""
    return not _ROUTERS.isdisjoint(path.split("."))


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Floating-point dtype that holds most of the weights."""
    sizes: Counter[torch.dtype] = Counter()
    for name in checkpoint.names:
        if checkpoint.dtype(name).is_floating_point:
            sizes[checkpoint.dtype(name)] += checkpoint.numel(name)
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _equal_but_for_rounding(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Integers and masks have no rounding."""
    if one is other or not one.is_floating_point():
        return torch.equal(one, other)
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
