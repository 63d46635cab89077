"""Decoding by replay: one step of a model in a CUDA graph, a graph for every set of DSLA layers or heads in use.

Between two launches the host needs more time than a GPU needs for a token of a small batch. A graph launches a whole step at once.
What it records are addresses, so caches, states and inputs stay where they are: a `Workspace` holds them, and the graphs over them,
for a batch size and a longest text. A raise of the level folds the cache into states as always, and goes on with another graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from dsla_kernels import uses_triton

from ..compat.attributes import attention_implementation, padding_token
from ..core.beside_linear import has_linear_part, partial_layer, with_linear_part
from ..core.cache import DSLACacheLayer, RingStaticLayer, StaticDSLACacheLayer, VisibleStaticLayer
from ..core.fold import dsla_cache_layer, partial_cache_layer
from ..core.layout import TokenLayout
from ..core.partial_cache import PartialCacheLayer, last_heads, with_heads
from ..core.precision import autocast_dtype
from ..core.tensor_parallel import is_tensor_parallel
from ..levels.acceptance import Rule
from ..levels.drafting import (
    DraftedOutput,
    Ends,
    check_draft_options,
    draft_and_check,
    lengths_for,
    pure_processors,
    rule_for,
    stop_by_criterion,
)
from ..models.adapter import DSLALayer, dsla_layers
from ..models.architectures import check_draftable, head_dim_of, heads_differ
from ..models.base_attention import DSLAAttentionMixin
from ..models.decoder import decoder_layers
from ..models.level import counts_heads
from .decode_attention import attends_where_cached, can_attend_where_cached, over_prompt, run_token
from .draft_space import DraftSpace, LayerOfLevels, is_of_drafts
from .drafting import GraphEngine, Raced
from .draws import Sampler
from .fusion import LONG_PROMPT
from .recorder import CudaRecording, Record, Recorder, shown_tokens
from .recorder import PlainRecording as PlainRecording

logger = logging.get_logger(__name__)

REHEARSAL = 64  # tokens of the text that `prepare` reads
# Of static caches, by name, as a release may lack one: layers whose tensors stay where they are, and those of softmax attention, in whose
# place are such as no host counts the lengths of.
KNOWN_LAYERS = {
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "DummyLayer",
}
FOR_MEMORY = "give a smaller max_length, fewer rows, or GraphDecoder(keep=False)"


# What of a layer is DSLA: nothing, all of it, or its converted and its kept KV heads, in the order in which they lie in its cache.
Part = bool | tuple[tuple[int, ...], tuple[int, ...]]


def part_of(module: Any) -> Part:
    """What of a layer is DSLA, by its part of a cache or by the attention that it runs (None: by softmax attention)."""
    if isinstance(module, PartialCacheLayer):
        return module.heads, module.kept
    if isinstance(module, DSLAAttentionMixin) and module.split is not None:
        return module.split.converted, module.split.kept
    return isinstance(module, (DSLACacheLayer, DSLAAttentionMixin))


def includes(more: Part, less: Part) -> bool:
    """Whether all that is DSLA in `less` is in `more`."""
    if isinstance(more, tuple) and isinstance(less, tuple):
        return set(less[0]) <= set(more[0])
    return more is True or less is False


@dataclass
class Workspace:
    """A static cache and the inputs and outputs of a step, at addresses that stay; and what was recorded over them.

    A layer converted in part keeps heads in their order of conversion, so that those of a higher level are the last ones: all levels share
    the memory of the keys and values of the lowest that was in use.

    tokens, positions: int64 `[B, 1]`, the inputs of the next step. mask: bool `[B, length]`, False at padding of the prompt.
    lengths: int64 `[B]`, tokens in the cache after the next step.
    logits: fp32 `[B, vocabulary]`, the output of the last step.
    counts: int64 `[layers, B + 1]`, of DSLA layers the lengths of the rows and the tokens in the cache.
    cached: int64 `[layers]`, of layers with keys and values the tokens in the cache.
    recorder: of steps by (what of each layer is DSLA, padding, tokens shown).
    linear: by layer number the cache layers of layers without attention, whose states a step changes in place.
    beside: by layer number those that have such states beside attention: all layers that take their place share them.
    windows: by layer number how many tokens attention sees, where it slides.
    has_rings: whether such layers keep their windows alone; else the whole text.
    softmax: by layer number the keys and values of as many heads as were kept at once.
    dsla: by layer number and part the cache layers of DSLA, whole or in part, as far as they have been in use.
    kv_heads: by layer number how many a layer has that was in use in part.
    by_length: whether the attention of a step knows how far the cache is filled, and needs not be shown a part of it.
    drafts: what drafts have beside it, once there was one.
    """

    cache: StaticCache
    length: int
    tokens: Tensor
    positions: Tensor
    mask: Tensor
    lengths: Tensor
    logits: Tensor
    counts: Tensor
    cached: Tensor
    recorder: Recorder
    linear: dict[int, Any] = field(default_factory=dict)
    beside: dict[int, Any] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    has_rings: bool = False
    softmax: dict[int, VisibleStaticLayer] = field(default_factory=dict)
    dsla: dict[tuple[int, Part], Any] = field(default_factory=dict)
    kv_heads: dict[int, int] = field(default_factory=dict)
    by_length: bool = False
    drafts: DraftSpace | None = None
    read: int = 0  # tokens in the cache
    padded: bool = False
    parts: tuple[Part, ...] | None = None  # what is DSLA in the cache, once a step has looked

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def begin(self, parts: Iterable[Part], mask: Tensor | None) -> None:
        """For a new text: empty layers, of the kind that `parts` asks for; `mask` `[B, T]` of its prompt."""
        self.cache.layers = [self._layer(index, part) for index, part in enumerate(parts)]
        for layer in (*self.layers(), *self.beside.values()):
            if getattr(layer, "is_initialized", True) or has_linear_part(layer):  # whether its states are there, it does not say
                layer.reset()
        self.cached.zero_()
        self.read, self.parts = 0, None
        self.mask.fill_(True)
        self.padded = mask is not None
        if mask is not None:
            self.mask[:, : mask.shape[1]] = mask.bool()

    def settle(self, keep: bool) -> None:
        """DSLA layers that came to be take the addresses of those that were there at an earlier text. Without `keep` the keys and
        values that they replaced are freed, and with them the recordings that read those."""
        for index, layer in enumerate(self.cache.layers):
            if (part := part_of(layer)) is False:
                continue
            known = self.dsla.get((index, part))
            if known is None:
                self._take_in(index, part, layer)
            elif known is not layer:
                _take(known, layer)
                self.cache.layers[index] = known
            if not keep:
                self._free(index, part)

    def layers(self) -> list[Any]:
        """The layers of the cache, both of such as are converted in part."""
        return [part for layer in self.cache.layers for part in getattr(layer, "parts", (layer,))]

    def _layer(self, index: int, part: Part) -> Any:
        """A layer for a new text: where it was before, if it was."""
        if part is False:
            return self.linear[index] if index in self.linear else self._memory(index, self.kv_heads.get(index))
        if (index, part) in self.dsla:
            return self.dsla[index, part]
        states = StaticDSLACacheLayer(self.length)
        if part is True:
            return with_linear_part(states, self.beside.get(index))
        return self._partial(index, part, states)

    def _partial(self, index: int, part: Any, states: Any) -> PartialCacheLayer:
        self.kv_heads[index] = len(part[0]) + len(part[1])
        return partial_layer(self._memory(index, len(part[1])), states, *part)

    def _memory(self, index: int, heads: int | None) -> VisibleStaticLayer:
        """Keys and values of so many heads, all if None. Where there were fewer, these go, and with them what was recorded over them."""
        memory = self.softmax.get(index)
        held = memory.num_heads if memory is not None and memory.is_initialized else None
        if memory is None or (held is not None and heads is not None and held < heads):
            self._forget(index)
            window = self.windows.get(index)
            new = VisibleStaticLayer(self.length, self.cached[index], window)
            if self.has_rings and window is not None:
                new = RingStaticLayer(window, self.cached[index])
            self.softmax[index] = memory = with_linear_part(new, self.beside.get(index))
            return memory
        return memory if held is None or heads is None or held == heads else last_heads(memory, heads)

    def _take_in(self, index: int, part: Part, layer: Any) -> None:
        """From now on this is the layer of its part."""
        states = layer
        if isinstance(part, tuple):
            states, place = layer.converted, self._partial(index, part, layer.converted)
            if _copied(place.softmax, layer.softmax):  # a raise has made it anew
                self.cache.layers[index] = layer = place
        states.count_in(self.counts[index, :-1], self.counts[index, -1])
        self.dsla[index, part] = layer

    def _free(self, index: int, part: Part) -> None:
        memory = self.softmax.get(index)
        kept = len(part[1]) if isinstance(part, tuple) else 0
        if memory is None or not memory.is_initialized or memory.num_heads == kept:
            return
        self._forget(index)
        del self.softmax[index]
        if isinstance(part, tuple):
            layer = self.cache.layers[index]
            self.softmax[index] = smaller = with_heads(layer.softmax, list(range(kept)))
            self.cache.layers[index] = self.dsla[index, part] = partial_layer(smaller, layer.converted, *part)

    def _forget(self, index: int) -> None:
        """Drop what reads the keys and values of a layer."""
        self.dsla = {key: layer for key, layer in self.dsla.items() if key[0] != index or key[1] is True}
        self.recorder.drop(lambda key: key[0][index] is not True)

    def show(self, tokens: int, places: Tensor | None = None, past: int | None = None) -> None:
        """Let attention see the first `tokens` places of the cache; the next token goes to `places` `[B]`, if given. past: for a piece of
        a prompt, tokens before it."""
        in_rings = {} if places is None else {window: places % window for window in set(self.windows.values()) if self.has_rings}
        for layer in self.layers():
            if isinstance(layer, VisibleStaticLayer):
                layer.visible, layer.places, layer.past = tokens, places, past
                if isinstance(layer, RingStaticLayer):
                    layer.places = in_rings.get(layer.max_cache_len)
            elif isinstance(layer, StaticDSLACacheLayer):
                layer.max_length = tokens  # what it answers when it is asked for the size of masks
                layer.counts = places is None  # the step counts for all layers

    def rings(self) -> dict[int, tuple[Tensor, Tensor | None]]:
        """By number of a layer that has a ring how many tokens of it the next step sees, `[B]`, and which, `[B, window]`; None for all."""
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        for window in set(self.windows.values()) if self.has_rings else ():
            mask = None
            if self.padded:
                newest, places = self.lengths[:, None] - 1, torch.arange(window, device=self.lengths.device)
                tokens = newest - (newest - places) % window  # which one lies there; before the first one none does
                mask = self.mask.gather(1, tokens.clamp_min(0))
            seen = self.lengths.clamp_max(window), mask
            found |= {index: seen for index, size in self.windows.items() if size == window}
        return found

    def view(self) -> int:
        """How many places the next step needs to see, rounded up so that few recordings are needed."""
        if self.by_length:
            return self.length
        return min(shown_tokens(self.read + 1), self.length)


def _take(known: Any, layer: Any) -> None:
    """Copy what a layer of the cache holds to where an earlier one of its kind has it."""
    if isinstance(known, PartialCacheLayer):
        _copied(known.softmax, layer.softmax)
        known, layer = known.converted, layer.converted
    known.take(layer)


def _copied(to: Any, source: Any) -> bool:
    """Copy keys and values to another memory; False where they are there."""
    if to.keys.data_ptr() == source.keys.data_ptr():
        return False
    for mine, theirs in ((to.keys, source.keys), (to.values, source.values), (to.cumulative_length, source.cumulative_length)):
        mine.copy_(theirs)
    return True


class GraphDecoder:
    """`generate` of a model, with the steps of decoding replayed from CUDA graphs. Greedy texts are the same; sampled ones follow the same
    probabilities, and are those that the server draws with the same seed.

        decoder = GraphDecoder(model)
        out = decoder.generate(**inputs, max_new_tokens=100, level_policy="text-length")

    A graph is captured when a level is first used, after one step as usual; `prepare` does it before. They are used again by later
    texts with the same batch size that are no longer. Where graphs cannot run (`obstacle` says why), one line says so, and
    `generate` runs as usual.

    Args:
        model: a model of transformers, a `PeftModel` with a DSLA adapter, or a hybrid.
        max_length: the longest text, prompt included, to make room for; None: as long as each call asks for.
        keep: hold the keys and values of layers that were raised, so that the next text begins without new captures. False frees them.
        fuse: compile norms, MLPs and rotations, each into one kernel (`dsla_hf.inference.fusion`); takes seconds, once for a kind of model,
            and once more for long prompts.
        draft_level: guess tokens at this level, and check several of them in one forward of the model's own, which must be lower: texts
            stay what they are, one a call. A level, or a share as `set_level` takes it. See `docs/generate.md`.
        draft_tokens: guesses in a round; None adapts their number, to none where they do not pay.
        record: what records a step; for tests.

    Attributes:
        capture_seconds: what each capture took, in order.
        recorder: what captures and replays; its `reason` says why a capture failed.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_length: int | None = None,
        keep: bool = True,
        fuse: bool = True,
        draft_level: int | str | None = None,
        draft_tokens: int | None = None,
        record: Record = CudaRecording,
    ):
        if draft_tokens is not None and draft_level is None:
            raise ValueError(f"draft_tokens={draft_tokens!r} without draft_level: give the level that drafts, above 0")
        self.model, self.max_length, self.keep = model, max_length, keep
        self.draft_level, self.draft_tokens = draft_level, draft_tokens
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.causal_lm: Any = base
        self.workspace: Workspace | None = None
        self.recorder = Recorder(base, record, fuse=fuse, for_memory=FOR_MEMORY)
        self._wrapped = list(dsla_layers(base).values())
        self._own_attention = False
        self._seen: Any = None  # what `_parts` was computed from
        self._parts: tuple[Part, ...] = ()
        # By layer number and part the attentions converted in part that were recorded: their weights live as long, and lie where they lay.
        self._attentions: dict[tuple[int, Part], Any] = {}

    @property
    def capture_seconds(self) -> list[float]:
        return self.recorder.capture_seconds

    # --- where it can run ---------------------------------------------------------------------------------------

    def obstacle(self, **options: Any) -> str | None:
        """Why `generate(**options)` cannot replay graphs, in words, or None."""
        model = self.causal_lm
        config = model.config.get_text_config(decoder=True)
        if config is not model.config:
            return f"{type(model).__name__} reads images, too, which no step here does: give GraphDecoder its text model, text_model(model)"
        if self.recorder.record is CudaRecording and model.device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and this model is on {model.device.type}"
        if (rounds_to := autocast_dtype(model.device)) is not None:
            return f"autocast is on, whose rounded weights no graph can keep: load the model in {rounds_to} and leave autocast out"
        for layer in self._wrapped if counts_heads(model) else ():
            if (why := layer.cannot_be_ordered()) is not None:
                return f"levels count heads, and the weights of layer {layer.layer_idx} at a level lie where a level puts them: {why}"
        if is_tensor_parallel(model):
            return "tensor parallel: processes exchange activations in every layer"
        places = set(map(str, getattr(model, "hf_device_map", {}).values()))
        if len(places) > 1 or places & {"cpu", "disk"}:
            return f"the model is spread over {sorted(places)}; a graph needs all weights on one GPU"
        if (attention := attention_implementation(config)) not in ("sdpa", "eager"):
            return f"attn_implementation is {attention!r}; static caches are read by 'sdpa' or 'eager'"
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {str(entry.get("rope_type")) for entry in (rope, *rope.values()) if isinstance(entry, dict)}
        if changing := sorted(kinds & {"dynamic", "longrope"}):
            return f"rotary embeddings of type {changing} change with the length, which the host would have to look at"
        if getattr(config, "attention_chunk_size", None) is not None:
            return "this base attends in chunks (attention_chunk_size), which caches of recorded steps do not know"
        layers = StaticCache(config=config, max_cache_len=8).layers
        if others := {type(layer).__name__ for layer in layers} - KNOWN_LAYERS:
            return f"the static cache of this model has {sorted(others)}, whose tokens the host counts"
        return self._obstacle_in(options)

    def _option(self, options: dict[str, Any], name: str) -> Any:
        """What a call says by this name, or its generation config does."""
        return options.get(name, getattr(options.get("generation_config") or self.causal_lm.generation_config, name, None))

    def _obstacle_in(self, options: dict[str, Any]) -> str | None:
        def option(name: str) -> Any:
            return self._option(options, name)

        if (option("num_beams") or 1) > 1 or options.get("assistant_model") is not None or option("prompt_lookup_num_tokens"):
            return "beams, assisted decoding and prompt lookup need caches that can be reordered or cut"
        asked = [name for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states") if option(name)]
        if asked:
            return f"{', '.join(asked)}: a step leaves nothing but its last logits"
        if option("use_cache") is False:
            return "use_cache=False: there is nothing to record without a cache"
        if options.get("inputs_embeds") is not None or options.get("custom_generate") is not None:
            return "inputs_embeds and custom_generate have decoding loops of their own"
        mask = options.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            return f"the attention_mask is {list(mask.shape)}; graphs take [batch, tokens]"
        cache = options.get("past_key_values")
        if cache is not None and (self.workspace is None or cache is not self.workspace.cache):
            return f"past_key_values is a {type(cache).__name__} of other making; graphs go on with a cache that they returned"
        return None

    # --- generate -----------------------------------------------------------------------------------------------

    def generate(self, input_ids: Tensor | None = None, *, seed: int | None = None, **options: Any) -> Any:
        """As `model.generate`, with its options and results.

        seed: of the draws (`do_sample=True`), int64; text i of a batch has `seed + i`. A text's draws depend on its seed and the places of
            its tokens alone: neither on the rest of the batch nor on the device. None: one from PyTorch's generator, which
            `torch.manual_seed` sets; with `draft_level`, draws of that generator, of which more guesses are accepted than with a seed.
            Where no graphs can run, `seed` seeds that generator for the call, whose draws are transformers'.

        Raises:
            ValueError: if `past_key_values` of this decoder has no room for the text, or holds all of it already; for a seed beyond int64.
            RuntimeError: if the level is lowered within a text.
        """
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must be from -2^63 to 2^63 - 1, got {seed}")
        if input_ids is not None:
            options["input_ids"] = input_ids
        draft_level = self._draft_level(options)
        if (why := self.obstacle(**options)) is not None:
            logger.warning_once(f"no CUDA graphs: {why}. generate() runs as usual")
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                drafts = {} if draft_level is None else {"draft_level": draft_level, "draft_tokens": self.draft_tokens}
                return self.model.generate(**options, **drafts)
        goes_on = options.pop("past_key_values", None) is not None
        streamer = options.pop("streamer", None)  # transformers keeps it from custom loops
        stop_by_criterion(options, lambda name: self._option(options, name))

        def decode(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
        ) -> Any:
            mask = inputs.get("attention_mask")
            how = (logits_processor, stopping_criteria, generation_config, streamer, goes_on, seed)
            if draft_level is not None:
                return self._decode_drafted(input_ids, mask, *how, draft_level)
            return self._decode(input_ids, mask, *how)

        with torch.no_grad(), self._attention():
            return self.model.generate(**options, custom_generate=decode)

    def _decode(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        logits_processor: Any,
        stopping_criteria: Any,
        settings: Any,
        streamer: Any,
        goes_on: bool,
        seed: int | None,
    ) -> Any:
        """The loop of transformers' sampling, around steps of ours. input_ids, mask `[B, T]`."""
        space = self._begun(input_ids, mask, settings.max_length, goes_on)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        self._read(space, input_ids[:, space.read :], settings.prefill_chunk_size)
        can_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        ends, going = Ends(stopping_criteria), [True] * input_ids.shape[0]
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        sampler = Sampler(logits_processor, settings.do_sample, seed)
        places = space.mask[:, : space.read].sum(1).tolist()  # of the next tokens; padding does not count
        while True:
            token = sampler(space.logits.clone(), input_ids, places)
            places = [place + 1 for place in places]
            if can_end and not all(going):
                token = torch.where(unfinished, token, padding_token(settings))
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            before = going
            if ends.known:  # then the device is asked for nothing but the tokens
                going = [goes and not ends.knows(input_ids.shape[1], value) for goes, value in zip(before, token.tolist(), strict=True)]
            else:
                going = (unfinished & ~stopping_criteria(input_ids, None)).tolist()
            if not any(going):
                break
            if going != before:
                unfinished = torch.tensor(going, device=input_ids.device)
            self._step(space, token)
        if streamer is not None:
            streamer.end()
        if settings.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=space.cache)
        return input_ids

    def _begun(self, input_ids: Tensor, mask: Tensor | None, length: int, goes_on: bool) -> Workspace:
        """The workspace for texts that begin, or go on, with input_ids, mask `[B, T]`."""
        if mask is not None and bool(mask.all()):
            mask = None
        space = self._space(input_ids.shape[0], length, goes_on)
        if not goes_on:
            space.begin(self._parts_now(anew=True), mask)
        elif space.read >= input_ids.shape[1]:
            raise ValueError(f"the cache holds {space.read} tokens, the text has {input_ids.shape[1]}: give the whole text as input_ids")
        elif mask is not None:
            space.mask[:, : mask.shape[1]], space.padded = mask.bool(), True
        return space

    # --- drafts -------------------------------------------------------------------------------------------------

    def _draft_level(self, options: dict[str, Any]) -> int | None:
        """The level that drafts in a call, as a number; None where none does.

        Raises:
            ValueError: where the call cannot be drafted.
        """
        if self.draft_level is None:
            return None
        if not hasattr(self.model, "layer_parts"):
            raise ValueError(
                f"draft_level: {type(self.model).__name__} has no levels; give a PeftModel with a DSLA adapter, or leave it out"
            )
        check_draftable(self.causal_lm.config, self.draft_level)
        return check_draft_options(self.model, self.draft_level, self.draft_tokens, lambda name: self._option(options, name))

    def _decode_drafted(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        logits_processor: Any,
        stopping_criteria: Any,
        settings: Any,
        streamer: Any,
        goes_on: bool,
        seed: int | None,
        draft_level: int,
    ) -> Any:
        """As `_decode`, one text with drafts."""
        space = self._begun(input_ids, mask, settings.max_length, goes_on)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        lengths, levels = lengths_for(self.draft_tokens), (self.model.get_level(), draft_level)
        rule: Rule = rule_for(logits_processor, settings.do_sample)
        if settings.do_sample and seed is not None:
            padding = 0 if mask is None else int((~mask.bool()).sum())
            rule = Raced(logits_processor, pure_processors(logits_processor), seed, padding)
        engine = GraphEngine(
            self.causal_lm,
            space,
            self.recorder,
            lambda ids: self._read(space, ids, settings.prefill_chunk_size),
            lambda token: self._step(space, token),
            lambda: self._drafts(space, levels, lengths.longest),
            self.model.set_level,
            levels,
        )
        ids, counts = draft_and_check(
            engine,
            input_ids,
            rule,
            lengths,
            Ends(stopping_criteria),
            max_length=settings.max_length,
            show=(lambda token: None) if streamer is None else (lambda token: streamer.put(token.cpu())),
        )
        if streamer is not None:
            streamer.end()
        if settings.return_dict_in_generate:
            return DraftedOutput(sequences=ids, past_key_values=space.cache, **vars(counts))
        return ids

    def _drafts(self, space: Workspace, levels: tuple[int, int], longest: int) -> DraftSpace:
        """What drafts at the second level have beside `space`, at the first: what was there for them before, if it fits."""
        check, draft = map(self._layers_at, levels)
        self.model.set_level(levels[0])
        if space.drafts is None or not space.drafts.fits(draft, check, longest):
            self.recorder.drop(is_of_drafts)
            space.drafts = None  # what is not needed any more goes before the new one comes
            config = self.causal_lm.config.get_text_config(decoder=True)
            space.drafts = DraftSpace(space, config, draft, check, longest)
        return space.drafts

    def _layers_at(self, level: int) -> list[LayerOfLevels]:
        """What each layer is at a level, which the model then has."""
        self.model.set_level(level)
        attentions = [dsla_attention_of(layer) for layer in decoder_layers(self.causal_lm)]
        return [LayerOfLevels(*pair) for pair in zip(self._parts_now(anew=True), attentions, strict=True)]

    def prepare(self, levels: Iterable[int], *, max_length: int, rows: int = 1, tokens: int | None = None, padded: bool = False) -> None:
        """Capture these levels before a text of at most `max_length` tokens needs them, so that a raise waits for its fold only.

        tokens: how long the text is when they come into use (as long as it can be, when None); `padded`: whether prompts are.

        Raises:
            ValueError: if graphs cannot run here, or the model has no levels.
        """
        if (why := self.obstacle()) is not None:
            raise ValueError(f"no CUDA graphs: {why}")
        if not hasattr(self.model, "get_level"):
            raise ValueError(
                f"{type(self.model).__name__} has no levels, and nothing to prepare: its graph is captured at the second token"
            )
        self.recorder.try_again()
        levels, before = sorted(levels), self.model.get_level()
        space = self._space(rows, max_length, False)
        at = (space.length if tokens is None else tokens) - 1
        prompt = torch.zeros(rows, min(REHEARSAL, max(space.length - 2 * len(levels), 1)), dtype=torch.long, device=space.tokens.device)
        with torch.no_grad(), self._attention():
            for number, level in enumerate(levels):
                self.model.set_level(level)
                if number == 0:
                    space.begin(self._parts_now(anew=True), torch.ones_like(prompt) if padded else None)
                    self._read(space, prompt, None)
                for _ in range(2):  # as it is, then captured
                    self._step(space, prompt[:, 0], at)
            self.model.set_level(before)
            space.begin(self._parts_now(anew=True), None)

    # --- one step -----------------------------------------------------------------------------------------------

    def _attention(self) -> Any:
        """Softmax layers read caches by the kernel for that, where it runs, and where the user has not asked for another attention."""
        self._own_attention = can_attend_where_cached(self.causal_lm)
        return attends_where_cached(self.causal_lm) if self._own_attention else nullcontext()

    def _takes_rings(self) -> bool:
        """Whether windows may lie in rings. Masks are in the order of tokens, and so is what drafts read and write."""
        config = self.causal_lm.config.get_text_config(decoder=True)
        if self.draft_level is not None or heads_differ(config) or not can_attend_where_cached(self.causal_lm):
            return False
        head = torch.empty(0, head_dim_of(config), device=self.causal_lm.device, dtype=self.causal_lm.dtype)
        return uses_triton(head, head, quietly=True)

    def _space(self, rows: int, length: int, goes_on: bool) -> Workspace:
        """The workspace for so many rows and tokens: the one at hand if it fits, else a new one."""
        space, has_rings = self.workspace, self._takes_rings()
        other_windows = space is not None and bool(space.windows) and space.has_rings != has_rings
        if space is not None and space.rows == rows and space.length >= length and not other_windows:
            return space
        if goes_on and other_windows:
            what = "the attention implementation" if self.draft_level is None or has_rings else "draft_level"
            raise ValueError(
                f"{what} has changed within a text, whose sliding layers lie otherwise in memory: set it back, or begin anew without "
                "past_key_values"
            )
        if goes_on:
            raise ValueError(
                f"the cache has room for {space.rows if space else 0} rows of {space.length if space else 0} tokens, the text needs "
                f"{rows} of {length}: give GraphDecoder a max_length of {length} or more before the text begins"
            )
        length = max(length, self.max_length or 0)
        length += -length % 8  # kernels read aligned rows of masks faster
        self.workspace = space = None  # what is not needed any more goes before the new one comes
        self.recorder.clear()
        model = self.causal_lm
        config, device = model.config.get_text_config(decoder=True), model.device
        cache = StaticCache(config=config, max_cache_len=length)  # whose layers `begin` exchanges
        self.workspace = Workspace(
            cache=cache,
            length=length,
            tokens=torch.zeros(rows, 1, dtype=torch.long, device=device),
            positions=torch.zeros(rows, 1, dtype=torch.long, device=device),
            mask=torch.ones(rows, length, dtype=torch.bool, device=device),
            lengths=torch.zeros(rows, dtype=torch.long, device=device),
            logits=torch.zeros(rows, config.vocab_size, device=device),
            counts=torch.zeros(len(cache.layers), rows + 1, dtype=torch.long, device=device),
            cached=torch.zeros(len(cache.layers), dtype=torch.long, device=device),
            recorder=self.recorder,
            linear={i: layer for i, layer in enumerate(cache.layers) if not isinstance(layer, StaticLayer)},
            beside={i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, StaticLayer) and has_linear_part(layer)},
            # What transformers keeps of them: the window, or the whole text where that is shorter.
            windows={i: layer.max_cache_len for i, layer in enumerate(cache.layers) if isinstance(layer, StaticSlidingWindowLayer)},
            has_rings=has_rings,
        )
        return self.workspace

    def _read(self, space: Workspace, ids: Tensor, chunk: int | None) -> None:
        """Read the prompt `[B, T]`, or the rest of it, at most `chunk` tokens at a time."""
        seen = space.read + ids.shape[1]
        mask = space.mask[:, :seen]
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        for part in ids.split(chunk or ids.shape[1], 1):
            start, space.read = space.read, space.read + part.shape[1]
            space.show(space.read, past=start)
            fuses = self.recorder.fused(prompt=True) if part.numel() >= LONG_PROMPT else nullcontext()
            with fuses, over_prompt(space.windows) if self._own_attention and not space.padded else nullcontext():
                logits = self.causal_lm(
                    input_ids=part,
                    attention_mask=mask[:, : space.read] if space.padded else None,
                    position_ids=positions[:, start : space.read],
                    past_key_values=space.cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
            space.settle(self.keep)
        space.logits.copy_(logits[:, -1])
        space.positions.copy_(positions[:, -1:] + 1)
        space.lengths.fill_(space.read + 1)
        cached = [layer for layer in space.layers() if isinstance(layer, VisibleStaticLayer)]
        space.by_length = self._own_attention and all(uses_triton(layer.keys, layer.values) for layer in cached)
        assert space.by_length or not space.has_rings

    def _step(self, space: Workspace, token: Tensor, view_for: int | None = None) -> None:
        """The logits after `token` `[B]`, into `space.logits`. `view_for`: choose the recording for a text of so many tokens."""
        parts = self._parts_now()
        self._raise(space, parts)
        read, space.read = space.read, space.read if view_for is None else max(view_for, space.read)
        view = space.view()
        space.read = read + 1
        space.tokens.copy_(token[:, None])
        key = (parts, space.padded, view)

        def step() -> None:
            space.show(view, space.lengths - 1 if space.by_length else None)
            mask = space.mask[:, :view] if space.padded else None
            run_token(self.causal_lm, space, mask, space.by_length, space.rings())
            for count in (space.positions, space.lengths, *([space.counts] if space.by_length else [])):
                count.add_(1)

        if self.recorder.run(key, step):
            space.settle(self.keep)  # a layer that was converted in the very first forward

    def _raise(self, space: Workspace, parts: tuple[Part, ...]) -> None:
        """Fold the cache of layers and heads that have become DSLA since the last step."""
        if parts == space.parts:
            return
        before = [part_of(layer) for layer in space.cache.layers]
        if not all(map(includes, parts, before)):
            raise RuntimeError(
                "the level was lowered within one text, and the keys and values of layers or heads that were DSLA are gone: start again "
                "with a new text (without past_key_values)"
            )
        layout = TokenLayout(space.mask[:, : space.read] if space.padded else None)
        for index, (part, was) in enumerate(zip(parts, before, strict=True)):
            if part == was:
                continue
            attention = dsla_attention_of(decoder_layers(self.causal_lm)[index])
            if isinstance(part, tuple):
                partial_cache_layer(space.cache, index, attention.dsla, attention.split, layout, attention.exact_fold)
            else:
                dsla_cache_layer(space.cache, index, attention.dsla, layout, attention.exact_fold)
            space.settle(self.keep)
        space.parts = parts

    def _parts_now(self, anew: bool = False) -> tuple[Part, ...]:
        """What of each layer is DSLA now. Asked before every step, so what it rests on is looked at first."""
        seen: Any = ()
        if self._wrapped:
            first = self._wrapped[0]
            name = first.adapter_name
            config = None if name is None else first.configs[name]
            seen = (name, first.disable_adapters, *(() if config is None else (config.level, list(config.conversion_order or ()))))
        if anew or seen != self._seen:
            attentions = [dsla_attention_of(layer) for layer in decoder_layers(self.causal_lm)]
            self._parts = tuple(map(part_of, attentions))
            for index, attention in enumerate(attentions):
                self._hold(index, attention)
            self._seen = seen
        return self._parts

    def _hold(self, index: int, attention: Any) -> None:
        """Keep an attention converted in part, whose weights recordings read; of such as read those of another one nothing is left."""
        part = part_of(attention)
        if not isinstance(part, tuple) or (held := self._attentions.get((index, part))) is attention:
            return
        if held is not None:
            self.recorder.drop(lambda key: isinstance(key[0][index], tuple))
            self._attentions = {key: other for key, other in self._attentions.items() if key[0] != index}
        self._attentions[index, part] = attention


def dsla_attention_of(layer: nn.Module) -> Any:
    """The DSLA attention that a decoder layer runs now, of an adapter or a hybrid; None if it runs softmax attention."""
    attention = next((child for child in layer.children() if isinstance(child, (DSLALayer, DSLAAttentionMixin))), None)
    return attention.running_attention() if isinstance(attention, DSLALayer) else attention
