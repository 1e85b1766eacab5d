"""How long it takes to start: imports beside the peers', and `posttrain chat` to its first token.

    python benchmarks/bench_startup.py

Writes results/startup.json: medians of interleaved fresh processes, warm file cache. The peers are
whatever of them is installed. `chat` is timed from the start of the process to the first byte of
its answer, with the demo quantized by three recipes (to nearest: the solver changes no time); so is
transformers' own generate, with the demo as it is. Then one process: a long question, a short one after
it, and the same short one where nothing of the conversation is held.
"""

import importlib.util
import statistics
import subprocess
import sys
import time

from bench_recipes import WORK
from common import run_json, write_result

import posttrain
from posttrain.data import load_text
from posttrain.lm.chat import Conversation
from posttrain.lm.local import prompt_ids

ROUNDS = 15
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import posttrain": ["-c", "import posttrain"],
    "posttrain --help": ["-m", "posttrain", "--help"],
    "import torch": ["-c", "import torch"],
    "import transformers": ["-c", "import transformers"],
    "import compressed_tensors": ["-c", "import compressed_tensors"],
    "import llmcompressor": ["-c", "import llmcompressor"],
    "import torchao": ["-c", "import torchao"],
}


RECIPES = ("w8a8", "w6a8", "w4a8")
PROMPT = "Why is the sky blue?"
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

path, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
messages = [{"role": "user", "content": prompt}]
ids = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :]), flush=True)
"""


def main() -> None:
    commands = {
        name: words
        for name, words in COMMANDS.items()
        if not name.startswith("import ") or importlib.util.find_spec(name.split()[1])
    } | first_tokens()
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS + 1):  # the first round warms the file cache and is not counted
        for name, words in commands.items():
            seconds[name].append(until_output(words))
    rows = [
        {
            "command": name,
            "median_seconds": statistics.median(times[1:]),
            "fastest": min(times[1:]),
            "slowest": max(times[1:]),
        }
        for name, times in seconds.items()
    ]
    write_result("startup", {"rounds": ROUNDS, "rows": rows, "conversation": conversation()})


def conversation() -> list[dict[str, float | str | int]]:
    """Seconds to the first token of answers, the document of the first question being 6,000 characters."""
    talk = Conversation(WORK / f"startup-{RECIPES[0]}")
    anew = Conversation(WORK / f"startup-{RECIPES[0]}")
    document = "".join(load_text().render(talk.model.tokenizer, False))[:6000]
    names = ("a long question", "a short one after it", "the short one, nothing held")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS + 1):
        talk.reset()
        seconds[names[0]].append(first_token(talk, f"{document}\n\nWhat is this about?"))
        history = list(talk.messages)
        seconds[names[1]].append(first_token(talk, PROMPT))
        anew.reset()
        anew.messages = history
        seconds[names[2]].append(first_token(anew, PROMPT))
    ids = [prompt_ids(talk.model.tokenizer, talk.messages[:end]) for end in (1, 3)]
    tokens = dict(zip(names, (len(ids[0]), len(ids[1]), len(ids[1])), strict=True))
    return [
        {
            "what": name,
            "tokens": tokens[name],
            "median_seconds": statistics.median(times[1:]),
            "fastest": min(times[1:]),
            "slowest": max(times[1:]),
        }
        for name, times in seconds.items()
    ]


def first_token(talk: Conversation, question: str) -> float:
    times: list[float] = []
    started = time.perf_counter()
    talk.say(question, max_new_tokens=8, stream=lambda _: times.append(time.perf_counter()))
    return times[0] - started


def first_tokens() -> dict[str, list[str]]:
    """Commands that print the first token of an answer, after making the models they need."""
    WORK.mkdir(parents=True, exist_ok=True)
    commands = {}
    for recipe in RECIPES:
        out = str(WORK / f"startup-{recipe}")
        how = ("--solver", "rtn", "--transform", "none", "--overwrite")
        run_json("quantize", "demo", "--recipe", recipe, "-o", out, *how)
        words = ["-m", "posttrain", "chat", out, "--prompt", PROMPT, "--max-new-tokens", "1"]
        commands[f"posttrain chat, {recipe}, to the first token"] = words
    plain = WORK / "startup-plain"
    model = posttrain.load("demo")
    model.save_pretrained(plain)
    model.tokenizer.save_pretrained(plain)
    whole = ["-c", TRANSFORMERS, str(plain), PROMPT]
    return commands | {"transformers, unquantized, to the first token": whole}


def until_output(words: list[str]) -> float:
    """Seconds from the start of a Python process to its first byte of output, or its end."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{words} ended with status {process.returncode}: {said.decode()[-500:]}")
    return seconds


if __name__ == "__main__":
    main()
