"""An engine whose texts are given, for tests of what surrounds it, and a tokenizer that knows every byte."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.request import Event, Logprob, Request
from dsla_hf.serving.engine.scheduler import QueueFull

CHAT = (
    "{% if tools %}tools {{ tools | tojson }}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}{{ ' ' + m.name if m.name }}: {{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} {{ call.function.arguments.items() | list }}</tool_call>{% endfor %}"
    "{{ '' if continue_final_message and loop.last else '\\n' }}{% endfor %}{{ mood }}{% if add_generation_prompt %}assistant: {% endif %}"
)


def every_byte_tokenizer(special=(), template=CHAT):
    """Every token is a byte; `special` tokens come last."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


class Scripted(Engine):
    """Says `script`, or `script(text of the prompt)`, and ends the text, as far as the request's constraint allows: where that forbids a
    token, the end comes if it may, else the first allowed token. A token's log-probability is -0.25, those of others in its place are
    -1, -2, ...

    Attributes:
        asked: the requests so far, with what they had besides: (request, constraint, level).
    """

    def __init__(self, tokenizer, **options):
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
        }
        config = LlamaConfig(**sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        super().__init__(LlamaForCausalLM(config).eval(), options=EngineOptions(**{"slots": 2, "max_tokens": 1000, **options}))
        self.tokenizer, self.script, self.asked = tokenizer, "", []

    def submit(self, prompt, max_tokens, listener, sampling=None, constraint=None, level=None, stop_strings=False):
        self.check(prompt, max_tokens)
        if level not in (None, 0):
            raise ValueError(f"level must be 0, got {level}")
        if len(self.asked) >= 100:
            raise QueueFull("full")
        request = Request(list(prompt), max_tokens, sampling, listener, self.clock())
        request.levels.append((len(prompt), 0))
        self.asked.append((request, constraint, level))
        for event in self._events(request, constraint):
            listener(event)
        return request

    def _events(self, request, constraint):
        sampling, eos = request.sampling, self.tokenizer.eos_token_id
        script = self.script if isinstance(self.script, str) else self.script(self.tokenizer.decode(request.prompt))
        tokens = iter(self.tokenizer(script)["input_ids"])
        before = None
        if sampling.prompt_logprobs is not None:
            before = tuple(self._logprob(token, sampling.prompt_logprobs) for token in request.prompt[1:])
        request.first_token = request.last_token = self.clock()
        while len(request.tokens) < request.max_tokens:
            token = next(tokens, eos)
            if constraint is not None:
                mask = constraint.mask()
                allowed = [token for token in range(self.vocab_size) if int(mask[token // 32]) >> token % 32 & 1]
                token = token if token in allowed else eos if eos in allowed else allowed[0]
                constraint.accept(token)
            if token == eos and not sampling.ignore_eos:
                yield Event(finish="stop", prompt_logprobs=before)
                return
            request.tokens.append(token)
            logprob = None if sampling.logprobs is None else self._logprob(token, sampling.logprobs)
            yield Event(token, logprob=logprob, prompt_logprobs=before)
            before = None
        yield Event(finish="length")

    def _logprob(self, token, count):
        others = [other for other in range(10, 40) if other != token]
        top = [(token, -0.25), *((other, -1.0 - number) for number, other in enumerate(others))]
        return Logprob(token, -0.25, tuple(top[:count]))
