"""What the OpenAI-compatible routes take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ...inference.sampling import Sampling
from .messages import Json, Long, Message, NamedTool, ToolChoice, Tools

# Options that would change the answer and are not there; these values of them, and null, change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (False,),  # of chats: templates have their own
}
# Options that mean nothing here, whatever their value: they say who asks, or what another server may keep.
HARMLESS = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",  # where there are no tools
        "request_id",
        "priority",
    }
)
MAX_CHOICES = 16
MAX_STOPS = 128
MAX_BIASES = 1024
StopString = Annotated[str, Field(min_length=1, max_length=200)]
Tokens = Annotated[list[int], Field(max_length=128)]
Real = Annotated[float, Field(allow_inf_nan=False)]


def _few(biases: Any) -> Any:
    """Before they are looked at one by one."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens can have one, got {len(biases)}")
    return biases


Biases = Annotated[dict[str, Annotated[Real, Field(ge=-100, le=100)]], BeforeValidator(_few)]


def sendable(text: str) -> str:
    """Messages may quote what no encoding can carry."""
    return text.encode("utf-8", "backslashreplace").decode()


class Unsupported(ValueError):
    """An option that is not there; `param` names it."""

    def __init__(self, param: str, reason: str = "is not supported: leave it out"):
        self.param = sendable(param)
        super().__init__(sendable(f"{param} {reason}"))


class Closed(BaseModel):
    """A body that has no other fields than those of its class, but for `HARMLESS` ones and `neutral` values."""

    model_config = ConfigDict(strict=True, extra="forbid")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_there(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.neutral:
                if value is not None and value not in cls.neutral[name]:
                    raise Unsupported(name)
            elif name not in HARMLESS:
                raise Unsupported(name, "is not known here: leave it out")
        return kept


class StreamOptions(BaseModel):
    """continuous_usage_stats: an extension, as in vLLM: usage with every piece."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, populate_by_name=True)
    name: str = "answer"
    json_schema: Json = Field({}, alias="schema")


class ResponseFormat(BaseModel):
    """json_schema: with the type of that name."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('give json_schema with the type "json_schema"')
        return self


class Options(Closed):
    """What all routes that generate take. Extensions, as in vLLM: top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos
    (go on to `max_tokens` whatever comes, as load tests want), guided_*. Our own: level, which pins the request to one."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: Real | None = Field(None, ge=0, le=2)
    top_p: Real | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Real | None = Field(None, ge=0, le=1)
    presence_penalty: Real | None = Field(None, ge=-2, le=2)
    frequency_penalty: Real | None = Field(None, ge=-2, le=2)
    repetition_penalty: Real | None = Field(None, gt=0, le=100)
    logit_bias: Biases | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: Tokens | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    level: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = Field(None, min_length=1)
    guided_choice: Annotated[Long[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _names_tokens_by_number(self) -> Options:
        for token in self.logit_bias or ():
            if not re.fullmatch("0|[1-9][0-9]{0,8}", token):
                raise Unsupported("logit_bias", f"has token ids for keys, got {token[:40]!r}")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Most tokens that are asked for, None if the request does not say."""
        return self.max_tokens

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def tokens_named(self) -> dict[str, list[int]]:
        """Token ids of the request by the option that has them."""
        return {"logit_bias": [int(token) for token in self.logit_bias or ()], "stop_token_ids": self.stop_token_ids or []}

    def sampling(self, choice: int = 0, **changes: Any) -> Sampling:
        """How tokens of one of the `n` choices are drawn; its seed is the request's plus its number."""
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()),
            "min_tokens": self.min_tokens,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "seed": None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
            "ignore_eos": self.ignore_eos,
            **changes,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})


class CompletionBody(Options):
    """Of /v1/completions: a prompt as text or token ids, or several. add_special_tokens: those that the tokenizer puts around a text."""

    prompt: str | Long[int] | Long[str] | Long[Long[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    add_special_tokens: bool = True

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or more."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else prompt


class ChatBody(Options):
    """Of /v1/chat/completions. Extensions, as in vLLM: chat_template_kwargs, continue_final_message, add_generation_prompt."""

    messages: Long[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Json | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise Unsupported("top_logprobs", "needs logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise Unsupported("add_generation_prompt", "and continue_final_message exclude each other: leave one of them out")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise Unsupported("tool_choice", "needs tools: leave it out, or send them")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise Unsupported("tool_choice", f"names the tool {self.tool_choice.function.name!r}, which is not one of {names}")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(BaseModel):
    """Of /tokenize: a text, or a chat as the model's template renders it."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Long[Message], Field(min_length=1)] | None = None
    tools: Tools | None = None
    chat_template_kwargs: Json | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _has_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeBody(BaseModel):
    """Of /detokenize."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    tokens: Long[int]
