"""What the OpenAI-compatible routes take."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Options of OpenAI's interface that would change the answer and are not there; these values of them change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
}
StopString = Annotated[str, Field(min_length=1, max_length=200)]


class Unsupported(ValueError):
    """An option that is not there; `param` names it."""

    def __init__(self, param: str):
        super().__init__(f"{param} is not supported: leave it out")
        self.param = param


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class _Options(BaseModel):
    """What both routes take. `ignore_eos` is an extension: go on to `max_tokens` whatever comes, as load tests want."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_there(cls, values: Any) -> Any:
        for name, neutral in UNSUPPORTED.items() if isinstance(values, dict) else ():
            if values.get(name) is not None and values[name] not in neutral:
                raise Unsupported(name)
        return values

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(_Options):
    """Of /v1/completions: one prompt, as text or token ids."""

    prompt: str | list[int]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: str = Field(pattern="^text$")
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Options):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class TokenizeBody(BaseModel):
    """Of /tokenize: a text, or a chat as the model's template renders it."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
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
    tokens: list[int]
