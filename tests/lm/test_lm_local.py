"""Laws of generation: deterministic, seeded by itself alone, and what the model really says."""

import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.lm import generate
from posttrain.lm.chat import Conversation, unused
from posttrain.lm.engine import NativeEngine, TorchEngine
from posttrain.lm.local import _Answer, generate_with, prompt_ids, stop_tokens
from posttrain.lm.tokens import generate_tokens
from posttrain.models.kv import parse_kv

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level: every byte is a token, so that a character can be split between tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


class Scripted(torch.nn.Module):
    """Says the given tokens one after another, whatever it is asked."""

    device = torch.device("cpu")

    def __init__(self, model, script):
        super().__init__()
        self.config, self.generation_config = model.config, model.generation_config
        self.script = list(script)

    def forward(self, input_ids, past_key_values, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        logits[..., self.script.pop(0)] = 9.0
        return type("Output", (), {"logits": logits})


def without_cache(model, ids, count):
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids


def test_greedy_is_the_argmax_of_the_whole_text_every_time(model, tokenizer):
    ids = tokenizer("Hello")["input_ids"]
    with torch.inference_mode():
        expected = without_cache(model, ids, 20)[len(ids) :]
    stops = [i for i, token in enumerate(expected) if token in stop_tokens(model, tokenizer)]
    expected = expected[: stops[0]] if stops else expected
    said = generate(model, tokenizer, "Hello", max_new_tokens=20)
    assert said == tokenizer.decode(expected, skip_special_tokens=True)
    assert said


def test_the_seed_decides_and_the_global_generator_is_untouched(model, tokenizer):
    def sample(seed):
        return generate(model, tokenizer, "Hi", max_new_tokens=12, temperature=1.0, seed=seed)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(7) == first
    assert len({sample(seed) for seed in range(8)}) > 1


def test_prompts_side_by_side_are_answered_as_if_alone(model, tokenizer):
    prompts = [f"{i} and so on" * (i % 4 + 1) for i in range(11)]
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5}
    alone = [generate(model, tokenizer, prompt, **options) for prompt in prompts]
    assert generate(model, tokenizer, prompts, **options) == alone
    assert generate(model, tokenizer, [], **options) == []


def test_a_list_of_seeds_has_one_for_each_prompt(model, tokenizer):
    options = {"max_new_tokens": 9, "temperature": 1.0}
    alone = [generate(model, tokenizer, "Hi", seed=seed, **options) for seed in range(6)]
    assert generate(model, tokenizer, ["Hi"] * 6, seed=range(6), **options) == alone
    assert len(set(alone)) > 1
    assert generate(model, tokenizer, "Hi", seed=[4], **options) == alone[4]
    with pytest.raises(UserError, match="one for each prompt: 2, not 3"):
        generate(model, tokenizer, ["Hi", "Ho"], seed=[0, 1, 2], **options)
    with pytest.raises(UserError, match="seed must be a whole number, not 'x'"):
        generate(model, tokenizer, ["Hi", "Ho"], seed=[0, "x"], **options)
    for wrong in ({"seed": "x"}, {"temperature": -1.0}):  # also where there is nothing to draw
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be"):
            generate(model, tokenizer, [], **wrong)


def test_threads_get_what_they_would_get_alone(model, tokenizer):
    def sample(seed):
        return generate(model, tokenizer, "Hi", max_new_tokens=12, temperature=1.0, seed=seed)

    alone = [sample(seed) for seed in range(4)]
    together = [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, sample(i))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_streamed_pieces_join_to_the_answer_and_split_no_character(model, tokenizer):
    script = tokenizer("né 世界 🙂!")["input_ids"] + [tokenizer.eos_token_id]
    pieces = []
    said = generate(Scripted(model, script), tokenizer, "x", stream=pieces.append)
    assert said == "né 世界 🙂!"
    assert "".join(pieces) == said
    assert "\ufffd" not in said
    assert len(pieces) > 5


def test_a_long_answer_is_streamed_as_it_reads(model, tokenizer, monkeypatch):
    """In steps whose work does not grow with what was said, wherever they cut it."""
    text = "né 世界 🙂! " * 40
    script = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    decoded = []
    decode = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer),
        "decode",
        lambda self, ids, **o: decoded.append(len(ids)) or decode(self, ids, **o),
    )
    for settled in (1, 7, 64):
        monkeypatch.setattr("posttrain.lm.local.SETTLED", settled)
        decoded.clear()
        pieces = []
        said = generate(
            Scripted(model, script), tokenizer, "x", max_new_tokens=2000, stream=pieces.append
        )
        assert said == "".join(pieces) == text
        assert max(decoded) <= settled + 8 + 4


def test_an_answer_cut_inside_a_character_still_ends(model, tokenizer):
    script = tokenizer("ab世")["input_ids"]
    pieces = []
    said = generate(Scripted(model, script), tokenizer, "x", max_new_tokens=3, stream=pieces.append)
    assert said == "".join(pieces) == "ab\ufffd"


def test_a_text_goes_on_with_the_space_that_belongs_there():
    """Decoders of SentencePiece's kind drop the space that a text begins with."""
    vocab = {"\u2581Hello": 0, "\u2581world": 1, "ly": 2, "\u2581": 3, "!": 4, "<s>": 5}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="!"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    for before, said in (
        ([0], " world"),
        ([0] * 50, " world"),
        ([], "world"),
        ([5], "world"),
        ([5, 0], " world"),
    ):
        answer = _Answer(tokenizer, before)
        answer.tokens.append(1)
        assert answer.text() == said
        answer.tokens.append(2)
        pieces = []
        answer.emit(pieces.append, last=True)
        assert pieces == [said + "ly"]


def test_ids_are_continued_as_transformers_would(model):
    """Padding without a mask; ends of text in every form; what a batch is filled up with."""
    ids = torch.tensor([[7, 7, 65, 70, 80], [66, 67, 68, 69, 71]])
    first = model.generate(
        ids[1:], max_new_tokens=3, do_sample=False, pad_token_id=7, eos_token_id=0
    )
    options = [
        {"pad_token_id": 7, "eos_token_id": 0},
        {"pad_token_id": 7, "eos_token_id": 7},
        {"eos_token_id": [int(first[0, 6]), 2]},
        {"eos_token_id": torch.tensor([int(first[0, 6]), 2])},
    ]
    for more in options:
        more = {"max_new_tokens": 9, "do_sample": False} | more
        ours, theirs = generate_tokens(model, ids, dict(more)), model.generate(ids, **more)
        assert torch.equal(ours, theirs), more


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens_are_refused_as_transformers_does(model, count):
    with pytest.raises(ValueError):
        generate_tokens(model, torch.tensor([[65]]), {"max_new_tokens": count})


@pytest.mark.parametrize("stop", ["<|endoftext|>", "<|im_end|>"])
def test_generation_stops_at_every_kind_of_end(model, tokenizer, stop):
    script = [*tokenizer("ok")["input_ids"], tokenizer.convert_tokens_to_ids(stop), 65, 65]
    assert generate(Scripted(model, script), tokenizer, "x") == "ok"


def test_messages_go_through_the_template(tokenizer):
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10.5}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": "9"}, "max_new_tokens must be a whole number"),
        ({"prompt": "caf\udce9"}, "not UTF-8.*at character 4"),
        ({"prompt": [{"role": "user", "content": "caf\udce9"}]}, "not UTF-8"),
        ({"prompt": [[]]}, "a prompt is a string or a list of messages"),
        ({"prompt": b"x"}, "a prompt is a string or a list of messages"),
        ({"prompt": {"role": "user"}}, "a prompt is a string or a list of messages"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"prompt": 7}, "a prompt is a string or a list of messages"),
        ({"prompt": ["x", 7]}, "a prompt is a string or a list of messages"),
        ({"prompt": ["x", "y"], "stream": print}, "stream needs one prompt"),
        ({"prompt": [{"role": "nobody", "content": "x"}]}, "template refuses.*who"),
    ],
)
def test_what_cannot_be_done_is_refused(model, tokenizer, arguments, message):
    arguments = {"prompt": "x"} | arguments
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, **arguments)


def test_messages_without_a_template_are_refused(model, tokenizer):
    base = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        generate(model, base, [{"role": "user", "content": "x"}])


def test_a_model_without_a_cache_to_round_is_refused(model):
    with pytest.raises(UserError, match="a Scripted keeps no keys and values"):
        runner = TorchEngine(Scripted(model, [1, 2]), kv=parse_kv("int8"))
        runner.forward([(runner.session(), [3])])


def test_generate_keeps_the_cache_as_asked(model, tokenizer):
    """A format so coarse that the answer changes; one so fine that it does not."""
    plain = generate(model, tokenizer, "Hello", max_new_tokens=20)
    assert generate(model, tokenizer, "Hello", max_new_tokens=20, kv="fp32") == plain
    assert generate(model, tokenizer, "Hello", max_new_tokens=20, kv="int2 | fp16/row") != plain
    with pytest.raises(UserError, match="(?s)kv: .*choose int8, fp8"):
        generate(model, tokenizer, "Hello", kv="int9")


@pytest.fixture
def fed(monkeypatch):
    """How many tokens went into the native decoder."""
    counts = []
    step = NativeEngine.step
    monkeypatch.setattr(
        NativeEngine,
        "step",
        lambda self, feeds, *rest: (
            counts.append(sum(len(ids) for _, ids in feeds)) or step(self, feeds, *rest)
        ),
    )
    return counts


@pytest.fixture
def talker(model, tokenizer):
    model.tokenizer = tokenizer
    return model


@pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
@pytest.mark.parametrize("kv", [None, "int8", "fp32"])
def test_a_conversation_computes_nothing_twice_and_says_what_it_would_anew(talker, kv, fed):
    talk = Conversation(talker, system="Be brief. " * 20, kv=kv)
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    texts = ["one " * 30, "two", "three " * 200, "two"]
    for turn, text in enumerate(texts):
        fed.clear()
        answer = talk.say(text, **options)
        total = len(prompt_ids(talker.tokenizer, talk.messages[:-1]))
        again = Conversation(talker, kv=kv)
        again.messages = talk.messages[:-2]
        mine, _ = sum(fed), fed.clear()
        assert again.say(text, **options) == answer
        assert sum(fed) >= total
        if turn and "\ufffd" not in answer:  # its tokens may come otherwise from the text
            assert mine <= len(prompt_ids(talker.tokenizer, text)) + 12 + 40 < total
    talk.reset()
    fed.clear()
    assert talk.say("one", **options) == Conversation(talker, system="Be brief. " * 20, kv=kv).say(
        "one", **options
    )


def test_an_interrupted_answer_leaves_a_conversation_as_it_was(talker):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    expected = [Conversation(talker).say("one", **options)]
    talk = Conversation(talker)
    talk.say("one", **options)
    expected.append(talk.say("two", **options))
    talk = Conversation(talker)

    def interrupt(piece):
        raise KeyboardInterrupt

    for text, answer in zip(("one", "two"), expected, strict=True):
        with pytest.raises(KeyboardInterrupt):
            talk.say(text, stream=interrupt, **options)
        assert talk.say(text, **options) == answer


def test_an_empty_system_message_is_one(talker):
    assert Conversation(talker, system="").messages == [{"role": "system", "content": ""}]
    assert Conversation(talker).messages == []


def test_options_that_change_nothing_are_named():
    nothing = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert unused(**nothing) == unused(**nothing | {"temperature": 0.5, "top_k": 3}) == []
    for name, value in (("top_k", 3), ("top_p", 0.5), ("min_p", 0.1)):
        (note,) = unused(**nothing | {name: value, "seed": 1})
        assert note.startswith(f"{name} without a temperature")


def test_no_prompts_have_no_answers(talker):
    assert generate_with(talker, []) == []
    with pytest.raises(UserError, match="a prompt is a string"):
        generate_with(talker, {"role": "user", "content": "x"})


def test_texts_longer_than_the_model_was_made_for_are_named_or_refused(talker, tokenizer):
    talk = Conversation(talker)
    talk.say("x" * 30, max_new_tokens=2)
    assert talk.facts()["notes"] == []
    most, talker.config.max_position_embeddings = talker.config.max_position_embeddings, 20
    try:
        (note,) = talk.facts()["notes"]
    finally:
        talker.config.max_position_embeddings = most
    assert note.startswith("conversation: ") and "more than the 20" in note
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16)
    gpt2 = GPT2LMHeadModel(config).eval()
    assert isinstance(generate(gpt2, tokenizer, "x", max_new_tokens=15), str)
    with pytest.raises(
        UserError, match="max_new_tokens: 17 tokens, and this model has 16 positions"
    ):
        generate(gpt2, tokenizer, "x", max_new_tokens=16)
