"""One face over a TransformerLens model: checked hook names, plain logits, left as found.

``LensModel`` wraps a ``TransformerBridge`` (TransformerLens 3.9 and 4.x) or a
``HookedTransformer`` (3.9); hook names and shapes are the bridge's of 4.x for both. tvlens loads
through the bridge, which keeps the checkpoint's own weights: no folding and no centring, so a
weight there is the weight on disk.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import AdapterError, CheckpointError, HostError, PromptError

from .bridge import bridge_host
from .hooked_transformer import hooked_transformer_host
from .hosts import Host, submodule
from .passages import Passage, hooked_passages

HookList = Sequence[tuple[str, Callable[..., Any]]]
"""Pairs of a hook name and a function of (tensor, hook)."""


UNEMBED_INPUT = "unembed.hook_in"


class LensModel:
    """A hooked language model whose parameters are never written.

    Attributes:
        model: The TransformerLens model.
        n_layers: Blocks.
        n_heads: Query heads of a block.
        n_kv_heads: Key and value heads of a block.
        d_head: Width of a head.
        d_model: Width of the residual stream.
        d_mlp: Neurons of a block.
        d_vocab: Tokens of the output.
        host: Where it keeps parameters and activations.
        hook_names: Every name that ``hooks`` accepts.
        unknown: Token ids that must not be read, with their strings: only one model of the pair
            knows them.
    """

    def __init__(self, model: Any) -> None:
        """Read the sizes of ``model``, a TransformerBridge or a HookedTransformer.

        Raises:
            HostError: It has no MLPs, has experts, or is quantised.
        """
        config = model.cfg
        self.model = model
        self.host: Host = host_of(model)
        self.n_layers: int = config.n_layers
        self.n_heads: int = config.n_heads
        self.n_kv_heads: int = getattr(config, "n_key_value_heads", None) or config.n_heads
        self.d_head: int = config.d_head
        self.d_model: int = config.d_model
        self.d_mlp: int = config.d_mlp
        self.d_vocab: int = config.d_vocab
        self.hook_names: frozenset[str] = frozenset({*model.hook_dict, *self.host.passages})
        self.unknown: Mapping[int, str] = {}

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        adapter: Path | None = None,
        rows: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "LensModel":
        """Build the model of a checkpoint folder; an adapter is merged into this copy.

        Args:
            folder: The checkpoint.
            adapter: The adapter to merge.
            rows: Keep only this many rows of the embedding and the unembedding, the first ones.
            device: Where the parameters go.
            dtype: Their type.

        Raises:
            CheckpointError: The folder holds no causal language model that loads.
            AdapterError: The adapter does not fit the checkpoint.
            HostError: TransformerLens does not know the architecture.
        """
        loaded = _huggingface_model(Path(folder), dtype)
        if adapter is not None:
            loaded = _merged_adapter(loaded, Path(adapter), dtype)
        if rows is not None and rows < loaded.get_input_embeddings().weight.shape[0]:
            loaded.resize_token_embeddings(rows, mean_resizing=False)
        return cls(_bridge(loaded.eval().to(device), str(folder)))

    @classmethod
    def of(
        cls,
        model: Any,
        *,
        adapter: Path | None = None,
        rows: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "LensModel":
        """Build the model of one in memory, which stays as it is.

        A transformers model on that device, in that dtype and without an adapter lends its own
        weights: what an analysis writes into them for a while, and puts back, is written there.
        Otherwise they are copied. A PeftModel's adapter is merged into a copy; layers that peft
        put into a base are taken out of the copy. A bridge or a HookedTransformer is used as it
        is.

        Raises:
            HostError: TransformerLens does not know the architecture, or a hooked model is
                elsewhere.
            AdapterError: The adapter does not fit the model.
        """
        if hasattr(model, "hook_dict"):
            lens = cls.wrap(model)
            if rows is not None and rows < lens.d_vocab:
                raise HostError(
                    f"only {rows} of this {type(model).__name__}'s {lens.d_vocab} embedding rows "
                    "are shared.",
                    hint="Give the transformers model or the folder instead.",
                )
            if (lens.device, lens.dtype) != (torch.device(device), dtype) or adapter is not None:
                raise HostError(
                    f"this {type(model).__name__} is {lens.dtype} on {lens.device}; {dtype} on "
                    f"{device} without an adapter is asked for.",
                    hint="Give the transformers model or the folder instead.",
                )
            return lens
        cut = rows is not None and rows < model.get_input_embeddings().weight.shape[0]
        written = cut or adapter is not None
        loaded = owned_copy(model, device=device, dtype=dtype, written=written)
        if cut:
            loaded.resize_token_embeddings(rows, mean_resizing=False)
        if adapter is not None:
            loaded = _merged_adapter(loaded, Path(adapter), dtype)
        return cls(_bridge(loaded.eval(), type(model).__name__))

    @classmethod
    def wrap(cls, bridge: Any) -> "LensModel":
        """A model that the caller made; it is used as it is and never changed.

        Raises:
            HostError: The object has no hooks.
        """
        if not hasattr(bridge, "hook_dict") or not hasattr(bridge, "cfg"):
            raise HostError(
                f"expected a TransformerBridge or a HookedTransformer, got "
                f"{type(bridge).__name__}.",
                hint="Build one with TransformerBridge.boot_transformers, or pass a folder.",
            )
        return cls(bridge)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return next(self.model.parameters()).dtype

    def __call__(
        self, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of right-padded ``ids``; ``mask`` is 1 at real tokens.

        Raises:
            PromptError: A token has no row in this model, or only one model of the pair knows it.
        """
        return self._run(ids, mask)

    def logits_at(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch read"],
    ) -> Float[Tensor, "batch read d_vocab"]:
        """The logits at ``positions`` alone: the unembedding is not run anywhere else.

        The gather happens at ``unembed.hook_in``, after the hooks that are already there.

        Raises:
            PromptError: As for a plain call.
        """
        with self.hooks(fwd=[(UNEMBED_INPUT, partial(at_positions, positions))]):
            return self._run(ids, mask)

    def _run(
        self, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch read d_vocab"]:
        self.require_known(ids)
        where = self.device
        return self.host.logits(ids.to(where), mask.to(where))

    def require_known(self, ids: Int[Tensor, "batch pos"]) -> None:
        """Refuse tokens that this model must not read.

        Raises:
            PromptError: A token has no row, or only one model of the pair knows it.
        """
        if ids.numel() and (largest := int(ids.max())) >= self.d_vocab:
            raise PromptError(
                f"a prompt has token {largest}, but the embedding has {self.d_vocab} rows.",
                hint="Use the tokenizer that belongs to the base (HookedPair.tokenizer).",
            )
        if not self.unknown:
            return
        alone = ids[torch.isin(ids, torch.tensor(list(self.unknown), device=ids.device))]
        if alone.numel():
            first = int(alone.flatten()[0])
            raise PromptError(
                f"a prompt has token {first}, {self.unknown[first]!r}, which only one of the two "
                "models knows under this number.",
                hint="Write the prompt without it, or with --chat off if a template brings it.",
            )

    @contextmanager
    def hooks(self, fwd: HookList = (), bwd: HookList = ()) -> Iterator["LensModel"]:
        """Hooks for the time of the block, removed afterwards whatever happens.

        Raises:
            HostError: The model has no hook of a name, or the hook needs a setting that is off.
        """
        self.require_hooks(name for name, _ in (*fwd, *bwd))
        passages = {n: p for n, p in self.host.passages.items() if isinstance(p, Passage)}
        there = [[(n, f) for n, f in hooks if n in passages] for hooks in (fwd, bwd)]
        entered = False
        try:
            with ExitStack() as stack:
                stack.enter_context(
                    self.model.hooks(fwd_hooks=self._own(fwd), bwd_hooks=self._own(bwd))
                )
                stack.enter_context(hooked_passages(passages, *there))
                entered = True
                yield self
        except (ValueError, AssertionError) as error:
            if entered:
                raise
            raise HostError(f"TransformerLens refuses a hook: {error}") from error

    def _own(self, hooks: HookList) -> list[tuple[str, Callable[..., Any]]]:
        """The hooks that the model has points for, by its own names."""
        named = [(self.host.passages.get(name, name), function) for name, function in hooks]
        return [(name, _Hook(function)) for name, function in named if isinstance(name, str)]

    def require_hooks(self, names: Any) -> None:
        """Refuse names that this model lacks, since TransformerLens 3.9 ignores them silently.

        Raises:
            HostError: Naming the first three.
        """
        if missing := sorted(set(names) - self.hook_names):
            raise HostError(
                f"this model has no hook {', '.join(map(repr, missing[:3]))}.",
                hint="LensModel.hook_names lists those it has.",
            )

    @contextmanager
    def frozen(self) -> Iterator["LensModel"]:
        """No parameter needs a gradient for the time of the block; flags are put back.

        Raises:
            HostError: The model is in training mode, or the caller is in inference mode.
        """
        self.require_eval()
        if torch.is_inference_mode_enabled():
            raise HostError(
                "gradients cannot be taken inside torch.inference_mode().",
                hint="Use torch.no_grad() around the call instead, or nothing.",
            )
        parameters = list(self.model.parameters())
        flags = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield self
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)

    def require_eval(self) -> None:
        """Refuse a model in training mode, where dropout would make numbers random.

        Raises:
            HostError: Some module is in training mode.
        """
        if self.host.training_differs and any(m.training for m in self._running_modules()):
            raise HostError("the model is in training mode.", hint="Call model.eval() first.")

    def _running_modules(self) -> Iterator[torch.nn.Module]:
        root = getattr(self.model, "original_model", self.model)
        yield from root.modules()


def host_of(model: Any) -> Host:
    """What kind of model of TransformerLens this is, told by what it has."""
    embed = submodule(model, "embed")
    own = embed is not None and "W_E" in embed._parameters
    return hooked_transformer_host(model) if own else bridge_host(model)


class _Hook:
    """A hook whose name is short: TransformerLens prints every hook that is added to a model.

    To print a bound method, or a partial of one, is to print the tensors that its object holds.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, activation: Tensor, hook: Any) -> Any:
        return self.function(activation, hook=hook)


def at_positions(positions: Int[Tensor, "batch read"], activation: Tensor, hook: Any) -> Tensor:
    """What ``positions`` of each row hold; bound to them, a forward hook that lets no other by."""
    rows = torch.arange(len(positions), device=activation.device)[:, None]
    return activation[rows, positions.to(activation.device)]


def leaf(activation: Tensor, hook: Any) -> Tensor:
    """A forward hook for ``hook_embed``: the graph of a frozen model starts here."""
    return activation.detach().requires_grad_(True)


def owned_copy(model: Any, *, device: str, dtype: torch.dtype, written: bool) -> Any:
    """A copy of a transformers or peft model without peft's layers, an adapter merged.

    Args:
        model: The model; it is not changed.
        device: Where the copy shall be.
        dtype: The dtype of its parameters.
        written: The copy's weights will be written to, so it must not share them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    merges = hasattr(model, "merge_and_unload")
    fits = all(p.dtype == dtype and p.device == torch.device(device) for p in model.parameters())
    shared = fits and not merges and not written
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors} if shared else None)
    if not shared:
        copied = copied.to(device=device, dtype=dtype)
    if merges:
        copied = copied.merge_and_unload(adapter_names=list(model.active_adapters))
    copied = _without_adapters(copied)
    copied.config._attn_implementation = "eager"
    return copied.eval()


def _without_adapters(model: Any) -> Any:
    """The model with its own layers where peft wrapped them; the weights are those beneath."""
    for name, module in list(model.named_modules()):
        beneath = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if isinstance(beneath, torch.nn.Module):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, beneath)
    return model


@contextmanager
def _quiet_loading() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_gguf(path: Path) -> None:
    """Refuse to run a GGUF file, whose weights alone are read.

    Raises:
        HostError: ``path`` is one.
    """
    if path.suffix == ".gguf" and path.is_file():
        raise HostError(
            f"{path} is a GGUF file: tvlens reads its weights and does not run it.",
            hint="`tvlens decompose` needs no hooked model; to run it, dequantise it into a folder "
            "with transformers.",
        )


def _huggingface_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    refuse_gguf(folder)
    if not folder.is_dir():
        raise CheckpointError(f"expected a checkpoint folder, got {str(folder)!r}.")
    try:
        with _quiet_loading():
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} does not load as a causal language model: {error}",
            hint="It needs config.json and safetensors of an architecture transformers knows.",
        ) from error


def _merged_adapter(model: Any, adapter: Path, dtype: torch.dtype) -> Any:
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise AdapterError(f"expected an adapter folder, got {str(adapter)!r}.")
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        _part_adapted(tuned)
        merged = tuned.merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"the adapter {adapter} does not fit the base model: {error}") from error
    return merged.to(dtype)


def _part_adapted(model: Any) -> None:
    """Give adapted layers a weight of their own, so that merging changes no other use of it.

    peft merges into the tensor that a tied embedding shares with the unembedding, which changes
    what the adapter had left alone in training.
    """
    from peft.tuners.lora import LoraLayer

    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for base in [layer.get_base_layer() for layer in layers]:
        if uses[id(base.weight)] > 1:
            base.weight = torch.nn.Parameter(base.weight.detach().clone())


def _bridge(model: Any, name: str) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        bridge = build_bridge_from_module(
            model, type(model).__name__, hf_config=model.config, tokenizer=None
        )
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise HostError(
            f"TransformerLens cannot wrap {type(model).__name__} of {name}: {error}",
            hint="`tvlens decompose` needs no hooked model and may still work.",
        ) from error
    return bridge.eval()
