"""The engines that are compared, each behind the same runs.

`prefill` feeds N tokens to an empty sequence and wants the logits after the last; `begin` prepares a
sequence that holds N tokens, or none; `decode` draws N tokens greedily, one by one, after a first that
continues it; `score` wants the loss of all tokens of a window of N.
Tokens are arbitrary but the same for all: no engine's speed depends on them.
"""

import ctypes
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from posttrain import kernels
from posttrain.bench.ctranslate2_peer import FACTS
from posttrain.bench.gguf_peer import silence
from posttrain.bench.peers import import_peer
from posttrain.errors import UserError
from posttrain.models.kv import describe_kv

ROWS = 64  # logits are looked at in parts of so many positions
EXPERTS = (
    "a token meets only some of this model's experts, so how much of the machine's limits is used "
    "is not known"
)


def token_ids(count: int, vocabulary: int) -> list[int]:
    """The same arbitrary tokens for everybody."""
    return [(i * 7919 + 101) % (vocabulary - 1) + 1 for i in range(count)]


class Contender(ABC):
    """Base: timing and memory. `cache` is how keys and values are kept, where there is a choice; ""
    is what the model says. `longest`: tokens of the longest run."""

    vocabulary: int

    def __init__(self, source: str, threads: int, cache: str, longest: int = 4096) -> None:
        torch.set_num_threads(threads)
        self.longest = longest
        self.prepare(source)
        self._imports = psutil.Process().memory_info().rss
        self.load(source, threads, cache)

    def prepare(self, source: str) -> None:
        """Import what loading imports, which is no memory of the model's."""
        from posttrain.models.source import open_source
        from posttrain.models.walk import skeleton

        skeleton(open_source(source).config)

    @abstractmethod
    def load(self, source: str, threads: int, cache: str) -> None:
        """Load the model."""

    @abstractmethod
    def prefill(self, tokens: list[int]) -> None:
        """Logits after the last of these tokens."""

    @abstractmethod
    def begin(self, context: list[int], room: int) -> None:
        """Begin a sequence with these tokens, or none, and room for so many more."""

    @abstractmethod
    def decode(self, count: int) -> None:
        """Feed a first token to what was begun and draw so many, one by one."""

    def score(self, tokens: list[int]) -> None:
        raise UserError("it does not score")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """`kernel`, `weight_bytes`, `bits_per_weight` and what else is known."""

    def run(self, what: str, count: int, *room: int) -> float:
        """Seconds of "prefill", "begin" (with `room`), "decode" or "score" with `count` tokens."""
        if what not in ("prefill", "begin", "decode", "score"):
            raise UserError(f"unknown run {what!r}: choose prefill, begin, decode or score")
        given = count if what == "decode" else token_ids(count, self.vocabulary)
        begun = time.perf_counter()
        getattr(self, what)(given, *room)
        return time.perf_counter() - begun

    def facts(self) -> dict[str, Any]:
        rss = psutil.Process().memory_info().rss
        return self.describe() | {"rss_bytes": rss, "rss_above_imports_bytes": rss - self._imports}


class Posttrain(Contender):
    """Our engine, as `generate` uses it: with weights in the dtype of the checkpoint."""

    def load(self, source: str, threads: int, cache: str) -> None:
        from posttrain.lm import engine, load

        if kernels.available():
            kernels.set_threads(threads)
        self.source = source
        self.model = load(source, dtype="auto")
        self.engine = engine(self.model, cache or None)
        self.vocabulary = self.model.config.get_text_config().vocab_size

    def prefill(self, tokens: list[int]) -> None:
        self.engine.forward([(self.engine.session(len(tokens)), tokens)])

    def begin(self, context: list[int], room: int) -> None:
        self.session = self.engine.session(len(context) + room)
        if context:
            self.engine.forward([(self.session, context)])

    def decode(self, count: int) -> None:
        text, greedy = [1], kernels.Sampling()
        for _ in range(count):
            text += self.engine.step([(self.session, text[-1:])], [greedy], [text])

    def score(self, tokens: list[int]) -> None:
        """As `evaluate` does. Of a 16-bit checkpoint that loads weights as float32 first, which here
        would be a second copy of the model: those left in 16 bits are multiplied as they lie."""
        self.engine.window_losses(torch.tensor([tokens]), len(tokens), ROWS)

    def describe(self) -> dict[str, Any]:
        found, kept = self.model.posttrain, self.engine.keeps()
        decoder = getattr(self.engine, "decoder", None)
        if decoder:
            weights, per_token = decoder.nbytes, decoder.bytes_per_token
        else:
            weights, per_token = _torch_bytes(self.model, self.source)
        mixed = _mixes_experts(self.model)
        return {
            "kernel": self.engine.name,
            "cache": str(kept),
            "kv_bytes_per_token": describe_kv(kept, self.model.config)["kv_bytes_per_token"],
            "bits_per_weight": found["bits_per_weight"],
            "stored_bytes": found["bytes"],
            "weight_bytes": weights,
            "bytes_per_token": None if mixed else per_token,
            "linear_weights": None if mixed else _linear_weights(self.model),
            "notes": [EXPERTS] if mixed else [],
        }


class Transformers(Contender):
    """transformers' own forward in float32 with its cache, of the model as it was before it was
    quantized."""

    def prepare(self, source: str) -> None:
        import_peer("transformers")
        super().prepare(source)

    def load(self, source: str, threads: int, cache: str) -> None:
        from posttrain.lm.engine import TorchEngine
        from posttrain.models.load import load

        self.model = load(source, dtype="float32", resident="dequantized")
        self.engine = TorchEngine(self.model, kernels=False)
        self.vocabulary = self.model.config.get_text_config().vocab_size

    def prefill(self, tokens: list[int]) -> None:
        self.engine.forward([(self.engine.session(), tokens)])

    def begin(self, context: list[int], room: int) -> None:
        self.session = self.engine.session()
        if context:
            self.engine.forward([(self.session, context)])

    def decode(self, count: int) -> None:
        token = 1
        for _ in range(count):
            token = int(self.engine.forward([(self.session, [token])])[0].argmax())

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> None:
        from posttrain.lm.engine import losses_of

        window = torch.tensor([tokens])
        logits = self.model(input_ids=window, use_cache=False).logits[0, :-1]
        losses_of(iter(logits.split(ROWS)), window, len(tokens), ROWS)

    def describe(self) -> dict[str, Any]:
        from posttrain.models.load import count_parameters

        weights = count_parameters(self.model)
        return {"kernel": "torch float32", "bits_per_weight": 32.0, "weight_bytes": 4 * weights}


class LlamaCpp(Contender):
    """llama.cpp through llama-cpp-python, on a GGUF file; its cache is its default, fp16."""

    def prepare(self, source: str) -> None:
        import_peer("llama.cpp")

    def load(self, source: str, threads: int, cache: str) -> None:
        from llama_cpp import llama_cpp

        self.c: Any = llama_cpp
        silence()
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(source.encode(), model)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {source}")
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch = self.longest, 512, 512
        how.n_threads = how.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            raise UserError(f"llama.cpp has no memory for {self.longest} tokens of {source}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.bytes = os.path.getsize(source)

    def _feed(self, tokens: list[int]) -> None:
        array = (self.c.llama_token * len(tokens))(*tokens)  # the batch only points to it
        batch = self.c.llama_batch_get_one(array, len(tokens))
        if self.c.llama_decode(self.context, batch):
            raise UserError("llama.cpp refused a batch")

    def _forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def prefill(self, tokens: list[int]) -> None:
        self._forget()
        for start in range(0, len(tokens), 512):
            self._feed(tokens[start : start + 512])

    def begin(self, context: list[int], room: int) -> None:
        self.prefill(context)

    def decode(self, count: int) -> None:
        token = 1
        for _ in range(count):
            self._feed([token])
            logits = self.c.llama_get_logits_ith(self.context, -1)
            row = torch.frombuffer(
                (ctypes.c_float * self.vocabulary).from_address(ctypes.addressof(logits.contents)),
                dtype=torch.float32,
            )
            token = int(row.argmax())

    def describe(self) -> dict[str, Any]:
        weights = int(self.c.llama_model_n_params(self.model))
        return {
            "kernel": _llama_features(self.c.llama_print_system_info().decode()),
            "bits_per_weight": 8 * self.bytes / weights,
            "weight_bytes": self.bytes,
        }


class CTranslate2(Contender):
    """CTranslate2 in INT8: weights per row, activations per token, float32 between products."""

    def prepare(self, source: str) -> None:
        import_peer("ctranslate2")

    def load(self, source: str, threads: int, cache: str) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            source, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        self.source = Path(source)
        self.words = json.loads((self.source / "vocabulary.json").read_text(encoding="utf-8"))
        self.vocabulary = len(self.words)

    def _generate(self, tokens: list[int], count: int, context: Sequence[int] = ()) -> list[int]:
        """So many tokens, drawn greedily; it has no way to stop after the prompt's logits. The state
        after a context is kept, and taken when the same one comes again."""
        (result,) = self.generator.generate_batch(
            [[self.words[token] for token in tokens]],
            static_prompt=[self.words[token] for token in context] or None,
            min_length=count,
            max_length=count,
            include_prompt_in_result=False,
        )
        drawn: list[int] = result.sequences_ids[0]
        if len(drawn) != count:
            raise UserError(f"CTranslate2 drew {len(drawn)} tokens, not {count}")
        return drawn

    def prefill(self, tokens: list[int]) -> None:
        self._generate(tokens, 1)

    def begin(self, context: list[int], room: int) -> None:
        self.context = context
        if context:
            self._generate([1], 1, context)

    def decode(self, count: int) -> None:
        self._generate([1], count, self.context)

    def score(self, tokens: list[int]) -> None:
        self.generator.score_batch([[self.words[token] for token in tokens]])

    def describe(self) -> dict[str, Any]:
        import ctranslate2

        facts = json.loads((self.source / FACTS).read_text(encoding="utf-8"))
        size = os.path.getsize(self.source / "model.bin")
        return {
            "kernel": f"CTranslate2 {ctranslate2.__version__} {self.generator.compute_type}",
            "bits_per_weight": 8 * size / facts["parameters"],
            "weight_bytes": size,
        }


def contender_named(name: str) -> type[Contender]:
    return {
        "posttrain": Posttrain,
        "transformers": Transformers,
        "llama.cpp": LlamaCpp,
        "ctranslate2": CTranslate2,
    }[name]


def _llama_features(info: str) -> str:
    """What llama.cpp was built with, from "CPU : AVX2 = 1 | AVX512 = 1 | ..."."""
    switched = [part.split("=") for part in info.split(":")[-1].split("|") if "=" in part]
    return "llama.cpp " + " ".join(name.strip() for name, on in switched if on.strip() == "1")


def _linear_weights(model: Any) -> int:
    """Weights of the linear layers inside the blocks: what every token of a prefill meets."""
    from posttrain.models.walk import decoder_blocks, quantizable

    found = [quantizable(name, block) for name, block in decoder_blocks(model)]
    return sum(math.prod(target.shape) for targets in found for target in targets.values())


def _mixes_experts(model: Any) -> bool:
    """Whether there are weights that only some tokens meet."""
    from posttrain.models.experts import records
    from posttrain.models.walk import decoder_blocks, quantizable

    for name, block in decoder_blocks(model):
        targets = quantizable(name, block)
        if any(target.kind == "experts" or ".experts." in full for full, target in targets.items()):
            return True
        if any(records(module) for module in block.modules()):
            return True
    return False


def _torch_bytes(model: Any, source: str) -> tuple[int, int]:
    """Bytes of the weights that PyTorch computes with, and of those that a token meets: all but an
    embedding that is not the head too."""
    from posttrain.models.source import open_source
    from posttrain.models.walk import tied_head

    weights = open_source(source)  # quantized ones stay packed; those of GGUF are expanded
    total = sum(weights.nbytes(name) for name in weights.tensor_names())
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding) + ".weight"
    if tied_head(model) is not None or name not in weights.tensor_names():
        return total, total
    return total, total - weights.nbytes(name)
